"""The PyTorch peer: the same network in torch.nn, channels_last, and its training step.

Imported only where PyTorch is installed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.benchmark.environment import cores
from flaxres.nets.resnet import ResNet


def _conv(received: int, given: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(received, given, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """A basic (expansion 1) or bottleneck (4) block, the activation after the sum."""

    def __init__(
        self, received: int, features: int, stride: int, expansion: int, padded: bool
    ) -> None:
        super().__init__()
        out = features * expansion
        if expansion == 1:
            first, second = _conv(received, features, 3, stride), _conv(features, out, 3)
            layers = [first, nn.BatchNorm2d(features), nn.ReLU(True), second, nn.BatchNorm2d(out)]
        else:
            layers = [
                _conv(received, features, 1),
                nn.BatchNorm2d(features),
                nn.ReLU(True),
                _conv(features, features, 3, stride),
                nn.BatchNorm2d(features),
                nn.ReLU(True),
                _conv(features, out, 1),
                nn.BatchNorm2d(out),
            ]
        self.branch = nn.Sequential(*layers)
        self.stride, self.missing = stride, out - received
        fits = stride == 1 and received == out
        self.padded = padded and not fits
        self.shortcut: nn.Module = nn.Identity()
        if not fits and not padded:
            self.shortcut = nn.Sequential(_conv(received, out, 1, stride), nn.BatchNorm2d(out))
        self.act = nn.ReLU(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.padded:
            kept = x[:, :, :: self.stride, :: self.stride]
            kept = nn.functional.pad(kept, (0, 0, 0, 0, 0, self.missing))
        else:
            kept = self.shortcut(x)
        return self.act(self.branch(x) + kept)


class TorchResNet(nn.Module):
    """Input `[batch, channels, height, width]`, output logits `[batch, classes]`."""

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        cifar = model.stem == "cifar"
        expansion = 4 if model.block == "bottleneck" else 1
        width = model.widths[0]
        stem = [_conv(3, width, 3 if cifar else 7, 1 if cifar else 2), nn.BatchNorm2d(width)]
        blocks: list[nn.Module] = [*stem, nn.ReLU(True)]
        if not cifar:
            blocks.append(nn.MaxPool2d(3, 2, 1))
        received = width
        for stage, (size, features) in enumerate(zip(model.stage_sizes, model.widths, strict=True)):
            for block in range(size):
                stride = 2 if stage and not block else 1
                blocks.append(Block(received, features, stride, expansion, cifar))
                received = features * expansion
        self.trunk = nn.Sequential(*blocks)
        self.head = nn.Linear(received, model.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x).mean((2, 3)))


def _prepare(model: ResNet, images: np.ndarray) -> tuple[TorchResNet, torch.Tensor]:
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    net = TorchResNet(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
    return net, pixels.contiguous(memory_format=torch.channels_last)


def training(model: ResNet, images: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """A training step to call; images `[batch, height, width, channels]`, labels `[batch]`."""
    net, pixels = _prepare(model, images)
    targets = torch.from_numpy(labels.astype(np.int64))
    net.train()
    # fused: one pass over the parameters, the fastest that PyTorch has.
    optimizer = torch.optim.SGD(
        net.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(net(pixels), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def inference(model: ResNet, images: np.ndarray) -> Callable[[], Any]:
    """A forward pass to call, with running statistics."""
    net, pixels = _prepare(model, images)
    net.eval()

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return net(pixels)

    return step
