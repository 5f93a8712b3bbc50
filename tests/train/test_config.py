"""Configurations: round trips, refusals, differences; recipes; no JAX."""

import dataclasses
import json
import subprocess
import sys

import pytest

from flaxres.nets import conv, zoo
from flaxres.train import presets
from flaxres.train.config import MAY_DIFFER, TrainConfig, profile_range


@pytest.mark.parametrize("name", presets.names())
def test_every_recipe_is_valid_and_survives_json(name):
    config = presets.get(name).validate()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    zoo.create_model(config.model, residual_init=config.residual_init)


def test_recipes_say_what_was_published():
    for preset in presets.PRESETS.values():
        assert "%" in preset.about
        assert preset.time.endswith(".")
    goyal = presets.get("imagenet_resnet50")
    assert dataclasses.replace(goyal, batch_size=8192).peak_lr() == pytest.approx(3.2)
    he = presets.get("cifar10_resnet110")
    assert (he.steps, he.drops, he.warmup_steps) == (64_000, (0.5, 0.75), 400)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 0}, "steps must be more than 0, not 0"),
        ({"epochs": -1.0}, "epochs must be more than 0, not -1.0"),
        ({"batch_size": -8}, "batch_size must be at least 1, not -8"),
        ({"lr": 0.0}, "lr must be more than 0, not 0.0"),
        ({"lr": float("inf")}, "lr must be more than 0, not inf"),
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1, not 1.0"),
        ({"driver": "ddp"}, "driver must be one of auto, device, pmap, mesh, not ddp"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, constant, not linear"),
        ({"steps": 1, "epochs": 1.0}, "give steps or epochs, not both"),
        ({"warmup_steps": 1, "warmup_epochs": 1.0}, "give warmup_steps or warmup_epochs"),
        ({"batch_size": 10, "accumulate": 3}, "does not divide into accumulate=3"),
        ({"fsdp": True, "driver": "pmap"}, "fsdp needs driver=mesh, not pmap"),
        (
            {"conv_form": "onednn", "dtype": "bfloat16"},
            "conv_form=onednn needs dtype=float32, not bfloat16",
        ),
        (
            {"batch_norm": "ghost", "norm": "group"},
            "batch_norm=ghost needs norm=batch, not group",
        ),
        ({"batch_norm": "device", "norm": "none"}, "needs norm=batch, not none"),
        ({"ghost_size": 8}, "ghost_size=8 needs batch_norm=ghost, not sync"),
        ({"drops": (0.3, 0.6)}, "drops=0.3,0.6 needs schedule=step, not cosine"),
        ({"drops": (0.5, 1.5)}, "drops must be between 0 and 1"),
        ({"ema": 1.0}, "ema must be between 0 and 1, not 1.0"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"profile_steps": "20:10"}, "FROM less than TO, not '20:10'"),
    ],
)
def test_what_makes_no_run_is_refused_with_its_value(changes, sentence):
    with pytest.raises(ValueError) as error:
        TrainConfig(**changes).validate()
    assert sentence in str(error.value)


def test_difference_names_fields_that_make_another_run():
    a = TrainConfig(steps=10)
    b = dataclasses.replace(a, lr=0.5, log_every=3, driver="pmap", workdir="elsewhere")
    assert a.diff(b) == ["lr: 0.1 here, 0.5 there"]
    assert a.diff(a) == []


def test_fields_that_may_differ_exist():
    assert {f.name for f in dataclasses.fields(TrainConfig)} >= MAY_DIFFER


def test_every_form_of_convolutions_is_accepted():
    for form in conv.FORMS:
        assert TrainConfig(conv_form=form).validate().conv_form == form


def test_unknown_fields_of_a_file_are_named():
    with pytest.raises(ValueError, match="unknown fields in a configuration: learning_rate"):
        TrainConfig.from_json({"learning_rate": 1})


def test_length_in_steps_or_epochs():
    assert TrainConfig(epochs=2, batch_size=64).total_steps(1437) == 45
    assert TrainConfig(steps=7).total_steps(1437) == 7
    assert TrainConfig(batch_size=64).total_steps(1437) == 22
    assert profile_range("10:20") == (10, 20)


def test_unknown_recipe_answers_with_the_closest():
    with pytest.raises(ValueError, match="unknown preset 'fashon'; did you mean fashion_mnist"):
        presets.get("fashon")


def test_configuration_and_recipes_import_no_jax():
    code = "import sys; from flaxres.train import config, presets; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
