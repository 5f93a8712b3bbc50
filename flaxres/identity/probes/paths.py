"""Which path lengths carry the gradient (Veit 2016, arXiv 1605.06431, §5)."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet

_PLACE = re.compile(r"(stage|block)(\d+)")


def path_gradients(
    model: ResNet,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    samples: int = 4,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Gradient that reaches the image through paths of each length, and its share.

    A net of n residual blocks has n-choose-k paths that pass through k branches and n - k
    shortcuts. The gradient of one path goes through the branches of a subset of k blocks and the
    shortcuts of the others; `samples` random subsets are drawn for each k.

      per_path `[n + 1]`: mean norm of the gradient at the image through one path of length k;
      share `[n + 1]`: per_path times the number of such paths, over the sum;
      length `[]`: mean path length under that share.
    """
    if not model.residual:
        raise ValueError("a plain net has one path only: its gradient has no shares by length")
    model, variables = common.per_block(model, variables)
    count = model.depth

    def gradient(mask: jax.Array) -> jax.Array:
        def loss(images: jax.Array) -> jax.Array:
            with nn.intercept_methods(_gate(model, mask)):
                return common.loss(model, variables, images, labels, train)

        return jnp.linalg.norm(jax.grad(loss)(images).reshape(-1))

    lengths = jnp.repeat(jnp.arange(count + 1), samples)
    keys = jax.random.split(key, lengths.size)

    def sample(item: Any) -> jax.Array:
        key, length = item
        order = jax.random.permutation(key, count)
        return gradient(order < length)

    norms = jax.lax.map(sample, (keys, lengths)).reshape(count + 1, samples).mean(1)
    chances = jnp.array([_log_binomial(count, k) for k in range(count + 1)])
    logs = jnp.log(jnp.maximum(norms, 1e-38)) + chances
    share = jax.nn.softmax(logs)
    return {
        "per_path": norms,
        "share": share,
        "length": jnp.sum(share * jnp.arange(count + 1)),
    }


def _gate(model: ResNet, mask: jax.Array) -> Any:
    """Let gradients pass through the branch where the mask is true, else through the shortcut."""

    def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        path = context.module.path
        if context.method_name != "__call__" or len(path) != 3:
            return out
        if path[2] not in ("branch", "shortcut"):
            return out
        stage, block = (int(_PLACE.fullmatch(part).group(2)) for part in path[:2])  # type: ignore[union-attr]
        passes = mask[sum(model.stage_sizes[: stage - 1]) + block - 1]
        passes = passes if path[2] == "branch" else ~passes
        return jnp.where(passes, out, jax.lax.stop_gradient(out))

    return intercept


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
