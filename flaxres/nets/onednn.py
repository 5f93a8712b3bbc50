"""oneDNN on the CPU through XLA's foreign-function interface: optional, built at first use.

Needs the extra `flaxres[onednn]` (the library and its headers) and a C++ compiler. The bridge,
`onednn.cc`, is compiled once into the user's cache folder. Where anything is missing, `reason`
says so, and the pure forms are taken.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxres.cache import cache_dir
from flaxres.nets.forms import Geometry

_log = logging.getLogger("flaxres.onednn")
_PASSES = {"forward": 0, "input": 1, "weight": 2}
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_TARGETS = {
    "flaxres_onednn_conv": "FlaxresConvolve",
    "flaxres_onednn_moments": "FlaxresMoments",
    "flaxres_onednn_gradients": "FlaxresGradients",
}


def available() -> bool:
    """Whether oneDNN can be used; builds the bridge at the first call of a process."""
    return reason() is None


@functools.cache
def reason() -> str | None:
    """Why oneDNN cannot be used, or None; one line in the log says which it is."""
    try:
        library = _build()
        # Its threads shall sleep between calls, or they take the cores from XLA's.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        handle = ctypes.CDLL(str(library))
        for target, symbol in _TARGETS.items():
            capsule = jax.ffi.pycapsule(getattr(handle, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (OSError, RuntimeError) as error:
        _log.warning("oneDNN is not in use, the pure forms are: %s", error)
        return str(error)
    _log.info("oneDNN is in use for convolutions (%s)", library)
    return None


def describe(form: str) -> str:
    """Who computes convolutions of a form, for a log."""
    if form != "onednn":
        return f"XLA, form {form}"
    if (backend := jax.default_backend()) != "cpu":
        return f"XLA, since oneDNN is for the CPU only and this is {backend}"
    return "oneDNN" if available() else f"XLA, since oneDNN is not to be had: {reason()}"


def takes(*operands: Any) -> bool:
    """Whether operands are such as the bridge takes: float32, and oneDNN there."""
    return all(operand.dtype == jnp.float32 for operand in operands) and available()


def convolve(which: str, a: jax.Array, b: jax.Array, geometry: Geometry) -> jax.Array:
    """A pass ("forward", "input", "weight") of a convolution, see `flaxres.nets.forms`."""
    result = jax.ShapeDtypeStruct(geometry.result(which, a, b), a.dtype)
    call = jax.ffi.ffi_call("flaxres_onednn_conv", result, vmap_method="sequential")
    return call(
        a,
        b,
        which=np.int64(_PASSES[which]),
        strides=np.array(geometry.strides, np.int64),
        pads=np.array(geometry.pads, np.int64).reshape(-1),
        groups=np.int64(geometry.groups),
    )


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ x and Σ x² over the rows of `[rows, channels]`, in one pass."""
    sums = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype),) * 2
    call = jax.ffi.ffi_call("flaxres_onednn_moments", sums, vmap_method="sequential")
    first, second = call(x)
    return first, second


def gradients(
    x: jax.Array, dy: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array]:
    """Σ dz and Σ dz · (x - mean) over rows, dz the gradient before the ReLU, in one pass."""
    sums = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype),) * 2
    call = jax.ffi.ffi_call("flaxres_onednn_gradients", sums, vmap_method="sequential")
    first, second = call(x, dy, mean, factor, bias, relu=np.int64(relu))
    return first, second


def _build() -> pathlib.Path:
    """The compiled bridge, from the cache or made now; RuntimeError says what is missing."""
    if sys.platform != "linux":
        raise RuntimeError(f"its wheels are for Linux, not {sys.platform}")
    prefix = _prefix()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]
    parts = [_SOURCE.read_bytes(), jax.__version__.encode(), str(prefix).encode(), _machine()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = cache_dir() / "onednn" / f"bridge-{digest}.so"
    if library.exists():
        return library
    if compiler is None:
        raise RuntimeError("no C++ compiler is there to build its bridge (g++, or $CXX)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as room:
        made = pathlib.Path(room) / library.name
        command = [compiler, *flags, str(_SOURCE), "-o", str(made)]
        command += [f"-I{jax.ffi.include_dir()}", f"-I{prefix / 'include'}"]
        command += [f"-L{prefix / 'lib'}", "-ldnnl", f"-Wl,-rpath,{prefix / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"its bridge does not compile: {' '.join(errors[:2])}")
        made.replace(library)
    return library


def _prefix() -> pathlib.Path:
    """The folder that holds include/ and lib/ of the oneDNN wheels."""
    for name in ("onednn-devel-cpu-gomp", "onednn-cpu-gomp"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise RuntimeError(f"{name} is not installed: pip install 'flaxres[onednn]'") from None
    files = importlib.metadata.distribution("onednn-devel-cpu-gomp").files or []
    for file in files:
        if file.parts[-2:] == ("include", "dnnl.hpp"):
            return pathlib.Path(str(file.locate())).resolve().parent.parent
    raise RuntimeError("onednn-devel-cpu-gomp holds no include/dnnl.hpp: install it anew")


def _machine() -> bytes:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return b""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model"))})
    ).encode()
