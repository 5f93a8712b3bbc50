"""Named models: a table of configurations, `create_model` and `list_models`."""

import difflib
import fnmatch
import re
from typing import Any

from flaxres.nets.resnet import ResNet

_IMAGENET: dict[str, dict[str, Any]] = {
    "resnet18": {"stage_sizes": (2, 2, 2, 2), "block": "basic"},
    "resnet26": {"stage_sizes": (2, 2, 2, 2)},
    "resnet34": {"stage_sizes": (3, 4, 6, 3), "block": "basic"},
    "resnet50": {"stage_sizes": (3, 4, 6, 3)},
    "resnet101": {"stage_sizes": (3, 4, 23, 3)},
    "resnet152": {"stage_sizes": (3, 8, 36, 3)},
    "resnet200": {"stage_sizes": (3, 24, 36, 3)},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "resnet50d": {**_IMAGENET["resnet50"], "stem": "deep", "avg_down": True},
    "resnext50_32x4d": {**_IMAGENET["resnet50"], "groups": 32, "base_width": 4},
    "wide_resnet50_2": {**_IMAGENET["resnet50"], "base_width": 128},
    "seresnet50": {**_IMAGENET["resnet50"], "se": 1 / 16},
}
_PREACTIVATED = {
    name.replace("resnet", "resnetv2_"): {**fields, "style": "v2"}
    for name, fields in _IMAGENET.items()
}
_TABLE = {**_IMAGENET, **_OPTIONS, **_PREACTIVATED}

_CIFAR: dict[str, Any] = {
    "block": "basic",
    "widths": (16, 32, 64),
    "stem": "cifar",
    "stem_width": 16,
    "shortcut": "A",
    "num_classes": 10,
}
# The members that list_models shows; create_model takes any depth of the family.
_CIFAR_LISTED = (
    *(f"resnet{depth}_cifar" for depth in (8, 14, 20, 32, 44, 56, 110, 1202)),
    *(f"resnetv2_{depth}_cifar" for depth in (11, 20, 29, 110, 164, 1001)),
    *(f"wrn{name}_cifar" for name in ("16_4", "16_8", "28_2", "28_10", "40_4")),
)


def _resnet_cifar(depth: int) -> dict[str, Any]:
    blocks = _blocks("resnet", depth, 6)
    return {**_CIFAR, "stage_sizes": (blocks,) * 3}


def _resnetv2_cifar(depth: int) -> dict[str, Any]:
    blocks = _blocks("resnetv2_", depth, 9)
    shared = {**_CIFAR, "block": "bottleneck", "style": "v2", "shortcut": "B"}
    return {**shared, "stage_sizes": (blocks,) * 3}


def _wrn_cifar(depth: int, widen: int) -> dict[str, Any]:
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        raise ValueError(
            f"no wide resnet of depth {depth} and width {widen}: the depth must be 6n+4 "
            "(10, 16, 22, 28, 40, …) and the width at least 1"
        )
    widths = tuple(width * widen for width in _CIFAR["widths"])
    shared = {**_CIFAR, "style": "v2", "shortcut": "B", "widths": widths}
    return {**shared, "stage_sizes": ((depth - 4) // 6,) * 3}


def _blocks(family: str, depth: int, layers: int) -> int:
    """Blocks a stage of a CIFAR net of this depth: depth = layers · n + 2."""
    blocks, rest = divmod(depth - 2, layers)
    if rest or blocks < 1:
        below = max(1, blocks) * layers + 2
        raise ValueError(
            f"no {family}{depth}_cifar: its depth must be {layers}n+2, such as {below} or "
            f"{below + layers}"
        )
    return blocks


_FAMILIES = (
    (re.compile(r"resnet(\d+)_cifar"), _resnet_cifar),
    (re.compile(r"resnetv2_(\d+)_cifar"), _resnetv2_cifar),
    (re.compile(r"wrn(\d+)_(\d+)_cifar"), _wrn_cifar),
)


def _plain_name(name: str) -> str:
    """plain50 for resnet50; plain_wrn28_10_cifar for models of another first name."""
    return "plain" + name.removeprefix("resnet") if name.startswith("resnet") else f"plain_{name}"


def _fields(name: str) -> dict[str, Any] | None:
    if name in _TABLE:
        return _TABLE[name]
    for pattern, make in _FAMILIES:
        if match := pattern.fullmatch(name):
            return make(*map(int, match.groups()))  # type: ignore[operator]
    if name.startswith("plain"):
        rest = name.removeprefix("plain")
        twin = _fields(rest[1:] if rest.startswith("_") else f"resnet{rest}")
        return None if twin is None else {**twin, "residual": False}
    return None


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a glob such as "resnet*" or "plain*".

    The CIFAR families hold every depth (6n+2; 9n+2 for resnetv2_; 6n+4 for wrn), of which the list
    names the usual ones.
    """
    names = [*_TABLE, *_CIFAR_LISTED]
    return [name for name in (*names, *map(_plain_name, names)) if fnmatch.fnmatch(name, pattern)]


def create_model(name: str, **overrides: Any) -> ResNet:
    """The model of this name as a linen module.

    Args:
      name: a name of `list_models()`, or any depth of a CIFAR family.
      **overrides: fields of `ResNet`, such as num_classes=10, dtype=jnp.bfloat16,
        residual_init="zero_gamma", norm="group".

    Raises:
      ValueError: unknown name (the sentence has the closest ones) or field, or fields that
        together make no model.
    """
    fields = _fields(name)
    if fields is None:
        raise ValueError(f"unknown model {name!r}{_hint(name, list_models())}")
    known = [field for field in ResNet.__dataclass_fields__ if field not in ("parent", "name")]
    for field in overrides:
        if field not in known:
            raise ValueError(f"unknown field {field!r} of a model{_hint(field, known)}")
    merged = {**fields, **overrides}
    for field in ("stage_sizes", "widths"):
        if field in merged:
            merged[field] = tuple(merged[field])
    model = ResNet(**merged)
    model.validate()
    return model


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 3, 0.5)
    return f"; did you mean {', '.join(close)}?" if close else f" (known: {', '.join(known)})"
