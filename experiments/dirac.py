"""Is a plain net that starts as the identity as good as a residual one?

Question  Zagoruyko 2017 (DiracNets, arXiv 1706.00388): kernels that carry the identity let plain
          nets of hundreds of layers train. Is it enough to start there, without their
          parametrisation, or does it take the shortcut that stays?
Command   python -m experiments.dirac [--quick] [--seeds 1]
Time      one and a half minutes on one CPU core; --quick a quarter of one.
Came out  with batch norm the start alone goes far, from one seed, in 120 steps on the digits: at 50
          layers the plain net has a training error of 81 %, from dirac 28 %, a residual net 66 %,
          and from zero_gamma 25 %; at 18 layers 25, 8, 12 and 41 %. Its blocks stay near the
          identity (0.17 at 50 layers) though nothing holds them there. Without norm dirac does not
          train at this rate. Hundreds of layers, as published, were not tried.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.common import options, save, tower
from flaxres.cli import plots
from flaxres.identity import probes
from flaxres.identity.claims import Context, Settings
from flaxres.train import fit

PLAIN = {"residual": False}
NETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain": (PLAIN, plots.RED, "-"),
    "plain, dirac": ({**PLAIN, "residual_init": "dirac"}, plots.ORANGE, "-"),
    "plain, dirac, no norm": (
        {**PLAIN, "residual_init": "dirac", "norm": "none"},
        plots.ORANGE,
        "--",
    ),
    "residual": ({}, plots.BLUE, "-"),
    "residual, zero_gamma": ({"residual_init": "zero_gamma"}, plots.BLACK, "-"),
}
STEPS, BATCH = 120, 32


def measure(context: Context, fields: dict[str, Any], blocks: int, seed: int) -> dict[str, Any]:
    """Training error in % by step; how far blocks are from the identity before and after."""
    model = context.model("resnet8_cifar", **tower(blocks, 8), **fields)
    start = context.start(model, seed)
    changes = {"steps": STEPS, "warmup_steps": STEPS // 10, "batch_size": BATCH}
    fitted = fit(context.config("resnet8_cifar", seed, **changes), start=(model, start))

    def distance(variables: Any) -> float:
        report = probes.identity(model, variables, context.images, train=True)
        return float(np.median(report["distance"]))

    return {
        "error": 100 - 100 * fitted.history["accuracy"],
        "distance at the start": distance(start),
        "distance at the end": distance(fitted.variables),
        "test accuracy, %": 100 * fitted.accuracy,
    }


def draw(found: dict[int, dict[str, list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """A panel a depth: training error over time."""
    with plots.figure(
        path, columns=len(found), sharey=True, figsize=(4 * len(found) + 2.2, 3.8), squeeze=False
    ) as panels:
        for axes, (blocks, nets) in zip(panels[0], found.items(), strict=True):
            for name, runs in nets.items():
                _, colour, line = NETS[name]
                errors = np.stack([plots.smooth(run["error"], 10) for run in runs])
                steps = np.arange(1, errors.shape[1] + 1)
                axes.plot(steps, errors.mean(0), line, color=colour, label=name)
                low, high = errors.min(0), errors.max(0)
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
            axes.set(title=f"{2 * blocks + 2} layers", xlabel="step", ylim=(0, 100))
        panels[0, 0].set_ylabel("training error, %")
        panels[0, 0].annotate(
            "chance", (0, 90), (2, 3), textcoords="offset points", color="grey", size=8
        )
        handles, labels = panels[0, 0].get_legend_handles_labels()
        panels[0, 0].figure.legend(handles, labels, loc="outside right center")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train all nets at all depths, draw, print errors and distances, means over seeds."""
    opts = options(__doc__ or "", argv)
    context = Context(Settings())
    depths = (2,) if opts.quick else (2, 8, 24)
    chosen = list(NETS)[::2] if opts.quick else list(NETS)
    found = {
        blocks: {
            name: [measure(context, NETS[name][0], blocks, seed) for seed in range(opts.seeds)]
            for name in chosen
        }
        for blocks in depths
    }
    draw(found, opts.out / "dirac.png")
    numbers: dict[str, Any] = {}
    for blocks, nets in found.items():
        for name, runs in nets.items():
            means = {key: np.mean([run[key] for run in runs]) for key in runs[0] if key != "error"}
            error = np.mean([run["error"][-20:] for run in runs])
            numbers[f"{2 * blocks + 2} layers, {name}"] = {"training error, %": error, **means}
    save(opts.out, "dirac", numbers)
    return numbers


if __name__ == "__main__":
    main()
