"""From the start of `flaxres train` on the digits to its first step, cold and warm."""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from experiments.benchmark import environment, timing


def measure(quick: bool) -> dict[str, Any]:
    """Seconds with empty caches (programs and prepared data), and with those of an earlier run."""
    colds, warms = (1, 1) if quick else (3, 2)
    cold, warm = [], []
    for _ in range(colds):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_first_step(pathlib.Path(folder), "cold"))
            for number in range(warms):
                warm.append(_first_step(pathlib.Path(folder), f"warm{number}"))
    return {
        "cold": timing.Spread.of(cold).to_json(),
        "warm": timing.Spread.of(warm).to_json(),
    }


def _first_step(folder: pathlib.Path, name: str) -> float:
    """A run of two steps in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "flaxres.cli.main", "train", "--steps", "2", "--json"]
    run = subprocess.run(
        [*command, "--workdir", str(folder / name)],
        env={
            **environment.of_a_user(),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "compiled"),
            "FLAXRES_COMPILATION_CACHE": "1",
        },
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"flaxres train ended with {run.returncode}: {run.stderr[-2000:]}")
    seconds = float(json.loads(run.stdout.splitlines()[-1])["time_to_first_step"])
    print(f"  flaxres train, {name}: first step after {seconds:.1f} s", flush=True)
    return seconds
