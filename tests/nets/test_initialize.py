"""Every way to start a branch is alive, or refused with the reason."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import flaxres
from flaxres.nets import drawing, initialize
from flaxres.nets.norms import NoNorm

IMAGES = jax.random.normal(jax.random.key(5), (8, 8, 8, 3))
LABELS = jnp.arange(8) % 4
INITS = [*initialize.RESIDUAL_INITS, "layerscale(1e-2)", "scaled(0.5)"]
ALL = list(
    itertools.product(
        ["v1", "v2"], ["batch", "group", "none"], ["basic", "bottleneck"], [True, False], INITS
    )
)


def tiny(style, norm, block, residual, init, **fields):
    return flaxres.create_model(
        "resnet8_cifar",
        stage_sizes=(2, 1),
        widths=(8, 16),
        stem_width=8,
        num_classes=4,
        style=style,
        norm=norm,
        block=block,
        residual=residual,
        residual_init=init,
        shortcut="B",
        **fields,
    )


def gradients_after_two_steps(model):
    variables = drawing.init_variables(model, 0, IMAGES.shape)
    stats = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        logits, _ = model.apply(
            {"params": params, **stats}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    grad = jax.jit(jax.grad(loss))
    params = variables["params"]
    for _ in range(2):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad(params))
    return traverse_util.flatten_dict(grad(params), sep="/")


def refusal(case):
    try:
        tiny(*case)
    except ValueError as error:
        return str(error)
    return None


def ids(case):
    return "-".join(str(part) for part in case)


@pytest.mark.parametrize("case", [case for case in ALL if refusal(case) is None], ids=ids)
def test_every_parameter_learns_or_the_start_says_it_is_dead(case):
    gradients = gradients_after_two_steps(tiny(*case))
    _, norm, _, residual, init = case
    if init != "zero_branch":
        dead = [path for path, g in gradients.items() if not np.any(g)]
        assert not dead
        return
    branch = {path: g for path, g in gradients.items() if "/branch/" in path}
    # The bias of a last norm in v1 adds a constant; nothing else of the branch ever moves.
    moving = {re.sub(r".*/branch/", "", path) for path, g in branch.items() if np.any(g)}
    last = {"basic": "norm2/bias", "bottleneck": "norm3/bias"}[case[2]]
    assert moving <= ({last} if case[0] == "v1" and norm != "none" else set())


def test_every_refusal_gives_its_reason_and_what_fits():
    refused = {case: refusal(case) for case in ALL if refusal(case)}
    assert refused
    for case, sentence in refused.items():
        assert repr(initialize.resolve(case[-1]).name) in sentence
        assert "use " in sentence or "it fits" in sentence
    assert "derivative at 0 is 0" in refused["v2", "batch", "basic", True, "zero_gamma"]
    assert "epsilon" in refused["v1", "batch", "basic", True, "zero_last"]
    assert "plain net" in refused["v1", "batch", "basic", False, "zero_gamma"]
    assert "shortcut" in refused["v1", "batch", "basic", True, "dirac"]


def test_zero_gamma_in_v2_would_be_dead_for_ever():
    """The trap behind the refusal: relu'(0) = 0 leaves scale and convolution without gradient."""
    model = tiny("v2", "batch", "basic", True, "default")
    variables = drawing.init_variables(model, 0, IMAGES.shape)
    block = variables["params"]["stage1"]["block1"]["branch"]
    block["norm2"]["scale"] = np.zeros_like(block["norm2"]["scale"])

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    grad = jax.grad(loss)(variables["params"])["stage1"]["block1"]["branch"]
    assert not np.any(grad["norm2"]["scale"]) and not np.any(grad["conv1"]["kernel"])


@pytest.mark.parametrize("case", [("v1", "zero_gamma"), ("v2", "zero_last"), ("v2", "rezero")])
def test_zero_starts_make_nets_of_any_depth_one_function(case):
    style, init = case
    outputs = []
    for sizes in ((1, 1), (4, 3)):
        model = tiny(style, "batch", "basic", True, init).clone(stage_sizes=sizes)
        variables = drawing.init_variables(model, 0, IMAGES.shape)
        outputs.append(model.apply(variables, IMAGES))
    chex.assert_trees_all_equal(*outputs)


def test_fixup_scales_as_published():
    model = tiny("v1", "none", "basic", True, "fixup")
    params = drawing.init_variables(model, 0, IMAGES.shape)["params"]
    twin = tiny("v1", "none", "basic", True, "default")
    plain = drawing.init_variables(twin, 0, IMAGES.shape)["params"]
    branch = params["stage1"]["block2"]["branch"]
    assert set(branch) == {"conv1", "conv2", "bias1a", "bias1b", "bias2a", "bias2b", "gain"}
    expected = plain["stage1"]["block2"]["branch"]["conv1"]["kernel"] * 3**-0.5
    np.testing.assert_allclose(branch["conv1"]["kernel"], expected, rtol=1e-6)
    assert not np.any(branch["conv2"]["kernel"]) and branch["gain"] == 1
    assert not np.any(params["head"]["kernel"])


def test_dirac_makes_a_norm_free_plain_block_the_identity_on_what_it_receives():
    block = flaxres.BasicBlock(16, residual=False, residual_init="dirac", norm=NoNorm)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 8, 8, 16)))
    out, _ = block.init_with_output(jax.random.key(1), x)
    chex.assert_trees_all_close(out, x, rtol=1e-6)


def test_scaled_shrinks_the_last_scale_by_the_root_of_the_depth():
    params = drawing.init_variables(
        tiny("v1", "batch", "basic", True, "scaled(0.5)"), 0, IMAGES.shape
    )["params"]
    scale = params["stage1"]["block1"]["branch"]["norm2"]["scale"]
    np.testing.assert_allclose(scale, 3**-0.5, rtol=1e-6)


def test_he_normal_has_the_variance_of_fan_out():
    kernel = initialize.HE(jax.random.key(0), (3, 3, 64, 128))
    assert abs(float(kernel.std()) / np.sqrt(2 / (9 * 128)) - 1) < 0.01


def test_names_and_arguments_are_parsed_or_refused():
    assert initialize.resolve("layerscale(1e-5)").value == 1e-5
    assert initialize.resolve("scaled").exponent == 0.5
    with pytest.raises(ValueError, match="unknown residual_init 'zero_gama'; did you mean zero_g"):
        initialize.resolve("zero_gama")
    with pytest.raises(ValueError, match="'x' is not a number"):
        initialize.resolve("layerscale(x)")
    with pytest.raises(ValueError, match="positive"):
        initialize.resolve("layerscale(0)")
