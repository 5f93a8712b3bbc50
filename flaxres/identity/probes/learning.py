"""Backward: gradients by depth, and how far layers have moved since their start."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity import layout
from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet


def gradients(
    model: ResNet,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Gradient of the mean cross-entropy by depth (He 2015, §4.1; Glorot & Bengio 2010).

    parameters `[blocks]`: norm of the gradient of each block's branch, nats;
    relative `[blocks]`: the same over the norm of the branch's parameters;
    stem, head `[]`: norms of the gradients there.
    """

    def loss(params: Any) -> jax.Array:
        return common.loss(model, {**variables, "params": params}, images, labels, train)

    grads = jax.grad(loss)(variables["params"])
    blocks = [part["branch"] for part in _blocks(model, grads)]
    weights = [part["branch"] for part in _blocks(model, variables["params"])]
    sizes = jnp.stack([norm(part) for part in blocks])
    return {
        "parameters": sizes,
        "relative": sizes / jnp.stack([norm(part) for part in weights]),
        "stem": norm(grads["stem"]),
        "head": norm(grads["head"]),
    }


def movement(model: ResNet, start: Any, now: Any) -> dict[str, jax.Array]:
    """How far kernels have moved since their start, ‖w − w₀‖ / ‖w₀‖, without unit.

    start, now: variables of one model. Gives `[blocks]` for the convolutions of each branch, and
    stem, head `[]`. Where early layers stop learning, the first numbers stay behind the last. A
    kernel that started at zero counts by the size it has now (over 1).
    """
    before, after = start["params"], now["params"]

    def moved(a: Any, b: Any) -> jax.Array:
        kernels_a, kernels_b = _kernels(a), _kernels(b)
        size = norm(kernels_a)
        change = norm(jax.tree.map(jnp.subtract, kernels_b, kernels_a))
        return change / jnp.where(size > 0, size, 1.0)

    pairs = zip(_blocks(model, before), _blocks(model, after), strict=True)
    return {
        "blocks": jnp.stack([moved(a["branch"], b["branch"]) for a, b in pairs]),
        "stem": moved(before["stem"], after["stem"]),
        "head": moved(before["head"], after["head"]),
    }


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return jnp.sqrt(
        sum(
            (jnp.sum(jnp.square(jnp.asarray(leaf, jnp.float32))) for leaf in jax.tree.leaves(tree)),
            start=jnp.float32(0),
        )
    )


def _blocks(model: ResNet, params: Any) -> list[Any]:
    per_block = layout.unstack_tree(params)
    return [
        per_block[f"stage{stage}"][f"block{block}"]
        for stage, size in enumerate(model.stage_sizes, 1)
        for block in range(1, size + 1)
    ]


def _kernels(tree: Any) -> list[jax.Array]:
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(path[-1], "key", "") == "kernel"
    ]
