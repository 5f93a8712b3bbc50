"""Numbers of a run: metrics.jsonl, TensorBoard events, log.txt, and reading them back."""

import collections
import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flaxres.train.workdir import Workdir, replacing, write_json

run_log = logging.getLogger("flaxres.run")
"""Its lines go to log.txt alone: what a person is shown is the listener's to say."""
run_log.propagate = False
run_log.setLevel(logging.INFO)
run_log.addHandler(logging.NullHandler())  # else logging prints errors where there is no log.txt


class MetricsWriter:
    """Appends lines {"step": …, "split": "train" | "eval", …} and TensorBoard scalars.

    Opened for a run that goes on from `step`, it first takes away the lines of later steps, so
    that none is there twice. Raises OSError, with the file's name, where it cannot write.
    """

    def __init__(self, work: Workdir, step: int = 0) -> None:
        self._path = work.metrics_file
        self._evaluated: set[int] = set()
        with self._failures():
            if self._path.exists():
                kept = _truncate(self._path, step)
                self._evaluated = {line["step"] for line in kept if line["split"] == "eval"}
            self._file = self._path.open("a", buffering=1)
        self._events_dir = work.events
        self._start = step
        self._events: Any = None

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line, handed to the system at once; numbers that JSON lacks are written as null."""
        line = {"step": step, "split": split, **{k: _plain(v) for k, v in values.items()}}
        with self._failures():
            self._file.write(json.dumps(line) + "\n")
        if split == "eval":
            self._evaluated.add(step)
        self.scalars(step, split, values)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """For TensorBoard alone."""
        events = self.events()
        for name, value in values.items():
            events.add_scalar(f"{group}/{name}", value, step)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of this step is written."""
        return step in self._evaluated

    def events(self) -> Any:
        """TensorBoard's file; opened late, since its library takes a second to load."""
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._events_dir), purge_step=self._start + 1)
        return self._events

    def flush(self) -> None:
        """Hand everything to the system."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        with self._failures():
            self._file.close()
        if self._events is not None:
            self._events.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self._path} could not be written: {error.strerror or error}") from None


class NoWriter:
    """Writes nothing: what processes other than the first are given."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Do nothing."""

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Do nothing."""

    def events(self) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class InFlight:
    """Metrics of steps that the device may still be computing.

    The host runs `ahead` steps before the device: the device never waits for the host to look at
    numbers, and the host never runs away with memory.
    """

    def __init__(self, ahead: int = 2) -> None:
        self._ahead = ahead
        self._steps: collections.deque[tuple[int, Any]] = collections.deque()

    def push(self, step: int, metrics: Any) -> None:
        """A step has been handed to the device."""
        for value in metrics.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        self._steps.append((step, metrics))

    def pop(self, everything: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps that must be done by now, with their numbers; or all, when they are."""
        while len(self._steps) > (0 if everything else self._ahead):
            step, metrics = self._steps.popleft()
            fetched = jax.device_get(metrics)
            yield step, {name: float(value) for name, value in fetched.items()}


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


def keep_batch(
    work: Workdir, step: int, batch: dict[str, np.ndarray], metrics: dict[str, float]
) -> pathlib.Path:
    """Write a batch of this process (npz) and what came of it (json) to look at; give the file."""
    file = work.nonfinite / f"step{step}-process{jax.process_index()}.npz"
    with replacing(file) as scratch:
        np.savez(scratch, allow_pickle=False, **batch)
    write_json(
        file.with_suffix(".json"), {"step": step, **{k: repr(v) for k, v in metrics.items()}}
    )
    return file


@contextlib.contextmanager
def logging_to(file: pathlib.Path) -> Iterator[None]:
    """Append what a run does, and every warning of flaxres, to a file, one plain line each."""
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = run_log, logging.getLogger("flaxres")
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _truncate(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to a step, atomically; they are returned."""
    kept = [line for line in read(path) if line["step"] <= step]
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
