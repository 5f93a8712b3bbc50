"""Checkpoints by orbax: asynchronous, atomic, newest and best kept, independent of layout.

A checkpoint holds the whole `TrainState` as named arrays (`params/stage1/block1/…`, in the
per-block layout), and beside it the state of the data iterator, the seed and the configuration. So
it can be restored into the stacked layout, by another driver, on another number of devices.
"""

import contextlib
import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from flaxres.identity import layout
from flaxres.train.config import TrainConfig
from flaxres.train.optim import path_name
from flaxres.train.state import TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave."""

    step: int
    state: TrainState
    data: dict[str, int]
    """State of the data iterator."""


class Checkpoints:
    """The checkpoints of a work directory."""

    def __init__(self, directory: pathlib.Path, keep: int = 3) -> None:
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        preserve = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["accuracy"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserve,
                best_fn=lambda metrics: metrics["accuracy"],
                enable_async_checkpointing=True,
            ),
            item_names=("state", "run"),
        )
        self._ocp = ocp

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, int],
        config: TrainConfig,
        accuracy: float | None = None,
    ) -> None:
        """Begin to save a host state; returns once the arrays are copied.

        Raises OSError if this save or the one before it failed (such as a full disk); checkpoints
        that were complete stay.
        """
        run = {"data": data, "seed": config.seed, "config": config.to_json()}
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_named(state)), run=self._ocp.args.JsonSave(run)
        )
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with self._failures(step):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Return when nothing is being saved any more; raises as `save`."""
        with self._failures(self.latest()):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self, step: int | None) -> Any:
        try:
            yield
        except (ValueError, TypeError):
            raise
        except Exception as error:  # whatever the storage raises
            text = " ".join(str(error).split())[:300]
            raise OSError(
                f"checkpoint at step {step} could not be written to {self._directory} ({text}); "
                f"complete ones: {self.steps() or 'none'}"
            ) from error

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """The step of the highest evaluation accuracy, or None."""
        return self._manager.best_step()

    def restore(self, into: TrainState, step: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read, or that of a step; None if there is none.

        A damaged one is reported in a sentence and the one before it taken. `into` gives shapes,
        layout and everything that is no array.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise ValueError(
                    f"no checkpoint of step {step} in {self._directory} (there are: "
                    f"{', '.join(map(str, steps)) or 'none'})"
                )
            return self._read(into, step)
        for candidate in reversed(steps):
            try:
                return self._read(into, candidate)
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                _log.warning(
                    "checkpoint at step %d in %s is damaged (%s); trying the one before it",
                    candidate,
                    self._directory,
                    text,
                )
        if steps:
            raise ValueError(f"no checkpoint in {self._directory} can be read (tried {steps})")
        return None

    def _read(self, into: TrainState, step: int) -> Restored:
        target = _named(into)
        abstract = {k: np.empty(np.shape(v), np.asarray(v).dtype) for k, v in target.items()}
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(abstract), run=self._ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        arrays = restored["state"]
        if missing := sorted(set(target) - set(arrays)):
            raise ValueError(f"it lacks {missing[0]}")
        return Restored(step, _unnamed(into, arrays), restored["run"]["data"])


def _named(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by its name in the per-block layout."""
    leaves = jax.tree_util.tree_leaves_with_path(layout.unstack_tree(state))
    # Names with slashes would become folders.
    return {path_name(path)[1:].replace("/", "."): np.asarray(leaf) for path, leaf in leaves}


def _unnamed(into: TrainState, arrays: dict[str, Any]) -> TrainState:
    """The inverse of `_named`, in the layout of `into`."""
    per_block = layout.unstack_tree(into)
    paths, tree = jax.tree_util.tree_flatten_with_path(per_block)
    leaves = [np.asarray(arrays[path_name(path)[1:].replace("/", ".")]) for path, _ in paths]
    restored = jax.tree_util.tree_unflatten(tree, leaves)
    return layout.convert(into.task.model, restored)
