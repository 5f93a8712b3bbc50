"""Augmentation as pure functions on the device, inside the training step.

Every example has a key of its own, derived from its place in the global batch, so that what is
drawn does not depend on how the batch is spread over devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

POLICIES = ("none", "crop", "flip", "crop_flip")
_DEFAULTS = {"digits": "crop", "mnist": "crop", "imagenet2012": "flip"}


def default_policy(name: str) -> str:
    """What suits a data set: crops without flips for digits, flips for cropped photographs."""
    return _DEFAULTS.get(name, "crop_flip")


def check_policy(policy: str) -> str:
    """The policy itself, or ValueError with the accepted ones."""
    if policy not in POLICIES:
        raise ValueError(f"unknown augmentation {policy!r} (accepted: {', '.join(POLICIES)})")
    return policy


def example_keys(key: jax.Array, batch: int, offset: jax.Array | int = 0) -> jax.Array:
    """Keys `[batch]` for examples offset … offset + batch - 1 of the global batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(offset + jnp.arange(batch))


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """(pixels / 255 - mean) / std a channel; uint8 `[batch, h, w, c]` to `dtype`."""
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * scale - shift).astype(dtype)


def random_crop(images: jax.Array, keys: jax.Array, padding: int | None = None) -> jax.Array:
    """A random window of each image after padding with zeros (He 2015, §4.2).

    images: `[batch, h, w, c]`; keys: `[batch]`; padding: pixels a side, default an eighth of h.
    """
    _, height, width, _ = images.shape
    pad = max(1, height // 8) if padding is None else padding
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * pad + 1))(keys)

    def window(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    return jax.vmap(window)(padded, corners)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2."""
    flips = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def apply(images: jax.Array, keys: jax.Array, policy: str) -> jax.Array:
    """Augment raw pixels `[batch, h, w, c]` by a policy's name; keys: `[batch]`."""
    check_policy(policy)
    if policy in ("crop", "crop_flip"):
        images = random_crop(images, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    if policy in ("flip", "crop_flip"):
        images = random_flip(images, jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys))
    return images


def train(
    images: jax.Array,
    keys: jax.Array,
    policy: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Augment and normalise: uint8 `[batch, h, w, c]` to `dtype`."""
    return normalize(apply(images, keys, policy), mean, std, dtype)


def swap_neighbours(batch: jax.Array) -> jax.Array:
    """Rows 1, 0, 3, 2, … of a batch of even size."""
    return batch.reshape(-1, 2, *batch.shape[1:])[:, ::-1].reshape(batch.shape)


def mixup(
    images: jax.Array, targets: jax.Array, key: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """λ x + (1-λ) x', λ ~ Beta(α, α), x' the neighbour of x (Zhang 2017, arXiv 1710.09412).

    images: float `[batch, h, w, c]`; targets: soft labels `[batch, classes]`; one λ a batch.
    Neighbours (0 and 1, 2 and 3, …) rather than any permutation, so that partners lie on the same
    device however the batch is spread.
    """
    share = jax.random.beta(key, alpha, alpha).astype(jnp.float32)
    mixed = share.astype(images.dtype) * images + (1 - share).astype(
        images.dtype
    ) * swap_neighbours(images)
    return mixed, share * targets + (1 - share) * swap_neighbours(targets)


def cutmix(
    images: jax.Array, targets: jax.Array, key: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Paste a box of the neighbour; targets by area, 1 - area ~ Beta(α, α) (arXiv 1905.04899)."""
    _, height, width, _ = images.shape
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    row = jax.random.uniform(row_key) * height
    column = jax.random.uniform(column_key) * width
    rows = jnp.abs(jnp.arange(height) + 0.5 - row) < side * height / 2
    columns = jnp.abs(jnp.arange(width) + 0.5 - column) < side * width / 2
    box = rows[:, None] & columns[None, :]
    kept = 1 - jnp.mean(box.astype(jnp.float32))
    mixed = jnp.where(box[None, :, :, None], swap_neighbours(images), images)
    return mixed, kept * targets + (1 - kept) * swap_neighbours(targets)
