"""Bytes that a training step moves on a TPU, by its compiler, without having one.

    python -m experiments.benchmark.tpu flaxres MODEL BATCH

compiles in a process of its own, since libtpu reads its environment when it is loaded. Loops count
once in the compiler's analysis, so that blocks are not scanned here.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

TARGET = "v5e:2x2"
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # The process that asks may have loaded libtpu too, looking for a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # A quarter of the time to compile, for both sides alike.
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


class NotHere(Exception):
    """What a case needs is missing; the sentence says what."""


def measure(quick: bool) -> dict[str, Any]:
    """Bytes, flops and temporaries of the bfloat16 step for ours and plain linen, and ratios."""
    if importlib.util.find_spec("libtpu") is None:
        raise NotHere("libtpu, the TPU's compiler, is missing: pip install 'flaxres[tpu]'")
    name, batch = ("resnet18", 8) if quick else ("resnet50", 128)
    found: dict[str, Any] = {"target": TARGET, "model": name, "batch": batch}
    for side in ("flaxres", "plain linen"):
        found[side] = _in_process_of_its_own(side, name, batch)
        print(f"  {side}: {found[side]['bytes_accessed'] / 1e9:.2f} GB a step", flush=True)
    found["flaxres / plain linen"] = {
        number: found["flaxres"][number] / found["plain linen"][number]
        for number in found["flaxres"]
    }
    return found


def _in_process_of_its_own(side: str, name: str, batch: int) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark.tpu", side, name, str(batch)],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"compiling for {TARGET} failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compile_step(side: str, name: str, batch: int, image: int = 224) -> dict[str, float]:
    """Compile for one chip; needs the environment that `measure` sets."""
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from experiments.benchmark import accelerator, linen_resnet, steps
    from flaxres.nets import zoo

    model: Any = zoo.create_model(name, dtype=jnp.bfloat16)
    if side != "flaxres":
        model = linen_resnet.like(model)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TARGET).devices
    sharding = SingleDeviceSharding(chips[0])
    compiled = steps.lower_training(model, (batch, image, image, 3), sharding).compile()
    cost = accelerator.analysis(compiled)
    return {
        "bytes_accessed": cost["bytes accessed"],
        "flops": cost["flops"],
        "temporary": accelerator.memory(compiled)["temporary"],
    }


if __name__ == "__main__":
    print(json.dumps(compile_step(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
