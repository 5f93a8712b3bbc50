"""Many processes: JAX's own engine, found from the environment or named by hand."""

import os

from flaxres.train.config import TrainConfig

# A dead peer becomes an error on the others within these seconds.
_HEARTBEAT_SECONDS = 10


def initialize(config: TrainConfig) -> None:
    """Join the processes of a run before any device is touched; a run of one does nothing.

    Raises:
      ValueError: the three settings --coordinator, --num-processes, --process-id do not fit.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    given = (config.coordinator, config.num_processes, config.process_id)
    if config.coordinator is None:
        if given != (None, None, None):
            raise ValueError("--num-processes and --process-id need --coordinator HOST:PORT")
        if not _in_cluster():
            return
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        return
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator must be HOST:PORT, not {config.coordinator!r}")
    if config.num_processes is None or config.process_id is None:
        raise ValueError("--coordinator needs --num-processes and --process-id too")
    if not 0 <= config.process_id < config.num_processes:
        raise ValueError(
            f"process_id={config.process_id} is not below num_processes={config.num_processes}"
        )
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        initialization_timeout=60,
    )


def _in_cluster() -> bool:
    """Whether the environment names more than one process."""
    if os.environ.get("SLURM_JOB_ID"):
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if hosts := os.environ.get("TPU_WORKER_HOSTNAMES"):
        return "," in hosts
    return bool(os.environ.get("OMPI_MCA_orte_hnp_uri"))


def is_main() -> bool:
    """Whether this process writes logs and prints."""
    import jax

    return jax.process_index() == 0
