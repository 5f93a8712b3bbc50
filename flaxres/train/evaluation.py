"""Reading runs: evaluate a state or a checkpoint, and load the network of a run."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from flaxres.data import pipeline, sources
from flaxres.data.sources import DataInfo
from flaxres.nets.resnet import ResNet
from flaxres.train.checkpoint import Checkpoints, Restored, steps_on_disk
from flaxres.train.compiling import enable_compilation_cache
from flaxres.train.config import TrainConfig
from flaxres.train.drivers import Driver, choose_devices, make_driver
from flaxres.train.results import Result
from flaxres.train.state import TrainState, create_state, params_sha256
from flaxres.train.workdir import Workdir

Checkpoint = int | Literal["best"] | None


class Interrupted(Exception):
    """The evaluation was given up since the run is to stop."""


def run_evaluation(
    config: TrainConfig,
    info: DataInfo,
    driver: Driver,
    state: TrainState,
    interrupted: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Mean loss and accuracy over the held-out split, every example counted once.

    Args:
      config: of the run.
      info: of its data.
      driver: that `state` is placed by.
      state: as `driver.replicate` or a step gave it.
      interrupted: asked between batches; something true ends the evaluation with `Interrupted`.
    """
    batches = pipeline.prefetch(
        pipeline.eval_batches(
            info,
            info.eval_split,
            batch_size=config.eval_batch_size or config.batch_size,
            data_dir=config.data_dir,
            image_size=config.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.workers,
            max_corrupt=config.max_corrupt,
        ),
        driver.shard,
    )
    sums = []
    for batch in batches:
        if interrupted():
            batches.close()
            raise Interrupted
        sums.append(driver.eval(state, batch))
        if len(sums) > 2:  # do not run away from the device
            jax.block_until_ready(sums[-3])
    sums = jax.device_get(sums)
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    count = totals["count"]
    return {
        "loss": totals["loss_sum"] / count,
        "accuracy": totals["correct"] / count,
        "examples": count,
    }


def evaluate(workdir: str, checkpoint: Checkpoint = None, data_dir: str | None = None) -> Result:
    """Evaluate the newest checkpoint of a run, that of a step, or the best, on the held-out split.

    Args:
      workdir: of the run.
      checkpoint: a step, "best" (of the highest accuracy), or None for the newest.
      data_dir: where the data set lies now, if elsewhere than the run had it.

    Raises:
      ValueError: not a work directory, or no such checkpoint.
    """
    enable_compilation_cache()
    config, info, restored = _open(workdir, checkpoint, data_dir)
    config = _for_evaluation(config)
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


def _for_evaluation(config: TrainConfig) -> TrainConfig:
    """Without what only training asks of the devices and of a batch."""
    config = dataclasses.replace(
        config,
        batch_size=config.eval_batch_size or config.batch_size,
        accumulate=1,
        mixup=0.0,
        cutmix=0.0,
        batch_norm="sync",
        driver="auto",
        devices=None,
        fsdp=False,
    )
    if config.batch_size % len(choose_devices(config)):
        return dataclasses.replace(config, driver="device")
    return config


def load(
    workdir: str, checkpoint: Checkpoint = None, data_dir: str | None = None
) -> tuple[ResNet, dict[str, Any], TrainConfig, DataInfo]:
    """(model, variables, config, info) of a run, in the per-block layout, for looking into.

    Args:
      workdir: of the run.
      checkpoint: a step, "best" (of the highest accuracy), or None for the newest.
      data_dir: where the data set lies now, if elsewhere than the run had it.

    Raises:
      ValueError: not a work directory, or no such checkpoint.
    """
    from flaxres.identity import layout

    config, info, restored = _open(workdir, checkpoint, data_dir)
    model = restored.state.task.model
    return (*layout.unstack(model, restored.state.variables), config, info)


def _open(
    workdir: str, checkpoint: Checkpoint, data_dir: str | None
) -> tuple[TrainConfig, DataInfo, Restored]:
    work = Workdir.existing(workdir)
    config = dataclasses.replace(
        work.config(), workdir=str(workdir), coordinator=None, num_processes=None, process_id=None
    )
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=data_dir)
    if not steps_on_disk(work.checkpoints):
        raise ValueError(f"the run in {str(workdir)!r} has no checkpoint yet")
    info = sources.describe(config.data, config.data_dir)
    _, state = create_state(config, info)
    checkpoints = Checkpoints(work.checkpoints, config.keep)
    try:
        restored = checkpoints.restore(state, checkpoint)
    finally:
        checkpoints.close()
    if restored is None:
        raise ValueError(f"the run in {str(workdir)!r} has no checkpoint yet")
    return config, info, restored
