"""Recipes reach what they promise, and learn from pictures as ImageNet has them."""

import dataclasses

import pytest

from flaxres.cli.train import default_config
from flaxres.train import presets
from flaxres.train.fitting import fit


def test_a_data_set_without_a_recipe_is_taken_at_its_own_size():
    assert default_config(["--data", "digits"]) == presets.get("digits")
    other = default_config(["--data", "mnist"])
    assert (other.image_size, other.steps, other.epochs) == (None, None, 10)


def test_a_data_set_with_recipes_gets_the_first_of_them():
    assert default_config(["--data", "imagenet2012"]) == presets.get("imagenet_resnet50")
    assert default_config(["--data", "cifar10"]) == presets.get("cifar10_resnet20")


@pytest.mark.parametrize(
    "arguments, found",
    [
        ([], (40, 0)),
        (["--warmup-epochs", "2"], (0, 0)),
        (["--warmup_epochs=2"], (0, 0)),
        (["--warmup-steps", "5"], (40, 0)),
        (["--preset", "imagenet", "--warmup-steps", "5"], (0, 0)),
        (["--warmup-steps", "5", "--warmup-epochs", "1"], (40, 0)),
    ],
)
def test_warm_up_of_a_recipe_gives_way_to_the_flag(arguments, found):
    config = default_config(arguments)
    assert (config.warmup_steps, config.warmup_epochs) == found


def test_drops_of_a_recipe_give_way_to_another_schedule():
    config = default_config(["--preset", "imagenet", "--schedule", "cosine"])
    dataclasses.replace(config, schedule="cosine").validate()
    config = default_config(["--preset", "imagenet", "--schedule", "step"])
    assert config == presets.get("imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_digits_reach_what_the_recipe_says_with_any_seed(seed):
    config = dataclasses.replace(presets.get("digits"), seed=seed, devices=1, eval_batch_size=360)
    assert fit(config).accuracy >= 0.978


@pytest.mark.slow
def test_two_epochs_of_fashion_mnist_exceed_88_percent(tfds_dir):
    recipe = presets.get("fashion_mnist")
    config = dataclasses.replace(recipe, data_dir=str(tfds_dir), epochs=2, devices=1)
    assert fit(config).accuracy > 0.88
