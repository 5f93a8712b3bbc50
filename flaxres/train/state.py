"""The training state, the model of a configuration, and fingerprints of parameters."""

import dataclasses
import hashlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from flax.training.dynamic_scale import DynamicScale

from flaxres.data import augment
from flaxres.data.sources import DataInfo
from flaxres.identity import layout
from flaxres.nets import drawing, zoo
from flaxres.nets.resnet import ResNet, scan_pays
from flaxres.train import optim
from flaxres.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step needs beside arrays: the same for the whole run."""

    model: ResNet
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    classes: int


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes."""

    step: Any
    """Steps taken, int32."""
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    """Moving average of the parameters, or None."""
    scale: DynamicScale | None
    """Loss scale, with float16 only."""
    skipped: Any
    """Updates that were not applied because they were not finite, int32."""
    task: Task = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes, with the averaged parameters where there are some."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


def input_shape(config: TrainConfig, info: DataInfo) -> tuple[int, int, int, int]:
    """`[1, height, width, channels]` of what the model is given."""
    height, width, channels = info.image_shape
    if height is None or width is None:
        height = width = 224
    return 1, config.image_size or height, config.image_size or width, channels


def make_model(config: TrainConfig, info: DataInfo) -> ResNet:
    """The model that a configuration trains, in the layout that it trains in."""
    model = zoo.create_model(
        config.model,
        num_classes=info.num_classes,
        residual_init=config.residual_init,
        norm=config.norm,
        stochastic_depth=config.stochastic_depth,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        conv_form=config.conv_form,
    )
    _, height, width, _ = input_shape(config, info)
    model.check_image((1, height, width, info.image_shape[2]))
    pays = scan_pays(model) if config.scan == "auto" else config.scan == "on"
    return model.clone(scan=pays)


def create_state(config: TrainConfig, info: DataInfo) -> tuple[ResNet, TrainState]:
    """The model and the state before the first step, on the host, from the seed alone."""
    model = make_model(config, info)
    variables = drawing.init_variables(model, config.seed, input_shape(config, info))
    return model, state_of(config, info, model, variables)


def state_of(config: TrainConfig, info: DataInfo, model: ResNet, variables: Any) -> TrainState:
    """A state that starts from given variables."""
    examples = info.splits["train"]
    params = variables["params"]
    optimizer = optim.make_optimizer(config, params, examples)
    policy = config.augment
    task = Task(
        model=model,
        optimizer=optimizer,
        schedule=optim.schedule(config, examples),
        mean=info.mean,
        std=info.std,
        augment=augment.check_policy(
            augment.default_policy(info.name) if policy == "auto" else policy
        ),
        classes=info.num_classes,
    )
    return TrainState(
        step=np.zeros((), np.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=jax.device_get(optimizer.init(params)),
        ema=None if config.ema is None else jax.tree.map(np.copy, params),
        scale=DynamicScale() if config.dtype == "float16" else None,
        skipped=np.zeros((), np.int32),
        task=task,
    )


def params_sha256(params: Any) -> str:
    """Fingerprint over names, shapes, dtypes and bytes, sorted by name; the same in any layout."""
    flat = traverse_util.flatten_dict(layout.unstack_tree(jax.device_get(params)), sep="/")
    digest = hashlib.sha256()
    for name in sorted(flat):
        leaf = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {leaf.shape} {leaf.dtype.name}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
