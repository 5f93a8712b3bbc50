"""The conditions of a measurement: cores, allocator, threads, versions; the same for all sides."""

import os
import pathlib
import sys
from typing import Any

from flaxres.cli import allocator

# What the command line sets for itself, here for whoever runs in this process.
TUNED = allocator.VARIABLES
# One library's OpenMP threads must not spin on the cores that another's need.
_ALWAYS = {"OMP_WAIT_POLICY": "passive"}
_MARK = "FLAXRES_BENCHMARK_ALLOCATOR"


def start_again(setting: str) -> None:
    """Replace this process by one that has these settings, unless it has them already."""
    if os.environ.get(_MARK) == setting:
        return
    tuned = TUNED if setting == "tuned" else {}
    environment = {**os.environ, **tuned, **_ALWAYS, _MARK: setting}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def of_a_user() -> dict[str, str]:
    """The environment without what `start_again` set, for a command as a user starts it."""
    ours = {**TUNED, **_ALWAYS, _MARK: None} if _MARK in os.environ else {}
    return {name: value for name, value in os.environ.items() if name not in ours}


def cores() -> int:
    """Cores that this process may run on: the number of threads of every side."""
    return len(os.sched_getaffinity(0))


def conditions() -> dict[str, Any]:
    """Machine, settings and versions, to be kept beside the numbers."""
    import importlib.metadata

    import jax

    from flaxres.train.workdir import versions

    found = versions()
    for package in ("torch", "libtpu", "onednn-cpu-gomp"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = (*TUNED, *_ALWAYS, "XLA_FLAGS")
    return {
        "processor": _processor(),
        "cores": cores(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "settings": {name: os.environ.get(name, "not set") for name in settings},
        "versions": found,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512f" in line for line in lines if line.startswith("flags"))
    return f"{named[0] if named else 'unknown'}{', AVX-512' if wide else ''}"
