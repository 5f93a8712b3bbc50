"""Residual networks in JAX and Flax that prove their own argument: the public surface.

Everything is imported on first use (PEP 562), so that the command line can answer `--help`
without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute or None for the module itself)
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "create_model": ("flaxres.nets.zoo", "create_model"),
    "list_models": ("flaxres.nets.zoo", "list_models"),
    "ResNet": ("flaxres.nets.resnet", "ResNet"),
    "Residual": ("flaxres.nets.blocks", "Residual"),
    "BasicBlock": ("flaxres.nets.blocks", "BasicBlock"),
    "BottleneckBlock": ("flaxres.nets.blocks", "BottleneckBlock"),
    "ResidualInit": ("flaxres.nets.initialize", "ResidualInit"),
    "load": ("flaxres.train.loop", "load"),
    "branches": ("flaxres.identity.branches", None),
    "layout": ("flaxres.identity.layout", None),
    "probes": ("flaxres.identity.probes", None),
    "claims": ("flaxres.identity.claims", None),
    "train": ("flaxres.train", None),
    "data": ("flaxres.data", None),
    "nets": ("flaxres.nets", None),
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from flaxres import data, nets, train
    from flaxres.identity import branches, layout, probes
    from flaxres.nets.blocks import BasicBlock, BottleneckBlock, Residual
    from flaxres.nets.initialize import ResidualInit
    from flaxres.nets.resnet import ResNet
    from flaxres.nets.zoo import create_model, list_models
    from flaxres.train.loop import load


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flaxres' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return __all__
