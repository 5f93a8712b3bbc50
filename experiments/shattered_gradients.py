"""How alike are the gradients at neighbouring inputs, at the start of deep plain and residual nets?

Question  Balduzzi 2017 (arXiv 1702.08591, Fig. 1 and §3): in plain nets the correlation of input
          gradients falls with depth L as 2^-L, towards white noise; in residual nets with batch
          norm about as 1/sqrt(L). Does it in convolutional nets, between two real images?
Command   python -m experiments.shattered_gradients [--quick] [--seeds 4]
Time      one minute on one CPU core; --quick ten seconds.
Came out  the direction as published, the rates slower, since the 64 points of a line lie close.
          With batch norm the cosine of neighbours is 0.88, 0.50, 0.00 and 0.00 in plain nets of 4,
          12, 34 and 100 layers, and 0.93, 0.88, 0.75 and 0.54 in residual ones. Norm is part of it:
          without, residual nets keep 0.92 at 100 layers, plain ones 0.61 at 34 and 0.02 at 100. A
          net that starts with zero_gamma keeps 0.96 at any depth.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import options, save, tower
from flaxres.cli import plots
from flaxres.identity import probes
from flaxres.identity.claims import Context, Settings

POINTS = 64
"""On each line between two images."""
NETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "plain, batch norm": ({"residual": False}, plots.RED, "s-"),
    "plain, no norm": ({"residual": False, "norm": "none"}, plots.ORANGE, "s--"),
    "residual, batch norm": ({}, plots.BLUE, "o-"),
    "residual, no norm": ({"norm": "none"}, plots.SKY, "o--"),
    "residual, zero_gamma": ({"residual_init": "zero_gamma"}, plots.BLACK, "o-"),
}
Found = dict[str, np.ndarray]
"""Of each line: autocorrelation `[lines, points]`, neighbours and any `[lines]`."""


def measure(context: Context, fields: dict[str, Any], blocks: int, lines: int) -> Found:
    """Gradients along lines between two images, each with a start of its own."""
    model = context.model("resnet8_cifar", **tower(blocks), **fields)

    @jax.jit
    def probe(variables: Any, first: jax.Array, last: jax.Array, key: jax.Array) -> Any:
        return probes.gradient_correlation(model, variables, first, last, key, points=POINTS)

    runs = [
        probe(
            context.start(model, seed),
            *context.images[2 * seed : 2 * seed + 2],
            jax.random.key(seed),
        )
        for seed in range(lines)
    ]
    return {key: np.asarray(jnp.stack([run[key] for run in runs])) for key in runs[0]}


def draw(nets: dict[str, dict[int, Found]], path: pathlib.Path) -> None:
    """Cosines over depth, and autocorrelations of the deepest nets."""
    with plots.figure(path, columns=2, figsize=(11, 4)) as (left, right):
        for name, by_depth in nets.items():
            _, colour, style = NETS[name]
            layers = [2 * blocks for blocks in by_depth]
            values = np.stack([found["neighbours"] for found in by_depth.values()])
            left.plot(layers, values.mean(1), style, color=colour, markersize=5, label=name)
            left.fill_between(
                layers, values.min(1), values.max(1), color=colour, alpha=0.12, linewidth=0
            )
            deepest = by_depth[max(by_depth)]["autocorrelation"].mean(0)
            right.plot(
                np.linspace(0, 1, POINTS)[: POINTS // 2],
                deepest[: POINTS // 2],
                style[1:],
                color=colour,
            )
        left.set(
            title="cosine of gradients at neighbouring inputs",
            xlabel="layers",
            xscale="log",
            ylim=(-0.05, 1.02),
        )
        left.set_xticks(layers, [str(n) for n in layers])
        left.minorticks_off()
        right.set(
            title=f"autocorrelation of gradients, {max(layers)} layers",
            xlabel="distance of inputs (1: between the two images)",
        )
        for axes in (left, right):
            axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        right.annotate(
            "white noise", (0.5, 0), (0, 3), textcoords="offset points", ha="right", color="grey"
        )
        handles, labels = left.get_legend_handles_labels()
        left.figure.legend(handles, labels, loc="outside right center")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, draw, print the cosines by depth, means over lines."""
    opts = options(__doc__ or "", argv, seeds=4)
    context = Context(Settings())
    depths = (2, 10) if opts.quick else (2, 6, 17, 50)
    chosen = list(NETS)[:4:2] if opts.quick else list(NETS)
    nets = {
        name: {blocks: measure(context, NETS[name][0], blocks, opts.seeds) for blocks in depths}
        for name in chosen
    }
    draw(nets, opts.out / "shattered_gradients.png")
    numbers = {
        f"{name}: {key}": {
            f"{2 * blocks} layers": float(found[part].mean()) for blocks, found in by_depth.items()
        }
        for name, by_depth in nets.items()
        for key, part in (("cosine of neighbours", "neighbours"), ("|cosine| of any two", "any"))
    }
    save(opts.out, "shattered_gradients", numbers)
    return numbers


if __name__ == "__main__":
    main()
