"""What depth costs before and around the step: compile time and memory, from 20 layers to 1202."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmark import accelerator, linen_resnet, steps
from experiments.benchmark.sides import LINEN, OURS, our_model

DEPTHS = (20, 56, 110, 302, 1202)
QUICK_DEPTHS = (8, 14)
REMATS = ("none", "block", "conv")
# Plain linen's compile time grows with depth; it is followed up to here.
LINEN_SECONDS = 60.0
_BATCH, _ROUNDS = 64, 3


def compile_time(quick: bool) -> dict[str, Any]:
    """Seconds to trace and compile the training step; medians of some rounds over all depths."""
    depths, rounds = (QUICK_DEPTHS, 1) if quick else (DEPTHS, _ROUNDS)
    batch = 2 if quick else _BATCH
    _compiled(OURS, 8, "none", batch, -1)  # the compiler's own start
    ours: dict[str, list[float]] = {}
    for number in range(rounds):
        for depth in depths:
            seconds, _ = _compiled(OURS, depth, "none", batch, number)
            ours.setdefault(str(depth), []).append(seconds)
    linen, stopped = _linen(depths, batch)
    ratios = np.divide(ours[str(depths[-1])], ours[str(depths[0])])
    return {
        "batch": batch,
        OURS: {depth: float(np.median(seconds)) for depth, seconds in ours.items()},
        LINEN: {str(depth): seconds for depth, (seconds, _) in linen.items()},
        "plain linen is followed": stopped,
        "deepest / shallowest": float(np.median(ratios)),
    }


def memory(quick: bool) -> dict[str, Any]:
    """Bytes of the training step by depth, with each kind of rematerialisation."""
    depths, remats = (QUICK_DEPTHS, REMATS[:2]) if quick else (DEPTHS, REMATS)
    batch = 2 if quick else _BATCH
    found: dict[str, Any] = {
        f"{OURS}, remat={remat}": {
            str(depth): _compiled(OURS, depth, remat, batch)[1] for depth in depths
        }
        for remat in remats
    }
    linen, stopped = _linen(depths, batch)
    found[LINEN] = {str(depth): bytes_ for depth, (_, bytes_) in linen.items()}
    at = "110" if "110" in found[f"{OURS}, remat=none"] else str(depths[-1])
    least = min(found[f"{OURS}, remat={remat}"][at]["temporary"] for remat in remats[1:])
    ratio = least / found[f"{OURS}, remat=none"][at]["temporary"]
    said = {"batch": batch, "plain linen is followed": stopped}
    return {**said, **found, f"remat / none at {at}": ratio}


def _linen(depths: tuple[int, ...], batch: int) -> tuple[dict[int, Any], str]:
    """(seconds, bytes) of plain linen by depth, and how far it was followed."""
    found: dict[int, Any] = {}
    for depth in depths:
        if found:
            last = max(found)
            expected = found[last][0] * depth / last
            if expected > LINEN_SECONDS:
                return found, f"to {last}: {depth} would take some {expected:.0f} s to compile"
        found[depth] = _compiled(LINEN, depth, "none", batch)
    return found, "all the way"


@functools.cache
def _compiled(
    side: str, depth: int, remat: str, batch: int, number: int = 0
) -> tuple[float, dict[str, int]]:
    """Seconds that a training step took to compile, and its bytes; `number` tells repeats apart."""
    del number
    model: Any = our_model(f"resnet{depth}_cifar", remat=remat)
    if side == LINEN:
        model = linen_resnet.like(model)
    with _no_cache():
        start = time.perf_counter()
        compiled = steps.lower_training(model, (batch, 32, 32, 3)).compile()
        seconds = time.perf_counter() - start
    print(f"  {side}, {depth} layers, remat {remat}: compiled in {seconds:.1f} s", flush=True)
    return seconds, accelerator.memory(compiled)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Compile everything anew: neither programs on disk nor what was traced before is used."""
    from jax.experimental.compilation_cache import compilation_cache

    was = jax.config.values["jax_enable_compilation_cache"]
    jax.clear_caches()
    # JAX remembers whether it uses its cache until it is reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()
