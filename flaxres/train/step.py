"""One pure training step, and the evaluation step, that every driver wraps.

Random draws derive from (seed, step) and from an example's place in the global batch, never from
the device it happens to lie on, so that all drivers compute the same. The one exception is
stochastic depth, whose draws under pmap derive from (seed, step, device).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxres.data import augment
from flaxres.train import losses
from flaxres.train.config import TrainConfig
from flaxres.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
_AUGMENT, _MIX, _DROP = range(3)


def train_step(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    *,
    axis_name: str | None = None,
    seed: jax.Array | int | None = None,
    lr_factor: jax.Array | float = 1.0,
) -> tuple[TrainState, Metrics]:
    """One optimiser step.

    Args:
      state: `TrainState`.
      batch: {"image": uint8 `[batch, h, w, c]`, "label": int32 `[batch]`}: all of the batch, or
        this device's rows of it where `axis_name` names the mapped axis.
      config: the run.
      axis_name: mapped axis over which gradients, batch statistics and metrics are averaged.
      seed: in place of the configuration's, where several runs are mapped over.
      lr_factor: multiplies the learning rate, likewise.

    Returns:
      The next state and metrics, float32 scalars: loss, accuracy, lr, grad_norm, nonfinite (1 if
      the update was not finite; then parameters, statistics and optimiser stay as they were).
    """
    task = state.task
    key = jax.random.key(config.seed if seed is None else seed)
    key = jax.random.fold_in(key, state.step)
    local = batch["label"].shape[0]
    shard = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    keys = augment.example_keys(jax.random.fold_in(key, _AUGMENT), local, shard * local)
    images = augment.train(
        batch["image"], keys, task.augment, task.mean, task.std, jnp.dtype(config.dtype)
    )
    soft = losses.targets(batch["label"], task.classes, config.label_smoothing)
    images, soft = _mix(images, soft, jax.random.fold_in(key, _MIX), config)
    drop_key = jax.random.fold_in(jax.random.fold_in(key, _DROP), shard)

    gradient = _gradient(state, config)
    stats, grads, loss, hits = _accumulated(
        gradient, state.batch_stats, (images, soft, batch["label"]), drop_key, config.accumulate
    )
    if axis_name is not None:
        stats, grads, loss, hits = jax.lax.pmean((stats, grads, loss, hits), axis_name)
    scale, grads, fits = _unscale(state.scale, grads)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & fits
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    # Every update here is linear in the learning rate, decay included.
    updates = jax.tree.map(lambda u: u * jnp.asarray(lr_factor, u.dtype), updates)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and config.ema is not None:
        ema = optax.incremental_update(params, ema, 1 - config.ema)
    new = (params, stats, opt_state, ema)
    old = (state.params, state.batch_stats, state.opt_state, state.ema)
    params, stats, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    metrics = {
        "loss": loss,
        "accuracy": hits,
        "lr": jnp.asarray(task.schedule(state.step), jnp.float32) * lr_factor,
        "grad_norm": norm,
        "nonfinite": 1.0 - finite.astype(jnp.float32),
    }
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
        ema=ema,
        scale=scale,
        skipped=state.skipped + 1 - finite.astype(jnp.int32),
    )
    return state, metrics


def eval_step(state: TrainState, batch: Batch, config: TrainConfig) -> Metrics:
    """Sums over a batch: loss_sum, correct and count, float32; mask 0 leaves an example out."""
    task = state.task
    dtype = jnp.dtype(config.dtype)
    images = augment.normalize(batch["image"], task.mean, task.std, dtype)
    logits: Any = task.model.apply(state.variables, images, train=False)
    soft = losses.targets(batch["label"], task.classes)
    loss = losses.cross_entropy(logits, soft)
    mask = batch["mask"]
    return {
        "loss_sum": jnp.sum(jnp.where(mask > 0, loss, 0.0)),
        "correct": jnp.sum(losses.correct(logits, batch["label"]) * mask),
        "count": jnp.sum(mask),
    }


def _mix(
    images: jax.Array, soft: jax.Array, key: jax.Array, config: TrainConfig
) -> tuple[jax.Array, jax.Array]:
    """mixup or cutmix; with both on, one of them by a fair coin a step."""
    choice, key = jax.random.split(key)
    if config.mixup and config.cutmix:
        return jax.lax.cond(
            jax.random.bernoulli(choice),
            lambda: augment.mixup(images, soft, key, config.mixup),
            lambda: augment.cutmix(images, soft, key, config.cutmix),
        )
    if config.mixup:
        return augment.mixup(images, soft, key, config.mixup)
    if config.cutmix:
        return augment.cutmix(images, soft, key, config.cutmix)
    return images, soft


def _gradient(state: TrainState, config: TrainConfig) -> Any:
    """(batch_stats, micro-batch, key) -> (batch_stats, grads, loss, accuracy)."""
    model = state.task.model

    def loss_of(params: Any, stats: Any, micro: Any, key: jax.Array) -> Any:
        images, soft, labels = micro
        rngs = {"dropout": key} if model.stochastic_depth else None
        logits, updates = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs=rngs,
        )
        loss = losses.cross_entropy(logits, soft, config.loss).mean()
        hits = losses.correct(logits, labels).mean()
        scaled = loss if state.scale is None else loss * state.scale.scale
        return scaled, (updates.get("batch_stats", stats), loss, hits)

    def gradient(stats: Any, micro: Any, key: jax.Array) -> Any:
        grads, (stats, loss, hits) = jax.grad(loss_of, has_aux=True)(
            state.params, stats, micro, key
        )
        return stats, grads, loss, hits

    return gradient


def _accumulated(gradient: Any, stats: Any, batch: Any, key: jax.Array, count: int) -> Any:
    """Mean gradient over `count` micro-batches, running the batch statistics through them.

    Micro-batch i holds the examples whose place is i modulo count, so that it is the same set
    however the batch is spread over devices.
    """
    if count == 1:
        return gradient(stats, batch, key)

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1)

    def body(carry: Any, item: Any) -> Any:
        micro, number = item
        stats, sums = carry
        stats, *values = gradient(stats, micro, jax.random.fold_in(key, number))
        return (stats, jax.tree.map(jnp.add, sums, tuple(values))), None

    micros = jax.tree.map(split, batch)
    first = jax.tree.map(lambda leaf: leaf[0], micros)
    shapes = jax.eval_shape(gradient, stats, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(shapes[1:]))
    (stats, sums), _ = jax.lax.scan(body, (stats, zeros), (micros, jnp.arange(count)))
    return stats, *jax.tree.map(lambda leaf: leaf / count, sums)


def _unscale(scale: Any, grads: Any) -> Any:
    """Undo float16's loss scale; grow it slowly, halve it where gradients overflow."""
    if scale is None:
        return None, grads, jnp.bool_(True)
    grads = jax.tree.map(lambda g: g / scale.scale, grads)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
    grow = scale.fin_steps == scale.growth_interval
    grown = jnp.where(
        grow & finite,
        jnp.minimum(scale.scale * scale.growth_factor, jnp.finfo(jnp.float32).max),
        scale.scale,
    )
    shrunk = jnp.maximum(scale.scale * scale.backoff_factor, 1.0)
    steps = jnp.where(grow | ~finite, 0, scale.fin_steps + 1)
    return scale.replace(scale=jnp.where(finite, grown, shrunk), fin_steps=steps), grads, finite
