"""Which parameters have a gradient of exactly zero at the first steps, for every start?

Question  Zhang 2019 (Fixup, arXiv 1901.09321): with the last layer of each branch at zero only that
          layer moves at first, and the rest a step later. Which starts never wake up?
Command   python -m experiments.awakening [--quick]
Time      one and a half minutes on one CPU core; --quick under half of one.
Came out  as published. zero_last moves the last convolution at once and the rest a step later,
          zero_gamma the last norm, skipinit and rezero their gain; fixup, whose head is zero too,
          takes one step more. By step 2 every start is awake but zero_branch, of which no weight
          ever gets a gradient (with batch norm in v1 the last norm's bias alone does).
"""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.common import options, save, starts
from flaxres.cli import plots
from flaxres.identity import probes
from flaxres.identity.claims import Context, Settings

STEPS = 4
SMALL = {"stage_sizes": (2,), "widths": (16,)}
"""Two blocks that keep their shape: in a deeper net the others wake up alike."""
NORMS = {"batch": "batch norm", "none": "no norm"}
Row = dict[str, float]
"""Tensor to the first step with a gradient."""


def measure(context: Context, fields: dict[str, Any]) -> Row:
    """When each tensor of the last block's branch wakes up; infinity if it never does."""
    model = context.model("resnet8_cifar", **SMALL, **fields)
    alive = probes.awakening(model, context.start(model), *context.batch, steps=STEPS)
    leaves = jax.tree_util.tree_leaves_with_path(alive["stage1"]["block2"]["branch"])
    return {" ".join(key.key for key in path): first(np.asarray(shares)) for path, shares in leaves}


def first(shares: np.ndarray) -> float:
    """The first step at which any entry has a gradient."""
    return float(np.argmax(shares > 0)) if shares.any() else math.inf


def title(fields: dict[str, Any]) -> str:
    """Start and kind of net, as the picture names them."""
    kind = fields["style"] if fields["residual"] else "plain"
    return f"{kind}  {fields['residual_init']}"


def draw(groups: dict[str, dict[str, Row]], path: pathlib.Path) -> None:
    """A panel a norm, a row a start, a column a tensor; the first step with a gradient."""
    shape = {"width_ratios": [len(columns(rows)) for rows in groups.values()], "wspace": 0.03}
    with plots.figure(path, columns=2, figsize=(12, 6), gridspec_kw=shape) as panels:
        for axes, (name, rows) in zip(panels, groups.items(), strict=True):
            tensors = columns(rows)
            values = [[row.get(tensor, math.nan) for tensor in tensors] for row in rows.values()]
            # Dead shows as the brightest colour, behind the last step.
            shown = np.nan_to_num(np.array(values), nan=np.nan, posinf=STEPS)
            plots.heat(axes, shown, (0, STEPS - 1), text=lambda v: said(v), size=9)
            axes.set_xticks(range(len(tensors)), [t.replace(" ", "\n") for t in tensors], size=8.5)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set_title(name)
        about = "the first step at which each part of a branch has a gradient (grey: no such part)"
        panels[0].figure.suptitle(about, x=0.01, ha="left", fontsize=12)


def columns(rows: dict[str, Row]) -> list[str]:
    """Every tensor of any row, in the order in which they stand in the branch."""
    names = {name for row in rows.values() for name in row}
    kinds = ("conv", "norm", "gain", "bias")
    return sorted(names, key=lambda name: ([name.startswith(k) for k in kinds].index(True), name))


def said(step: float) -> str:
    """In a cell."""
    return "dead" if step >= STEPS else f"{step:.0f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure every start, draw, print when each tensor wakes up; null is never."""
    opts = options(__doc__ or "", argv)
    context = Context(Settings())
    groups: dict[str, dict[str, Row]] = {}
    for norm, name in NORMS.items():
        fits = [*starts(norms=(norm,)), *starts(("v1",), (norm,), residual=False)]
        groups[name] = {
            title(fields): measure(context, fields) for fields in fits[:: 4 if opts.quick else 1]
        }
    draw(groups, opts.out / "awakening.png")
    save(opts.out, "awakening", groups)
    return groups


if __name__ == "__main__":
    main()
