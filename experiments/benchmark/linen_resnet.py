"""The plain peer: the same network as one writes it in linen, unrolled, with XLA's convolutions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxres.nets.resnet import ResNet


class PlainBlock(nn.Module):
    """A basic (expansion 1) or bottleneck (4) block, the activation after the sum."""

    features: int
    strides: int
    expansion: int
    padded: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.features * self.expansion
        if self.expansion == 1:
            y = self.conv(self.features, (3, 3), self.strides, ((1, 1), (1, 1)))(x)
            y = nn.relu(self.norm()(y))
        else:
            y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
            y = self.conv(self.features, (3, 3), self.strides, ((1, 1), (1, 1)))(y)
            y = nn.relu(self.norm()(y))
        last = (1, 1) if self.expansion > 1 else (3, 3)
        y = self.norm()(self.conv(out, last)(y))
        if x.shape == y.shape:
            return nn.relu(x + y)
        if self.padded:
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out - x.shape[-1])))
        else:
            x = self.norm()(self.conv(out, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class PlainResNet(nn.Module):
    """Input `[batch, height, width, channels]`, output logits `[batch, num_classes]`, float32."""

    stage_sizes: tuple[int, ...]
    expansion: int
    widths: tuple[int, ...]
    num_classes: int
    cifar: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = x.astype(self.dtype)
        if self.cifar:
            x = nn.relu(norm()(conv(self.widths[0], (3, 3))(x)))
        else:
            x = nn.relu(norm()(conv(self.widths[0], (7, 7), 2, ((3, 3), (3, 3)))(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                strides = 2 if stage and not block else 1
                x = PlainBlock(self.widths[stage], strides, self.expansion, self.cifar, conv, norm)(
                    x
                )
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


def like(model: ResNet) -> PlainResNet:
    """The peer of one of our models."""
    return PlainResNet(
        stage_sizes=model.stage_sizes,
        expansion=4 if model.block == "bottleneck" else 1,
        widths=model.widths,
        num_classes=model.num_classes,
        cifar=model.stem == "cifar",
        dtype=model.dtype,
    )
