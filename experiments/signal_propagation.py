"""How do activations and gradients change with depth before the first step?

Question  He 2015 (arXiv 1502.01852) keeps the variance of activations in plain nets. De & Smith
          2020 (2002.10444): in residual nets it doubles a block without norm, and batch norm
          shrinks branch over trunk as 1/sqrt(depth). What do smaller starts of the branch change?
Command   python -m experiments.signal_propagation [--quick] [--seeds 3]
Time      one and a half minutes on one CPU core; --quick a quarter of one.
Came out  over 50 equal blocks as published, but for the plain nets. Without norm the variance grows
          by 1.9 (v1) and 1.6 (v2) a block, to 7e13 and 6e10 times the stem's; with batch norm it
          grows slowly and the ratio falls as depth to the -0.53. scaled(0.5) keeps all three flat;
          zero_gamma and skipinit exactly. Plain nets lose variance without norm, 0.64 a block; with
          batch norm their gradients explode, 3 million times from the last block to the first.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from experiments.common import options, save, tower
from flaxres.cli import plots
from flaxres.identity import probes
from flaxres.identity.claims import Context, Settings

FREE = {"norm": "none"}
NETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain, no norm": ({"residual": False, **FREE}, plots.RED, "--"),
    "plain, batch norm": ({"residual": False}, plots.RED, "-"),
    "v1, no norm": (FREE, plots.BLUE, "--"),
    "v1, batch norm": ({}, plots.BLUE, "-"),
    "v2, no norm": ({"style": "v2", **FREE}, plots.GREEN, "--"),
    "v2, batch norm": ({"style": "v2"}, plots.GREEN, "-"),
    "v2, no norm, scaled(0.5)": (
        {"style": "v2", "residual_init": "scaled(0.5)", **FREE},
        plots.ORANGE,
        "--",
    ),
    "v1, batch norm, zero_gamma": ({"residual_init": "zero_gamma"}, plots.BLACK, "-"),
    "v2, no norm, skipinit": (
        {"style": "v2", "residual_init": "skipinit", **FREE},
        plots.PURPLE,
        "--",
    ),
}
PANELS = {
    "variance": "variance of activations",
    "gradient": "norm of the branch's gradient, nats",
    "ratio": "‖branch‖ / ‖shortcut‖",
}
Found = dict[str, np.ndarray]


def measure(context: Context, blocks: int, fields: dict[str, Any], seeds: int) -> Found:
    """The three by block, geometric means over seeds."""
    model = context.model("resnet8_cifar", **tower(blocks), **fields)

    @jax.jit
    def probe(variables: Any) -> dict[str, jax.Array]:
        moments = probes.activations(model, variables, context.images, train=True)
        return {
            "variance": moments["variance"],
            "gradient": probes.gradients(model, variables, *context.batch)["parameters"],
            "ratio": probes.identity(model, variables, context.images, train=True)["ratio"],
        }

    runs = [jax.device_get(probe(context.start(model, seed))) for seed in range(seeds)]
    with np.errstate(divide="ignore"):
        return {key: np.exp(np.mean([np.log(run[key]) for run in runs], 0)) for key in PANELS}


def power(ratio: np.ndarray) -> float:
    """Exponent p of ratio ~ block^p, over the later three quarters of blocks."""
    block = np.arange(1, len(ratio) + 1)
    late = slice(len(ratio) // 4, None)
    return float(np.polyfit(np.log(block[late]), np.log(ratio[late]), 1)[0])


def draw(nets: dict[str, Found], path: pathlib.Path) -> None:
    """Variance, gradient and ratio over depth."""
    with plots.figure(path, columns=3, figsize=(14, 4.6)) as panels:
        for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
            for name, found in nets.items():
                values = found[key]
                if not (np.isfinite(values).all() and values.all()):
                    continue  # no shortcut, or a branch of zero
                _, colour, line = NETS[name]
                first = 1 if len(values) == len(found["ratio"]) else 0
                x = np.arange(first, first + len(values))
                axes.plot(x, values, line, color=colour, label=name)
            axes.set(title=title, xlabel="block", yscale="log")
        ratio = panels[2]
        at = np.arange(1, len(next(iter(nets.values()))["ratio"]) + 1)
        ratio.plot(at, 0.8 * at**-0.5, ":", color="grey", linewidth=1.2)
        ratio.annotate(
            "∝ 1/√block",
            (at[len(at) // 4], 0.8 * at[len(at) // 4] ** -0.5),
            (-4, -4),
            ha="right",
            va="top",
            textcoords="offset points",
            color="grey",
        )
        handles, labels = panels[0].get_legend_handles_labels()
        ratio.figure.legend(handles, labels, loc="outside lower center", ncols=5)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, draw, print growth a block of variance and gradient, and the power of the ratio."""
    opts = options(__doc__ or "", argv, seeds=3)
    context = Context(Settings())
    blocks = 10 if opts.quick else 50
    chosen = list(NETS)[:4] if opts.quick else list(NETS)
    nets = {name: measure(context, blocks, NETS[name][0], opts.seeds) for name in chosen}
    draw(nets, opts.out / "signal_propagation.png")
    numbers: dict[str, Any] = {}
    for name, found in nets.items():
        variance, gradient, ratio = (found[key] for key in PANELS)
        moves = bool(np.isfinite(ratio).all() and ratio.all())
        numbers[name] = {
            "variance, growth a block": float((variance[-1] / variance[0]) ** (1 / blocks)),
            "variance, last over stem": float(variance[-1] / variance[0]),
            "gradient, first block over last": float(gradient[0] / gradient[-1]),
            "gradient of the first block": float(gradient[0]),
            "ratio, first block": float(ratio[0]),
            "ratio, last block": float(ratio[-1]),
            "ratio, power of depth": power(ratio) if moves else np.nan,
        }
    save(opts.out, "signal_propagation", numbers)
    return numbers


if __name__ == "__main__":
    main()
