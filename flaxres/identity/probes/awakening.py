"""Which parameters have exactly zero gradient, step by step."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet


def awakening(
    model: ResNet,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    steps: int = 3,
    lr: float = 0.1,
    train: bool = True,
) -> Any:
    """Share of entries with a gradient other than exactly 0, before each of some SGD steps.

    Returns a tree like the parameters (in their layout) of arrays `[steps]`: 0 is asleep, and a
    leaf that stays at 0 is dead. Zhang 2019 (arXiv 1901.09321): with the last layer of each branch
    at zero, only that layer moves at first, and everything is awake by the third gradient.
    """

    def loss(params: Any) -> jax.Array:
        return common.loss(model, {**variables, "params": params}, images, labels, train)

    def step(params: Any, _: None) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params)
        alive = jax.tree.map(lambda g: jnp.mean((g != 0).astype(jnp.float32)), grads)
        return jax.tree.map(lambda p, g: p - lr * g, params, grads), alive

    params = jax.tree.map(jnp.asarray, variables["params"])
    return jax.lax.scan(step, params, None, length=steps)[1]
