"""Norms fused with the activation behind them: batch (device, synchronised, ghost), group, none.

All are called as `norm(x, train, act)`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxres.nets import initialize, onednn
from flaxres.nets.backend import standing

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
    form: str = "auto"
    """"auto", "onednn" (sums on the CPU by the bridge) or "plain", which knows forward-mode
    derivatives in training too; the numbers are the same within rounding."""

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
        if self.form == "plain":
            mean, var = _moments(grouped, axis)
            y = _normalize(grouped, mean[:, None], var[:, None], scale, bias, self.epsilon)
            y = _finish(y, act, dtype)
        else:
            how = _How(self.epsilon, axis, act is nn.relu, self.form == "onednn", dtype)
            y, mean, var = _normalize_batch(grouped, scale, bias, how)
            y = y if how.relu else _finish(y, act, dtype)
        if not self.is_initializing():
            for running, new in ((running_mean, mean.mean(0)), (running_var, var.mean(0))):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y.reshape(x.shape)


def _moments(
    x: jax.Array, axis: str | None, by_onednn: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over axis 1 of `[groups, n, channels]`, float32."""

    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        return _sum(x), _sum(jnp.square(x))

    bridged = by_onednn and onednn.takes(x)
    sums = _on_cpu(jax.vmap(onednn.moments), plain, x) if bridged else plain(x)
    mean, square = (s / x.shape[1] for s in sums)
    if axis is not None:
        mean, square = jax.lax.pmean((mean, square), axis)
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


def _on_cpu(bridge: Any, plain: Any, *operands: jax.Array) -> Any:
    """The bridge where it is compiled for a CPU, else the plain form."""
    return jax.lax.platform_dependent(*operands, cpu=bridge, default=plain)


def _sum(x: jax.Array) -> jax.Array:
    """Over axis 1 of `[groups, n, channels]`."""
    if len(x) > 1:
        return jnp.sum(x, axis=1)
    # Behind an axis of size 1, XLA's CPU backend sums products twenty times slower.
    return jnp.sum(x.reshape(x.shape[1:]), axis=0)[None]


class _How(NamedTuple):
    """What `_normalize_batch` does not differentiate by."""

    epsilon: float
    axis: str | None
    relu: bool
    by_onednn: bool
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(act((x - mean) / std · scale + bias), mean, var), x `[groups, n, channels]`.

    For the backward pass only x is kept, the output of the convolution: what else it needs is
    made again from it, in two readings of memory. No gradient flows through mean and var.
    """
    return _normalize_forward(x, scale, bias, how)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, how: _How) -> Any:
    mean, var = _moments(x, how.axis, how.by_onednn)
    y = _normalize(x, mean[:, None], var[:, None], scale, bias, how.epsilon)
    y = (nn.relu(y) if how.relu else y).astype(how.dtype)
    return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(how: _How, kept: Any, cotangents: Any) -> Any:
    x, scale, bias, mean, var = kept
    dy = cotangents[0].astype(jnp.float32)
    inverse = jax.lax.rsqrt(var + how.epsilon)
    factor = inverse * scale
    operands = (x, dy, mean, factor, bias.astype(jnp.float32))
    dz = _masked(x, dy, mean, factor, bias, how)
    if how.by_onednn and onednn.takes(x):
        bridge = jax.vmap(functools.partial(onednn.gradients, relu=how.relu), (0, 0, 0, 0, None))
        plain = lambda x, dy, mean, f, b: _sums(x, _masked(x, dy, mean, f, b, how), mean)
        total, product = _on_cpu(bridge, plain, *operands)
    else:
        dz = standing(dz)
        total, product = _sums(x, dz, mean)
    product = product * inverse
    both = (total, product) if how.axis is None else jax.lax.pmean((total, product), how.axis)
    shift, slope = (s[:, None] / x.shape[1] for s in both)
    normal = (x.astype(jnp.float32) - mean[:, None]) * inverse[:, None]
    dx = factor[:, None] * (dz - shift - normal * slope)
    return dx.astype(x.dtype), product.sum(0).astype(scale.dtype), total.sum(0).astype(bias.dtype)


def _sums(x: jax.Array, dz: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ dz and Σ dz · (x - mean) over axis 1."""
    total = _sum(dz)
    return total, _sum(dz * x.astype(jnp.float32)) - mean * total


def _masked(
    x: jax.Array, dy: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, how: _How
) -> jax.Array:
    """dy where the ReLU let pass."""
    if not how.relu:
        return dy
    centred = x.astype(jnp.float32) - mean[:, None]
    return jnp.where(centred * factor[:, None] + bias > 0, dy, 0.0)


_normalize_batch.defvjp(_normalize_forward, _normalize_backward)


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
