"""The host-side draw: one documented number stream, whatever the layout."""

import chex
import jax
import numpy as np
import pytest

import flaxres
from flaxres.nets import drawing

IMAGES = jax.random.normal(jax.random.key(5), (8, 8, 8, 3))


@pytest.mark.parametrize("name", ["resnet14_cifar", "wrn16_1_cifar"])
def test_draw_is_the_same_in_both_layouts(name):
    whole, stacked = (
        drawing.init_variables(flaxres.create_model(name, scan=scan), 3, IMAGES.shape)
        for scan in (False, True)
    )
    run = stacked["params"]["stage1"]["blocks1to2"]
    one = whole["params"]["stage1"]["block2"]
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[1], run), one)


def test_draw_has_the_tree_and_dtypes_of_model_init():
    for model in (
        flaxres.create_model("resnet8_cifar", residual_init="layerscale", se=1 / 16),
        flaxres.create_model("resnet8_cifar", norm="none", residual_init="fixup", scan=True),
    ):
        drawn = drawing.init_variables(model, 0, IMAGES.shape)
        made = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            drawn, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made)
        )


def test_draw_depends_on_the_seed_and_the_name_only():
    model = flaxres.create_model("resnet8_cifar")
    first, again, other = (drawing.init_variables(model, s, IMAGES.shape) for s in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    kernel = ("params", "stem", "conv", "kernel")
    assert np.any(_get(first, kernel) != _get(other, kernel))
    # A documented number: the stream must not change between releases.
    np.testing.assert_allclose(_get(first, kernel)[0, 0, 0, :2], EXPECTED, rtol=1e-6)


EXPECTED = [0.07593122124671936, -0.13042370975017548]


def _get(tree, path):
    for part in path:
        tree = tree[part]
    return tree
