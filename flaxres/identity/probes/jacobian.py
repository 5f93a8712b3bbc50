"""Singular values and log-determinants of Jacobians, without ever forming one.

Products with J and Jᵀ come from jvp and vjp; Golub–Kahan–Lanczos bidiagonalisation with full
reorthogonalisation turns them into extreme singular values, and stochastic Lanczos quadrature into
log |det J| (Ubaru 2017, SIAM J. Matrix Anal. 38). At the identity all singular values are 1 and the
log-determinant is 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxres.identity import branches
from flaxres.identity.probes import common
from flaxres.nets.resnet import ResNet

Function = Callable[[jax.Array], jax.Array]


def block_jacobian(
    model: ResNet, variables: Any, image: jax.Array, address: str, train: bool = False
) -> tuple[Function, jax.Array]:
    """(function, point): one block, such as "stage2/block3", at what it receives for an image.

    image: `[height, width, channels]`, or `[batch, …]` for statistics of a batch with train=True.
    Hand both to `singular_values` or `log_determinant`.
    """
    (row, *more) = branches.select(model, address)
    if more:
        raise ValueError(f"{address!r} means {len(more) + 1} blocks: a Jacobian is of one")
    images = image if image.ndim == 4 else image[None]
    model, variables = common.per_block(model.clone(norm_form="plain"), variables)
    _, blocks, _ = common.trace(model, variables, images, train)
    module = model.make_block(row.stage, row.block)
    place = (f"stage{row.stage}", f"block{row.block}")
    own = {
        name: tree[place[0]][place[1]]
        for name, tree in variables.items()
        if place[1] in tree.get(place[0], {})
    }

    def function(x: jax.Array) -> jax.Array:
        return module.apply(own, x, train, mutable=["batch_stats"])[0]

    return function, blocks[row.depth - 1].received


def network_jacobian(
    model: ResNet, variables: Any, image: jax.Array, train: bool = False
) -> tuple[Function, jax.Array]:
    """(function, point): logits as a function of the image, `[h, w, c]` or `[batch, h, w, c]`."""
    images = image if image.ndim == 4 else image[None]
    model = model.clone(norm_form="plain")  # which knows forward-mode derivatives in training

    def function(x: jax.Array) -> jax.Array:
        return common.apply(model, variables, x, train, mutable=["batch_stats"])[0]

    return function, images


def singular_values(
    function: Function, point: jax.Array, key: jax.Array, steps: int = 32
) -> jax.Array:
    """Ritz values of J's singular values at a point, descending, `[min(steps, sizes of J)]`.

    The largest converge first, within tens of steps; the smallest are upper bounds that become
    exact when steps reaches the smaller side of J.
    """
    forward, backward, columns, rows = _products(function, point)
    steps = min(steps, columns, rows)
    bidiagonal = _bidiagonalise(forward, backward, columns, rows, key, steps)
    return jnp.linalg.svd(bidiagonal, compute_uv=False)


def log_determinant(
    function: Function, point: jax.Array, key: jax.Array, steps: int = 32, samples: int = 8
) -> jax.Array:
    """Estimate of log |det J| = ½ tr log JᵀJ for a function that keeps the shape, in nats.

    The mean over `samples` random starts of Gauss quadrature with `steps` nodes. ValueError if J is
    not square.
    """
    forward, backward, columns, rows = _products(function, point)
    if columns != rows:
        raise ValueError(f"a Jacobian of {rows}×{columns} has no determinant: it is not square")
    steps = min(steps, columns)

    def sample(key: jax.Array) -> jax.Array:
        bidiagonal = _bidiagonalise(forward, backward, columns, rows, key, steps)
        _, values, right = jnp.linalg.svd(bidiagonal[:, :steps])
        # The start is the first right vector; its weights are the first entries.
        return columns * jnp.sum(right[:, 0] ** 2 * jnp.log(values))

    return jnp.mean(jax.lax.map(sample, jax.random.split(key, samples)))


def _products(function: Function, point: jax.Array) -> tuple[Function, Function, int, int]:
    """Products of flat vectors with J and its transpose, and J's numbers of columns and rows."""
    point = point.astype(jnp.float32)
    value, pull = jax.vjp(function, point)

    def forward(v: jax.Array) -> jax.Array:
        return jax.jvp(function, (point,), (v.reshape(point.shape),))[1].reshape(-1)

    def backward(u: jax.Array) -> jax.Array:
        return pull(u.reshape(value.shape).astype(value.dtype))[0].reshape(-1)

    return forward, backward, point.size, value.size


def _bidiagonalise(
    forward: Function, backward: Function, columns: int, rows: int, key: jax.Array, steps: int
) -> jax.Array:
    """Upper bidiagonal B with U B Vᵀ ≈ J, `[steps, steps + 1]`, from a random start."""
    start_key, restart_key = jax.random.split(key)
    start = jax.random.normal(start_key, (columns,))
    # Rows that are not yet filled are zero and so take no part in the projections.
    right = jnp.zeros((steps + 1, columns)).at[0].set(start / jnp.linalg.norm(start))
    left = jnp.zeros((steps, rows))

    def clean(vector: jax.Array, basis: jax.Array) -> jax.Array:
        for _ in range(2):  # twice is enough (Giraud 2005)
            vector = vector - basis.T @ (basis @ vector)
        return vector

    def extend(vector: jax.Array, basis: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A unit vector beside a basis, and how long it was.

        Singular values that occur many times, as at the identity, exhaust the space of the start;
        then a fresh direction takes its place, at length 0.
        """
        whole = jnp.linalg.norm(vector)
        vector = clean(vector, basis)
        size = jnp.linalg.norm(vector)
        exhausted = size <= 1e-5 * jnp.maximum(whole, 1e-30)
        fresh = clean(jax.random.normal(key, vector.shape), basis)
        vector = jnp.where(exhausted, fresh, vector)
        unit = vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30)
        return unit, jnp.where(exhausted, 0.0, size)

    def body(i: jax.Array, carry: Any) -> Any:
        left, right, bidiagonal = carry
        left_key, right_key = jax.random.split(jax.random.fold_in(restart_key, i))
        u, alpha = extend(forward(right[i]), left, left_key)
        left = left.at[i].set(u)
        v, beta = extend(backward(u), right, right_key)
        right = right.at[i + 1].set(v)
        bidiagonal = bidiagonal.at[i, i].set(alpha)
        return left, right, bidiagonal.at[i, i + 1].set(beta)

    bidiagonal = jnp.zeros((steps, steps + 1))
    return jax.lax.fori_loop(0, steps, body, (left, right, bidiagonal))[2]
