"""The loop around the step: data, evaluation, checkpoints, signals, metrics."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flaxres.data import pipeline, sources
from flaxres.data.sources import DataInfo
from flaxres.nets import onednn
from flaxres.train import distributed
from flaxres.train.checkpoint import Checkpoints, Restored, steps_on_disk
from flaxres.train.compiling import Background, abstract, enable_compilation_cache
from flaxres.train.config import TrainConfig, profile_range
from flaxres.train.distributed import PeerError
from flaxres.train.drivers import Driver, make_driver
from flaxres.train.evaluation import Interrupted, evaluate, load, run_evaluation
from flaxres.train.metrics import (
    InFlight,
    MetricsWriter,
    NoWriter,
    keep_batch,
    logging_to,
    run_log,
)
from flaxres.train.preempt import StopRequest, stop_requests
from flaxres.train.profile import Meter, Stopwatch, Tracer, seconds_since_start
from flaxres.train.results import Listener, NonFiniteError, Result
from flaxres.train.state import TrainState, create_state, input_shape, params_sha256
from flaxres.train.watch import Watch
from flaxres.train.workdir import Workdir, default_workdir

_MIN_EVAL_EVERY = 100


def train(config: TrainConfig, *, listener: Listener | None = None) -> Result:
    """Train as configured, going on with the run in the work directory if there is one.

    SIGTERM or Ctrl-C end it after the step under way, with everything saved, and are named in
    `Result.stopped_by`; a second Ctrl-C raises KeyboardInterrupt. With several processes, call it
    in each of them.

    Raises:
      ValueError: the configuration, data set or work directory does not fit; nothing is written.
      NonFiniteError: the loss was not finite; the batch is in the work directory.
      OSError: a checkpoint or the metrics could not be written; complete checkpoints stay.
      PeerError: another process of the run is lost.
    """
    listener = listener or Listener()
    config = config.validate()
    config = dataclasses.replace(config, workdir=config.workdir or default_workdir(config))
    enable_compilation_cache()
    distributed.initialize(config)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(distributed.watched())
        request = stack.enter_context(stop_requests(listener.on_stopping))
        info = sources.describe(config.data, config.data_dir)
        _check(config, info)
        driver = make_driver(config)
        _, state = create_state(config, info)
        work = Workdir(config.workdir or "")

        def claim() -> None:
            stack.enter_context(work.locked())
            work.claim(config)
            stack.enter_context(logging_to(work.log))

        distributed.share(claim)
        run_log.info("convolutions: %s", onednn.describe(config.conv_form))
        run = _Run(config, info, driver, work, listener, request, watch)
        stack.push(run.close)
        return run.go(state)


def _check(config: TrainConfig, info: DataInfo) -> None:
    """What a configuration asks of its data and its length."""
    if "train" not in info.splits:
        raise ValueError(
            f"data set {info.name!r} has no train split (found: {', '.join(info.splits)})"
        )
    _ = info.eval_split
    pipeline.local_size(config.batch_size, jax.process_count())
    pipeline.local_size(config.eval_batch_size or config.batch_size, jax.process_count())
    total = config.total_steps(info.splits["train"])
    if config.profile_steps and profile_range(config.profile_steps)[0] >= total:
        raise ValueError(
            f"profile_steps={config.profile_steps} begins behind the last of {total} steps, which "
            f"count from 0 to {total - 1}"
        )


class _Run:
    """One run: its parts, and the loop that moves them."""

    def __init__(
        self,
        config: TrainConfig,
        info: DataInfo,
        driver: Driver,
        work: Workdir,
        listener: Listener,
        request: StopRequest,
        watch: Watch | None,
    ) -> None:
        self.config, self.info, self.driver, self.work = config, info, driver, work
        self.listener, self.request, self.watch = listener, request, watch
        self.main = distributed.is_main()
        self.total = config.total_steps(info.splits["train"])
        epoch = max(1, info.splits["train"] // config.batch_size)
        self.eval_every = config.eval_every or max(_MIN_EVAL_EVERY, epoch)
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        self.stopwatch, self.meter, self.in_flight = Stopwatch(), Meter(), InFlight()
        steps = profile_range(config.profile_steps) if config.profile_steps else None
        self.tracer = Tracer(steps if self.main else None, work.trace)
        self.writer: MetricsWriter | NoWriter = NoWriter()
        self.first_step: float | None = None
        self.start = self.corrupt = 0
        self._checkpoints: Checkpoints | None = None
        self._best: float | None = None
        self._saved: int | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """Opened when needed, since orbax takes its time. On process 0 only."""
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(
                self.work.checkpoints, self.config.keep, self.work.damaged
            )
        return self._checkpoints

    def go(self, state: TrainState) -> Result:
        """Restore, train, evaluate, save."""
        newest = distributed.share(lambda: max(steps_on_disk(self.work.checkpoints), default=0))
        compiling = self._compile(state) if newest < self.total else None
        restored = self._restore(state)
        if restored is not None:
            state, self.start, self._saved = restored.state, restored.step, restored.step
            run_log.info("going on from the checkpoint of step %d", restored.step)
        step, stopped = self.start, None
        if self.main:
            self.writer = MetricsWriter(self.work, step)
        self.listener.on_start(self.config, self.total, self.driver, step)
        state = self.driver.replicate(state)
        evaluated = self._missed_evaluation(state, step)
        if step < self.total:
            with self._batches(restored.data["step"] if restored else 0) as batches:
                stopped = self._until_compiled(compiling)
                while step < self.total and stopped is None:
                    state = self._step(state, batches, step)
                    step += 1
                    stopped = self.request.agreed(step)
                    stopped, evaluated = self._after(state, step, stopped)
        elif evaluated is None:
            evaluated, stopped = self._evaluate(state), self.request.now()
        if step == self.total and evaluated is not None:
            stopped = None  # too late to end anything early
        return self._finish(state, step, evaluated, stopped, restored)

    def _compile(self, state: TrainState) -> Background:
        """Compile the step in the background, for the shapes of the state and of a batch."""
        local = pipeline.local_size(self.config.batch_size, jax.process_count())
        shape = (local, *input_shape(self.config, self.info)[1:])
        batch = {"image": np.zeros(shape, np.uint8), "label": np.zeros(local, np.int32)}
        placed = self.driver.replicate(state), self.driver.shard(batch)
        if jax.process_count() == 1:  # with more, pmap takes nothing but arrays
            placed = abstract(placed[0]), abstract(placed[1])
        return Background(lambda: self.driver.compile(*placed))

    def _until_compiled(self, compiling: Background | None) -> str | None:
        """Wait, loading meanwhile what will be needed later; a signal to stop by ends it."""
        later: list[Any] = [self.writer.events]
        if self.main:
            later.append(lambda: self.checkpoints)
        announced = False
        while compiling is not None and not compiling.done(within=0.05):
            if not announced:
                self.listener.on_compile()
                announced = True
            if stopped := self.request.now():
                return stopped
            if later:
                later.pop()()
        return self.request.now()

    def _restore(self, state: TrainState) -> Restored | None:
        """What process 0 reads, on all processes; they need not share a disk."""
        found: list[Restored | None] = [None]

        def read() -> tuple[int, dict[str, int], float | None] | None:
            if steps_on_disk(self.work.checkpoints):
                found[0] = self.checkpoints.restore(state)
            if found[0] is None:
                return None
            return found[0].step, found[0].data, self.checkpoints.best_accuracy()

        about = distributed.share(read)
        if about is None:
            return None
        step, data, self._best = about
        return Restored(step, distributed.broadcast(found[0].state if found[0] else state), data)

    @contextlib.contextmanager
    def _batches(self, start: int) -> Iterator[Iterator[Any]]:
        source = self._source(start)
        batches = pipeline.prefetch(source, self.driver.shard)
        try:
            first = next(batches)  # starts the thread, while the step is compiled in another
            yield itertools.chain([first], batches)
        finally:
            batches.close()
            self.corrupt = len(source.corrupt)

    def _source(self, start: int) -> pipeline.TrainIterator:
        return pipeline.train_iterator(
            self.info,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            data_dir=self.config.data_dir,
            image_size=self.config.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.workers,
            max_corrupt=self.config.max_corrupt,
            start_step=start,
        )

    def _step(self, state: TrainState, batches: Iterator[Any], step: int) -> TrainState:
        with self.stopwatch.during("data"):
            batch = next(batches)
        self.tracer.before(step)
        if self.watch is not None:
            self.watch.stepped(step)
        state, metrics = self.driver.step(state, batch)
        if self.tracer.after(step, metrics):
            run_log.info("trace of steps %s is in %s", self.config.profile_steps, self.work.trace)
        self.in_flight.push(step + 1, metrics)
        if self.first_step is None:
            jax.block_until_ready(metrics)
            self.first_step = seconds_since_start()
            self.stopwatch.restart()
            self._collect(everything=True)
            self.meter.begin()
        return state

    def _after(
        self, state: TrainState, step: int, stopped: str | None
    ) -> tuple[str | None, dict[str, float] | None]:
        """Log, evaluate and save as is due; what to stop by, and the evaluation."""
        due_eval = self._eval_due(step) and not stopped
        due_save = step % self.checkpoint_every == 0 or step == self.total
        self._collect(everything=bool(due_eval or due_save or stopped))
        evaluated = None
        if due_eval:
            evaluated = self._evaluate(state, step)
            stopped = self.request.now()
        if due_save or stopped or self._is_best(evaluated):
            self._save(state, step, evaluated)
        return stopped, evaluated

    def _eval_due(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total

    def _is_best(self, evaluated: dict[str, float] | None) -> bool:
        return evaluated is not None and (self._best is None or evaluated["accuracy"] > self._best)

    def _collect(self, everything: bool = False) -> None:
        """Write the numbers of the steps that are done."""
        for step, metrics in self.in_flight.pop(everything):
            self.meter.add(self.config.batch_size)
            self.writer.write(step, "train", metrics)
            if self._diverged(metrics):
                raise self._nonfinite(step, metrics)
            if step % self.config.log_every == 0 or step in (self.start + 1, self.total):
                self._report(step, metrics)
        if everything:
            self.meter.lap()

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        rate = self.meter.lap()
        shares = self.stopwatch.shares()
        self.listener.on_step(step, metrics, rate)
        self.writer.scalars(step, "time", {**shares, "images_per_second": rate})
        run_log.info(
            "step %d/%d  loss %.4f  accuracy %.2f %%  lr %.4f  %.0f images/s  time: %s",
            step,
            self.total,
            metrics["loss"],
            100 * metrics["accuracy"],
            metrics["lr"],
            rate,
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()),
        )
        if self._checkpoints is not None:
            self._checkpoints.check()

    def _diverged(self, metrics: dict[str, float]) -> bool:
        if not metrics["nonfinite"] or self.config.on_nonfinite == "skip":
            return False
        # In float16 a gradient that overflows is how the loss scale finds its size.
        return self.config.dtype != "float16" or not np.isfinite(metrics["loss"])

    def _nonfinite(self, step: int, metrics: dict[str, float]) -> NonFiniteError:
        """Keep the batch, which the seed and the step give again, and say where it is."""
        with contextlib.closing(self._source(step - 1)) as source:
            file = keep_batch(self.work, step, next(source), metrics)
        kept = f"the last good checkpoint is of step {self._saved}"
        if self._saved is None:
            kept = "there is no checkpoint yet"
        return NonFiniteError(
            f"loss or gradient not finite at step {step} (loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}); its batch is {file} and {kept}; try a lower --lr, "
            "--clip-norm 1 or --on-nonfinite skip"
        )

    def _missed_evaluation(self, state: TrainState, step: int) -> dict[str, float] | None:
        """The evaluation that was due at the checkpoint, where the run was stopped before it."""
        writer = self.writer

        def missed() -> bool:
            return isinstance(writer, MetricsWriter) and not writer.evaluated(step)

        if not step or not self._eval_due(step) or not distributed.share(missed):
            return None
        return self._evaluate(state, step)

    def _evaluate(self, state: TrainState, step: int | None = None) -> dict[str, float] | None:
        """Evaluate, and write it down as of a step; None where a signal came in between."""
        with self.stopwatch.during("eval"), self._busy():
            try:
                evaluated = run_evaluation(
                    self.config, self.info, self.driver, state, self.request.now
                )
            except Interrupted:
                return None
        self.meter.begin()
        if step is not None:
            self.writer.write(step, "eval", evaluated)
            self.listener.on_eval(step, evaluated)
            run_log.info(
                "step %d/%d  test accuracy %.2f %%  test loss %.4f",
                step,
                self.total,
                100 * evaluated["accuracy"],
                evaluated["loss"],
            )
        return evaluated

    def _save(self, state: TrainState, step: int, evaluated: dict[str, float] | None) -> None:
        with self.stopwatch.during("save"), self._busy():
            if self.main or self.config.fsdp:
                host = self.driver.unreplicate(state)
            if self.main:
                self.writer.flush()
                accuracy = evaluated["accuracy"] if evaluated else None
                self.checkpoints.save(step, host, {"step": step}, self.config, accuracy)
        if evaluated is not None and self._is_best(evaluated):
            self._best = evaluated["accuracy"]
        self._saved = step
        self.listener.on_checkpoint(step)
        self.meter.begin()

    def _busy(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch is None else self.watch.busy()

    def _finish(
        self,
        state: TrainState,
        step: int,
        evaluated: dict[str, float] | None,
        stopped: str | None,
        restored: Restored | None,
    ) -> Result:
        if stopped and self._saved != step:  # before the first step
            self._save(state, step, None)
        host = self.driver.unreplicate(state)
        with self.stopwatch.during("save"), self._busy():
            if self._checkpoints is not None:
                self._checkpoints.wait()
        found = evaluated or {"loss": float("nan"), "accuracy": float("nan"), "examples": 0}
        result = Result(
            step=step,
            loss=found["loss"],
            accuracy=found["accuracy"],
            examples=int(found["examples"]),
            images_per_second=self.meter.mean(),
            time_to_first_step=self.first_step,
            params_sha256=params_sha256(host.params),
            workdir=str(self.work.path),
            resumed_from=restored.step if restored else None,
            stopped_by=stopped,
            skipped=int(host.skipped),
            corrupt=sum(distributed.gather(self.corrupt)),
            shares=self.stopwatch.shares(),
        )
        run_log.info(
            "stopped by %s at step %d" if stopped else "%s at step %d", stopped or "done", step
        )
        self.listener.on_done(result)
        return result

    def close(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End traces and files. A save under way is finished, except at a second Ctrl-C."""
        if error is not None:
            run_log.error("%s", error or type(error).__name__)
        closing = [self.tracer.close, self.writer.close]
        if self._checkpoints is not None and not isinstance(error, KeyboardInterrupt):
            closing.append(self._checkpoints.close)
        for close in closing:
            # The error that ends the run is not to be hidden by one that follows from it.
            with contextlib.suppress(*((Exception,) if error else ())):
                close()


__all__ = [
    "Listener",
    "NonFiniteError",
    "PeerError",
    "Result",
    "default_workdir",
    "enable_compilation_cache",
    "evaluate",
    "load",
    "run_evaluation",
    "train",
]
