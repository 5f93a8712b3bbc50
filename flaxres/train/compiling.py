"""Compiled programs: kept between runs, and made in the background."""

import os
import threading
from collections.abc import Callable
from typing import Any

import jax

from flaxres.cache import cache_dir


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the environment says otherwise.

    JAX_COMPILATION_CACHE_DIR names another folder, FLAXRES_COMPILATION_CACHE=0 turns it off, and
    JAX's other settings of its cache hold.
    """
    if os.environ.get("FLAXRES_COMPILATION_CACHE", "1") == "0":
        return
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of placed arrays: enough to compile for them."""

    def describe(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, tree)


class Background:
    """Something that runs in a thread, such as the compiler, which leaves Python to others."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._error: BaseException | None = None
        # Not a daemon: an interpreter that ends under the compiler's feet aborts.
        self._thread = threading.Thread(target=self._run, args=(work,), name="flaxres-compile")
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def done(self, within: float = 0.0) -> bool:
        """Whether it has ended, after waiting so many seconds; raises what it raised."""
        self._thread.join(within)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True
