"""The max-pool of ImageNet stems, 3×3 with stride 2 and padding −inf, quick on the CPU as well.

XLA's CPU backend takes a tenth of a training step of ResNet-50 for its general window; by even and
odd rows and columns the same numbers, gradient included, come from whole arrays.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


def max_pool(x: jax.Array, strides: int = 2, plain: bool = False) -> jax.Array:
    """Maximum over 3×3 pixels, symmetrically padded; x `[batch, height, width, channels]`.

    The gradient goes to the first maximum of a window, as that of `nn.max_pool`, which `plain`
    takes, for derivatives in forward mode.
    """
    if not plain and strides == 2 and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0:
        return _halving_pool(x)
    return _window_pool(x, strides)


def _window_pool(x: jax.Array, strides: int) -> jax.Array:
    return nn.max_pool(x, (3, 3), (strides, strides), ((1, 1), (1, 1)))


@jax.custom_vjp
def _halving_pool(x: jax.Array) -> jax.Array:
    return _forward(x)[0]


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def general(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = _window_pool(x, 2)
        return out, jnp.zeros_like(out, jnp.int8)

    y, place = jax.lax.platform_dependent(x, cpu=_by_parity, default=general)
    return y, (x, place)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    def general(x: jax.Array, place: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(functools.partial(_window_pool, strides=2), x)[1](dy)[0]

    def by_parity(x: jax.Array, place: jax.Array, dy: jax.Array) -> jax.Array:
        return _spread(place, dy)

    return (jax.lax.platform_dependent(*kept, dy, cpu=by_parity, default=general),)


_halving_pool.defvjp(_forward, _backward)


def _by_parity(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum and its place in the window, 0 … 8 row by row."""
    across, column = _largest_of_three(x, axis=2)
    y, row = _largest_of_three(across, axis=1)
    columns = _three(column, axis=1)
    column = jnp.where(row == 0, columns[0], jnp.where(row == 1, columns[1], columns[2]))
    return y, row * 3 + column


def _largest_of_three(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    first, second, third = _three(x, axis)
    largest = jnp.maximum(jnp.maximum(first, second), third)
    is_first = (first >= second) & (first >= third)
    place = jnp.where(is_first, 0, jnp.where(second >= third, 1, 2)).astype(jnp.int8)
    return largest, place


def _three(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each window along an axis the odd pixel before, the even one and the odd one behind."""
    halved = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (jax.lax.index_in_dim(halved, i, axis + 1, keepdims=False) for i in (0, 1))
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else 0
    return _moved(odd, axis, lowest), even, odd


def _spread(place: jax.Array, dy: jax.Array) -> jax.Array:
    """dy at the places of the maxima: the gradient of the input.

    An even pixel is the middle of its window, an odd one the last of its own and the first of the
    next.
    """
    batch, height, width, channels = dy.shape
    behind = ((0, 0), (0, 1), (0, 1), (0, 0))
    # Both stand in memory, or each of the nine places would make them again, with one window more
    # behind, so that the next one is a mere slice.
    place = jnp.pad(place, behind, constant_values=-1)
    place, dy = jax.lax.optimization_barrier((place, jnp.pad(dy, behind)))

    def taken(row: int, column: int) -> jax.Array:
        below, right = int(row == 0), int(column == 0)
        window = (slice(None), slice(below, height + below), slice(right, width + right))
        return jnp.where(place[window] == 3 * row + column, dy[window], 0)

    def pixels(rows: tuple[int, ...], columns: tuple[int, ...]) -> jax.Array:
        return functools.reduce(jnp.add, (taken(row, column) for row in rows for column in columns))

    # Even and odd rows by even and odd columns, each standing in memory before they are woven.
    even, odd = (1,), (2, 0)
    weave = jax.lax.optimization_barrier(
        tuple(pixels(rows, columns) for rows in (even, odd) for columns in (even, odd))
    )
    pairs = (jnp.concatenate(weave[:2], axis=-1), jnp.concatenate(weave[2:], axis=-1))
    rows = [pair.reshape(batch, height, -1) for pair in jax.lax.optimization_barrier(pairs)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _moved(x: jax.Array, axis: int, fill: float) -> jax.Array:
    """x moved by one pixel along an axis, what comes in being `fill`."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (1, -1, 0)
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), config)
