"""Tables of what was measured, the targets beside it, and the picture of cost against depth."""

import dataclasses
import pathlib
import re
from typing import Any

from experiments.benchmark.sides import LINEN, ONEDNN, OURS, REMAT, TORCH
from flaxres.cli import plots


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure, where it stands in the results, and what it should reach."""

    figure: str
    path: tuple[str, ...]
    goal: float
    at_most: bool = False
    inverse: bool = False
    """The path holds a speed; the figure is a time."""

    def value(self, results: dict[str, Any]) -> float | None:
        """What was measured, None where it was not, or in a small form only."""
        found: Any = {} if results.get(self.path[0], {}).get("quick") else results
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            found = found["median"]
        return None if found is None else 1 / found if self.inverse else found


def _speed(kind: str, net: str, side: str, other: str) -> tuple[str, ...]:
    return kind, net, "speed", f"{side} / {other}"


TARGETS = (
    Target(
        "resnet50 training, pure JAX ÷ PyTorch", _speed("training", "resnet50", OURS, TORCH), 0.9
    ),
    Target(
        "resnet50 training, with oneDNN ÷ PyTorch",
        _speed("training", "resnet50", ONEDNN, TORCH),
        1.1,
    ),
    Target(
        "resnet50 training, pure JAX ÷ plain linen",
        _speed("training", "resnet50", OURS, LINEN),
        2.2,
    ),
    Target(
        "resnet50 inference, pure JAX ÷ PyTorch", _speed("inference", "resnet50", OURS, TORCH), 1.5
    ),
    Target(
        "resnet50 inference, with oneDNN ÷ PyTorch",
        _speed("inference", "resnet50", ONEDNN, TORCH),
        1.5,
    ),
    Target(
        "resnet56_cifar training, step time ÷ plain linen",
        _speed("training", "resnet56_cifar", OURS, LINEN),
        0.4,
        at_most=True,
        inverse=True,
    ),
    Target("compile time, 1202 layers ÷ 20", ("compile", "deepest / shallowest"), 1.3, True),
    Target(
        "temporary memory, 110 layers, remat ÷ none", ("memory", "remat / none at 110"), 0.4, True
    ),
    Target("first step on the digits, cold, s", ("first_step", "cold"), 12, True),
    Target("first step on the digits, warm, s", ("first_step", "warm"), 5, True),
    Target(
        "bytes of a resnet50 step on TPU v5e ÷ plain linen",
        ("tpu", "flaxres / plain linen", "bytes_accessed"),
        0.85,
        True,
    ),
)


def targets(results: dict[str, Any]) -> str:
    """Every target with what was measured, in Markdown."""
    lines = ["| figure | target | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value = target.value(results)
        sign = "≤" if target.at_most else "≥"
        if value is None:
            measured, verdict = "not measured", ""
        else:
            reached = value <= target.goal if target.at_most else value >= target.goal
            measured, verdict = f"{value:.2f}", "reached" if reached else "short"
        lines.append(f"| {target.figure} | {sign} {target.goal:g} | {measured} | {verdict} |")
    return "\n".join(lines)


def table(case: str, found: dict[str, Any]) -> str:
    """One case in Markdown."""
    if case in ("training", "inference"):
        return _speeds(found)
    if case == "memory":
        return _by_depth(found, lambda numbers: f"{numbers['temporary'] / 2**20:.0f}", "MiB")
    if case == "compile":
        return _by_depth(found, lambda seconds: f"{seconds:.1f}", "s")
    rows = [f"| {name} | {_said(value)} |" for name, value in found.items() if name not in _ABOUT]
    return "\n".join(["| | |", "|---|---|", *rows])


_ABOUT = ("quick", "conditions", "took")


def _speeds(found: dict[str, Any]) -> str:
    lines = [
        "| network | side | ms a step (quartiles) | images/s | ÷ PyTorch | ÷ plain linen |",
        "|---|---|---|---|---|---|",
    ]
    for net, numbers in found.items():
        if net in _ABOUT:
            continue
        for side, seconds in numbers["seconds"].items():
            times = _spread({k: 1000 * v for k, v in seconds.items()})
            ratios = [
                _spread(numbers["speed"].get(f"{side} / {other}")) for other in (TORCH, LINEN)
            ]
            rate = f"{numbers['images_per_second'][side]:.4g}"
            lines.append(f"| {net} | {side} | {times} | {rate} | {' | '.join(ratios)} |")
        for side, use in numbers.get("accelerator", {}).items():
            lines.append(f"| {net} | {side} | {_said(use)} | | | |")
    return "\n".join(lines)


def _by_depth(found: dict[str, Any], said: Any, unit: str) -> str:
    sides = [name for name, value in found.items() if name.startswith((OURS, LINEN))]
    sides = [side for side in sides if isinstance(found[side], dict)]
    depths = sorted({depth for side in sides for depth in found[side]}, key=int)
    lines = [f"| {unit}, at depth | {' | '.join(depths)} |", "|---|" + "---|" * len(depths)]
    for side in sides:
        cells = [said(found[side][d]) if d in found[side] else "" for d in depths]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    rest = {k: v for k, v in found.items() if k not in (*sides, *_ABOUT)}
    return "\n".join([*lines, "", _said(rest)])


def _spread(numbers: dict[str, float] | None) -> str:
    if numbers is None:
        return ""
    return f"{numbers['median']:.3g} ({numbers['low']:.3g} to {numbers['high']:.3g})"


def _said(value: Any) -> str:
    if isinstance(value, dict):
        if "median" in value:
            return _spread(value)
        return ", ".join(f"{name}: {_said(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_LINES = (
    (OURS, plots.BLUE, "o", "-"),
    (REMAT, plots.GREEN, "D", "--"),
    (LINEN, plots.RED, "s", "-"),
)


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Compile time, temporary memory and step time against depth, on log axes."""
    panels = {
        "seconds to compile": _compile_lines(results.get("compile", {})),
        "temporary memory, MiB": _memory_lines(results.get("memory", {})),
        "milliseconds a step": _step_lines(results.get("training", {})),
    }
    with plots.figure(path, columns=3, figsize=(12, 3.6)) as axes:
        for panel, (title, lines) in zip(axes, panels.items(), strict=True):
            for side, colour, marker, dash in _LINES:
                points = sorted(lines.get(side, {}).items())
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        color=colour,
                        marker=marker,
                        linestyle=dash,
                        markersize=5,
                        label=side,
                    )
            panel.set(title=title, xlabel="layers", xscale="log", yscale="log")
            depths = sorted({depth for points in lines.values() for depth in points})
            panel.set_xticks(depths, [str(depth) for depth in depths])
            panel.minorticks_off()
            if not depths:
                panel.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
        handles, labels = axes[1].get_legend_handles_labels()
        if not labels:
            handles, labels = axes[2].get_legend_handles_labels()
        if labels:
            axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _compile_lines(found: dict[str, Any]) -> dict[str, dict[int, float]]:
    return {
        side: {int(depth): seconds for depth, seconds in found[side].items()}
        for side in (OURS, LINEN)
        if side in found
    }


def _memory_lines(found: dict[str, Any]) -> dict[str, dict[int, float]]:
    names = {OURS: f"{OURS}, remat=none", REMAT: f"{OURS}, remat=block", LINEN: LINEN}
    return {
        side: {int(depth): bytes_["temporary"] / 2**20 for depth, bytes_ in found[name].items()}
        for side, name in names.items()
        if name in found
    }


def _step_lines(found: dict[str, Any]) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for net, numbers in found.items():
        if match := re.fullmatch(r"resnet(\d+)_cifar", net):
            for side, seconds in numbers["seconds"].items():
                lines.setdefault(side, {})[int(match[1])] = 1000 * seconds["median"]
    return lines
