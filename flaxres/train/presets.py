"""Named recipes: a configuration, the published result it aims at, and what it takes. No JAX."""

import dataclasses
import difflib

from flaxres.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A configuration with its history."""

    config: TrainConfig
    about: str
    """What it does, the published result and its source."""
    time: str
    """What it takes; an estimate from its multiply-adds unless it says whose measurement it is."""


_CIFAR = TrainConfig(
    data="cifar10",
    steps=64_000,
    batch_size=128,
    lr=0.1,
    schedule="step",
    drops=(0.5, 0.75),
    weight_decay=1e-4,
    augment="crop_flip",
    eval_every=2_000,
)
_IMAGENET = TrainConfig(
    model="resnet50",
    data="imagenet2012",
    image_size=224,
    epochs=90,
    batch_size=256,
    lr=0.1,
    scale_lr=True,
    warmup_epochs=5,
    schedule="step",
    drops=(1 / 3, 2 / 3, 8 / 9),
    weight_decay=1e-4,
    residual_init="zero_gamma",
    dtype="bfloat16",
    workers=16,
)

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        TrainConfig(image_size=12, steps=400, warmup_steps=40, lr=0.2, label_smoothing=0.1),
        "resnet20 on scikit-learn's 1,437 digits, drawn at 12×12 so that crops shift them by parts "
        "of a pixel, tested on the other 360: 98.1 to 98.9 % for seeds 0 to 4.",
        "Half a minute on two CPU cores, as measured here.",
    ),
    "fashion_mnist": Preset(
        TrainConfig(
            data="fashion_mnist",
            epochs=12,
            batch_size=128,
            lr=0.2,
            warmup_epochs=0.5,
            weight_decay=5e-4,
            augment="crop_flip",
        ),
        "resnet20 on 60,000 pictures of clothes: at least 93.5 %.",
        "Under half an hour on two CPU cores with conv_form=onednn, as measured here.",
    ),
    "cifar10_resnet20": Preset(
        dataclasses.replace(_CIFAR, model="resnet20_cifar"),
        "He 2015 (arXiv 1512.03385), Table 6: 8.75 % error; 64,000 steps.",
        "A quarter of an hour on one accelerator, a day on two CPU cores.",
    ),
    "cifar10_resnet56": Preset(
        dataclasses.replace(_CIFAR, model="resnet56_cifar"),
        "He 2015 (arXiv 1512.03385), Table 6: 6.97 % error; 64,000 steps.",
        "Three quarters of an hour on one accelerator.",
    ),
    "cifar10_resnet110": Preset(
        dataclasses.replace(_CIFAR, model="resnet110_cifar", warmup_steps=400),
        "He 2015 (arXiv 1512.03385), Table 6: 6.43 % error (6.61 ± 0.16); 64,000 steps after a "
        "warm-up of 400, without which 110 layers start slowly.",
        "An hour and a half on one accelerator.",
    ),
    "cifar10_wrn28_10": Preset(
        dataclasses.replace(
            _CIFAR,
            model="wrn28_10_cifar",
            steps=None,
            epochs=200,
            drops=(0.3, 0.6, 0.8),
            weight_decay=5e-4,
        ),
        "Zagoruyko 2016 (arXiv 1605.07146): 4.00 % error; 200 epochs, here with drops to a tenth "
        "where the paper multiplies by 0.2.",
        "Three to six hours on one accelerator.",
    ),
    "imagenet_resnet50": Preset(
        _IMAGENET,
        "Goyal 2017 (arXiv 1706.02677): 23.60 ± 0.12 % top-1 error at batch 256, 23.74 ± 0.09 at "
        "8192; 90 epochs, rate 0.1 · batch/256, five epochs of warm-up, zero gamma.",
        "An hour on 256 P100 at batch 8192 as published; at 2,000 images/s a device 16 hours on "
        "one, two on eight.",
    ),
    "imagenet_resnet50_a3": Preset(
        dataclasses.replace(
            _IMAGENET,
            image_size=160,
            epochs=100,
            batch_size=2048,
            optimizer="lamb",
            lr=0.008,
            scale_lr=False,
            schedule="cosine",
            drops=TrainConfig.drops,
            weight_decay=0.02,
            loss="bce",
            mixup=0.1,
            cutmix=1.0,
            residual_init="default",
        ),
        "Wightman 2021 (arXiv 2110.00476), procedure A3: 78.1 % top-1, trained at 160 and tested "
        "at 224, where this recipe is tested at 160; without repeated augmentation (A3 has none) "
        "and without RandAugment, which is left out here.",
        "15 hours on four V100 as published.",
    ),
}
_ALIASES = {
    "cifar10": "cifar10_resnet20",
    "imagenet": "imagenet_resnet50",
}


def names() -> list[str]:
    """Every name that `get` accepts."""
    return [*PRESETS, *_ALIASES]


def get(name: str) -> TrainConfig:
    """The configuration of this name; ValueError with the closest names."""
    found = _ALIASES.get(name, name)
    if found not in PRESETS:
        close = difflib.get_close_matches(name, names(), 3, 0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"unknown preset {name!r}{hint} (accepted: {', '.join(names())})")
    return PRESETS[found].config


def for_data(data: str | None) -> str | None:
    """The first recipe for a data set, or None."""
    return next((name for name, preset in PRESETS.items() if preset.config.data == data), None)


def listing() -> str:
    """All recipes with what is known of them, for the help."""
    aliases = ", ".join(f"{short} is {name}" for short, name in _ALIASES.items())
    recipes = [f"{name}: {preset.about} {preset.time}" for name, preset in PRESETS.items()]
    return "\n\n".join([f"Recipes for --preset ({aliases}):", *recipes])
