"""`flaxres claims`: measure every claim of the argument; tables, numbers and pictures."""

import dataclasses
import html
import pathlib
import time
from typing import Any

import numpy as np

from flaxres.cli import options, plots, report


@dataclasses.dataclass(frozen=True)
class Claims:
    """Measure every claim of the argument for residual learning on real data. Example:

    flaxres claims --quick --out claims
    """

    quick: bool = False
    """A small form: one seed, shallower nets, within three minutes on two cores."""
    out: str = "claims"
    """Folder for claims.json, claims.md, claims.html and the pictures."""
    only: tuple[str, ...] = ()
    """Names of claims to measure; default all."""
    seeds: int | None = None
    """Trainings of each net; default 3, or 1 with --quick."""
    data: str = "digits"
    """Data set."""
    data_dir: str | None = None
    """TFDS directory."""
    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Claims, argv, "claims")
    if command.seeds is not None and command.seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {command.seeds}")
    from flaxres.identity import claims
    from flaxres.train.compiling import enable_compilation_cache

    chosen = claims.select(command.only or None)
    settings = claims.Settings(
        quick=command.quick,
        seeds=command.seeds or (1 if command.quick else 3),
        data=command.data,
        data_dir=command.data_dir,
    )
    enable_compilation_cache()
    context = claims.Context(settings)
    _ = context.info  # an unknown data set is refused before anything is measured
    began = time.monotonic()

    def watch(outcome: Any) -> None:
        options.say(
            f"[{time.monotonic() - began:4.0f} s] {outcome.claim.sentence}\n"
            f"         {outcome.number}\n         → {outcome.verdict.text}",
            command.json,
        )

    names = [claim.name for claim in chosen]
    outcomes = claims.run(settings, names, watch, context)
    out = pathlib.Path(command.out)
    numbers = write(outcomes, out, settings)
    options.say(f"table, numbers and pictures in {out}", command.json)
    if command.json:
        options.print_json(numbers)
    return 0


def write(outcomes: list[Any], out: pathlib.Path, settings: Any) -> dict[str, Any]:
    """Write claims.json, .md, .html and a picture for each claim that has lines."""
    from flaxres.train.workdir import write_json, write_text

    numbers = {
        "settings": dataclasses.asdict(settings),
        "claims": [
            {
                "name": o.claim.name,
                "sentence": o.claim.sentence,
                "source": o.claim.source,
                "measured": o.claim.measured,
                "number": o.number,
                "numbers": o.numbers,
                "verdict": o.verdict.text,
            }
            for o in outcomes
        ],
    }
    for outcome in outcomes:
        if outcome.series is not None:
            draw(outcome, out / f"{outcome.claim.name}.png")
    write_json(out / "claims.json", numbers)
    write_text(out / "claims.md", markdown(outcomes))
    write_text(out / "claims.html", report.page("Claims", _html(outcomes, out)))
    return numbers


def markdown(outcomes: list[Any]) -> str:
    """The table for a README."""
    rows = [("claim", "source", "measured", "verdict"), ("---",) * 4]
    rows += [
        (o.claim.sentence, o.claim.source, o.number, f"**{o.verdict.text}**") for o in outcomes
    ]
    # A bar within a cell would end it.
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "".join(f"| {line} |\n" for line in lines)


def _html(outcomes: list[Any], out: pathlib.Path) -> str:
    parts = []
    for o in outcomes:
        parts.append(
            f"<h2>{html.escape(o.claim.sentence)}</h2><p><b>{html.escape(o.verdict.text)}</b>: "
            f"{html.escape(o.number)}</p><p>{html.escape(o.claim.source)}. Measured: "
            f"{html.escape(o.claim.measured)}.</p>"
        )
        picture = out / f"{o.claim.name}.png"
        if o.series is not None and picture.is_file():
            parts.append(report.picture(picture, o.claim.sentence))
    return "\n".join(parts)


_COLOURS = {"plain": (plots.RED, plots.ORANGE), "resnet": (plots.BLUE, plots.SKY)}


def draw(outcome: Any, path: pathlib.Path) -> None:
    """One panel: a line a label, the mean and range of its seeds."""
    series = outcome.series
    groups: dict[str, list[tuple[list[float], list[float]]]] = {}
    for label, line in series.lines.items():
        groups.setdefault(label.split(" · ")[0], []).append(line)
    used: dict[str, int] = {}
    with plots.figure(path, figsize=(6.4, 4.0)) as axes:
        for label, runs in groups.items():
            family = next((kind for kind in _COLOURS if label.startswith(kind)), "resnet")
            place = used.get(family, 0)
            used[family] = place + 1
            colour = _COLOURS[family][place % 2]
            x, ys = runs[0][0], np.array([y for _, y in runs])
            few = len(x) < 30
            axes.plot(
                x,
                ys.mean(0),
                color=colour,
                label=label.replace("resnet", "residual"),
                marker="o" if few else "",
                markersize=4,
                linestyle="--" if place % 2 else "-",
            )
            if len(runs) > 1:
                axes.fill_between(x, ys.min(0), ys.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=series.x, ylabel=series.y)
        axes.set_title(_wrap(f"{outcome.claim.sentence} {outcome.verdict.text}."), fontsize=9.5)
        if series.log_y:
            axes.set_yscale("log")
        if series.log_x:
            axes.set_xscale("log")
        axes.legend()


def _wrap(text: str, width: int = 72) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
