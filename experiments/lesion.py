"""What is left of a trained net when blocks are zeroed, taken out or put into another order?

Question  Veit 2016 (arXiv 1605.06431, Fig. 3 and 5): a trained residual net loses little by any one
          block, and degrades smoothly as more are taken out or moved; a plain net is ruined.
Command   python -m experiments.lesion [--quick] [--seeds 3]
Time      about two minutes on two CPU cores; --quick under one.
Came out  as published, and more so where branches started at zero. Of 95 % on the digits, resnet20
          with zero gamma keeps 94 % without any one block, 82 % without six of seven, and 95 % in
          any order. With the default start the first block is missed (38 %), the others hardly
          (82 to 95 %). The plain twin falls to chance by any one block zeroed, taken out or moved.
"""

import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.common import options, save
from flaxres.cli import plots
from flaxres.identity import branches
from flaxres.identity.claims import Context, Settings

NETS: dict[str, tuple[str, str]] = {
    "residual, zero gamma": ("resnet20_cifar", "zero_gamma"),
    "residual": ("resnet20_cifar", "default"),
    "plain": ("plain20_cifar", "default"),
}
STYLES = ((plots.GREEN, "D"), (plots.BLUE, "o"), (plots.RED, "s"))
Net = tuple[Any, Any]
Found = dict[str, dict[Any, list[float]]]
"""Measurement to (block, or number of blocks) to test accuracies in %."""


def zeroed(context: Context, net: Net) -> dict[Any, list[float]]:
    """With one branch zeroed, by block that keeps the shape: plain ones then give zeros."""
    rows = branches.select(net[0], lambda row: row.keeps_shape)
    return {
        row.address: [context.accuracy(net[0], branches.zero(*net, row.address))] for row in rows
    }


def taken_out(context: Context, net: Net) -> dict[Any, list[float]]:
    """With one block taken out, by block; with shortcuts the same as zeroed."""
    rows = branches.select(net[0], lambda row: row.keeps_shape)
    return {row.address: [context.accuracy(*branches.drop(*net, row.address))] for row in rows}


def without(net: Net, addresses: set[str]) -> Net:
    """The net without these blocks."""
    model, variables = branches.drop(*net, lambda row: row.address in addresses)
    return model, variables


def several_out(context: Context, net: Net, draws: int = 12) -> dict[Any, list[float]]:
    """With k blocks taken out, by k, for up to `draws` choices of them."""
    rows = branches.select(net[0], lambda row: row.keeps_shape)
    rng = np.random.default_rng(0)
    found: dict[Any, list[float]] = {0: [context.accuracy(*net)]}
    for count in range(1, len(rows)):
        choices = [
            {row.address for row in some}
            for some in itertools.combinations(rows, count)
            if sum(row.stage == 1 for row in some) < net[0].stage_sizes[0]
        ]
        chosen = [choices[i] for i in rng.permutation(len(choices))[:draws]]
        found[count] = [context.accuracy(*without(net, gone)) for gone in chosen]
    return found


def reordered(context: Context, net: Net) -> dict[Any, list[float]]:
    """By how many blocks stand elsewhere, for every order that keeps shapes."""
    openers = {row.stage for row in branches.select(net[0], "*") if not row.keeps_shape}
    orders = [
        [
            order
            for order in itertools.permutations(range(1, size + 1))
            if stage not in openers or order[0] == 1
        ]
        for stage, size in enumerate(net[0].stage_sizes, 1)
    ]
    found: dict[Any, list[float]] = {}
    for chosen in itertools.product(*orders):
        changed, moved = net, 0
        for stage, order in enumerate(chosen, 1):
            moved += sum(block != place for place, block in enumerate(order, 1))
            changed = branches.reorder(*changed, f"stage{stage}", order)
        found.setdefault(moved, []).append(context.accuracy(*changed))
    return dict(sorted(found.items()))


MEASUREMENTS = {
    "zeroed": zeroed,
    "taken out": taken_out,
    "several out": several_out,
    "reordered": reordered,
}


def measure(context: Context, name: str, init: str, seeds: int) -> Found:
    """All measurements of a kind of net, those of several seeds together, in %."""
    found: Found = {measurement: {} for measurement in MEASUREMENTS}
    for seed in range(seeds):
        fitted = context.fit(name, seed, residual_init=init)
        for measurement, function in MEASUREMENTS.items():
            for key, values in function(context, (fitted.model, fitted.variables)).items():
                found[measurement].setdefault(key, []).extend(100 * value for value in values)
    return found


def draw(nets: dict[str, Found], path: pathlib.Path) -> None:
    """One block, several, another order: mean and range of the accuracy."""
    shown = ("taken out", "several out", "reordered")
    with plots.figure(path, columns=3, sharey=True, figsize=(12, 3.8)) as panels:
        for axes, measurement in zip(panels, shown, strict=True):
            for (name, found), (colour, marker) in zip(nets.items(), STYLES, strict=True):
                values = found[measurement]
                x = range(len(values)) if axes is panels[0] else list(values)
                axes.plot(
                    x,
                    [np.mean(v) for v in values.values()],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    label=name,
                )
                low, high = ([f(v) for v in values.values()] for f in (min, max))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(10, color="grey", linewidth=0.8, linestyle=":")
        names = [address.replace("/", "\n") for address in nets["plain"]["taken out"]]
        panels[0].set_xticks(range(len(names)), names, size=7.5)
        panels[0].set(title="one block taken out", ylabel="test accuracy, %", ylim=(0, 102))
        panels[1].set(title="several taken out", xlabel="blocks taken out")
        panels[2].set(title="put into another order", xlabel="blocks out of place")
        panels[0].legend(loc="center right", bbox_to_anchor=(1, 0.42))
        panels[2].annotate(
            "chance", (0, 10), (2, 3), textcoords="offset points", color="grey", size=8
        )


def table(nets: dict[str, Found]) -> str:
    """In Markdown: the mean accuracy without each block, beside that of the whole net."""
    lines = [f"| branch set to zero | {' | '.join(nets)} |", "|---|" + "---|" * len(nets)]
    rows = {"none": [np.mean(found["several out"][0]) for found in nets.values()]}
    for address in nets["plain"]["zeroed"]:
        rows[f"`{address}`"] = [np.mean(found["zeroed"][address]) for found in nets.values()]
    return "\n".join(
        lines
        + [f"| {row} | {' | '.join(f'{v:.1f}' for v in cells)} |" for row, cells in rows.items()]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, injure, draw; print the table and the mean accuracies in %."""
    opts = options(__doc__ or "", argv, seeds=3)
    context = Context(Settings(opts.quick, opts.seeds))
    nets = {name: measure(context, *net, opts.seeds) for name, net in NETS.items()}
    draw(nets, opts.out / "lesion.png")
    numbers: dict[str, Any] = {
        f"{name}: {measurement}": {
            str(key): round(float(np.mean(v)), 1) for key, v in found[measurement].items()
        }
        for name, found in nets.items()
        for measurement in found
    }
    save(opts.out, "lesion", numbers)
    print(table(nets))
    return numbers


if __name__ == "__main__":
    main()
