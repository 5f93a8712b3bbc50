"""Batch norm with its activation is `nn.BatchNorm`, backward too; the pool is `nn.max_pool`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from flaxres.nets import onednn
from flaxres.nets.norms import BatchNorm
from flaxres.nets.pool import max_pool

X = 3 * jax.random.normal(jax.random.key(0), (8, 5, 4, 6)) + 1
VARIABLES = {
    "params": {"scale": jnp.linspace(-1, 2, 6), "bias": jnp.linspace(-0.5, 0.5, 6)},
    "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
}
FORMS = [
    "auto",
    "plain",
    pytest.param(
        "onednn", marks=pytest.mark.skipif(not onednn.available(), reason="oneDNN is not here")
    ),
]


def of_flax(variables, x, act, dtype=jnp.float32):
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=dtype)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    return (act(y) if act else y), updates["batch_stats"]


def of_ours(variables, x, act, **fields):
    y, updates = BatchNorm(**fields).apply(variables, x, True, act, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def with_gradients(function, x, act):
    weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(params, x):
        y, stats = function({**VARIABLES, "params": params}, x, act)
        return jnp.sum(weights * y), (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(VARIABLES["params"], x)


@pytest.mark.parametrize("act", [None, nn.relu, nn.gelu], ids=["none", "relu", "gelu"])
@pytest.mark.parametrize("form", FORMS)
def test_batch_norm_is_that_of_flax_forward_and_backward(form, act):
    ours = with_gradients(functools.partial(of_ours, form=form), X, act)
    theirs = with_gradients(of_flax, X, act)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_float32_statistics(form):
    x = X.astype(jnp.bfloat16)
    y, stats = of_ours(VARIABLES, x, nn.relu, form=form, dtype=jnp.bfloat16)
    expected, expected_stats = of_flax(VARIABLES, x, nn.relu, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and stats["var"].dtype == jnp.float32
    chex.assert_trees_all_close(y, expected, rtol=2e-2, atol=2e-2)
    chex.assert_trees_all_close(stats, expected_stats, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_ghost_groups_are_batches_of_their_own(form):
    y, stats = of_ours(VARIABLES, X, nn.relu, form=form, groups=4)
    parts = [of_flax(VARIABLES, X[i : i + 2], nn.relu) for i in range(0, 8, 2)]
    chex.assert_trees_all_close(y, jnp.concatenate([p[0] for p in parts]), rtol=1e-5, atol=1e-5)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *[p[1] for p in parts])
    chex.assert_trees_all_close(stats, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_synchronised_over_devices_it_is_the_whole_batch(form):
    whole = with_gradients(functools.partial(of_ours, form=form), X, nn.relu)
    weights = jnp.sin(jnp.arange(X.size, dtype=jnp.float32)).reshape(8, 1, *X.shape[1:])

    def gradient(x, weights):
        def loss(params, x):
            y, stats = of_ours(
                {**VARIABLES, "params": params}, x, nn.relu, form=form, axis_name="data"
            )
            return jnp.sum(weights * y), (y, stats)

        (params, dx), (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(VARIABLES["params"], x)
        return (jax.lax.psum(params, "data"), dx), (y, stats)

    (params, dx), (y, stats) = jax.pmap(gradient, "data")(X.reshape(8, 1, *X.shape[1:]), weights)
    first = jax.tree.map(lambda leaf: leaf[0], (params, stats))
    found = ((first[0], dx.reshape(X.shape)), (y.reshape(X.shape), first[1]))
    chex.assert_trees_all_close(found, whole, rtol=1e-4, atol=1e-4)


def test_only_the_input_is_kept_for_the_backward_pass():
    def loss(x):
        return jnp.sum(of_ours(VARIABLES, x, nn.relu)[0])

    kept = jax.tree.leaves(jax.vjp(loss, X)[1])
    large = [leaf for leaf in kept if getattr(leaf, "size", 0) >= X.size]
    assert len(large) == 1 and np.array_equal(large[0].reshape(X.shape), X)


def test_second_derivatives_agree_with_the_plain_form():
    def twice(form, x):
        def loss(x):
            return jnp.sum(of_ours(VARIABLES, x, nn.relu, form=form)[0] ** 3)

        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)

    chex.assert_trees_all_close(twice("auto", X), twice("plain", X), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 12, 10, 3), (1, 2, 2, 1), (2, 7, 8, 3)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_pool_is_that_of_flax_ties_included(shape, dtype):
    # Rounded to few values, so that windows have several maxima.
    x = jnp.round(jax.random.normal(jax.random.key(1), shape) * 2).astype(dtype)
    weights = jnp.sin(jnp.arange(1000.0))

    def loss(pool, x):
        y = pool(x)
        return jnp.sum(weights[: y.size].reshape(y.shape) * y.astype(jnp.float32)), y

    def of_flax(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    ours, theirs = (jax.grad(loss, 1, has_aux=True)(pool, x) for pool in (max_pool, of_flax))
    chex.assert_trees_all_equal(ours[1], theirs[1])
    rounding = 1e-2 if dtype == jnp.bfloat16 else 1e-6
    chex.assert_trees_all_close(ours[0], theirs[0], rtol=rounding, atol=rounding)


def test_plain_pool_has_forward_mode_and_is_the_same():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    y, tangent = jax.jvp(functools.partial(max_pool, plain=True), (x,), (jnp.ones_like(x),))
    chex.assert_trees_all_equal(y, max_pool(x))
    chex.assert_trees_all_equal(tangent, jnp.ones_like(y))


def test_pool_differentiates_in_shard_map_with_its_checks():
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x):
        return jax.lax.psum(jnp.sum(max_pool(x) ** 2), "data")

    sharded = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    theirs = jax.grad(lambda x: jnp.sum(max_pool(x) ** 2))(x)
    chex.assert_trees_all_close(jax.jit(sharded)(x), theirs, rtol=1e-6)


def test_without_a_cpu_the_bridge_stands_in_no_program(monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda: True)
    norm = BatchNorm(form="onednn")

    def loss(x):
        y, _ = norm.apply(VARIABLES, x, True, nn.relu, mutable=["batch_stats"])
        return jnp.sum(y**2)

    traced = jax.jit(jax.grad(loss)).trace(X)
    assert "onednn" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "onednn" not in traced.lower(lowering_platforms=("cuda",)).as_text()
