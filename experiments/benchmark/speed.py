"""Training steps and forward passes of every side, taken in turn."""

from typing import Any, NamedTuple

import jax

from experiments.benchmark import accelerator, sides, steps, timing
from experiments.benchmark.sides import LINEN, Kind
from flaxres.nets.summary import summarize


class Net(NamedTuple):
    """A network with its input, and rounds for plain linen and for the others."""

    name: str
    image: int
    batch: int
    rounds: int
    linen_rounds: int


FULL: dict[Kind, tuple[Net, ...]] = {
    "training": (
        Net("resnet18", 224, 16, 9, 4),
        Net("resnet50", 224, 16, 9, 4),
        Net("resnet20_cifar", 32, 64, 15, 9),
        Net("resnet56_cifar", 32, 64, 9, 7),
        Net("resnet110_cifar", 32, 64, 7, 4),
    ),
    "inference": (
        Net("resnet18", 224, 16, 15, 9),
        Net("resnet50", 224, 16, 15, 7),
        Net("resnet20_cifar", 32, 64, 25, 15),
        Net("resnet56_cifar", 32, 64, 15, 11),
        Net("resnet110_cifar", 32, 64, 11, 9),
    ),
}
QUICK = (Net("resnet18", 32, 2, 3, 2), Net("resnet8_cifar", 16, 4, 3, 2))
_ACCELERATOR_BATCH = 8


def training(quick: bool) -> dict[str, Any]:
    """Seconds, images/s and ratios of training steps, by network."""
    return _all("training", quick)


def inference(quick: bool) -> dict[str, Any]:
    """Seconds, images/s and ratios of forward passes, by network."""
    return _all("inference", quick)


def _all(kind: Kind, quick: bool) -> dict[str, Any]:
    found = {}
    for net in QUICK if quick else FULL[kind]:
        if not sides.on_cpu() and not quick:
            net = net._replace(batch=net.batch * _ACCELERATOR_BATCH, rounds=30, linen_rounds=30)
        found[net.name] = measure(net, kind)
        jax.clear_caches()
    return found


def measure(net: Net, kind: Kind) -> dict[str, Any]:
    """One network: every side's steps in turn."""
    shape = (net.batch, net.image, net.image, 3)
    images, labels = steps.examples(shape, sides.our_model(net.name).num_classes)
    calls = {}
    for side in sides.present(net.name, kind):
        print(f"  {kind} {net.name}: preparing {side}", flush=True)
        calls[side] = sides.prepare(side, net.name, kind, images, labels)
    rounds = {side: net.linen_rounds if side == LINEN else net.rounds for side in calls}
    times = timing.take_turns(calls, rounds)
    spreads = {side: timing.Spread.of(seconds) for side, seconds in times.items()}
    found: dict[str, Any] = {
        "batch": net.batch,
        "image": net.image,
        "seconds": {side: spread.to_json() for side, spread in spreads.items()},
        "images_per_second": {side: net.batch / s.median for side, s in spreads.items()},
        "speed": {
            f"{side} / {other}": timing.speed(times, side, other).to_json()
            for side in calls
            for other in (sides.TORCH, LINEN)
            if side.startswith(sides.OURS) and other in calls
        },
    }
    if not sides.on_cpu():
        found["accelerator"] = _accelerated(net, kind, calls, spreads)
    return found


def _accelerated(net: Net, kind: Kind, calls: Any, spreads: Any) -> dict[str, Any]:
    macs = summarize(sides.our_model(net.name), net.image).macs * net.batch
    flops = 2 * macs * (3 if kind == "training" else 1)
    device = jax.devices()[0].device_kind
    return {
        side: accelerator.achieved(device, flops, spreads[side].median, call.compiled)
        for side, call in calls.items()
        if isinstance(call, steps.Step)
    }
