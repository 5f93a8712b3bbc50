"""`TrainConfig`: everything that decides a run, as one frozen dataclass. Imports no JAX."""

import dataclasses
import json
import math
from typing import Any, Literal

# What a run may be continued with another value of: none of it changes what is computed, or it
# changes it within rounding (driver, devices, layout).
MAY_DIFFER = frozenset(
    {
        "workdir",
        "data_dir",
        "driver",
        "devices",
        "scan",
        "remat",
        "conv_form",
        "fsdp",
        "workers",
        "max_corrupt",
        "log_every",
        "eval_every",
        "eval_batch_size",
        "checkpoint_every",
        "keep",
        "on_nonfinite",
        "profile_steps",
        "coordinator",
        "num_processes",
        "process_id",
    }
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Stored as config.json in its work directory."""

    model: str = "resnet20_cifar"
    """Name in the zoo (`flaxres info` lists them)."""
    data: str = "digits"
    """TFDS image classification data set; digits need no network and no preparation."""
    data_dir: str | None = None
    """TFDS directory that holds the prepared data set."""
    image_size: int | None = None
    """Side to resize images to; default the data's own (224 where sizes differ)."""
    steps: int | None = None
    """Optimiser steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the training images; give this or steps."""
    batch_size: int = 64
    """Examples a step, over all devices and processes."""
    eval_batch_size: int | None = None
    """Examples an evaluation batch; default batch_size."""
    seed: int = 0
    """Every random draw derives from it: weights, order, augmentation, dropped branches."""
    workdir: str | None = None
    """Where the run is written; a run that is there is continued. Default runs/MODEL-DATA."""

    optimizer: str = "sgd"
    """sgd (Nesterov), adamw, lamb, lars, or by name one of optax that needs gradients alone."""
    lr: float = 0.1
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply lr by batch_size / 256 (linear scaling, Goyal 2017)."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run after which schedule=step divides the rate by ten."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    warmup_epochs: float = 0.0
    """The same in epochs; give one of the two."""
    momentum: float = 0.9
    """Of sgd, lars and rmsprop; first decay rate of the Adam family."""
    weight_decay: float = 5e-4
    """Decay of the parameters that decay_mask names; 0 is off."""
    decay_mask: tuple[str, ...] = ("/kernel$",)
    """Regular expressions on parameter names; each must match. Norms and biases are left out."""
    layer_decay: float = 1.0
    """Multiply updates by this to the power of the distance from the head; 1 is off."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    accumulate: int = 1
    """Micro-batches a step, whose gradients are averaged."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, used for evaluation."""

    loss: Literal["softmax", "bce"] = "softmax"
    """Cross-entropy over classes, or one binary cross-entropy a class."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; with mixup on too, each step takes one of them."""
    augment: str = "auto"
    """none, crop, flip, crop_flip, or auto: what suits the data set."""

    residual_init: str = "default"
    """How residual branches start: zero_gamma, zero_last, rezero, fixup, …"""
    norm: Literal["batch", "group", "none"] = "batch"
    """Norm of the model."""
    stochastic_depth: float = 0.0
    """Rate at which the last block's branch is dropped."""
    batch_norm: Literal["sync", "device", "ghost"] = "sync"
    """Statistics over the whole batch, each device's part, or groups of ghost_size examples."""
    ghost_size: int = 32
    """Examples a group with batch_norm=ghost."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of computation; parameters, statistics and logits stay float32."""
    scan: Literal["auto", "on", "off"] = "auto"
    """Run equal blocks as one scanned block: compile time and memory flat in depth."""
    remat: Literal["none", "block", "conv"] = "none"
    """Recompute activations in the backward pass to save memory."""
    conv_form: Literal["auto", "onednn", "lax", "turned", "im2col", "rows", "shifts", "s2d"] = (
        "auto"
    )
    """Form of convolutions: auto is the fastest in pure JAX, onednn needs flaxres[onednn]."""

    driver: Literal["auto", "device", "pmap", "mesh"] = "auto"
    """One device, pmap, or jit over a mesh; auto takes pmap where there are several devices."""
    devices: int | None = None
    """Devices to use; default all."""
    fsdp: bool = False
    """With driver=mesh: shard parameters and optimiser state over the devices too."""
    coordinator: str | None = None
    """host:port of process 0 in a run of many processes (found by itself on TPU and Slurm)."""
    num_processes: int | None = None
    """Processes in the run."""
    process_id: int | None = None
    """Number of this process, from 0."""
    workers: int = 0
    """Processes that decode images; 0 decodes in threads."""
    max_corrupt: int = 100
    """Unreadable examples to put up with, each named and replaced by the next readable one."""

    log_every: int = 10
    """Steps between lines of the log."""
    eval_every: int | None = None
    """Steps between evaluations; default an epoch, at least 100 steps. The end is always one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default eval_every."""
    keep: int = 3
    """Newest checkpoints to keep, beside the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a non-finite loss or gradient does."""
    profile_steps: str | None = None
    """FROM:TO, steps to write a profiler trace of."""

    def validate(self) -> "TrainConfig":
        """The configuration itself, or ValueError: one sentence with value and what is accepted."""
        for field in ("batch_size", "accumulate", "log_every", "keep", "ghost_size"):
            _need(getattr(self, field) >= 1, field, getattr(self, field), "at least 1")
        optional = (
            "steps",
            "epochs",
            "eval_batch_size",
            "eval_every",
            "checkpoint_every",
            "devices",
            "image_size",
            "clip_norm",
            "num_processes",
        )
        for field in optional:
            value = getattr(self, field)
            fits = value is None or (value > 0 and math.isfinite(value))
            _need(fits, field, value, "more than 0")
        _need(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "more than 0")
        for field in (
            "weight_decay",
            "mixup",
            "cutmix",
            "workers",
            "max_corrupt",
            "warmup_steps",
            "warmup_epochs",
        ):
            value = getattr(self, field)
            _need(value >= 0 and math.isfinite(value), field, value, "0 or more")
        for field in ("label_smoothing", "momentum", "stochastic_depth"):
            value = getattr(self, field)
            _need(0 <= value < 1, field, value, "at least 0 and less than 1")
        _need(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1")
        _need(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0, at most 1")
        _need(all(0 < d < 1 for d in self.drops), "drops", self.drops, "between 0 and 1")
        _need(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
        for name, accepted in _choices().items():
            value = getattr(self, name)
            _need(value in accepted, name, value, f"one of {', '.join(accepted)}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs:g})"
            )
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                "give warmup_steps or warmup_epochs, not both "
                f"({self.warmup_steps} and {self.warmup_epochs:g})"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} "
                "micro-batches"
            )
        self._check_effect()
        if self.fsdp and self.driver not in ("auto", "mesh"):
            raise ValueError(f"fsdp needs driver=mesh, not {self.driver}")
        if self.profile_steps is not None:
            profile_range(self.profile_steps)
        return self

    def _check_effect(self) -> None:
        """Refuse what was set and would change nothing."""
        if self.conv_form == "onednn" and self.dtype != "float32":
            raise ValueError(f"conv_form=onednn needs dtype=float32, not {self.dtype}")
        if self.batch_norm != "sync" and self.norm != "batch":
            raise ValueError(f"batch_norm={self.batch_norm} needs norm=batch, not {self.norm}")
        if self.ghost_size != TrainConfig.ghost_size and self.batch_norm != "ghost":
            raise ValueError(
                f"ghost_size={self.ghost_size} needs batch_norm=ghost, not {self.batch_norm}"
            )
        if self.drops != TrainConfig.drops and self.schedule != "step":
            raise ValueError(
                f"drops={','.join(f'{drop:g}' for drop in self.drops)} needs schedule=step, not "
                f"{self.schedule}"
            )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values; tuples become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`; ValueError names fields that are unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields in a configuration: {', '.join(unknown)}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)

    def diff(self, other: "TrainConfig") -> list[str]:
        """Sentences such as "lr: 0.1 here, 0.2 there" for fields that make another run."""
        return [
            f"{name}: {getattr(self, name)} here, {getattr(other, name)} there"
            for name in (field.name for field in dataclasses.fields(self))
            if name not in MAY_DIFFER and getattr(self, name) != getattr(other, name)
        ]

    def total_steps(self, examples: int) -> int:
        """Steps of the run, for a training split of so many examples."""
        if self.steps is not None:
            return self.steps
        epochs = self.epochs if self.epochs is not None else 1
        return max(1, round(epochs * examples / self.batch_size))

    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr * self.batch_size / 256 if self.scale_lr else self.lr


def profile_range(text: str) -> tuple[int, int]:
    """The steps of "10:20", or ValueError."""
    first, _, last = text.partition(":")
    if first.isdigit() and last.isdigit() and int(first) < int(last):
        return int(first), int(last)
    raise ValueError(f"profile_steps must be FROM:TO with FROM less than TO, not {text!r}")


def _choices() -> dict[str, tuple[str, ...]]:
    """Fields with a fixed list of values, from their types."""
    fields = dataclasses.fields(TrainConfig)
    return {
        f.name: f.type.__args__
        for f in fields
        if hasattr(f.type, "__args__") and getattr(f.type, "__origin__", None) is Literal
    }


def _need(condition: bool, field: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{field} must be {accepted}, not {value}")
