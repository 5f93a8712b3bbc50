"""Losses and targets, in float32."""

import jax
import jax.numpy as jnp
import optax


def targets(labels: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """Soft labels `[batch, classes]`: (1 - ε) one-hot + ε / classes (Szegedy 2015, 1512.00567)."""
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def cross_entropy(logits: jax.Array, soft: jax.Array, kind: str = "softmax") -> jax.Array:
    """Loss of each example, `[batch]`, for logits and soft labels `[batch, classes]`.

    "bce" is one binary cross-entropy a class, summed over classes and divided by their number, as
    Wightman 2021 (arXiv 2110.00476) uses it with mixed images.
    """
    logits = logits.astype(jnp.float32)
    if kind == "bce":
        return optax.sigmoid_binary_cross_entropy(logits, soft).mean(-1)
    return optax.softmax_cross_entropy(logits, soft)


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's, else 0; `[batch]` float32."""
    return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
