"""Pictures: one look for all of them, colour-blind safe, readable in print."""

import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from flaxres.train import metrics
from flaxres.train.workdir import replacing

# Okabe & Ito 2008, told apart by every kind of colour vision and in grey by their lightness.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


@contextmanager
def figure(path: pathlib.Path, columns: int = 1, rows: int = 1, **keywords: Any) -> Iterator[Any]:
    """Axes in the house style (an array if several); saved to `path`, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        size = keywords.pop("figsize", (4.6 * columns, 3.4 * rows))
        fig, axes = plt.subplots(rows, columns, figsize=size, **keywords)
        try:
            yield axes
            with replacing(pathlib.Path(path)) as scratch:
                fig.savefig(scratch)
        finally:
            plt.close(fig)


def heat(
    axes: Any,
    values: np.ndarray,
    limits: tuple[float, float],
    log: bool = False,
    text: Callable[[float], str] | None = None,
    size: float = 8.0,
) -> None:
    """A table `[rows, columns]` as colours with the numbers in them; exact 0 white, NaN grey."""
    from matplotlib.colors import LogNorm, Normalize

    shown = np.ma.masked_where(~np.isfinite(values) | (log & (values == 0)), values)
    norm: Any = (LogNorm if log else Normalize)(*limits, clip=True)
    axes.grid(False)
    axes.set_facecolor("white")
    axes.imshow(shown, cmap="cividis", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.add_patch(_cell(column, row))
            continue
        dark = (value != 0 or not log) and norm(value) < 0.5
        colour = "white" if dark else "black"
        said = (text or short)(value)
        axes.text(column, row, said, ha="center", va="center", color=colour, size=size)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.5, alpha=1)
    axes.tick_params(which="both", length=0)


def short(value: float) -> str:
    """A number in few characters: 0.52, 12, 3e-4, nan."""
    if value == 0 or abs(value) >= 0.01 or np.isnan(value):
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _cell(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="lightgrey", edgecolor="none")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the finite ones of the last `window` values, NaN if there are none."""
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)

    def over_window(numbers: np.ndarray) -> np.ndarray:
        sums = np.cumsum(np.insert(numbers, 0, 0.0))
        return sums[ends] - sums[starts]

    counts = over_window(finite.astype(float))
    means = over_window(np.where(finite, values, 0.0)) / np.maximum(counts, 1)
    return np.where(counts > 0, means, np.nan)


def training_curves(
    source: pathlib.Path, path: pathlib.Path, title: str = "", training: str = "training"
) -> None:
    """Loss, error and learning rate of a run, from its metrics.jsonl.

    training: what the loss of training is to be called, where it is not the held-out loss.
    """
    if not source.exists():
        return
    steps = {split: metrics.read(source, split) for split in ("train", "eval")}
    if not steps["train"]:
        return
    train = {
        k: np.array([_number(line, k) for line in steps["train"]])
        for k in ("step", "loss", "accuracy", "lr")
    }
    held = {
        k: np.array([_number(line, k) for line in steps["eval"]])
        for k in ("step", "loss", "accuracy")
    }
    window = max(1, len(train["step"]) // 30)
    with figure(path, columns=3) as (left, middle, right):
        for axes, key, scale, name, of_training in (
            (left, "loss", 1.0, "loss", training),
            (middle, "accuracy", 100.0, "error, %", "training"),
        ):
            for data, label, colour, marker in (
                (train, of_training, BLUE, ""),
                (held, "held out", RED, "o"),
            ):
                values = data[key] * scale if key == "loss" else 100 - data[key] * scale
                if not len(values):
                    continue
                if not marker:
                    axes.plot(data["step"], values, color=colour, alpha=0.2, linewidth=0.8)
                    values = smooth(values, window)
                axes.plot(
                    data["step"], values, color=colour, marker=marker, markersize=4, label=label
                )
            axes.set(xlabel="step", title=name)
            axes.legend()
        left.set_yscale("log")
        _plain_numbers(left)
        # From 1 % on in powers of ten, or the end of a good run would lie on the axis.
        middle.set_yscale("symlog", linthresh=1)
        middle.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        middle.set_ylim(0, 110)
        if len(held["step"]):
            error = 100 - 100 * held["accuracy"][-1]
            loss = held["loss"][-1]
            if np.isfinite(loss):  # else there is no place to write it at
                left.annotate(short(loss), (held["step"][-1], loss), **_END)
            middle.annotate(f"{error:.1f} %", (held["step"][-1], error), **_END)
        right.plot(train["step"], train["lr"], color=BLACK)
        right.set(xlabel="step", title="learning rate")
        right.set_ylim(0, None)
        left.figure.suptitle(title, x=0.01, ha="left", fontweight="bold")


_END: Any = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right", "color": RED}


def _plain_numbers(axes: Any) -> None:
    """0.5 rather than 5 · 10^-1 on a logarithmic axis, and not too many of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _number(line: dict[str, Any], key: str) -> float:
    value = line.get(key)
    return float("nan") if value is None else float(value)
