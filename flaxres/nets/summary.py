"""What a model is made of: shapes, parameters and multiply-adds, without computing anything."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxres.nets.conv import Conv
from flaxres.nets.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Part:
    """Stem, a stage or the head of a model, for one image."""

    name: str
    blocks: int
    output: tuple[int, ...]
    """`(height, width, channels)`, or `(classes,)`."""
    params: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The parts of a model and their totals."""

    parts: tuple[Part, ...]
    params: int
    """Trainable parameters."""
    macs: int
    """Multiply-adds of convolutions and the dense head for one image."""


def count_params(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def summarize(model: ResNet, image_size: int | tuple[int, int], channels: int = 3) -> Summary:
    """Shapes, parameters and multiply-adds of every part of a model.

    Args:
      model: of either layout; the numbers do not depend on it.
      image_size: side, or (height, width), in pixels.
      channels: of the image.
    """
    model = model.clone(scan=False, remat="none", norm_axis=None, norm_groups=1)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    macs: dict[str, int] = {}

    def count(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        module = context.module
        if isinstance(module, Conv | nn.Conv | nn.Dense) and context.method_name == "__call__":
            kernel = module.variables["params"]["kernel"].shape
            part = module.path[0]
            # Each output number is a product over the kernel's inputs.
            macs[part] = macs.get(part, 0) + math.prod(out.shape) * math.prod(kernel[:-1])
        return out

    def run(images: jax.Array) -> Any:
        variables = model.init(jax.random.key(0), images)
        with nn.intercept_methods(count):
            return variables, model.apply(variables, images, features=True)

    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    variables, (out, features) = jax.eval_shape(run, images)
    params = variables["params"]
    parts = []
    for name, activations in features.items():
        blocks = model.stage_sizes[int(name[5:]) - 1] if name.startswith("stage") else 0
        shape = activations.shape[1:]
        parts.append(Part(name, blocks, shape, count_params(params[name]), macs.get(name, 0)))
    rest = {name: tree for name, tree in params.items() if name not in features}
    parts.append(Part("head", 0, out.shape[1:], count_params(rest), macs.get("head", 0)))
    return Summary(tuple(parts), count_params(params), sum(macs.values()))
