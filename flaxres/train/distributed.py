"""Many processes: JAX's own engine joins them; here they agree, and notice who is lost.

What is exchanged goes through the key-value store of JAX's coordination service, which process 0
holds; arrays go through collectives.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from flaxres.train.config import TrainConfig
from flaxres.train.watch import Watch

T = TypeVar("T")

# JAX ends the process by itself this long after a peer fell silent; `Watch` is sooner, and clearer.
_HEARTBEAT_SECONDS = 15
_JOIN_SECONDS = 60
# The first process to finish waits for the last, which may still draw pictures or save.
_PART_SECONDS = 600
# Settings that a process may have to itself; all others must be equal on all processes.
_OWN = ("process_id", "workdir", "data_dir", "workers", "profile_steps")
# Keys must be new in every exchange; all processes make the same exchanges in the same order.
_exchanges = itertools.count()
# Parts of messages of a collective, or of the coordination service, that has lost a process.
_LOST = ("Gloo", "gloo", "NCCL", "oordination service", "heartbeat", "Connection closed by peer")


class PeerError(RuntimeError):
    """Another process of the run has failed, died or hangs."""


def initialize(config: TrainConfig) -> None:
    """Join the processes of a run before any device is touched; a run of one does nothing.

    Raises:
      ValueError: --coordinator, --num-processes and --process-id do not fit together, or processes
        were started with different settings.
      PeerError: the others did not come.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    arguments = _arguments(config)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_PART_SECONDS,
        )
    except Exception as error:
        where = config.coordinator or "the coordinator that the environment names"
        raise PeerError(
            f"the processes of the run did not meet at {where} within {_JOIN_SECONDS} s "
            f"({_first_line(error)})"
        ) from error
    _agree_on(config)


def _arguments(config: TrainConfig) -> dict[str, Any] | None:
    """What to give to `jax.distributed.initialize`; None for a run of one process."""
    if config.coordinator is None:
        if (config.num_processes, config.process_id) != (None, None):
            raise ValueError("--num-processes and --process-id need --coordinator HOST:PORT")
        return {} if _in_cluster() else None
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator must be HOST:PORT, not {config.coordinator!r}")
    if config.num_processes is None or config.process_id is None:
        raise ValueError("--coordinator needs --num-processes and --process-id too")
    if not 0 <= config.process_id < config.num_processes:
        raise ValueError(
            f"process_id must be from 0 to {config.num_processes - 1} with "
            f"num_processes={config.num_processes}, not {config.process_id}"
        )
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }


def _in_cluster() -> bool:
    """Whether the environment, as JAX reads it (TPU, Slurm, Open MPI), has several processes."""
    from jax._src import clusters  # what `jax.distributed.initialize()` asks; no public name

    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages for clusters that nobody asked for
        for kind in clusters.ClusterEnv._cluster_types:
            if not kind.opt_in_only_method and kind.is_env_present():
                return kind.get_process_count() > 1
    return False


def _agree_on(config: TrainConfig) -> None:
    """ValueError naming the settings that differ from those of process 0."""
    mine = {k: v for k, v in config.to_json().items() if k not in _OWN}
    first = share(lambda: mine)
    different = [f"{k}={mine[k]!r} instead of {v!r}" for k, v in first.items() if mine[k] != v]
    failures = gather(", ".join(different))
    for process, failure in enumerate(failures):
        if failure:
            raise ValueError(f"process {process} was started with {failure}: start all alike")


def is_main() -> bool:
    """Whether this process writes logs and prints."""
    import jax

    return jax.process_index() == 0


def _client() -> Any:
    from jax._src import distributed  # the store has no public name; orbax uses it alike

    return distributed.global_state.client


def share(make: Callable[[], T]) -> T:
    """What `make` gives on process 0 (anything that JSON can hold), on all of them.

    Where it raises ValueError on process 0, all raise it.
    """
    import jax

    if jax.process_count() == 1:
        return make()
    key = f"flaxres/share/{next(_exchanges)}"
    if is_main():
        try:
            message = {"value": make()}
        except ValueError as error:
            _client().key_value_set(key, json.dumps({"error": str(error)}))
            raise
        _client().key_value_set(key, json.dumps(message))
        return message["value"]
    received = json.loads(_client().blocking_key_value_get(key, 1000 * _PART_SECONDS))
    if "error" in received:
        raise ValueError(received["error"])
    return received["value"]


def gather(value: T) -> list[T]:
    """The value (anything that JSON can hold) of every process, in their order, on all of them."""
    import jax

    if jax.process_count() == 1:
        return [value]
    key = f"flaxres/gather/{next(_exchanges)}"
    client = _client()
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    wait = 1000 * _PART_SECONDS
    return [
        json.loads(client.blocking_key_value_get(f"{key}/{process}", wait))
        for process in range(jax.process_count())
    ]


def broadcast(tree: Any, chunk: int = 1 << 26) -> Any:
    """The arrays of process 0 on all of them, bit for bit; shapes and dtypes must be the same.

    They travel as bytes: a sum over processes, which is what a broadcast is made of, would turn
    -0.0 into 0.0.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    flat = np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves])
    chunk = min(chunk, max(1, flat.size))
    padded = np.pad(flat, (0, -flat.size % chunk)).reshape(-1, chunk)
    for part in padded:
        part[:] = multihost_utils.broadcast_one_to_all(part)
    flat = padded.reshape(-1)
    received, place = [], 0
    for leaf in leaves:
        received.append(flat[place : place + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape))
        place += leaf.nbytes
    return jax.tree.unflatten(structure, received)


@contextlib.contextmanager
def watched() -> Iterator[Watch | None]:
    """Notice lost processes while the body runs; None is given where there is only this one.

    A body that waits in a collective for a lost process cannot be told: then a sentence is
    printed and the process ends with code 1. A body that fails tells the others why.

    Raises:
      PeerError: in place of what a collective raises when it loses a process.
    """
    import jax

    if jax.process_count() == 1:
        yield None
        return
    watch = Watch(_client(), jax.process_index(), jax.process_count(), next(_exchanges))
    try:
        yield watch
    except BaseException as error:
        if not any(part in str(error) for part in _LOST):
            watch.announce(f"process {jax.process_index()} stopped: {_first_line(error)}")
            watch.close(done=False)
            atexit.register(leave, _exit_code(error))
            raise
        reason = watch.reason(seconds=3) or f"another process has died ({_first_line(error)})"
        watch.close(done=False)
        atexit.register(leave, 1)
        raise PeerError(
            f"{reason}; started again, the run goes on from its last checkpoint"
        ) from error
    watch.close(done=True)


def leave(code: int) -> None:
    """End this process now if it is one of many; at the usual end they would wait for the lost."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if is_main():
        time.sleep(2)  # the others hear the reason from this process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    return (
        2 if isinstance(error, ValueError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
