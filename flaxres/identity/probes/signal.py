"""Forward: how far blocks are from the identity, and how activations grow with depth."""

from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity import branches
from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet


def identity(
    model: ResNet, variables: Any, images: jax.Array, train: bool = False
) -> dict[str, jax.Array]:
    """How far each block, and the whole net, is from the identity.

    Means over examples of ratios of Euclidean norms, without unit:
      distance `[blocks]`: ‖block(x) − x‖ / ‖x‖; NaN where the block changes the shape;
      branch `[blocks]`: ‖branch(x)‖ / ‖x‖;
      ratio `[blocks]`: ‖branch(x)‖ / ‖shortcut(x)‖ (De & Smith 2020, arXiv 2002.10444); infinite
        in a plain net;
      net `[]`: ‖f(x) − f₀(x)‖ / ‖f₀(x)‖, f the pooled features, f₀ those with all branches zero;
        NaN in a plain net, whose f₀ is constant.
    """
    headless = model.clone(num_classes=0)
    params = {k: v for k, v in variables["params"].items() if k != "head"}
    trunk = {**variables, "params": params}
    _, blocks, pooled = common.trace(headless, trunk, images, train)
    distances, of_input, of_shortcut = [], [], []
    for block in blocks:
        size = common.norms(block.received)
        branch = common.norms(block.branch)
        of_input.append(_ratio(branch, size))
        of_shortcut.append(_ratio(branch, common.norms(block.shortcut)))
        if block.given.shape == block.received.shape:
            change = common.norms(block.given - block.received)
            distances.append(_ratio(change, size))
        else:
            distances.append(jnp.float32(jnp.nan))
    net = jnp.float32(jnp.nan)
    if model.residual:
        zeroed = branches.zero(headless, trunk)
        skeleton, _ = common.apply(headless, zeroed, images, train, mutable=["batch_stats"])
        net = _ratio(common.norms(pooled - skeleton), common.norms(skeleton))
    return {
        "distance": jnp.stack(distances),
        "branch": jnp.stack(of_input),
        "ratio": jnp.stack(of_shortcut),
        "net": net,
    }


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Mean over examples of part / whole; nothing of nothing, at a dead example, is 0."""
    return jnp.mean(jnp.where(part == 0, 0.0, part / whole))


def activations(
    model: ResNet, variables: Any, images: jax.Array, train: bool = False
) -> dict[str, jax.Array]:
    """Moments of the activations by depth: mean, variance, and share of exact zeros.

    Each `[blocks + 1]`, over batch, pixels and channels; the first is the stem's output.
    """
    stem, blocks, _ = common.trace(model, variables, images, train)
    outputs = [x.astype(jnp.float32) for x in (stem, *(block.given for block in blocks))]
    return {
        "mean": jnp.stack([jnp.mean(x) for x in outputs]),
        "variance": jnp.stack([jnp.var(x) for x in outputs]),
        "zeros": jnp.stack([jnp.mean(x == 0) for x in outputs]),
    }
