"""The loop around the step: data, evaluation, checkpoints, signals, metrics; and reading runs."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flaxres.data import pipeline, sources
from flaxres.data.sources import DataInfo
from flaxres.nets.resnet import ResNet
from flaxres.train import distributed
from flaxres.train.checkpoint import Checkpoints
from flaxres.train.config import TrainConfig, profile_range
from flaxres.train.drivers import Driver, choose_devices, make_driver
from flaxres.train.metrics import MetricsWriter, NoWriter
from flaxres.train.preempt import StopRequest, stop_requests
from flaxres.train.profile import Stopwatch, Tracer, seconds_since_start
from flaxres.train.state import TrainState, create_state, params_sha256
from flaxres.train.workdir import Workdir

_log = logging.getLogger(__name__)
_MIN_EVAL_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run, or an evaluation, came to."""

    step: int
    loss: float
    """Mean cross-entropy of the held-out split."""
    accuracy: float
    """Share of the held-out split classified right."""
    examples: int
    """Examples evaluated."""
    images_per_second: float
    """While training, after the first step."""
    time_to_first_step: float | None
    """Seconds from the start of the process; None where no step was taken."""
    params_sha256: str
    workdir: str
    resumed_from: int | None = None
    stopped_by: str | None = None
    """SIGTERM or SIGINT, where one ended the run early."""
    skipped: int = 0
    """Updates left out because they were not finite."""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of the time spent in step, data, eval and save."""


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite, and the run is to stop at that."""


class Listener:
    """What a run tells while it goes; all methods may be left out."""

    def on_start(self, config: TrainConfig, total: int, driver: Driver, step: int) -> None:
        """The run begins at `step` of `total`."""

    def on_compile(self) -> None:
        """The first step is being compiled."""

    def on_step(self, step: int, metrics: dict[str, float], images_per_second: float) -> None:
        """Steps up to `step` are done; metrics are those of the last."""

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint is being written."""

    def on_done(self, result: Result) -> None:
        """The run is over."""


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the environment says otherwise.

    JAX_COMPILATION_CACHE_DIR names another folder, FLAXRES_COMPILATION_CACHE=0 turns it off.
    """
    if os.environ.get("FLAXRES_COMPILATION_CACHE", "1") == "0":
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(sources.cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def default_workdir(config: TrainConfig) -> str:
    """runs/MODEL-DATA of the current folder, with the seed where it is not 0."""
    suffix = f"-seed{config.seed}" if config.seed else ""
    return str(pathlib.Path("runs") / f"{config.model}-{config.data}{suffix}")


def train(config: TrainConfig, *, listener: Listener | None = None) -> Result:
    """Train as configured, going on with the run in the work directory if there is one.

    Raises:
      ValueError: the configuration, data set or work directory does not fit; nothing is written.
      NonFiniteError: the loss was not finite; the batch is in the work directory.
      OSError: a checkpoint could not be written.
    """
    listener = listener or Listener()
    config = config.validate()
    config = dataclasses.replace(config, workdir=config.workdir or default_workdir(config))
    enable_compilation_cache()
    distributed.initialize(config)
    info = sources.describe(config.data, config.data_dir)
    _check_splits(config, info)
    driver = make_driver(config)
    _, state = create_state(config, info)
    work = Workdir(config.workdir)
    existed = _claim(work, config)
    restored = _restore(work, config, state) if existed else None
    run = _Run(config, info, driver, work, listener)
    with contextlib.closing(run):
        return run.go(restored.state if restored else state, restored)


def _check_splits(config: TrainConfig, info: DataInfo) -> None:
    if "train" not in info.splits:
        raise ValueError(
            f"data set {info.name!r} has no train split (found: {', '.join(info.splits)})"
        )
    _ = info.eval_split
    pipeline.local_size(config.batch_size, jax.process_count())


def _claim(work: Workdir, config: TrainConfig) -> bool:
    """`work.claim` on process 0; the others see what it said."""
    if jax.process_count() == 1:
        return work.claim(config)
    from jax.experimental import multihost_utils

    existed, failure = False, None
    if distributed.is_main():
        try:
            existed = work.claim(config)
        except ValueError as error:
            failure = error
    flags = np.array([existed, failure is not None])
    existed, failed = multihost_utils.broadcast_one_to_all(flags)
    if failed:
        raise failure or ValueError(f"process 0 refused the work directory {str(work.path)!r}")
    return bool(existed)


def _restore(work: Workdir, config: TrainConfig, state: TrainState) -> Any:
    if not work.checkpoints.is_dir():
        return None
    checkpoints = Checkpoints(work.checkpoints, config.keep)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


class _Run:
    """One run: its parts, and the loop that moves them."""

    def __init__(
        self,
        config: TrainConfig,
        info: DataInfo,
        driver: Driver,
        work: Workdir,
        listener: Listener,
    ) -> None:
        self.config, self.info, self.driver = config, info, driver
        self.work, self.listener = work, listener
        self.total = config.total_steps(info.splits["train"])
        epoch = max(1, info.splits["train"] // config.batch_size)
        self.eval_every = config.eval_every or max(_MIN_EVAL_EVERY, epoch)
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        self.watch = Stopwatch()
        steps = profile_range(config.profile_steps) if config.profile_steps else None
        self.tracer = Tracer(steps, work.trace)
        self.writer: Any = NoWriter()
        self.first_step: float | None = None
        self._checkpoints: Checkpoints | None = None
        self._pending: list[tuple[int, Any]] = []
        self._clock: tuple[float, int] | None = None
        self._rates: list[tuple[int, float]] = []
        self._shown = False

    @property
    def checkpoints(self) -> Checkpoints:
        """Opened with the first save, since orbax takes its time."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self.work.checkpoints, self.config.keep)
        return self._checkpoints

    def go(self, state: TrainState, restored: Any) -> Result:
        start = restored.step if restored else 0
        if distributed.is_main():
            self.writer = MetricsWriter(self.work, start)
        self.listener.on_start(self.config, self.total, self.driver, start)
        state = self.driver.replicate(state)
        stopped, evaluated = None, None
        with stop_requests() as request, self._batches(start) as batches:
            step = start
            while step < self.total and stopped is None:
                state = self._step(state, batches, step, first=step == start)
                step += 1
                stopped = request.agreed(step, self.config.log_every)
                evaluated = self._after(state, step, last=step == self.total or stopped)
        if evaluated is None and stopped is None:
            evaluated = self._evaluate(state)
        return self._finish(state, step, evaluated, stopped, restored)

    @contextlib.contextmanager
    def _batches(self, start: int) -> Iterator[Any]:
        source = pipeline.train_iterator(
            self.info,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            data_dir=self.config.data_dir,
            image_size=self.config.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.workers,
            start_step=start,
        )
        batches = pipeline.prefetch(source, self.driver.shard)
        try:
            yield batches
        finally:
            batches.close()

    def _step(self, state: TrainState, batches: Any, step: int, first: bool) -> TrainState:
        with self.watch.during("data"):
            batch = next(batches)
        if first:
            self.listener.on_compile()
        self.tracer.before(step)
        state, metrics = self.driver.step(state, batch)
        self.tracer.after(step, metrics)
        if first:
            jax.block_until_ready(metrics)
            self.first_step = seconds_since_start()
            self._clock = (time.perf_counter(), step + 1)
        self._pending.append((step + 1, metrics))
        return state

    def _after(self, state: TrainState, step: int, last: Any) -> dict[str, float] | None:
        """Log, evaluate and save as is due; the evaluation, if there was one."""
        due_eval = step % self.eval_every == 0 or step == self.total
        due_save = step % self.checkpoint_every == 0 or last
        if step % self.config.log_every == 0 or due_eval or due_save or not self._shown:
            self._flush()
        evaluated = None
        if due_eval:
            evaluated = self._evaluate(state)
            self.writer.write(step, "eval", evaluated)
            self.listener.on_eval(step, evaluated)
        if due_save:
            self._save(state, step, evaluated)
        if due_eval or due_save:
            self._clock = (time.perf_counter(), step)
        return evaluated

    def _flush(self) -> None:
        """Fetch and write what has been computed since the last time."""
        if not self._pending:
            return
        fetched = [
            (step, {name: float(value) for name, value in metrics.items()})
            for step, metrics in jax.device_get(self._pending)
        ]
        self._pending = []
        step = fetched[-1][0]
        rate = self._rate(step)
        for number, metrics in fetched:
            self.writer.write(number, "train", metrics)
            if metrics["nonfinite"] and self.config.on_nonfinite == "stop":
                raise self._nonfinite(number, metrics)
        self.listener.on_step(step, fetched[-1][1], rate)
        self._shown = True

    def _rate(self, step: int) -> float:
        """Images a second since the last flush, evaluation or save."""
        began, first = self._clock or (time.perf_counter(), step)
        now = time.perf_counter()
        if step > first:
            self._rates.append(((step - first) * self.config.batch_size, now - began))
        self._clock = (now, step)
        return self._rates[-1][0] / self._rates[-1][1] if self._rates else 0.0

    def _nonfinite(self, step: int, metrics: dict[str, float]) -> NonFiniteError:
        """Keep the batch, which the seed and the step give again, and say where it is."""
        from flaxres.train.workdir import replacing, write_json

        source = pipeline.train_iterator(
            self.info,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            data_dir=self.config.data_dir,
            image_size=self.config.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=step - 1,
        )
        file = self.work.nonfinite / f"step{step}-process{jax.process_index()}.npz"
        with replacing(file) as scratch:
            np.savez(scratch, **next(source))
        write_json(file.with_suffix(".json"), {"step": step, **{k: repr(v) for k, v in
                                                                metrics.items()}})
        return NonFiniteError(
            f"loss or gradient not finite at step {step} (loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}); its batch is {file}, the last good checkpoint is in "
            f"{self.work.checkpoints}; try a lower --lr, --clip-norm 1 or --on-nonfinite skip"
        )

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        with self.watch.during("eval"):
            return run_evaluation(self.config, self.info, self.driver, state)

    def _save(self, state: TrainState, step: int, evaluated: dict[str, float] | None) -> None:
        with self.watch.during("save"):
            host = self.driver.unreplicate(state)
            accuracy = evaluated["accuracy"] if evaluated else None
            self.checkpoints.save(step, host, {"step": step}, self.config, accuracy)
        self.listener.on_checkpoint(step)

    def _finish(
        self,
        state: TrainState,
        step: int,
        evaluated: dict[str, float] | None,
        stopped: str | None,
        restored: Any,
    ) -> Result:
        host = self.driver.unreplicate(state)
        with self.watch.during("save"):
            if self._checkpoints is not None:
                self._checkpoints.wait()
        images, seconds = (sum(column) for column in zip(*self._rates, strict=True)) if (
            self._rates
        ) else (0, 1.0)
        result = Result(
            step=step,
            loss=evaluated["loss"] if evaluated else float("nan"),
            accuracy=evaluated["accuracy"] if evaluated else float("nan"),
            examples=int(evaluated["examples"]) if evaluated else 0,
            images_per_second=images / seconds,
            time_to_first_step=self.first_step,
            params_sha256=params_sha256(host.params),
            workdir=str(self.work.path),
            resumed_from=restored.step if restored else None,
            stopped_by=stopped,
            skipped=int(host.skipped),
            shares=self.watch.shares(),
        )
        self.listener.on_done(result)
        return result

    def close(self) -> None:
        """End traces and files; a save under way is finished."""
        self.tracer.close()
        self.writer.close()
        if self._checkpoints is not None:
            self._checkpoints.close()


def run_evaluation(
    config: TrainConfig, info: DataInfo, driver: Driver, state: TrainState
) -> dict[str, float]:
    """Mean loss and accuracy over the held-out split, every example counted once."""
    batch_size = config.eval_batch_size or config.batch_size
    batches = pipeline.eval_batches(
        info,
        info.eval_split,
        batch_size=batch_size,
        data_dir=config.data_dir,
        image_size=config.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sums = [driver.eval(state, batch) for batch in pipeline.prefetch(batches, driver.shard)]
    totals = {name: sum(float(part[name]) for part in jax.device_get(sums)) for name in sums[0]}
    count = totals["count"]
    return {
        "loss": totals["loss_sum"] / count,
        "accuracy": totals["correct"] / count,
        "examples": count,
    }


def _open(workdir: str, checkpoint: int | None) -> tuple[TrainConfig, DataInfo, Any]:
    work = Workdir.existing(workdir)
    config = dataclasses.replace(
        work.config(), workdir=str(workdir), coordinator=None, num_processes=None, process_id=None
    )
    info = sources.describe(config.data, config.data_dir)
    _, state = create_state(config, info)
    if not work.checkpoints.is_dir():
        raise ValueError(f"the run in {workdir!r} has no checkpoint yet")
    checkpoints = Checkpoints(work.checkpoints, config.keep)
    try:
        restored = checkpoints.restore(state, checkpoint)
    finally:
        checkpoints.close()
    if restored is None:
        raise ValueError(f"the run in {workdir!r} has no checkpoint yet")
    return config, info, restored


def evaluate(workdir: str, checkpoint: int | None = None) -> Result:
    """Evaluate the newest checkpoint of a run, or that of a step, on the held-out split."""
    enable_compilation_cache()
    config, info, restored = _open(workdir, checkpoint)
    config = dataclasses.replace(config, driver="auto", devices=None, fsdp=False)
    if config.batch_norm != "sync" or (config.eval_batch_size or config.batch_size) % len(
        choose_devices(config)
    ):
        config = dataclasses.replace(config, driver="device")
    driver = make_driver(config)
    began = time.perf_counter()
    found = run_evaluation(config, info, driver, driver.replicate(restored.state))
    return Result(
        step=restored.step,
        loss=found["loss"],
        accuracy=found["accuracy"],
        examples=int(found["examples"]),
        images_per_second=found["examples"] / (time.perf_counter() - began),
        time_to_first_step=None,
        params_sha256=params_sha256(restored.state.params),
        workdir=str(workdir),
    )


def load(
    workdir: str, checkpoint: int | None = None
) -> tuple[ResNet, dict[str, Any], TrainConfig, DataInfo]:
    """(model, variables, config, info) of a run, in the per-block layout, for looking into."""
    from flaxres.identity import layout

    config, info, restored = _open(workdir, checkpoint)
    model = restored.state.task.model
    return (*layout.unstack(model, restored.state.variables), config, info)


__all__ = [
    "Listener",
    "NonFiniteError",
    "Result",
    "StopRequest",
    "default_workdir",
    "evaluate",
    "load",
    "train",
]
