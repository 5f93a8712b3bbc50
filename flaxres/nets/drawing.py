"""A model's first variables, drawn on the host with nothing to compile."""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from flaxres.nets.initialize import Initializer
from flaxres.nets.resnet import STACKED_RUN


def init_variables(model: nn.Module, seed: int, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Draw a model's variables on the host, with nothing to compile.

    Every leaf comes from numpy's Philox generator keyed by sha256 of "seed/collection/path", the
    path being the per-block one; so the values depend on the seed and the name only, not on the
    backend, the number of devices or the layout (a stacked leaf is the stack of its blocks).

    Args:
      model: any linen module whose submodules keep to linen's convention that parameter `kernel`
        is started by field `kernel_init`, `scale` by `scale_init` and so on.
      seed: any integer.
      input_shape: `[batch, height, width, channels]`; its batch size does not matter.

    Returns:
      {"params": …, "batch_stats": …} of numpy arrays in the model's `param_dtype`.
    """
    initializers: dict[tuple[str, ...], Initializer] = {}

    def record(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        for field in getattr(module, "__dataclass_fields__", {}):
            if field.endswith("_init") and callable(getattr(module, field)):
                initializers[(*module.path, field[:-5])] = getattr(module, field)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes = jax.eval_shape(
            lambda x: model.init(jax.random.key(0), x),
            jax.ShapeDtypeStruct((1, *input_shape[1:]), jnp.float32),
        )
    drawn = {}
    for collection, tree in shapes.items():
        flat = traverse_util.flatten_dict(tree)
        values = {
            path: _draw_leaf(collection, path, leaf, initializers, seed)
            for path, leaf in flat.items()
        }
        drawn[collection] = traverse_util.unflatten_dict(values)
    return drawn


def _draw_leaf(
    collection: str,
    path: tuple[str, ...],
    leaf: jax.ShapeDtypeStruct,
    initializers: dict[tuple[str, ...], Initializer],
    seed: int,
) -> np.ndarray:
    if collection == "batch_stats":
        return np.full(leaf.shape, {"mean": 0.0, "var": 1.0}[path[-1]], leaf.dtype)
    # fixup's bias1a, bias1b, … are all started by `bias_init`.
    path_of_init = (*path[:-1], re.sub(r"\d+[a-z]?$", "", path[-1]))
    if path_of_init not in initializers:
        raise ValueError(
            f"no initialiser known for {'/'.join(path)}: its module has no field "
            f"'{path_of_init[-1]}_init'; use model.init"
        )
    initializer = initializers[path_of_init]
    for position, part in enumerate(path):
        if run := STACKED_RUN.fullmatch(part):
            blocks = range(int(run[1]), int(run[2]) + 1)
            paths = [(*path[:position], f"block{b}", *path[position + 1 :]) for b in blocks]
            one = leaf.shape[1:], leaf.dtype, seed
            return np.stack([_draw_one(initializer, collection, path, *one) for path in paths])
    return _draw_one(initializer, collection, path, leaf.shape, leaf.dtype, seed)


def _draw_one(
    initializer: Initializer,
    collection: str,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Any,
    seed: int,
) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{collection}/{'/'.join(path)}".encode()).digest()
    if hasattr(initializer, "draw"):
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
        return initializer.draw(generator, shape).astype(dtype)
    key = jax.random.key(int.from_bytes(digest[:4], "big"))
    return np.asarray(initializer(key, shape, dtype))
