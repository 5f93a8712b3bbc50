"""The argument, bit for bit, on single blocks; and blocks inside other people's modules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxres import BasicBlock, BottleneckBlock, Residual
from flaxres.nets.blocks import Padded, Projection, blur, drop_path
from flaxres.nets.norms import NoNorm

X = jax.random.normal(jax.random.key(1), (4, 8, 8, 16))
BLOCKS = [BasicBlock(16), BottleneckBlock(4)]


def zero_branch(variables):
    params = dict(variables["params"])
    params["branch"] = jax.tree.map(jnp.zeros_like, params["branch"])
    return {**variables, "params": params}


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_zero_branch_in_v2_is_the_identity_bitwise(self):
        for block in BLOCKS:
            block = block.clone(style="v2")
            variables = zero_branch(block.init(jax.random.key(0), X))
            chex.assert_trees_all_equal(self.variant(block.apply)(variables, X), X)

    @chex.variants(with_jit=True, without_jit=True)
    def test_zero_branch_in_v1_is_relu_bitwise(self):
        for block in BLOCKS:
            variables = zero_branch(block.init(jax.random.key(0), X))
            chex.assert_trees_all_equal(self.variant(block.apply)(variables, X), nn.relu(X))


@pytest.mark.parametrize("block", BLOCKS)
def test_zero_plain_block_forgets_its_input(block):
    block = block.clone(residual=False)
    out = block.apply(zero_branch(block.init(jax.random.key(0), X)), X)
    assert np.unique(out).tolist() == [0.0]


@pytest.mark.parametrize("init, block", [("zero_gamma", BLOCKS[0]), ("zero_last", BLOCKS[1])])
def test_zero_starts_give_the_identity_in_training_too(init, block):
    style = "v1" if init == "zero_gamma" else "v2"
    block = block.clone(residual_init=init, style=style)
    variables = block.init(jax.random.key(0), X)
    out, _ = block.apply(variables, X, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(out, nn.relu(X) if style == "v1" else X)


def test_block_is_shortcut_plus_branch_by_hand():
    block = BasicBlock(32, strides=2, norm=NoNorm)
    variables = block.init(jax.random.key(0), X)
    params = variables["params"]

    def conv(x, kernel, strides, pad):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (strides,) * 2, [(pad, pad)] * 2, dimension_numbers=dims
        )

    z = nn.relu(conv(X, params["branch"]["conv1"]["kernel"], 2, 1))
    z = conv(z, params["branch"]["conv2"]["kernel"], 1, 1)
    expected = nn.relu(z + conv(X, params["shortcut"]["conv"]["kernel"], 2, 0))
    np.testing.assert_allclose(block.apply(variables, X), expected, atol=1e-5)


def test_residual_spans_any_number_of_transformations():
    layers = [layer for _ in range(7) for layer in (nn.Dense(16), nn.tanh)]
    block = Residual(nn.Sequential(layers), activation=None)
    variables = block.init(jax.random.key(0), X)
    assert set(variables["params"]) == {"branch"}
    chex.assert_trees_all_equal(block.apply(zero_branch(variables), X), X)


@pytest.mark.parametrize(
    "branch, strides, fit",
    [
        (nn.Conv(32, (3, 3), strides=2), 2, "Projection(features=32, strides=2)"),
        (nn.Conv(24, (3, 3)), 1, "Projection(features=24, strides=1)"),
    ],
)
def test_shapes_that_differ_name_both_and_the_shortcut_that_fits(branch, strides, fit):
    with pytest.raises(ValueError) as error:
        Residual(branch).init(jax.random.key(0), X)
    assert "[4, 8, 8, 16]" in str(error.value) and fit in str(error.value)
    block = Residual(branch, Projection(branch.features, strides))
    out, _ = block.init_with_output(jax.random.key(0), X)
    assert out.shape == (4, 8 // strides, 8 // strides, branch.features)


def test_blocks_work_inside_another_module():
    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(8, (3, 3))(x)
            x = BasicBlock(8, residual_init="zero_gamma")(x, train)
            x = Residual(nn.Dense(8), activation=nn.gelu)(x, train)
            return nn.Dense(3)(x.mean((1, 2)))

    variables = Theirs().init(jax.random.key(0), X)
    assert set(variables["params"]["BasicBlock_0"]) == {"branch"}
    assert set(variables["params"]["Residual_0"]) == {"branch"}
    assert Theirs().apply(variables, X).shape == (4, 3)


def test_padded_shortcut_keeps_every_second_pixel_and_adds_zeros():
    out = Padded(20, 2).apply({}, X)
    chex.assert_trees_all_equal(out[..., :16], X[:, ::2, ::2])
    assert not np.any(out[..., 16:])


def test_convolution_block_pre_activates_before_the_fork():
    block = BasicBlock(32, strides=2, style="v2")
    params = block.init(jax.random.key(0), X)["params"]
    assert set(params) == {"preact", "branch", "shortcut"}
    assert set(params["branch"]) == {"conv1", "norm2", "conv2"}
    assert set(params["shortcut"]) == {"conv"}


def test_stochastic_depth_drops_whole_branches_and_rescales_the_others():
    x = jnp.ones((4096, 2, 2, 1))
    out = drop_path(x, 0.25, jax.random.key(0))
    per_example = out.reshape(4096, -1)
    assert np.all(per_example == per_example[:, :1])
    values = np.unique(out)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
    assert abs(np.mean(per_example[:, 0] == 0) - 0.25) < 0.03


def test_dropped_branch_leaves_the_shortcut():
    block = BasicBlock(16, style="v2")
    variables = block.init(jax.random.key(0), X)
    apply = functools.partial(block.apply, variables, X, train=True, mutable=["batch_stats"])
    out, _ = apply(drop_rate=0.5, rngs={"dropout": jax.random.key(3)})
    whole, _ = apply()
    for example, kept in zip(out, X, strict=True):
        dropped = np.array_equal(example, kept)
        index = next(i for i in range(4) if np.array_equal(X[i], kept))
        scaled = np.allclose(example - kept, 2 * (whole[index] - kept), atol=1e-5)
        assert dropped != scaled


def test_blur_keeps_constants_and_removes_the_highest_frequency():
    chex.assert_trees_all_close(blur(jnp.ones((1, 8, 8, 3)), 2), jnp.ones((1, 4, 4, 3)))
    checkers = jnp.asarray(np.indices((8, 8)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
    assert np.abs(blur(checkers, 2)[:, 1:, 1:]).max() < 1e-6


def test_narrowing_padded_shortcut_is_refused():
    block = BasicBlock(8, shortcut_kind="A")
    with pytest.raises(ValueError, match="cannot give 8 channels of 16; use shortcut='B'"):
        block.init(jax.random.key(0), X)
