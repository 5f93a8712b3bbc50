"""Sweeps on one device: several seeds, and learning rates, trained at once by vmap of the step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxres.data import pipeline, sources
from flaxres.nets.resnet import ResNet
from flaxres.train.compiling import enable_compilation_cache
from flaxres.train.config import TrainConfig
from flaxres.train.state import TrainState, create_state
from flaxres.train.step import eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs that were trained together; every array has them on its first axis."""

    config: TrainConfig
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    model: ResNet
    states: TrainState
    """On the host, each leaf `[runs, …]`."""
    history: dict[str, np.ndarray]
    """`[runs, steps]`: loss, accuracy, lr, grad_norm, nonfinite."""
    accuracy: np.ndarray
    """On the held-out split, `[runs]`."""

    def variables(self, run: int) -> dict[str, Any]:
        """What `model.apply` takes, of one run."""
        return jax.tree.map(lambda leaf: leaf[run], self.states.variables)


def sweep(config: TrainConfig, seeds: Sequence[int], lrs: Sequence[float] | None = None) -> Sweep:
    """Train one run for each seed, in memory, on the first device.

    Each run is what `fit` gives for that seed (weights, data order, augmentation) and learning
    rate, within rounding. Batch norm is over the whole batch.

    Args:
      config: shared by all; its seed and lr are replaced.
      seeds: one a run.
      lrs: one a run, or None for the configuration's.
    """
    if not seeds:
        raise ValueError("a sweep needs at least one seed")
    if lrs is not None and len(lrs) != len(seeds):
        raise ValueError(f"{len(lrs)} learning rates do not fit {len(seeds)} seeds: one for each")
    if config.batch_norm != "sync":
        raise ValueError(f"batch_norm must be sync in a sweep, not {config.batch_norm}")
    rates = tuple(float(lr) for lr in lrs) if lrs is not None else (config.lr,) * len(seeds)
    configs = [
        dataclasses.replace(config, seed=int(seed), lr=lr).validate()
        for seed, lr in zip(seeds, rates, strict=True)
    ]
    enable_compilation_cache()
    info = sources.describe(config.data, config.data_dir)
    states = _stack([create_state(each, info)[1] for each in configs])
    factors = jnp.array([lr / config.lr for lr in rates], jnp.float32)
    numbers = jnp.array(seeds, jnp.uint32)

    def step(state: TrainState, batch: Any, seed: jax.Array, factor: jax.Array) -> Any:
        return train_step(state, batch, config, seed=seed, lr_factor=factor)

    many = jax.jit(jax.vmap(step), donate_argnums=0)
    batches = [
        pipeline.train_iterator(
            info,
            batch_size=config.batch_size,
            seed=each.seed,
            data_dir=config.data_dir,
            image_size=config.image_size,
        )
        for each in configs
    ]
    collected = []
    for _ in range(config.total_steps(info.splits["train"])):
        states, metrics = many(states, _stack([next(b) for b in batches]), numbers, factors)
        collected.append(metrics)
    fetched = jax.device_get(collected)
    history = {name: np.stack([m[name] for m in fetched], axis=1) for name in fetched[0]}
    accuracy = _accuracy(config, info, states)
    host = jax.device_get(states)
    return Sweep(config, tuple(seeds), rates, host.task.model, host, history, accuracy)


def _stack(trees: list[Any]) -> Any:
    """One tree with a leading axis; what is no array is taken from the first."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    stacked = [np.stack(column) for column in zip(*leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), stacked)


def _accuracy(config: TrainConfig, info: Any, states: TrainState) -> np.ndarray:
    evaluate = jax.jit(jax.vmap(lambda state, batch: eval_step(state, batch, config), (0, None)))
    batches = pipeline.eval_batches(
        info,
        info.eval_split,
        batch_size=config.eval_batch_size or config.batch_size,
        data_dir=config.data_dir,
        image_size=config.image_size,
    )
    sums = [jax.device_get(evaluate(states, batch)) for batch in batches]
    return sum(s["correct"] for s in sums) / sum(s["count"] for s in sums)
