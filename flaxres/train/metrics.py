"""Numbers of a run: metrics.jsonl, TensorBoard events, and reading them back."""

import json
import math
import pathlib
from typing import Any

from flaxres.train.workdir import Workdir, replacing


class MetricsWriter:
    """Appends lines {"step": …, "split": "train" | "eval", …} and TensorBoard scalars.

    Opened for a run that goes on from `step`, it first takes away the lines of later steps, so
    that none is there twice.
    """

    def __init__(self, work: Workdir, step: int = 0) -> None:
        self._path = work.metrics_file
        if self._path.exists():
            _truncate(self._path, step)
        self._file = open(self._path, "a", buffering=1)
        self._events_dir = work.events
        self._start = step
        self._events: Any = None

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line, flushed; numbers that JSON lacks are written as null."""
        line = {"step": step, "split": split, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._tensorboard().add_scalar(f"{split}/{name}", value, step)

    def _tensorboard(self) -> Any:
        if self._events is None:
            from tensorboardX import SummaryWriter  # slow to import; not before the first step

            self._events = SummaryWriter(str(self._events_dir), purge_step=self._start + 1)
        return self._events

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class NoWriter:
    """Writes nothing: what processes other than the first are given."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read(path: pathlib.Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of one split or all; a torn last line is passed over."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if split is None or line["split"] == split:
            lines.append(line)
    return lines


def _truncate(path: pathlib.Path, step: int) -> None:
    kept = [line for line in read(path) if line["step"] <= step]
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
