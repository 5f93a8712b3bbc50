"""Convolution in the form that the backend likes: a drop-in for `nn.Conv`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flaxres.nets import initialize

FORMS = ("auto", "lax", "matmul")
Padding = str | int | Sequence[int | tuple[int, int]]


def explicit_padding(
    padding: Padding, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Pairs of pixels to add before and after each spatial axis.

    "SYMMETRIC" adds (k-1)//2 on both sides, as published weights expect; "SAME" as XLA (for stride
    2 it may add one more after than before), "VALID" none.
    """
    if padding == "SYMMETRIC":
        return tuple(((k - 1) // 2,) * 2 for k in kernel)
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"unknown padding {padding!r} (accepted: SYMMETRIC, SAME, VALID, a number or pairs)"
            )
        return tuple(jax.lax.padtype_to_pads(size, kernel, strides, padding))
    if isinstance(padding, int):
        return ((padding, padding),) * len(kernel)
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SYMMETRIC",
    groups: int = 1,
    form: str = "auto",
) -> jax.Array:
    """Two-dimensional cross-correlation.

    x: `[batch, height, width, channels]`; kernel: `[k_h, k_w, channels/groups, features]` (HWIO).
    """
    if form not in FORMS:
        raise ValueError(f"unknown convolution form {form!r} (accepted: {', '.join(FORMS)})")
    pads = explicit_padding(padding, x.shape[1:3], kernel.shape[:2], strides)
    if form == "matmul" and groups == 1:
        return _matmul(x, kernel, strides, pads)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _matmul(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: tuple[tuple[int, int], ...],
) -> jax.Array:
    """One product of patches `[batch, h, w, k_h · k_w · channels]` and the flattened kernel.

    Its derivatives are products too, whereas XLA's CPU backend runs those of its own convolution
    many times slower inside loops.
    """
    rows, columns, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height = (x.shape[1] - rows) // strides[0] + 1
    width = (x.shape[2] - columns) // strides[1] + 1
    shifted = [
        x[
            :,
            i : i + (height - 1) * strides[0] + 1 : strides[0],
            j : j + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(rows)
        for j in range(columns)
    ]
    patches = shifted[0] if len(shifted) == 1 else jnp.concatenate(shifted, axis=-1)
    return jnp.dot(patches, kernel.reshape(rows * columns * channels, features))


class Conv(nn.Module):
    """A drop-in for `nn.Conv` in two dimensions: the same names, shapes and results."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SYMMETRIC"
    feature_group_count: int = 1
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = initialize.HE
    bias_init: Any = initialize.ZEROS
    form: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = _pair(self.kernel_size)
        if x.shape[-1] % self.feature_group_count or self.features % self.feature_group_count:
            raise ValueError(
                f"{x.shape[-1]} channels and {self.features} features do not divide into "
                f"{self.feature_group_count} groups"
            )
        shape = (*size, x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv(x, kernel, _pair(self.strides), self.padding, self.feature_group_count, self.form)
        return y if bias is None else y + bias


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
