"""How far is each block, and the whole net, from the identity before the first step?

Question  Goyal 2017 (arXiv 1706.02677), Zhang 2019 (1901.09321), De & Smith 2020 (2002.10444) and
          others start branches at or near zero, so that a deep net begins as a shallow one. Which
          starts make blocks exactly the identity, in nets of which style?
Command   python -m experiments.identity_at_init [--quick]
Time      ten seconds on two CPU cores.
Came out  on resnet20 and the digits: with zero_gamma, zero_last, rezero, skipinit, fixup (and the
          dead zero_branch) every block that keeps its shape is the identity and the net its
          skeleton, exactly. layerscale(1e-4) is 1e-4 away, but in v2 with batch norm the net is 7 %
          away: the padded channels of its skeleton are 0, and the final norm blows up what stands
          there. scaled(0.5) is nearer, not near. A plain net is the identity with dirac, no norm.
"""

import math
import pathlib
from typing import Any

import numpy as np

from experiments.common import options, save, starts
from flaxres.cli import plots
from flaxres.identity import branches, probes
from flaxres.identity.claims import Context, Settings

NORMS = {"batch": "batch norm", "none": "no norm"}
Row = dict[str, float]
"""Address, or "net", to distance."""


def measure(context: Context, fields: dict[str, Any]) -> Row:
    """‖block(x) − x‖/‖x‖ of every block that keeps its shape; the net's from its skeleton."""
    model = context.model("resnet20_cifar", **fields)
    variables = context.start(model)
    report = probes.identity(model, variables, context.images, train=True)
    rows = branches.table(model, variables)
    distances = zip(rows, np.asarray(report["distance"]), strict=True)
    return {row.address: float(d) for row, d in distances if row.keeps_shape} | {
        "net": float(report["net"])
    }


def draw(groups: dict[str, dict[str, Row]], path: pathlib.Path) -> None:
    """A panel a style, a row a start: distances as colour and number, exact zeros in white."""
    widths = {"wspace": 0.02}
    with plots.figure(path, columns=len(groups), figsize=(15, 4.4), gridspec_kw=widths) as panels:
        for axes, (title, rows) in zip(panels, groups.items(), strict=True):
            places = list(next(iter(rows.values())))
            if all(math.isnan(row["net"]) for row in rows.values()):
                places.remove("net")
            values = np.array([[row[place] for place in places] for row in rows.values()])
            plots.heat(axes, values, (1e-4, 1), log=True)
            axes.set_xticks(range(len(places)), [p.replace("/", "\n") for p in places], size=7)
            axes.set_yticks(range(len(rows)), list(rows), size=8.5)
            axes.set_title(title)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure every start, draw, print the largest distance of a block and that of the net."""
    opts = options(__doc__ or "", argv)
    context = Context(Settings())
    groups: dict[str, dict[str, Row]] = {}
    for title, combinations in (
        ("post-activation (v1)", starts(("v1",))),
        ("pre-activation (v2)", starts(("v2",))),
        ("plain", starts(("v1",), residual=False)),
    ):
        groups[title] = {
            f"{fields['residual_init']}, {NORMS[fields['norm']]}": measure(context, fields)
            for fields in combinations[:: 4 if opts.quick else 1]
        }
    draw(groups, opts.out / "identity_at_init.png")
    numbers = {
        f"{title}: {name}": {
            "farthest block": max(value for place, value in row.items() if place != "net"),
            "net": row["net"],
        }
        for title, rows in groups.items()
        for name, row in rows.items()
    }
    save(opts.out, "identity_at_init", numbers)
    return numbers


if __name__ == "__main__":
    main()
