"""The input pipeline alone beside the step that it feeds, in images/s."""

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from experiments.benchmark import environment, timing
from flaxres.data import pipeline, sources
from flaxres.train import presets
from flaxres.train.config import TrainConfig
from flaxres.train.drivers import make_driver
from flaxres.train.state import create_state


def measure(quick: bool, data_dir: str | None = None) -> dict[str, Any]:
    """Images/s of pipeline and step for the digits, Fashion-MNIST if prepared, and photographs."""
    found: dict[str, Any] = {"digits": _set(presets.get("digits"), quick)}
    fashion = dataclasses.replace(presets.get("fashion_mnist"), data_dir=data_dir)
    try:
        sources.describe(fashion.data, data_dir)
    except ValueError as error:
        print(f"  fashion_mnist is left out: {error}")
    else:
        found["fashion_mnist"] = _set(fashion, quick)
    with tempfile.TemporaryDirectory() as folder:
        count = 24 if quick else 256
        print(f"  drawing {count} photographs", flush=True)
        module = "experiments.benchmark.photographs"
        command = [sys.executable, "-m", module, folder, str(count)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        photographs = dataclasses.replace(
            presets.get("imagenet_resnet50"),
            model="resnet18" if quick else "resnet50",
            data_dir=folder,
            batch_size=4 if quick else 16,
            image_size=64 if quick else 224,
            workers=0,
        )
        if jax.default_backend() == "cpu":
            photographs = dataclasses.replace(photographs, dtype="float32")
        else:
            photographs = dataclasses.replace(photographs, batch_size=128)
        processes = (0,) if quick else (0, environment.cores())
        found["photographs"] = _set(photographs, quick, processes)
    return found


def _set(config: TrainConfig, quick: bool, processes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """One data set: the pipeline with so many worker processes each, and the preset's step."""
    config = dataclasses.replace(config, driver="device", devices=1)
    alone = {
        _named(workers): _pipeline(config, workers, 1.0 if quick else 8.0) for workers in processes
    }
    step = _step(config, 1 if quick else 5)
    most = max(alone.values())
    print(
        f"  {config.data}: pipeline {most:.0f} images/s, step of {config.model} {step:.1f}",
        flush=True,
    )
    return {
        "model": config.model,
        "batch": config.batch_size,
        "pipeline": alone,
        "step": step,
        "pipeline / step": most / step,
    }


def _named(workers: int) -> str:
    return f"{workers} processes" if workers else "threads"


def _pipeline(config: TrainConfig, workers: int, seconds: float) -> float:
    """Images/s with nothing else going on, after the first batches."""
    info = sources.describe(config.data, config.data_dir)
    batches = pipeline.train_iterator(
        info,
        batch_size=config.batch_size,
        seed=config.seed,
        data_dir=config.data_dir,
        image_size=config.image_size,
        workers=workers,
    )
    with contextlib.closing(batches):
        for _ in range(3):
            next(batches)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += len(next(batches)["label"])
        return images / (time.perf_counter() - start)


def _step(config: TrainConfig, rounds: int) -> float:
    """Images/s of the training step on one batch that lies on the device."""
    info = sources.describe(config.data, config.data_dir)
    driver = make_driver(config)
    _, host = create_state(config, info)
    iterator = pipeline.train_iterator(
        info,
        batch_size=config.batch_size,
        seed=config.seed,
        data_dir=config.data_dir,
        image_size=config.image_size,
    )
    with contextlib.closing(iterator):
        batch = driver.shard(next(iterator))
    state = driver.replicate(host)

    def step() -> None:
        nonlocal state
        state, metrics = driver(state, batch)
        jax.block_until_ready((state.params, metrics))

    seconds = timing.take_turns({"step": step}, {"step": rounds})["step"]
    return config.batch_size / timing.Spread.of(seconds).median
