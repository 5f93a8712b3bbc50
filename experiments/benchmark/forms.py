"""Every form of a convolution for ResNet-50's shapes, pass by pass: the table behind "auto"."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import sides, timing
from flaxres.nets.conv import FORMS, conv

# Side of the input, side of the kernel, stride, channels, features, groups.
SHAPES = (
    (224, 7, 2, 3, 64, 1),
    (56, 1, 1, 256, 64, 1),
    (56, 3, 1, 64, 64, 1),
    (56, 3, 2, 128, 128, 1),
    (28, 3, 1, 128, 128, 1),
    (28, 3, 2, 256, 256, 1),
    (14, 1, 1, 1024, 256, 1),
    (14, 3, 1, 256, 256, 1),
    (14, 3, 2, 512, 512, 1),
    (7, 3, 1, 512, 512, 1),
    (28, 3, 1, 256, 256, 32),
    (32, 3, 1, 16, 16, 1),
    (8, 3, 1, 64, 64, 1),
)
_QUICK = ((8, 3, 1, 4, 4, 1),)


def measure(quick: bool) -> dict[str, Any]:
    """Milliseconds of each form in turn, by shape and pass."""
    batch, rounds = (2, 2) if quick else (16, 7)
    found: dict[str, Any] = {"batch": batch}
    for shape in _QUICK if quick else SHAPES:
        side, window, strides, channels, features, groups = shape
        name = f"{side}² {window}×{window}/{strides} {channels}→{features}"
        name += f" in {groups} groups" if groups > 1 else ""
        for which in ("forward", "input", "weight"):
            calls = {form: _call(which, form, batch, *shape) for form in _forms()}
            times = timing.take_turns(calls, dict.fromkeys(calls, rounds))
            medians = {f: 1000 * timing.Spread.of(seconds).median for f, seconds in times.items()}
            said = ", ".join(f"{form} {ms:.3g}" for form, ms in medians.items())
            best = min((f for f in medians if f not in ("auto", "onednn")), key=medians.__getitem__)
            print(f"  {name}, {which}: {said}", flush=True)
            found[f"{name}, {which}"] = {**medians, "fastest pure": best}
    return found


def _forms() -> list[str]:
    return [form for form in FORMS if form != "onednn" or sides.has_onednn()]


def _call(
    which: str,
    form: str,
    batch: int,
    side: int,
    window: int,
    strides: int,
    channels: int,
    features: int,
    groups: int,
) -> Callable[[], Any]:
    """A compiled pass with its operands; the gradients are the forward pass's transposes."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), sides.dtype())
    x, kernel = (
        draw(batch, side, side, channels),
        draw(window, window, channels // groups, features),
    )
    run = functools.partial(conv, strides=(strides, strides), groups=groups, form=form)
    dy = draw(*jax.eval_shape(run, x, kernel).shape)

    def gradient_of_input(dy: jax.Array, kernel: jax.Array) -> Any:
        return jax.linear_transpose(lambda x: run(x, kernel), x)(dy)

    def gradient_of_kernel(x: jax.Array, dy: jax.Array) -> Any:
        return jax.linear_transpose(lambda kernel: run(x, kernel), kernel)(dy)

    passes: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        "forward": (run, x, kernel),
        "input": (gradient_of_input, dy, kernel),
        "weight": (gradient_of_kernel, x, dy),
    }
    function, *operands = passes[which]
    compiled = jax.jit(function).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))
