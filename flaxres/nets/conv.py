"""Convolution in the form that the backend likes, with the parameters of `nn.Conv`.

A convolution is linear in its input and in its kernel, and so are its two gradients: `conv_p`,
`input_p` and `weight_p` below are each other's transposes. So derivatives of any order, forward
and reverse, are made of these three, and each of them takes the form that `choose` knows to be the
fastest for its pass, its shape and the backend that it is compiled for.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flaxres.nets import forms, initialize, onednn
from flaxres.nets.forms import Geometry

FORMS = ("auto", "lax", "turned", "im2col", "rows", "shifts", "s2d", "onednn")
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
    """Two-dimensional cross-correlation, `lax.conv_general_dilated` in NHWC and HWIO.

    x: `[batch, height, width, channels]`; kernel: `[k_h, k_w, channels/groups, features]`; both of
    one dtype, which the result has. `form` forces one form for all passes (see `FORMS`), "auto"
    takes the fastest. "onednn" falls back to "auto" where oneDNN is not to be had.
    """
    if form not in FORMS:
        raise ValueError(f"unknown convolution form {form!r} (accepted: {', '.join(FORMS)})")
    if x.shape[-1] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"a kernel of shape {list(kernel.shape)} does not fit an input of {x.shape[-1]} "
            f"channels in {groups} groups"
        )
    size, window = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
    top, left = explicit_padding(padding, size, window, strides)
    geometry = Geometry(size, window, strides, (top, left), groups, form)
    if min(geometry.out) < 1:
        raise ValueError(f"an input of {list(x.shape)} is too small for a kernel of {window}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return forms.forward_lax(x, kernel, geometry)
    return conv_p.bind(*forms.varying_alike(x, kernel), geometry=geometry)


def choose(which: str, platform: str, geometry: Geometry, channels: int) -> str:
    """The fastest form of a pass ("forward", "input", "weight") on a platform.

    On GPU and TPU it is XLA's own convolution, but for few channels and a stride (the stem), whose
    forward pass TPUs take better as space to depth; their gradient of its kernel is XLA's, into
    which the compiler merges what makes dy (0.7 GB less to move a step of 128 in ResNet-50, by its
    count). On CPU measurements decide (two cores with AVX-512, ms;
    `python -m experiments.benchmark forms` takes them again, for more shapes):

      pass     shape                  lax  turned  im2col  rows  shifts
      forward  16·56²·64 → 64          39      39      45    42      41
      forward  16·14²·256 → 256        22      22      26    27      24
      forward  16·56²·256 → 64 1×1     24      26      10    11      11
      input    16·56²·64 → 64          38      38      47    44      37
      input    16·14²·256 → 256        21      21      26    28      21
      input    16·56²·256 → 64 1×1     20      20      10     9      10
      weight   16·224²·3 → 64 7×7/2    94      86      84   103     303
      weight   16·56²·64 → 64          57      60      71    59      90
      weight   16·14²·256 → 256        27      23      28    27      26
      weight   16·56²·256 → 64 1×1     61      62      24    23      24
      forward  16·28²·256, 32 groups   46      44      40    22      40
      input    16·28²·256, 32 groups   46      50      41    23      46
      weight   16·28²·256, 32 groups 8397      50      43    35      41

    In a scan over blocks XLA's own gradients ("lax") take many times as long (input 14²: 116 ms,
    weight 14²: 3847 ms), since they are not brought there into the form that its kernels know. A
    gradient that is written as a convolution to begin with ("turned") is as fast as outside.
    """
    if platform != "cpu":
        few = channels <= 4 and geometry.strides[0] == geometry.strides[1] > 1
        deep = platform == "tpu" and which == "forward" and few and geometry.groups == 1
        return "s2d" if deep else "lax"
    if geometry.kernel == (1, 1) or geometry.mapped:
        return "im2col"  # products of matrices as they stand, or batched ones
    if geometry.groups > 1:
        return "rows"
    return "lax" if which == "forward" else "turned"


def _run(which: str, platform: str, a: jax.Array, b: jax.Array, *, geometry: Geometry) -> jax.Array:
    """One pass, as it is compiled for a platform."""
    form = geometry.form
    if form == "onednn" and not geometry.mapped:
        if platform == "cpu" and onednn.takes(a, b):
            return onednn.convolve(which, a, b, geometry)
        form = "auto"
    if form == "auto":
        channels = b.shape[-2] if which != "weight" else a.shape[-1] // geometry.groups
        form = choose(which, platform, geometry, channels)
    if geometry.mapped:
        one = dataclasses.replace(geometry, mapped=False, form=form)
        return jax.vmap(partial(_run, which, platform, geometry=one))(a, b)
    run = forms.FORMS[which][form]
    if geometry.kernel != (1, 1) and form not in ("lax", "turned"):
        # Else what gives the operands would be computed again for each entry of the kernel.
        a, b = jax.lax.optimization_barrier((a, b))
    if geometry.groups > 1 and form != "lax":
        run = forms.grouped(run)
    return run(a, b, geometry)


def _batched(which: str, primitive: Primitive, operands: Any, axes: Any, geometry: Geometry) -> Any:
    """The rule of vmap: a shared kernel takes the mapped axis into the batch."""
    a, b = operands
    if axes[1] is None and which != "weight" and not geometry.mapped:
        a = jnp.moveaxis(a, axes[0], 0)
        out = primitive.bind(a.reshape(-1, *a.shape[2:]), b, geometry=geometry)
        return out.reshape(*a.shape[:2], *out.shape[1:]), 0
    count = next(o.shape[axis] for o, axis in zip(operands, axes, strict=True) if axis is not None)
    a, b = (
        jnp.broadcast_to(o, (count, *o.shape)) if axis is None else jnp.moveaxis(o, axis, 0)
        for o, axis in zip(operands, axes, strict=True)
    )
    if geometry.mapped:  # a vmap in a vmap
        flat = (o.reshape(-1, *o.shape[2:]) for o in (a, b))
        out = primitive.bind(*flat, geometry=geometry)
        return out.reshape(count, -1, *out.shape[1:]), 0
    return primitive.bind(a, b, geometry=dataclasses.replace(geometry, mapped=True)), 0


def _primitive(which: str, name: str) -> Primitive:
    primitive = Primitive(name)

    def shaped(a: Any, b: Any, *, geometry: Geometry) -> Any:
        # `update` keeps what else an abstract array knows, such as the axes it varies over.
        return a.update(shape=geometry.result(which, a, b), weak_type=False)

    def batched(operands: Any, axes: Any, *, geometry: Geometry) -> Any:
        return _batched(which, primitive, operands, axes, geometry)

    def run(platform: str) -> Any:
        return mlir.lower_fun(partial(_run, which, platform), multiple_results=False)

    primitive.def_abstract_eval(shaped)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="geometry"))
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, run("other"))
    for platform in ("cpu", "tpu"):
        mlir.register_lowering(primitive, run(platform), platform=platform)
    return primitive


conv_p = _primitive("forward", "flaxres_conv")
input_p = _primitive("input", "flaxres_conv_input")
weight_p = _primitive("weight", "flaxres_conv_weight")

# y = conv(x, k); dx = input(dy, k); dk = weight(x, dy). Each line: the transposes in its operands.
ad.defbilinear(
    conv_p,
    lambda ct, x, k, geometry: input_p.bind(ct, k, geometry=geometry),
    lambda ct, x, k, geometry: weight_p.bind(x, ct, geometry=geometry),
)
ad.defbilinear(
    input_p,
    lambda ct, dy, k, geometry: conv_p.bind(ct, k, geometry=geometry),
    lambda ct, dy, k, geometry: weight_p.bind(ct, dy, geometry=geometry),
)
ad.defbilinear(
    weight_p,
    lambda ct, x, dy, geometry: input_p.bind(dy, ct, geometry=geometry),
    lambda ct, x, dy, geometry: conv_p.bind(x, ct, geometry=geometry),
)


class Conv(nn.Module):
    """`nn.Conv` in two dimensions, undilated: the same names, shapes and results.

    What is not said differs: there is no bias, padding is symmetric and kernels start as He's.
    """

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
    """One form for all passes, see `conv`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = _pair(self.kernel_size)
        groups = self.feature_group_count
        if x.shape[-1] % groups or self.features % groups:
            raise ValueError(
                f"{x.shape[-1]} channels and {self.features} features do not divide into "
                f"{groups} groups"
            )
        shape = (*size, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        strides = _pair(self.strides)
        y = conv(x, kernel, strides, self.padding, groups, self.form)
        return y if bias is None else y + bias


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
