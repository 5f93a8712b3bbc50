"""The two layouts are exact inverses, for every tree that training holds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxres
from flaxres.identity import layout
from flaxres.nets.drawing import init_variables

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


def model_and_variables(name="resnet14_cifar", **fields):
    model = flaxres.create_model(name, **fields)
    return model, init_variables(model, 0, IMAGES.shape)


@pytest.mark.parametrize("name", ["resnet14_cifar", "resnetv2_29_cifar", "plain14_cifar"])
def test_unstack_is_the_exact_inverse_of_stack(name):
    model, variables = model_and_variables(name)
    stacked_model, stacked = layout.stack(model, variables)
    assert layout.is_stacked(stacked) and not layout.is_stacked(variables)
    back_model, back = layout.unstack(stacked_model, stacked)
    assert back_model == model
    chex.assert_trees_all_equal(back, variables)


def test_stacked_tree_is_the_one_that_the_scanned_model_makes():
    model, variables = model_and_variables()
    scanned, stacked = layout.stack(model, variables)
    made = jax.eval_shape(scanned.init, jax.random.key(0), IMAGES)
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, made)


def test_both_layouts_are_the_same_function():
    model, variables = model_and_variables()
    scanned, stacked = layout.stack(model, variables)
    np.testing.assert_allclose(
        model.apply(variables, IMAGES), scanned.apply(stacked, IMAGES), atol=1e-5
    )


def test_a_strided_block_of_the_shapes_of_the_next_stays_alone():
    model, variables = model_and_variables(widths=(16, 16, 16), shortcut="A")
    _, stacked = layout.stack(model, variables)
    assert set(stacked["params"]["stage2"]) == {"block1", "block2"}
    model = model.clone(stage_sizes=(2, 3, 2))
    variables = init_variables(model, 0, IMAGES.shape)
    _, stacked = layout.stack(model, variables)
    assert set(stacked["params"]["stage2"]) == {"block1", "blocks2to3"}


def test_optimiser_state_is_converted_like_the_parameters():
    model, variables = model_and_variables()
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, variables["params"])
    optimiser = optax.chain(
        optax.masked(optax.add_decayed_weights(1e-4), mask), optax.adamw(1e-3, mask=mask)
    )
    state = optimiser.init(jax.tree.map(jnp.asarray, variables["params"]))
    stacked = layout.stack_tree(state, model)
    assert layout.is_stacked(stacked)
    chex.assert_trees_all_equal(layout.unstack_tree(stacked), state)


def test_conversion_is_jittable():
    model, variables = model_and_variables()
    stacked = jax.jit(lambda tree: layout.stack_tree(tree, model))(variables)
    chex.assert_trees_all_equal(jax.jit(layout.unstack_tree)(stacked), variables)


def test_missing_block_is_named():
    model, variables = model_and_variables()
    del variables["params"]["stage1"]["block2"]
    with pytest.raises(ValueError, match="stage1 has no block2, which the model has"):
        layout.stack(model, variables)


def test_blocks_that_the_model_has_not_are_named():
    model, variables = model_and_variables()
    shorter = model.clone(stage_sizes=tuple(size - 1 for size in model.stage_sizes))
    with pytest.raises(ValueError, match=r"stage1 has a block\d, which the model has not"):
        layout.stack(shorter, variables)
    with pytest.raises(ValueError, match="stage1 has no block1"):
        layout.stack_tree(layout.stack(model, variables)[1], model)
