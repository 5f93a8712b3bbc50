"""Where flaxres keeps what it can make again: compiled programs, data sets, the oneDNN bridge."""

import os
import pathlib


def cache_dir() -> pathlib.Path:
    """$XDG_CACHE_HOME/flaxres, or ~/.cache/flaxres."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "flaxres"
