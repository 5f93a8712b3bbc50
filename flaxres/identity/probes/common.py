"""What probes share: what goes in and out of every block, and the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flaxres.identity import layout
from flaxres.nets.resnet import ResNet, block_runs, run_name


class Block(NamedTuple):
    """Activations around one block, each `[batch, height, width, channels]`."""

    received: jax.Array
    shortcut: jax.Array
    """What the shortcut gives; zeros in a plain net."""
    branch: jax.Array
    given: jax.Array


def apply(
    model: ResNet, variables: Any, images: jax.Array, train: bool, **keywords: Any
) -> tuple[Any, Any]:
    """Model output and updated collections, in either mode; batch statistics are not kept."""
    rngs = {"dropout": jax.random.key(0)} if train and model.stochastic_depth else None
    return model.apply(variables, images, train=train, rngs=rngs, **keywords)


def trace(
    model: ResNet, variables: Any, images: jax.Array, train: bool = False
) -> tuple[jax.Array, list[Block], jax.Array]:
    """(stem output, every block's activations, logits), in either layout.

    Reduce what you need of it under the same jit: XLA then frees each activation early.
    """

    def wanted(module: nn.Module, method: str) -> bool:
        name = module.name or ""
        return method == "__call__" and (
            name in ("stem", "branch", "shortcut") or name.startswith("block")
        )

    logits, seen = apply(
        model,
        variables,
        images,
        train,
        capture_intermediates=wanted,
        mutable=["intermediates", "batch_stats"],
    )
    captured = seen["intermediates"]
    stem = captured["stem"]["__call__"][0]
    blocks, received = [], stem
    for stage in range(1, len(model.stage_sizes) + 1):
        for first, last in block_runs(model, stage):
            part = captured[f"stage{stage}"][run_name(first, last)]
            for place in range(last - first + 1):

                def take(entry: Any, place: int = place, alone: bool = first == last) -> jax.Array:
                    return entry["__call__"][0] if alone else entry["__call__"][0][place]

                branch, given = take(part["branch"]), take(part)
                zeros = jnp.zeros_like(branch)
                shortcut = take(part["shortcut"]) if "shortcut" in part else zeros
                blocks.append(Block(received, shortcut, branch, given))
                received = given
    return stem, blocks, logits


def norms(x: jax.Array) -> jax.Array:
    """Euclidean norm of each example, `[batch]`, float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32).reshape(x.shape[0], -1)), axis=1))


def loss(
    model: ResNet,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    train: bool = False,
) -> jax.Array:
    """Mean cross-entropy of a batch, nats."""
    logits, _ = apply(model, variables, images, train, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def per_block(model: ResNet, tree: Any) -> tuple[ResNet, Any]:
    """Model and tree in the per-block layout."""
    return model.clone(scan=False), layout.unstack_tree(tree)
