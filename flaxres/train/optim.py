"""Schedules and optimisers from a configuration: optax throughout, decay masks by name."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
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

    `sgd` decays as PyTorch does (the decay is part of the gradient, before the momentum), and so
    does everything of optax that has no masked decay of its own, such as adam; adamw, lamb, lion
    and their like decouple it. Norms, biases and scalars are left out by `decay_mask`.
    """
    rate = schedule(config, examples)
    decay = config.weight_decay
    mask = decay_mask(params, config.decay_mask)
    steps = []
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.optimizer == "sgd":
        made, decays = optax.sgd(rate, config.momentum, nesterov=config.momentum > 0), False
    elif config.optimizer == "lars":
        lars = optax.lars(
            rate,
            decay,
            weight_decay_mask=mask,
            trust_ratio_mask=mask,
            momentum=config.momentum,
        )
        made, decays = lars, True
    else:
        made, decays = _by_name(config, rate, mask)
    if decay and not decays:
        steps.append(optax.add_decayed_weights(decay, mask))
    steps.append(made)
    if config.layer_decay < 1:
        steps.append(_layer_decay(config.layer_decay))
    return optax.chain(*steps)


def _by_name(
    config: TrainConfig, rate: optax.Schedule, mask: Any
) -> tuple[optax.GradientTransformation, bool]:
    """An optimiser of optax with our momentum, and whether it decays what `mask` says itself."""
    make = getattr(optax, config.optimizer, None)
    if make is None or config.optimizer.startswith("_") or not callable(make):
        raise ValueError(
            f"unknown optimizer {config.optimizer!r} (accepted: sgd, adamw, lamb, lars, or an "
            "optimiser of optax such as adam, rmsprop, lion)"
        )
    own: dict[str, Any] = {}
    try:
        accepted = list(inspect.signature(make).parameters)
        if accepted[0] != "learning_rate":
            raise TypeError(f"it takes {accepted[0]} first")
        own |= {name: config.momentum for name in ("b1", "momentum") if name in accepted}
        if "weight_decay" in accepted:
            own["weight_decay"] = 0.0
        _try(make(rate, **own))
    except Exception as error:  # each part of optax that is no optimiser fails in its own way
        raise ValueError(
            f"optimizer {config.optimizer!r} of optax cannot train with a learning rate and "
            "gradients alone (accepted: sgd, adamw, lamb, lars, or one that can, such as adam, "
            "rmsprop, lion)"
        ) from error
    masks = [name for name in ("mask", "weight_decay_mask") if name in accepted]
    if "weight_decay" not in own or not masks:
        return make(rate, **own), False
    own |= {"weight_decay": config.weight_decay, masks[0]: mask}
    return make(rate, **own), True


def _try(optimizer: optax.GradientTransformation) -> None:
    """Raise whatever comes of it if an optimiser cannot make a step."""
    params = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    jax.eval_shape(optax.apply_updates, params, updates)


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
