"""One training step and one forward pass for any linen module: the same work for every side.

A training step is forward, softmax cross-entropy, backward, batch statistics and SGD with Nesterov
momentum and weight decay, in one compiled program that takes the old state's memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

Shape = tuple[int, int, int, int]
"""[batch, height, width, channels]."""
_OPTIMIZER = optax.chain(
    optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9, nesterov=True)
)


@dataclasses.dataclass
class Step:
    """A compiled program with its arguments; a call runs it once and waits for it."""

    compiled: Any
    state: Any
    batch: tuple[Any, ...]
    trains: bool

    def __call__(self) -> None:
        out = self.compiled(self.state, *self.batch)
        jax.block_until_ready(out)
        if self.trains:
            self.state = out[0]


def examples(shape: Shape, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal(shape, np.float32)
    return images, rng.integers(0, classes, shape[0]).astype(np.int32)


def training(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> Step:
    """The compiled training step of a model, at its start."""
    compiled = lower_training(model, images.shape).compile()
    variables = _start(_shapes(model, images.shape))
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = jax.device_put((params, stats, _OPTIMIZER.init(params)))
    return Step(compiled, state, jax.device_put((images, labels)), trains=True)


def inference(model: nn.Module, images: np.ndarray) -> Step:
    """The compiled forward pass of a model with running statistics."""

    def forward(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    shapes = _shapes(model, images.shape)
    batch = jax.ShapeDtypeStruct(images.shape, images.dtype)
    compiled = jax.jit(forward).lower(shapes, batch).compile()
    return Step(compiled, jax.device_put(_start(shapes)), (jax.device_put(images),), trains=False)


def lower_training(model: Any, shape: Shape, sharding: Any = None) -> Any:
    """The training step, traced for images of this shape; nothing is computed.

    With a sharding the program is for its devices, which need not be there.
    """

    def loss_of(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, updates = model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates["batch_stats"]

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, opt_state = state
        grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, stats), grads = grad(params, stats, images, labels)
        updates, opt_state = _OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    variables = _shapes(model, shape)
    params, stats = variables["params"], variables["batch_stats"]
    state = (params, stats, jax.eval_shape(_OPTIMIZER.init, params))
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    keywords = {} if sharding is None else {"in_shardings": sharding, "out_shardings": sharding}
    return jax.jit(step, donate_argnums=0, **keywords).lower(state, images, labels)


def _shapes(model: nn.Module, shape: tuple[int, ...]) -> Any:
    images = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)


def _start(shapes: Any) -> Any:
    """Weights for any module with nothing to compile: He's normal, ones and zeros, by name."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key != "kernel":
            return np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)
        fan_in = np.prod(leaf.shape[-4:-1])
        return (rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_in)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
