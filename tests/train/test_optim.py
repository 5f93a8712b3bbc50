"""Schedules, masks and optimisers against what their papers write."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxres
from flaxres.identity import layout
from flaxres.nets.drawing import init_variables
from flaxres.train import losses, optim
from flaxres.train.config import TrainConfig

MODEL = flaxres.create_model("resnet14_cifar", residual_init="layerscale")
PARAMS = jax.tree.map(jnp.asarray, init_variables(MODEL, 0, (1, 8, 8, 1))["params"])
CONFIG = TrainConfig(steps=100, lr=0.4, warmup_steps=10)


def names_of(mask):
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {optim.path_name(path) for path, value in leaves if value}


def test_warm_up_is_linear_and_cosine_ends_at_zero():
    rate = optim.schedule(CONFIG, 1000)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose([rate(55), rate(100)], [0.2, 0.0], atol=1e-6)


def test_step_schedule_drops_to_a_tenth_where_it_says():
    config = dataclasses.replace(CONFIG, schedule="step", drops=(0.5, 0.75))
    rate = optim.schedule(config, 1000)
    found = [float(rate(step)) for step in (49, 51, 74, 76)]
    np.testing.assert_allclose(found, [0.4, 0.04, 0.04, 0.004], rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_decay_leaves_norms_biases_and_gains_alone_in_both_layouts(scan):
    params = layout.stack_tree(PARAMS, MODEL) if scan else PARAMS
    decayed = names_of(optim.decay_mask(params, ("/kernel$",)))
    assert decayed and all(name.endswith("/kernel") for name in decayed)
    assert "/head/kernel" in decayed


def test_mask_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="decay_mask 'weight' matches no parameter"):
        optim.decay_mask(PARAMS, ("/kernel$", "weight"))
    with pytest.raises(ValueError, match="no regular expression"):
        optim.decay_mask(PARAMS, ("(",))
    with pytest.raises(ValueError, match="decay_mask 'weight' matches no parameter"):
        config = dataclasses.replace(CONFIG, weight_decay=0.0, decay_mask=("weight",))
        optim.make_optimizer(config, PARAMS, 1000)


def test_sgd_is_nesterov_with_decay_in_the_gradient():
    config = TrainConfig(steps=5, lr=0.1, schedule="constant", weight_decay=0.01)
    optimiser = optim.make_optimizer(config, PARAMS, 1000)
    state, params = optimiser.init(PARAMS), PARAMS
    weight = np.asarray(PARAMS["head"]["kernel"], np.float64)
    momentum = np.zeros_like(weight)
    for _ in range(3):
        updates, state = optimiser.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        gradient = 1 + 0.01 * weight
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.1 * (gradient + 0.9 * momentum)
    np.testing.assert_allclose(params["head"]["kernel"], weight, rtol=1e-5)
    expected = PARAMS["head"]["bias"] - 0.1 * (1.9 + 2.71 + 3.439)
    np.testing.assert_allclose(params["head"]["bias"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "adam", "rmsprop", "lion"])
def test_other_optimisers_of_optax_move_every_parameter(name):
    config = TrainConfig(steps=5, lr=0.1, optimizer=name)
    optimiser = optim.make_optimizer(config, PARAMS, 1000)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = optimiser.update(grads, optimiser.init(PARAMS), PARAMS)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))


def update(name, grads=0.0, **changes):
    """The first update of an optimiser, for gradients that are all the same."""
    config = TrainConfig(steps=5, lr=0.1, schedule="constant", optimizer=name, **changes)
    optimiser = optim.make_optimizer(config, PARAMS, 1000)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, grads), PARAMS)
    state = optimiser.init(PARAMS)
    for _ in range(2):
        updates, state = optimiser.update(grads, state, PARAMS)
    return updates


@pytest.mark.parametrize("name", ["adamw", "lion", "nadamw", "adamaxw", "adan", "adadelta"])
def test_decay_of_their_own_is_ours(name):
    """No gradients: what moves is decayed, once, and nothing but the kernels is."""
    updates = update(name, weight_decay=0.01)
    assert names_of(jax.tree.map(np.any, updates)) == names_of(
        optim.decay_mask(PARAMS, ("/kernel$",))
    )
    if name != "adadelta":
        expected = -0.1 * 0.01 * PARAMS["head"]["kernel"]
        np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(update(name, weight_decay=0.0)))


@pytest.mark.parametrize("name", ["sgd", "lars", "rmsprop", "adafactor"])
def test_momentum_counts(name):
    one, other = update(name, 1.0, momentum=0.5), update(name, 1.0, momentum=0.95)
    assert np.any(one["head"]["kernel"] != other["head"]["kernel"])


def test_momentum_is_the_first_decay_rate_of_the_adam_family():
    optimiser = optim.make_optimizer(
        TrainConfig(steps=5, optimizer="adam", momentum=0.75, weight_decay=0.0), PARAMS, 1000
    )
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = optimiser.update(grads, optimiser.init(PARAMS), PARAMS)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mu["head"]["bias"], 0.25)


NO_OPTIMISERS = "sdg chain apply_updates __doc__ lbfgs polyak_sgd scale clip scale_by_schedule"


@pytest.mark.parametrize("name", NO_OPTIMISERS.split())
def test_what_is_no_optimiser_is_refused(name):
    with pytest.raises(ValueError, match=f"optimizer '{name}' .*accepted: sgd"):
        optim.make_optimizer(TrainConfig(steps=5, optimizer=name), PARAMS, 1000)


def test_clipping_bounds_the_global_norm():
    config = TrainConfig(
        steps=5, lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, clip_norm=0.5
    )
    optimiser = optim.make_optimizer(config, PARAMS, 1000)
    updates, _ = optimiser.update(
        jax.tree.map(jnp.ones_like, PARAMS), optimiser.init(PARAMS), PARAMS
    )
    total = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(total, 0.5, rtol=1e-5)


def test_layer_decay_shrinks_updates_away_from_the_head():
    config = TrainConfig(
        steps=5, lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, layer_decay=0.5
    )
    optimiser = optim.make_optimizer(config, PARAMS, 1000)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = optimiser.update(grads, optimiser.init(PARAMS), PARAMS)
    sizes = {name: float(jax.tree.leaves(tree)[0].ravel()[0]) for name, tree in updates.items()}
    assert sizes == {
        "head": -1.0,
        "stage3": -0.5,
        "stage2": -0.25,
        "stage1": -0.125,
        "stem": -0.0625,
    }


def test_smoothed_targets_and_losses_by_hand():
    soft = losses.targets(jnp.array([1]), 4, 0.2)
    np.testing.assert_allclose(soft[0], [0.05, 0.85, 0.05, 0.05], rtol=1e-6)
    logits = jnp.array([[1.0, 2.0, 0.0, -1.0]])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum())
    np.testing.assert_allclose(
        losses.cross_entropy(logits, soft), -(soft * log_p).sum(-1), rtol=1e-5
    )
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    bce = -(soft * np.log(p) + (1 - soft) * np.log(1 - p)).mean(-1)
    np.testing.assert_allclose(losses.cross_entropy(logits, soft, "bce"), bce, rtol=1e-5)
    assert losses.cross_entropy(logits.astype(jnp.bfloat16), soft).dtype == jnp.float32
    chex.assert_trees_all_equal(
        losses.correct(logits, jnp.array([1])), jnp.array([1.0], jnp.float32)
    )
