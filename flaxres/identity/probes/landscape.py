"""Loss along a line between two nets, and on a plane of random directions through one."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity import branches
from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet


def line(
    model: ResNet,
    a: Any,
    b: Any,
    images: jax.Array,
    labels: jax.Array,
    points: int = 21,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Loss at (1 - t) a + t b for t from 0 to 1: {"t": `[points]`, "loss": `[points]`, nats}.

    Goodfellow 2014 (arXiv 1412.6544). With train=True batch norm uses the batch's statistics, since
    running ones do not fit nets in between.
    """
    ts = jnp.linspace(0.0, 1.0, points)

    def at(t: jax.Array) -> jax.Array:
        between = branches.interpolate(model, a, b, t)
        return common.loss(model, between, images, labels, train)

    return {"t": ts, "loss": jax.lax.map(at, ts)}


def plane(
    model: ResNet,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    extent: float = 1.0,
    points: int = 15,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Loss around a net on two random directions, each filter as long as the net's own.

    Li 2018 (arXiv 1712.09913): kernels' directions are scaled filter by filter (last axis), other
    parameters keep their values, so that pictures of different nets can be compared.

    Returns {"at": `[points]` from -extent to extent, "loss": `[points, points]`, nats}.
    """
    params = jax.tree.map(jnp.asarray, variables["params"])
    first, second = (_direction(params, k) for k in jax.random.split(key))
    at = jnp.linspace(-extent, extent, points)

    def loss(place: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda p, d, e: p + place[0] * d + place[1] * e, params, first, second)
        return common.loss(model, {**variables, "params": moved}, images, labels, train)

    places = jnp.stack(jnp.meshgrid(at, at, indexing="ij"), axis=-1).reshape(-1, 2)
    return {"at": at, "loss": jax.lax.map(loss, places).reshape(points, points)}


def _direction(params: Any, key: jax.Array) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))

    def draw(path: Any, leaf: jax.Array, key: jax.Array) -> jax.Array:
        if path[-1].key != "kernel":
            return jnp.zeros_like(leaf)
        noise = jax.random.normal(key, leaf.shape, leaf.dtype)
        # A stacked kernel has its blocks on the first axis; a filter is a block's own.
        axes = tuple(range(leaf.ndim - 1))
        axes = axes[1:] if leaf.ndim == 5 else axes

        def size(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

        return noise * size(leaf) / jnp.maximum(size(noise), 1e-30)

    drawn = [draw(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    return jax.tree_util.tree_unflatten(tree, drawn)
