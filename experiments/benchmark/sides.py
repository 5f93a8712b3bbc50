"""Who is measured: ours in its forms, the plain linen network, PyTorch's."""

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import linen_resnet, steps
from flaxres.nets import onednn, zoo
from flaxres.nets.resnet import ResNet, scan_pays

OURS, ONEDNN, REMAT = "flaxres", "flaxres + oneDNN", "flaxres, remat"
LINEN, TORCH = "plain linen", "PyTorch"
Kind = Literal["training", "inference"]


def on_cpu() -> bool:
    """Whether JAX computes on the CPU."""
    return jax.default_backend() == "cpu"


def dtype() -> Any:
    """Of computation: float32 on a CPU, bfloat16 on what has units for it."""
    return jnp.float32 if on_cpu() else jnp.bfloat16


def has_onednn() -> bool:
    """Whether convolutions by oneDNN can be had here."""
    return on_cpu() and onednn.available()


def our_model(name: str, **overrides: Any) -> ResNet:
    """A model of the zoo in the layout that training picks, with JAX's own forms of convolution."""
    model = zoo.create_model(name, **{"dtype": dtype(), **overrides})
    return model.clone(scan=scan_pays(model))


def present(name: str, kind: Kind) -> list[str]:
    """The sides that can be measured here, for a model of the zoo."""
    sides = [OURS]
    if has_onednn():
        sides.append(ONEDNN)
    if kind == "training" and name.endswith("_cifar"):
        sides.append(REMAT)
    if importlib.util.find_spec("torch") is not None and on_cpu():
        sides.append(TORCH)
    return [*sides, LINEN]


def prepare(
    side: str, name: str, kind: Kind, images: np.ndarray, labels: np.ndarray
) -> Callable[[], Any]:
    """One step of a side, ready to be called; a `steps.Step` where it is JAX's."""
    ours = our_model(name)
    if side == TORCH:
        from experiments.benchmark import torch_resnet

        if kind == "training":
            return torch_resnet.training(ours, images, labels)
        return torch_resnet.inference(ours, images)
    models: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours,
        ONEDNN: lambda: our_model(name, conv_form="onednn"),
        REMAT: lambda: our_model(name, remat="block"),
        LINEN: lambda: linen_resnet.like(ours),
    }
    model = models[side]()
    if kind == "training":
        return steps.training(model, images, labels)
    return steps.inference(model, images)
