"""Whole models: outputs, sizes, layouts, rematerialisation, published padding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxres
from flaxres.nets.drawing import init_variables


def small(**fields):
    return flaxres.create_model("resnet8_cifar", **fields)


def images_of(*shape):
    return jax.random.normal(jax.random.key(2), shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logits_are_float32_for_any_dtype(dtype):
    model = small(dtype=dtype)
    images = images_of(2, 8, 8, 3)
    variables = init_variables(model, 0, images.shape)
    logits, features = model.apply(variables, images, features=True)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 10)
    assert features["stage2"].dtype == dtype
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_features_of_every_stage():
    model = flaxres.create_model("resnet50", num_classes=5)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)

    def run(x):
        return model.apply(model.init(jax.random.key(0), x), x, features=True)

    logits, features = jax.eval_shape(run, images)
    assert logits.shape == (2, 5)
    assert {name: f.shape[1:] for name, f in features.items()} == {
        "stem": (16, 24, 64),
        "stage1": (16, 24, 256),
        "stage2": (8, 12, 512),
        "stage3": (4, 6, 1024),
        "stage4": (2, 3, 2048),
    }


def test_no_classes_gives_pooled_features():
    model = small(num_classes=0)
    images = images_of(2, 8, 8, 3)
    variables = init_variables(model, 0, images.shape)
    pooled, features = model.apply(variables, images, features=True)
    assert "head" not in variables["params"]
    chex.assert_trees_all_close(pooled, features["stage3"].mean((1, 2)))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (1, 9, 13, 7), (3, 32, 5, 2)])
def test_any_image_size_and_channel_count(shape):
    model = small()
    logits, _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    assert logits.shape == (shape[0], 10)


def test_image_smaller_than_the_strides_is_refused():
    with pytest.raises(ValueError, match="3×8 is too small for strides of 4 .* at least 4×4"):
        small().init(jax.random.key(0), jnp.zeros((1, 3, 8, 3)))
    with pytest.raises(ValueError, match=r"\[batch, height, width, channels\], not \[8, 8, 3\]"):
        small().init(jax.random.key(0), jnp.zeros((8, 8, 3)))


@pytest.mark.parametrize("name", ["plain20_cifar", "plain18"])
def test_plain_twin_with_zero_weights_is_one_constant(name):
    model = flaxres.create_model(name, num_classes=3)
    images = images_of(4, 32, 32, 3)
    variables = init_variables(model, 0, images.shape)
    params = jax.tree.map(np.zeros_like, variables["params"])
    params["head"] = variables["params"]["head"]
    logits = model.apply({**variables, "params": params}, images)
    assert np.unique(logits, axis=0).shape[0] == 1


@pytest.mark.parametrize("style", ["v1", "v2"])
@pytest.mark.parametrize("fields", [{}, {"remat": "block"}, {"remat": "conv"}])
def test_scanned_net_equals_the_per_block_one(style, fields):
    """Same function, gradients and batch statistics, up to rounding; statistics updated once."""
    images = images_of(8, 8, 8, 3)
    results = []
    for scan in (False, True):
        model = flaxres.create_model("resnet20_cifar", style=style, scan=scan)
        model = model.clone(**fields) if scan else model
        variables = init_variables(model, 0, images.shape)

        def loss(params, model=model, variables=variables):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return (logits**2).mean(), updates["batch_stats"]

        (value, stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        results.append((value, flaxres.layout.unstack_tree((stats, grads))))
    (value, per_block), (scanned_value, scanned) = results
    np.testing.assert_allclose(value, scanned_value, rtol=1e-5)
    chex.assert_trees_all_equal_structs(per_block, scanned)
    # Gradients of a deep net amplify rounding: compare against the scale of each leaf.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max() + 1e-6),
        per_block,
        scanned,
    )


def test_stochastic_depth_rates_grow_linearly_and_work_under_scan():
    model = flaxres.create_model("resnet20_cifar", stochastic_depth=0.9, scan=True)
    np.testing.assert_allclose(model.drop_rates(), np.arange(1, 10) / 10, rtol=1e-6)
    images = images_of(4, 8, 8, 3)
    variables = init_variables(model, 0, images.shape)

    def run(key):
        return model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )[0]

    first, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(first != other)


def test_stem_pads_symmetrically():
    """A kernel that picks its centre must give pixels 0, 2, 4, …, as published weights expect."""
    model = flaxres.create_model("resnet18", norm="none", num_classes=0)
    images = images_of(1, 32, 32, 1)
    variables = init_variables(model, 0, images.shape)
    kernel = np.zeros_like(variables["params"]["stem"]["conv"]["kernel"])
    kernel[3, 3, 0, 0] = 1
    variables["params"]["stem"]["conv"]["kernel"] = kernel
    _, features = model.apply(variables, images, features=True)
    picked = np.maximum(images[0, ::2, ::2, 0], 0)
    pooled = [
        [
            picked[max(0, 2 * i - 1) : 2 * i + 2, max(0, 2 * j - 1) : 2 * j + 2].max()
            for j in range(8)
        ]
        for i in range(8)
    ]
    np.testing.assert_allclose(features["stem"][0, :, :, 0], pooled, rtol=1e-6)


def test_max_pool_pads_with_minus_infinity():
    """In v2 the pool sees negative numbers; zero padding would win at the border."""
    model = flaxres.create_model("resnetv2_26", num_classes=0)
    images = -jnp.ones((1, 32, 32, 1))
    variables = init_variables(model, 0, images.shape)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    variables["params"]["stem"]["conv"]["kernel"] = np.abs(kernel)
    _, features = model.apply(variables, images, features=True)
    assert np.all(features["stem"] < 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"se": 1 / 16},
        {"avg_down": True, "shortcut": "B"},
        {"antialias": True},
        {"norm": "group"},
        {"shortcut": "C"},
        {"activation": "silu"},
        {"stem": "deep", "block": "bottleneck", "groups": 4, "base_width": 32},
    ],
    ids=str,
)
def test_options_compose(fields):
    model = small(**fields)
    images = images_of(2, 16, 16, 3)
    variables = init_variables(model, 0, images.shape)
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert np.all(np.isfinite(logits)) and len(np.unique(logits)) > 10
