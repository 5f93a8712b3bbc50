"""Norms fused with the activation behind them: batch (device, synchronised, ghost), group, none.

All are called as `norm(x, train, act)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxres.nets import initialize

Activation = Callable[[jax.Array], jax.Array] | None


class NoNorm(nn.Module):
    """Only the activation; no parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, act: Activation = None) -> jax.Array:
        return act(x) if act else x


class BatchNorm(nn.Module):
    """Batch normalisation and activation (Ioffe 2015, arXiv 1502.03167).

    x: `[batch, …, channels]`. Statistics are float32; running averages are `momentum · old +
    (1 - momentum) · new`, with the biased variance, as `nn.BatchNorm`.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = initialize.ONES
    bias_init: Any = initialize.ZEROS
    axis_name: str | None = None
    """Mapped axis over which statistics are averaged (synchronised batch norm)."""
    groups: int = 1
    """Equal groups of the batch with statistics each (ghost batch norm, Hoffer 2017)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, act: Activation = None) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        bias = self.param("bias", self.bias_init, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        dtype = self.dtype or x.dtype
        if not train:
            y = _normalize(x, running_mean.value, running_var.value, scale, bias, self.epsilon)
            return _finish(y, act, dtype)
        if x.shape[0] % self.groups:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into {self.groups} groups")
        grouped = x.reshape(self.groups, -1, channels)
        axis = None if self.is_initializing() else self.axis_name
        mean, var = _moments(grouped, axis)
        y = _normalize(grouped, mean[:, None], var[:, None], scale, bias, self.epsilon)
        if not self.is_initializing():
            for running, new in ((running_mean, mean.mean(0)), (running_var, var.mean(0))):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return _finish(y.reshape(x.shape), act, dtype)


def _moments(x: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over axis 1 of `[groups, n, channels]`, float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=1)
    square = jnp.mean(jnp.square(x), axis=1)
    if axis is not None:
        mean, square = jax.lax.pmean((mean, square), axis)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


def _normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    factor = jax.lax.rsqrt(var + epsilon) * scale
    return (x.astype(jnp.float32) - mean) * factor + bias


def _finish(y: jax.Array, act: Activation, dtype: Any) -> jax.Array:
    y = y.astype(dtype)
    return act(y) if act else y


class GroupNorm(nn.Module):
    """Group normalisation and activation (Wu 2018, arXiv 1803.08494).

    Of the divisors of the channel count, the largest up to `num_groups` is taken.
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Any = initialize.ONES
    bias_init: Any = initialize.ZEROS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, act: Activation = None) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        bias = self.param("bias", self.bias_init, (channels,), self.param_dtype)
        groups = max(g for g in range(1, self.num_groups + 1) if channels % g == 0)
        grouped = x.reshape(x.shape[0], -1, groups, channels // groups).astype(jnp.float32)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        var = jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return _finish(y * scale + bias, act, self.dtype or x.dtype)
