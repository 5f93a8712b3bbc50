"""Drivers of the one pure step: one device (jit), pmap, and a mesh (jit over named shardings).

On as many devices all give the same parameters within rounding, for every mode of batch norm:
  sync    statistics of the whole batch, whatever the number of devices;
  device  of each device's part of it (running averages are the mean over devices);
  ghost   of groups of `ghost_size` examples, in order, whatever the number of devices.
"""

import abc
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxres.train.config import TrainConfig
from flaxres.train.state import TrainState, create_state
from flaxres.train.step import eval_step, train_step

AXIS = "data"
# Under fsdp a leaf smaller than this stays whole on every device: gathering it would cost more.
_FSDP_MIN_SIZE = 1 << 14


class Driver(abc.ABC):
    """Wraps `train_step` for some devices. Call it as `driver(state, batch)`.

    `replicate` places a host state, `shard` a host batch of this process's rows; both `step` and
    the call give (state, metrics), `eval` sums; `unreplicate` brings a state back to the host.
    The state given to a step is donated: do not use it again.
    """

    name = ""

    def __init__(self, config: TrainConfig, devices: list[jax.Device]) -> None:
        self.config = config
        self.devices = devices
        self.num_devices = len(devices)
        check_batch(config, self.num_devices, "batch_size", config.batch_size)
        if config.eval_batch_size:
            check_batch(config, self.num_devices, "eval_batch_size", config.eval_batch_size)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        return self.step(state, batch)

    @abc.abstractmethod
    def replicate(self, state: TrainState) -> TrainState:
        """Place a host state on the devices."""

    @abc.abstractmethod
    def shard(self, batch: Any) -> Any:
        """Place this process's rows of a batch on the devices."""

    @abc.abstractmethod
    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """One training step; donates the state."""

    @abc.abstractmethod
    def compile(self, state: TrainState, batch: Any) -> None:
        """Compile the step ahead of its first call, for placed arrays or `ShapeDtypeStruct`s."""

    @abc.abstractmethod
    def eval(self, state: TrainState, batch: Any) -> Any:
        """Sums of `eval_step` over all devices."""

    def unreplicate(self, state: TrainState) -> TrainState:
        """The state as host arrays."""
        return jax.device_get(state)

    def _micro(self) -> int:
        """Examples that one forward pass sees over all devices."""
        return self.config.batch_size // self.config.accumulate

    def _with_norm(self, state: TrainState, axis: str | None, groups: int) -> TrainState:
        """The state whose model takes batch statistics as this driver needs them."""
        task = state.task
        model = task.model.clone(norm_axis=axis, norm_groups=groups)
        if model == task.model:
            return state
        return state.replace(task=_replace_model(task, model))


@functools.lru_cache(maxsize=64)
def _replace_model(task: Any, model: Any) -> Any:
    """One object for one meaning: a new task would make jit compile again."""
    import dataclasses

    return dataclasses.replace(task, model=model)


class DeviceDriver(Driver):
    """One device, jit."""

    name = "device"

    def __init__(self, config: TrainConfig, devices: list[jax.Device]) -> None:
        super().__init__(config, devices)
        self._step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
        self._eval = jax.jit(functools.partial(eval_step, config=config))

    def replicate(self, state: TrainState) -> TrainState:
        groups = self._micro() // self.config.ghost_size if self.config.batch_norm == "ghost" else 1
        return jax.device_put(self._with_norm(state, None, groups), self.devices[0])

    def shard(self, batch: Any) -> Any:
        return jax.device_put(batch, self.devices[0])

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        return self._step(state, batch)

    def compile(self, state: TrainState, batch: Any) -> None:
        self._step.lower(state, batch).compile()

    def eval(self, state: TrainState, batch: Any) -> Any:
        return self._eval(state, batch)


class PmapDriver(Driver):
    """Replicated state, batch split over devices, gradients and statistics averaged."""

    name = "pmap"

    def __init__(self, config: TrainConfig, devices: list[jax.Device]) -> None:
        super().__init__(config, devices)
        self._local = [d for d in devices if d.process_index == jax.process_index()]

        def summed(state: TrainState, batch: Any) -> Any:
            return jax.lax.psum(eval_step(state, batch, config), AXIS)

        step = functools.partial(train_step, config=config, axis_name=AXIS)
        self._step = jax.pmap(step, AXIS, devices=devices, donate_argnums=0)
        self._eval = jax.pmap(summed, AXIS, devices=devices)

    def replicate(self, state: TrainState) -> TrainState:
        axis, groups = (AXIS, 1) if self.config.batch_norm == "sync" else (None, 1)
        if self.config.batch_norm == "ghost":
            groups = self._micro() // self.num_devices // self.config.ghost_size
        return self._place(self._with_norm(state, axis, groups), stack=True)

    def shard(self, batch: Any) -> Any:
        count = len(self._local)
        return self._place(
            jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch), stack=False
        )

    def _place(self, tree: Any, stack: bool) -> Any:
        # Placed leaf by leaf on its device: an array that is not yet sharded when it is donated
        # is silently copied instead.
        mesh = Mesh(np.array(self.devices), (AXIS,))
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))

        def place(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            rows = (
                [leaf[None]] * len(self._local)
                if stack
                else [leaf[i : i + 1] for i in range(len(self._local))]
            )
            shards = [jax.device_put(r, d) for r, d in zip(rows, self._local, strict=True)]
            shape = (self.num_devices, *rows[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, shards)

        return jax.tree.map(place, tree)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = self._step(state, batch)
        return state, _first(metrics)

    def compile(self, state: TrainState, batch: Any) -> None:
        self._step.lower(state, batch).compile()

    def eval(self, state: TrainState, batch: Any) -> Any:
        return _first(self._eval(state, batch))

    def unreplicate(self, state: TrainState) -> TrainState:
        return jax.device_get(_first(state))


def _first(tree: Any) -> Any:
    """The first local replica of each leaf; indexing a mapped array would gather it."""
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], tree)


class MeshDriver(Driver):
    """jit over a mesh of one axis: batch sharded, state replicated or (fsdp) sharded too."""

    name = "mesh"

    def __init__(self, config: TrainConfig, devices: list[jax.Device]) -> None:
        super().__init__(config, devices)
        if config.conv_form == "onednn" and len(devices) > 1:
            raise ValueError(
                "conv_form=onednn does not fit driver=mesh with several devices, whose compiler "
                "cannot split foreign calls: use driver=pmap, or conv_form=auto"
            )
        self._mesh = Mesh(np.array(devices), (AXIS,))
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._rows = NamedSharding(self._mesh, PartitionSpec(AXIS))
        self._eval = jax.jit(functools.partial(eval_step, config=config), out_shardings=self._whole)
        self._jitted: Any = None

    def replicate(self, state: TrainState) -> TrainState:
        groups = {
            "sync": 1,
            "device": self.num_devices,
            "ghost": self._micro() // self.config.ghost_size,
        }[self.config.batch_norm]
        state = self._with_norm(state, None, groups)
        shardings = self._shardings(state)
        if self._jitted is None:  # another one would compile again
            self._jitted = jax.jit(
                functools.partial(train_step, config=self.config),
                in_shardings=(shardings, self._rows),
                out_shardings=(shardings, self._whole),
                donate_argnums=0,
            )

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, state, shardings)

    def _shardings(self, state: TrainState) -> Any:
        def choose(leaf: Any) -> NamedSharding:
            shape = np.shape(leaf)
            if not self.config.fsdp or np.size(leaf) < _FSDP_MIN_SIZE:
                return self._whole
            fits = [axis for axis, size in enumerate(shape) if size % self.num_devices == 0]
            if not fits:
                return self._whole
            axis = max(fits, key=lambda axis: shape[axis])
            return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS))

        return jax.tree.map(choose, state)

    def shard(self, batch: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._rows, np.asarray(leaf)),
            batch,
        )

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        return self._jitted(state, batch)

    def compile(self, state: TrainState, batch: Any) -> None:
        self._jitted.lower(state, batch).compile()

    def eval(self, state: TrainState, batch: Any) -> Any:
        return self._eval(state, batch)

    def unreplicate(self, state: TrainState) -> TrainState:
        if self.config.fsdp:
            gather = jax.jit(lambda tree: tree, out_shardings=self._whole)
            state = gather(state)
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state)


_DRIVERS: dict[str, type[Driver]] = {
    "device": DeviceDriver,
    "pmap": PmapDriver,
    "mesh": MeshDriver,
}


def check_batch(config: TrainConfig, devices: int, field: str, batch: int) -> None:
    """ValueError if a batch does not divide over devices, micro-batches and ghost groups."""
    if batch % devices:
        raise ValueError(
            f"{field}={batch} does not divide over {devices} devices; use a multiple of {devices}"
        )
    if field != "batch_size":
        return
    share = batch // devices
    if share % config.accumulate:
        raise ValueError(
            f"{share} examples a device do not divide into accumulate={config.accumulate} "
            f"micro-batches; use a batch_size that is a multiple of {devices * config.accumulate}"
        )
    if config.batch_norm == "ghost" and (share // config.accumulate) % config.ghost_size:
        raise ValueError(
            f"{share // config.accumulate} examples a device and micro-batch do not divide into "
            f"groups of ghost_size={config.ghost_size}"
        )
    if (config.mixup or config.cutmix) and share % 2:
        raise ValueError(
            f"mixup and cutmix pair neighbours: {share} examples a device is no even number"
        )


def choose_devices(config: TrainConfig) -> list[jax.Device]:
    """The devices that a configuration asks for."""
    devices = jax.devices()
    if config.devices is None:
        return devices[:1] if config.driver == "device" and jax.process_count() == 1 else devices
    if config.devices > len(devices):
        raise ValueError(
            f"devices={config.devices} asks for more than there are ({len(devices)} "
            f"{devices[0].platform})"
        )
    if jax.process_count() > 1 and config.devices != len(devices):
        raise ValueError(
            f"a run of {jax.process_count()} processes uses all {len(devices)} devices, "
            f"not {config.devices}"
        )
    return devices[: config.devices]


def make_driver(
    config: TrainConfig, driver: str | None = None, devices: list[jax.Device] | None = None
) -> Driver:
    """The driver of a configuration: `auto` is pmap with several devices, mesh under fsdp."""
    devices = choose_devices(config) if devices is None else devices
    name = driver or config.driver
    if name == "auto":
        name = "mesh" if config.fsdp else "pmap" if len(devices) > 1 else "device"
    if name not in _DRIVERS:
        raise ValueError(f"unknown driver {name!r} (accepted: auto, {', '.join(_DRIVERS)})")
    if name == "device" and len(devices) > 1:
        if config.devices is not None or jax.process_count() > 1:
            raise ValueError(f"driver=device uses one device, not {len(devices)}; use pmap or mesh")
        devices = devices[:1]
    return _DRIVERS[name](config, devices)


def make_train_step(
    config: TrainConfig, driver: str | None = None, devices: list[jax.Device] | None = None
) -> Driver:
    """`step = make_train_step(config, driver="pmap")`, then `state, metrics = step(state, batch)`.

    >>> step = make_train_step(config)                               # doctest: +SKIP
    >>> state = step.replicate(create_state(config, info)[1])        # doctest: +SKIP
    >>> state, metrics = step(state, step.shard(batch))              # doctest: +SKIP
    """
    return make_driver(config, driver, devices)


__all__ = ["Driver", "create_state", "make_driver", "make_train_step"]
