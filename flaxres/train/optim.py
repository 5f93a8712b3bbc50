"""Schedules and optimisers from a configuration: optax throughout, decay masks by name."""

import re
from typing import Any

import jax
import optax

from flaxres.train.config import TrainConfig

_STAGE = re.compile(r"stage(\d+)$")


def path_name(path: tuple[Any, ...]) -> str:
    """ "/stage1/block2/branch/conv1/kernel" of a tree path."""
    return "".join(f"/{getattr(key, 'key', getattr(key, 'name', key))}" for key in path)


def schedule(config: TrainConfig, examples: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to 0, drops to a tenth, or constant."""
    total = config.total_steps(examples)
    warmup = config.warmup_steps or round(config.warmup_epochs * examples / config.batch_size)
    warmup = min(warmup, total - 1)
    peak = config.peak_lr()
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    elif config.schedule == "step":
        main = optax.piecewise_constant_schedule(
            peak, {round(drop * total) - warmup: 0.1 for drop in config.drops}
        )
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def decay_mask(params: Any, patterns: tuple[str, ...]) -> Any:
    """A tree of booleans: which parameters decay. ValueError if a pattern matches none."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        try:
            matches = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"decay_mask {pattern!r} is no regular expression: {error}") from None
        if not matches:
            raise ValueError(
                f"decay_mask {pattern!r} matches no parameter (such as {', '.join(names[:3])})"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), params
    )


def make_optimizer(config: TrainConfig, params: Any, examples: int) -> optax.GradientTransformation:
    """The optimiser of a configuration.

    `sgd` decays as PyTorch does (the decay is part of the gradient, before the momentum), the
    Adam family decouples it. Norms, biases and scalars are left out by `decay_mask`.
    """
    rate = schedule(config, examples)
    decay = config.weight_decay
    mask = decay_mask(params, config.decay_mask) if decay else None
    steps = []
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.optimizer == "sgd":
        if decay:
            steps.append(optax.add_decayed_weights(decay, mask))
        steps.append(optax.sgd(rate, config.momentum, nesterov=config.momentum > 0))
    elif config.optimizer in ("adamw", "lamb"):
        make = getattr(optax, config.optimizer)
        steps.append(make(rate, b1=config.momentum, weight_decay=decay, mask=mask))
    elif config.optimizer == "lars":
        trust = decay_mask(params, config.decay_mask)
        lars = optax.lars(
            rate,
            decay,
            weight_decay_mask=trust,
            trust_ratio_mask=trust,
            momentum=config.momentum,
        )
        steps.append(lars)
    else:
        if decay:
            steps.append(optax.add_decayed_weights(decay, mask))
        steps.append(_by_name(config.optimizer)(rate))
    if config.layer_decay < 1:
        steps.append(_layer_decay(config.layer_decay))
    return optax.chain(*steps)


def _by_name(name: str) -> Any:
    make = getattr(optax, name, None)
    if make is None or name.startswith("_") or not callable(make):
        raise ValueError(
            f"unknown optimizer {name!r} (accepted: sgd, adamw, lamb, lars, or an optimiser of "
            "optax such as adam, rmsprop, lion)"
        )

    def checked(rate: Any) -> optax.GradientTransformation:
        try:
            made = make(rate)
            made.init({})  # combinators of optax fail only here
        except (TypeError, AttributeError):
            made = None
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(f"optax.{name} is no optimiser that takes a learning rate alone")
        return made

    return checked


def _layer_decay(factor: float) -> optax.GradientTransformation:
    """Scale updates by factor^(stages between a parameter and the head)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        stages = max(int(m.group(1)) for k in updates if (m := _STAGE.match(k)))

        def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            top = path_name(path[:1])[1:]
            match = _STAGE.match(top)
            depth = int(match.group(1)) if match else 0 if top == "stem" else stages + 1
            return leaf * factor ** (stages + 1 - depth)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
