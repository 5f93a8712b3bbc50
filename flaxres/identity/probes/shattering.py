"""Shattered gradients: how alike the gradients at neighbouring inputs are."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet


def gradient_correlation(
    model: ResNet,
    variables: Any,
    first: jax.Array,
    last: jax.Array,
    key: jax.Array,
    points: int = 64,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Autocorrelation of the input gradient along a line between two images.

    Balduzzi 2017 (arXiv 1702.08591): in plain nets it falls off as 2^-depth towards white noise, in
    residual nets about as 1/sqrt(depth). With x(t) = (1 - t) first + t last at `points` values of
    t, f a random linear function of the logits and g(t) = ∇f(x(t)):

      autocorrelation `[points]`: of the components of g, by lag, 1 at lag 0;
      neighbours `[]`: mean cosine of g at neighbouring points;
      any `[]`: mean absolute cosine of g between all pairs.

    first, last: `[height, width, channels]`.
    """
    ts = jnp.linspace(0.0, 1.0, points)[:, None, None, None]
    images = (1 - ts) * first[None] + ts * last[None]

    def total(images: jax.Array) -> jax.Array:
        logits, _ = common.apply(model, variables, images, train, mutable=["batch_stats"])
        return jnp.sum(logits @ jax.random.normal(key, (logits.shape[-1],)))

    grads = jax.grad(total)(images).reshape(points, -1)
    centred = grads - grads.mean(0)
    lags = jnp.arange(points)

    def at(lag: jax.Array) -> jax.Array:
        inside = (lags + lag < points)[:, None]
        return jnp.sum(jnp.where(inside, centred * jnp.roll(centred, -lag, axis=0), 0.0))

    products = jax.vmap(at)(lags)
    unit = grads / jnp.maximum(jnp.linalg.norm(grads, axis=1, keepdims=True), 1e-30)
    cosines = unit @ unit.T
    pairs = points * (points - 1)
    return {
        "autocorrelation": products / products[0],
        "neighbours": jnp.mean(jnp.diagonal(cosines, 1)),
        "any": (jnp.sum(jnp.abs(cosines)) - points) / pairs,
    }
