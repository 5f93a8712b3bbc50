"""Published sizes, names and the sentences for wrong ones."""

import jax
import jax.numpy as jnp
import pytest

import flaxres
from flaxres.nets.summary import count_params, summarize

# 1000 classes (10 for the CIFAR families), 3 channels.
PARAMS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet200": 64_673_832,
    "resnet26": 15_995_176,
    "resnet50d": 25_576_264,
    "seresnet50": 28_088_024,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet50_2": 68_883_240,
    "resnetv2_50": 25_549_352,
    "resnetv2_101": 44_541_480,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
    "plain50": 22_780_456,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "resnet1202_cifar": 19_421_274,
    "plain20_cifar": 269_722,
    "plain110_cifar": 1_727_962,
    "resnetv2_164_cifar": 1_703_258,
    "resnetv2_1001_cifar": 10_327_706,
    "wrn28_10_cifar": 36_479_194,
}
PADDED = {"resnet18": 11_515_688, "resnet34": 21_623_848, "resnet50": 22_780_456}
GMACS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnet152": 11.514,
    "resnet200": 15.007,
}


def params_of(model, size=32):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return count_params(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_count_is_the_published_one(name):
    # Scanned, so that tracing a thousand layers takes no longer than tracing twenty.
    assert params_of(flaxres.create_model(name, scan=True)) == PARAMS[name]


@pytest.mark.parametrize("name", ["resnet50", "resnet56_cifar", "resnetv2_164_cifar"])
def test_both_layouts_hold_the_same_number_of_parameters(name):
    assert params_of(flaxres.create_model(name)) == PARAMS[name]


@pytest.mark.parametrize("name", PADDED)
def test_padded_shortcuts_have_no_parameters(name):
    assert params_of(flaxres.create_model(name, shortcut="A")) == PADDED[name]


def test_projections_add_2752_parameters_to_resnet20_cifar():
    assert params_of(flaxres.create_model("resnet20_cifar", shortcut="B")) == 269_722 + 2_752


def test_no_projection_where_the_shapes_agree():
    model = flaxres.create_model("resnet18")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert "shortcut" not in params["stage1"]["block1"]
    assert "shortcut" in params["stage2"]["block1"]


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_the_published_ones(name):
    summary = summarize(flaxres.create_model(name), 224)
    assert round(summary.macs / 1e9, 3) == GMACS[name]
    assert summary.params == PARAMS[name]
    assert summary.params == sum(part.params for part in summary.parts)


def test_every_listed_model_can_be_made():
    for name in flaxres.list_models():
        assert flaxres.create_model(name, num_classes=7).num_classes == 7


def test_every_model_has_a_plain_twin():
    residual = [name for name in flaxres.list_models() if not name.startswith("plain")]
    assert len(flaxres.list_models("plain*")) == len(residual)
    assert not flaxres.create_model("plain_wrn28_10_cifar").residual
    assert flaxres.create_model("plainv2_50") == flaxres.create_model("resnetv2_50", residual=False)


def test_any_depth_of_a_family():
    assert flaxres.create_model("resnet26_cifar").stage_sizes == (4, 4, 4)
    assert flaxres.create_model("wrn22_3_cifar").widths == (48, 96, 192)


def test_unknown_name_answers_with_the_closest():
    with pytest.raises(ValueError, match="unknown model 'resnet5O'; did you mean .*resnet50"):
        flaxres.create_model("resnet5O")
    with pytest.raises(ValueError, match=r"6n\+2, such as 20 or 26"):
        flaxres.create_model("resnet21_cifar")
    with pytest.raises(ValueError, match=r"6n\+4"):
        flaxres.create_model("wrn27_10_cifar")


def test_unknown_field_answers_with_the_closest():
    with pytest.raises(ValueError, match="unknown field 'num_clases' of a model; did you mean"):
        flaxres.create_model("resnet18", num_clases=3)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"style": "v3"}, "unknown style 'v3' .accepted: v1, v2"),
        ({"activation": "swish9"}, "unknown activation 'swish9'"),
        ({"widths": (64, 128)}, "2 widths .* do not fit 4 stages"),
        ({"num_classes": -1}, "num_classes must be 0 or more, not -1"),
        ({"stochastic_depth": 0.1, "residual": False}, "stochastic_depth=0.1 needs residual=True"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth must be in \[0, 1\), not 1.0"),
        ({"stage_sizes": (2, 0, 2, 2)}, "stage_sizes must be positive"),
    ],
)
def test_fields_that_make_no_model_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        flaxres.create_model("resnet18", **overrides)
