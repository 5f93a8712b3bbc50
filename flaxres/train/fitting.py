"""Training in memory, without a work directory: what experiments and claims are made with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flaxres.data import pipeline, sources
from flaxres.data.sources import DataInfo
from flaxres.nets.resnet import ResNet
from flaxres.train.compiling import enable_compilation_cache
from flaxres.train.config import TrainConfig
from flaxres.train.drivers import make_driver
from flaxres.train.evaluation import run_evaluation
from flaxres.train.state import TrainState, create_state, state_of


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What came out of a training in memory."""

    config: TrainConfig
    info: DataInfo
    model: ResNet
    state: TrainState
    """On the host."""
    history: dict[str, np.ndarray]
    """Per step, `[steps]`: loss, accuracy, lr, grad_norm of the training batches."""
    accuracy: float
    """On the held-out split."""
    loss: float

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return self.state.variables

    def last_accuracy(self, steps: int = 20) -> float:
        """Mean training accuracy of the last batches."""
        return float(np.mean(self.history["accuracy"][-steps:]))


def fit(
    config: TrainConfig,
    *,
    start: tuple[ResNet, Any] | None = None,
    watch: Callable[[int, TrainState], None] | None = None,
    watch_every: int = 0,
) -> Fitted:
    """Train as configured and evaluate, keeping everything in memory.

    Args:
      config: what belongs to a run on disk or of many processes is passed over: workdir, workers
        and max_corrupt (but for the evaluation), log_every, eval_every, checkpoint_every, keep,
        on_nonfinite (updates that are not finite are left out), profile_steps, coordinator,
        num_processes and process_id.
      start: (model, variables) to begin from, in place of the configuration's own.
      watch: called as watch(step, state) with the state on the device, before the first step,
        every `watch_every` steps and after the last.
      watch_every: steps between calls; 0 for the first and the last only.
    """
    enable_compilation_cache()
    info = sources.describe(config.data, config.data_dir)
    driver = make_driver(config.validate())
    model, state = create_state(config, info)
    if start is not None:
        model, variables = start
        state = state_of(config, info, model, jax.device_get(variables))
    state = driver.replicate(state)
    total = config.total_steps(info.splits["train"])
    batches = pipeline.train_iterator(
        info,
        batch_size=config.batch_size,
        seed=config.seed,
        data_dir=config.data_dir,
        image_size=config.image_size,
    )
    collected = []
    for step in range(total):
        if watch and (step == 0 or (watch_every and step % watch_every == 0)):
            watch(step, state)
        state, metrics = driver.step(state, driver.shard(next(batches)))
        collected.append(metrics)
    if watch:
        watch(total, state)
    history = {
        name: np.array([float(metrics[name]) for metrics in jax.device_get(collected)])
        for name in collected[0]
    }
    found = run_evaluation(config, info, driver, state)
    return Fitted(
        config,
        info,
        model,
        driver.unreplicate(state),
        history,
        accuracy=found["accuracy"],
        loss=found["loss"],
    )
