"""Checkpoints by orbax: asynchronous, atomic, newest and best kept, independent of layout.

A checkpoint holds the whole `TrainState` as named arrays (`params.stage1.block1…`, in the
per-block layout), and beside it the state of the data iterator, the seed, the configuration and a
checksum of every array. So it can be restored into the stacked layout, by another driver, on
another number of devices or processes, and a damaged one is known as such. Only process 0 reads
and writes; `flaxres.train.distributed` carries what it read to the others.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from flaxres.identity import layout
from flaxres.train.config import TrainConfig
from flaxres.train.optim import path_name
from flaxres.train.state import TrainState

_log = logging.getLogger(__name__)
_METRIC = "accuracy"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave."""

    step: int
    state: TrainState
    """On the host, in the layout that was asked for."""
    data: dict[str, int]
    """State of the data iterator."""


class MismatchError(ValueError):
    """A checkpoint is whole, but of another network."""


class Checkpoints:
    """The checkpoints of a work directory.

    Args:
      directory: where they lie, or are to lie.
      keep: how many of the newest stay, beside the one of the best accuracy.
      damaged: where unreadable ones are moved to, so that a run can go on past them; None leaves
        the directory as it is, which is right for whoever only reads.
    """

    def __init__(
        self, directory: pathlib.Path, keep: int = 3, damaged: pathlib.Path | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        _quieten_orbax()
        self._ocp = ocp
        self._directory = directory.absolute()
        self._damaged = damaged
        writable = damaged is not None
        if writable:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._delete_torn()
        policies = ocp.checkpoint_managers
        preserve = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[_METRIC],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve,
            best_fn=lambda metrics: metrics[_METRIC],
            read_only=not writable,
            create=False,
            # What a kill left half-written; in somebody else's run it may still be growing.
            cleanup_tmp_directories=writable,
            enable_async_checkpointing=True,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("state", "run")
        )

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, int],
        config: TrainConfig,
        accuracy: float | None = None,
    ) -> None:
        """Begin to save a host state; returns while the files are being written.

        Raises OSError if this save or the one before it failed (such as a full disk); checkpoints
        that were complete stay.
        """
        arrays = _named(state)
        run = {
            "data": data,
            "seed": config.seed,
            "config": config.to_json(),
            "checksums": {name: _checksum(array) for name, array in arrays.items()},
        }
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(arrays), run=self._ocp.args.JsonSave(run)
        )
        metrics = None if accuracy is None else {_METRIC: accuracy}
        with self._failures():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def check(self) -> None:
        """Raise OSError if a save that was begun has failed; does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being saved any more; raises as `save`."""
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the storage raises
            for half in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
            complete = steps_on_disk(self._directory)
            having = f"step {complete[-1]}" if complete else "none"
            raise OSError(
                f"a checkpoint could not be written to {self._directory} ({_brief(error)}); the "
                f"last complete one: {having}"
            ) from error

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the highest evaluation accuracy, or None."""
        step = self._manager.best_step()
        return None if step is None or self._accuracy(step) is None else step

    def best_accuracy(self) -> float | None:
        """The highest accuracy that was given to `save` and whose checkpoint is here."""
        step = self.best()
        return None if step is None else self._accuracy(step)

    def _accuracy(self, step: int) -> float | None:
        metrics = self._manager.metrics(step)
        return metrics[_METRIC] if metrics else None

    def restore(
        self, into: TrainState, step: int | Literal["best"] | None = None
    ) -> Restored | None:
        """The newest checkpoint that can be read, or that of a step; None if there is none.

        A damaged one is reported in a sentence and the one before it taken. `into` gives shapes,
        layout and everything that is no array.

        Raises:
          ValueError: there is none of that step, none that can be read, or no best one.
        """
        steps = self.steps()
        if step == "best":
            step = self._best_of(steps)
        if step is not None:
            return self._read_step(into, step, steps)
        damaged: list[int] = []
        for candidate in reversed(steps):
            try:
                restored = self._read(into, candidate)
                self._set_aside(damaged)
                return restored
            except MismatchError:
                raise
            except Exception as error:  # whatever the storage raises
                _log.warning(
                    "checkpoint of step %d in %s is damaged (%s); going back to the one before it",
                    candidate,
                    self._directory,
                    _brief(error),
                )
                damaged.append(candidate)
        if steps:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read (tried steps "
                f"{', '.join(map(str, steps))}): start again in another --workdir"
            )
        return None

    def _best_of(self, steps: list[int]) -> int:
        best = self.best()
        if best is None:
            raise ValueError(
                f"no checkpoint in {self._directory} has been evaluated, so that none is best "
                f"(there are: {_listed(steps)})"
            )
        return best

    def _read_step(self, into: TrainState, step: int, steps: list[int]) -> Restored:
        if step not in steps:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory} (there are: {_listed(steps)})"
            )
        try:
            return self._read(into, step)
        except MismatchError:
            raise
        except Exception as error:
            raise ValueError(
                f"checkpoint of step {step} in {self._directory} cannot be read ({_brief(error)}); "
                f"there are: {_listed(steps)}"
            ) from error

    def _read(self, into: TrainState, step: int) -> Restored:
        expected = _named(into)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(
                {name: np.empty(array.shape, array.dtype) for name, array in expected.items()}
            ),
            run=self._ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=args)
        arrays, run = restored["state"], restored["run"]
        for name, checksum in run["checksums"].items():
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"{name} is not what was saved")
        # Orbax gives arrays of the size that was stored, whatever size was asked for.
        if differing := _differing(arrays, expected):
            raise MismatchError(
                f"checkpoint of step {step} in {self._directory} is of another network or another "
                f"number of classes ({'; '.join(differing[:3])})"
            )
        return Restored(step, _unnamed(into, arrays), run["data"])

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints out of the way of new ones of the same steps."""
        if self._damaged is None or not steps:
            return
        self._damaged.mkdir(parents=True, exist_ok=True)
        for step in steps:
            target = self._damaged / str(step)
            shutil.rmtree(target, ignore_errors=True)
            (self._directory / str(step)).rename(target)
        self._manager.reload()

    def _delete_torn(self) -> None:
        """A kill while an old checkpoint was being deleted leaves part of it: delete the rest."""
        for step in steps_on_disk(self._directory):
            folder = self._directory / str(step)
            if not all((folder / item).is_dir() for item in ("state", "run")):
                shutil.rmtree(folder, ignore_errors=True)


def steps_on_disk(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a directory, ascending, without loading orbax."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def _named(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by its name in the per-block layout."""
    leaves = jax.tree_util.tree_leaves_with_path(layout.unstack_tree(state))
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _unnamed(into: TrainState, arrays: dict[str, Any]) -> TrainState:
    """The inverse of `_named`, in the layout of `into`."""
    paths, tree = jax.tree_util.tree_flatten_with_path(layout.unstack_tree(into))
    leaves = [np.asarray(arrays[_name(path)]) for path, _ in paths]
    return layout.convert(into.task.model, jax.tree_util.tree_unflatten(tree, leaves))


def _name(path: tuple[Any, ...]) -> str:
    # With slashes, storage would make a folder of every scope.
    return path_name(path)[1:].replace("/", ".")


def _differing(stored: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Sentences such as "params.head.bias: [10] there, [7] here"."""
    return [
        f"{name}: {list(stored[name].shape)} there, {list(array.shape)} here"
        for name, array in expected.items()
        if stored[name].shape != array.shape
    ]


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _brief(error: BaseException) -> str:
    """The first words of an error, on one line; storage puts stack traces into its messages."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text or "File too large" in text:
        return "no space left on the disk"
    return text[:200] or type(error).__name__


def _quieten_orbax() -> None:
    """Orbax logs every failure with stack traces; ours is one sentence, raised or logged once."""
    logger = logging.getLogger("absl")
    if any(isinstance(known, _NotOrbax) for known in logger.filters):
        return
    logger.addFilter(_NotOrbax())
    report = sys.unraisablehook

    def report_unless_late(unraisable: Any) -> None:
        # Other reads or writes of the same checkpoint that end after the first has failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_unless_late


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname
