"""The three passes of a convolution, each in several forms: pure functions of arrays.

  forward  y[n, i, j] = Σ x[n, s·i + a - p, s·j + b - p] · k[a, b]
  input    its transpose in x: from dy and k to dx
  weight   its transpose in k: from x and dy to dk

Every form gives the same numbers within rounding; which one is fast depends on the backend, the
shape and the pass, see `choose`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a convolution is, beside its operands."""

    size: tuple[int, int]
    """Of the input."""
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: Pads = ((0, 0), (0, 0))
    groups: int = 1
    form: str = "auto"
    mapped: bool = False
    """All operands have a leading axis more, of convolutions with a kernel each (vmap)."""

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip(self.size, self.kernel, self.strides, self.pads, strict=True)
        height, width = ((n + sum(p) - k) // s + 1 for n, k, s, p in sizes)
        return height, width

    def axes(self) -> list[tuple[int, int, int, int, int]]:
        """Of height and width: size, that of the output, kernel, stride, pixels added before."""
        before = (low for low, _ in self.pads)
        return list(zip(self.size, self.out, self.kernel, self.strides, before, strict=True))

    def result(self, which: str, a: Any, b: Any) -> tuple[int, ...]:
        """Shape of what a pass gives for operands (arrays, or anything with a shape)."""
        lead = a.shape[:1] if self.mapped else ()
        batch = a.shape[len(lead)]
        if which == "forward":
            return (*lead, batch, *self.out, b.shape[-1])
        if which == "input":
            return (*lead, batch, *self.size, b.shape[-2] * self.groups)
        return (*lead, *self.kernel, a.shape[-1] // self.groups, b.shape[-1])

    @property
    def pointwise(self) -> bool:
        """Whether it is one product of matrices as it stands, stride aside."""
        return self.kernel == (1, 1) and self.pads == ((0, 0), (0, 0))


def forward_lax(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.pads,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=geometry.groups,
    )


def input_lax(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's own gradient of the input."""
    x = _example("input", dy, kernel, geometry)
    return jax.linear_transpose(lambda x: forward_lax(x, kernel, geometry), x)(dy)[0]


def weight_lax(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's own gradient of the kernel."""
    kernel = _example("weight", x, dy, geometry)
    return jax.linear_transpose(lambda k: forward_lax(x, k, geometry), kernel)(dy)[0]


def forward_im2col(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """One product of all patches and the flattened kernel; for 1×1 no patches are made."""
    return _dot(_side_by_side(_patches(x, geometry)), kernel.reshape(-1, kernel.shape[-1]))


def forward_rows(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A product for each row of the kernel, of patches one row high."""
    rows = _row_patches(x, geometry)
    return _sum(
        (
            _dot_float32(row, k.reshape(-1, k.shape[-1]))
            for row, k in zip(rows, kernel, strict=True)
        ),
        x.dtype,
    )


def forward_shifts(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """A product for each entry of the kernel, of the shifted input; no patches are made."""
    flat = kernel.reshape(-1, *kernel.shape[2:])
    products = zip(_patches(x, geometry), flat, strict=True)
    return _sum((_dot_float32(patch, k) for patch, k in products), x.dtype)


def input_turned(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's gradient of the input, written as a convolution of dy with the turned kernel."""
    return lax.conv_general_dilated(
        dy,
        _turned(kernel),
        (1, 1),
        [(k - 1 - low, size - 1 - (out - 1) * s + low) for size, out, k, s, low in geometry.axes()],
        lhs_dilation=geometry.strides,
        dimension_numbers=_DIMENSIONS,
    )


def weight_turned(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's gradient of the kernel, written as a convolution of x with dy, summed over examples.

    The examples take the place of the channels, the channels that of the examples.
    """
    turned = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        [(low, k + (out - 1) * s - size - low) for size, out, k, s, low in geometry.axes()],
        rhs_dilation=geometry.strides,
        dimension_numbers=_DIMENSIONS,
    )
    return turned.transpose(1, 2, 0, 3)


def _flipped(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The gradient of the input by products: for stride 1 a forward pass with a turned kernel."""

    def run(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
        if geometry.strides != (1, 1) or geometry.pointwise:
            return input_shifts(dy, kernel, geometry)
        top, left = (
            (k - 1 - low, k - 1 - high)
            for k, (low, high) in zip(geometry.kernel, geometry.pads, strict=True)
        )
        return forward(
            dy, _turned(kernel), dataclasses.replace(geometry, size=geometry.out, pads=(top, left))
        )

    return run


input_im2col = _flipped(forward_im2col)
input_rows = _flipped(forward_rows)


def input_shifts(dy: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient of all patches in one product, each added where it was taken."""
    rows, columns, channels, features = kernel.shape
    flat = kernel.reshape(-1, features).T
    taken = _dot(dy, flat).reshape(*dy.shape[:3], rows * columns, channels)
    x = _example("input", dy, kernel, geometry)
    parts = [taken[..., entry, :] for entry in range(rows * columns)]
    return jax.linear_transpose(lambda x: _patches(x, geometry), x)(parts)[0]


def weight_im2col(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """One product of all patches, transposed, and dy."""
    patches = _side_by_side(_patches(x, geometry))
    return _transposed_dot(patches, dy).reshape(geometry.result("weight", x, dy))


def weight_rows(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """A product for each row of the kernel."""
    rows = [_transposed_dot(row, dy) for row in _row_patches(x, geometry)]
    return jnp.stack(rows).reshape(geometry.result("weight", x, dy))


def weight_shifts(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """A product for each entry of the kernel."""
    entries = [_transposed_dot(patch, dy) for patch in _patches(x, geometry)]
    return jnp.stack(entries).reshape(geometry.result("weight", x, dy))


def forward_s2d(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Space to depth: a strided convolution as one of stride 1 over s² times as many channels.

    An exact rewriting; it fills the lanes of matrix units where an image has three channels.
    """
    (s, t), (rows, columns) = geometry.strides, geometry.kernel
    height, width = geometry.out
    rows, columns = -(-rows // s) * s, -(-columns // t) * t
    high, wide = height * s + rows - s, width * t + columns - t
    x = _resized(lax.pad(x, jnp.zeros((), x.dtype), _pad_config(geometry.pads)), (high, wide))
    x = x.reshape(len(x), high // s, s, wide // t, t, -1).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(
        kernel,
        ((0, rows - geometry.kernel[0]), (0, columns - geometry.kernel[1]), (0, 0), (0, 0)),
    )
    kernel = kernel.reshape(rows // s, s, columns // t, t, *kernel.shape[2:])
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5)
    deep = Geometry(size=(high // s, wide // t), kernel=(rows // s, columns // t))
    return forward_lax(
        x.reshape(*x.shape[:3], -1), kernel.reshape(*kernel.shape[:2], -1, kernel.shape[-1]), deep
    )


Form = Callable[[jax.Array, jax.Array, Geometry], jax.Array]
FORMS: dict[str, dict[str, Form]] = {
    "forward": {
        "lax": forward_lax,
        "turned": forward_lax,
        "im2col": forward_im2col,
        "rows": forward_rows,
        "shifts": forward_shifts,
        "s2d": forward_s2d,
    },
    "input": {
        "lax": input_lax,
        "turned": input_turned,
        "im2col": input_im2col,
        "rows": input_rows,
        "shifts": input_shifts,
        "s2d": input_lax,
    },
    "weight": {
        "lax": weight_lax,
        "turned": weight_turned,
        "im2col": weight_im2col,
        "rows": weight_rows,
        "shifts": weight_shifts,
        "s2d": weight_lax,
    },
}


def grouped(form: Form) -> Form:
    """A form for several groups of channels, from one that knows none.

    Groups lie along the last axis of all operands and results, of kernels too.
    """

    def run(a: jax.Array, b: jax.Array, geometry: Geometry) -> jax.Array:
        def split(operand: jax.Array) -> jax.Array:
            return jnp.moveaxis(operand.reshape(*operand.shape[:3], geometry.groups, -1), 3, 0)

        one = dataclasses.replace(geometry, groups=1)
        parts = jax.vmap(lambda a, b: form(a, b, one))(split(a), split(b))
        merged = jnp.moveaxis(parts, 0, 3)
        return merged.reshape(*merged.shape[:3], -1)

    return run


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())))


def _dot_float32(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product before it is rounded, to be summed with others."""
    kind = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=kind)


def _transposed_dot(a: jax.Array, dy: jax.Array) -> jax.Array:
    """Σ over batch and pixels of a[…, i] · dy[…, o]: `[i, o]`."""
    return _dot(a.reshape(-1, a.shape[-1]).T, dy.reshape(-1, dy.shape[-1]))


def _sum(terms: Iterable[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return functools.reduce(jnp.add, terms).astype(dtype)


def _example(which: str, a: jax.Array, b: jax.Array, geometry: Geometry) -> jax.Array:
    """What a form is transposed in: zeros that vary over the mesh axes that the operands vary over.

    Without the axes shard_map would take one kernel for all devices, and sum its gradient.
    """
    return varying_alike(jnp.zeros(geometry.result(which, a, b), a.dtype), a, b)[0]


def varying_alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, said to vary over every mesh axis that one of them does (in shard_map)."""
    axes = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    every = frozenset[str]().union(*axes)
    return [
        lax.pcast(operand, tuple(every - own), to="varying") if every - own else operand
        for operand, own in zip(operands, axes, strict=True)
    ]


def _turned(kernel: jax.Array) -> jax.Array:
    """The kernel of the gradient of the input: turned by half, inputs and outputs swapped."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _pad_config(pads: Pads) -> tuple[tuple[int, int, int], ...]:
    return ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))


def _resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Cut or filled up with zeros at the end of both axes."""
    if x.shape[1:3] == tuple(size):
        return x
    pads = tuple((0, wanted - have) for wanted, have in zip(size, x.shape[1:3], strict=True))
    return lax.pad(x, jnp.zeros((), x.dtype), _pad_config(pads))  # type: ignore[arg-type]


def _padded(x: jax.Array, geometry: Geometry) -> jax.Array:
    if geometry.pads == ((0, 0), (0, 0)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), _pad_config(geometry.pads))


def _shifted(x: jax.Array, row: int | None, column: int | None, geometry: Geometry) -> jax.Array:
    """The pixels that one row, or column, of the kernel sees, all rows or columns if None."""
    (s, t), (height, width) = geometry.strides, geometry.out
    if row is not None:
        x = x[:, row : row + (height - 1) * s + 1 : s]
    if column is not None:
        x = x[:, :, column : column + (width - 1) * t + 1 : t]
    return x


def _patches(x: jax.Array, geometry: Geometry) -> list[jax.Array]:
    """For each entry of the kernel, row by row, the pixels it sees."""
    x = _padded(x, geometry)
    rows, columns = geometry.kernel
    return [_shifted(x, i, j, geometry) for i in range(rows) for j in range(columns)]


def _row_patches(x: jax.Array, geometry: Geometry) -> list[jax.Array]:
    """For each row of the kernel the pixels that its entries see, side by side."""
    x = _padded(x, geometry)
    rows, columns = geometry.kernel
    wide = _side_by_side([_shifted(x, None, j, geometry) for j in range(columns)])
    return [_shifted(wide, i, None, geometry) for i in range(rows)]


def _side_by_side(patches: list[jax.Array]) -> jax.Array:
    return patches[0] if len(patches) == 1 else jnp.concatenate(patches, axis=-1)
