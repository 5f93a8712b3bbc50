"""Training: a configuration, one pure step, drivers that wrap it, and the loop around them."""

import importlib
from typing import Any

_PUBLIC = {
    "TrainConfig": "config",
    "TrainState": "state",
    "create_state": "state",
    "params_sha256": "state",
    "train_step": "step",
    "eval_step": "step",
    "Driver": "drivers",
    "make_driver": "drivers",
    "make_train_step": "drivers",
    "Fitted": "fitting",
    "fit": "fitting",
    "vmapped": "vmapped",
    "presets": "presets",
    "train": "loop",
    "evaluate": "loop",
    "load": "loop",
}
_MODULES = ("vmapped", "presets")
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flaxres.train' has no attribute {name!r}")
    module = importlib.import_module(f"flaxres.train.{_PUBLIC[name]}")
    return module if name in _MODULES else getattr(module, name)
