"""The residual network: stem, stages of blocks, head; features at every stage.

One linen module, `ResNet`, is every model of the zoo: its fields are the whole configuration.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxres.nets import initialize
from flaxres.nets.blocks import BLOCKS, ModuleDef, activation, blur
from flaxres.nets.conv import Conv
from flaxres.nets.initialize import ResidualInit
from flaxres.nets.norms import BatchNorm, GroupNorm, NoNorm
from flaxres.nets.pool import max_pool

STACKED_RUN = re.compile(r"blocks(\d+)to(\d+)")
"""Names of runs of equal blocks whose leaves are stacked, first block and last."""

_CHOICES = {
    "block": tuple(BLOCKS),
    "stem": ("imagenet", "deep", "cifar"),
    "style": ("v1", "v2"),
    "shortcut": ("A", "B", "C"),
    "norm": ("batch", "group", "none"),
    "remat": ("none", "block", "conv"),
    "norm_form": (None, "auto", "onednn", "plain"),
}


class ResNet(nn.Module):
    """A residual network or, with `residual=False`, its plain twin (the same layers, no shortcut).

    Input `[batch, height, width, channels]`, any size from `total_stride` up and any number of
    channels. Gives logits `[batch, num_classes]` in float32, or, with `num_classes=0`, pooled
    features `[batch, features]` in `dtype`; with `features=True` also a dict of the activations
    after stem and stages (`"stem"`, `"stage1"`, …). `train=True` needs `mutable=["batch_stats"]`
    under batch norm, and `rngs={"dropout": key}` under stochastic depth.
    He 2015 (arXiv 1512.03385), He 2016 (1603.05027).
    """

    stage_sizes: tuple[int, ...]
    """Blocks in each stage."""
    block: str = "bottleneck"
    """"basic" or "bottleneck"."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Features of each stage (a bottleneck gives four times as many)."""
    num_classes: int = 1000
    """Classes; 0 leaves the head out and gives pooled features."""
    stem: str = "imagenet"
    """"imagenet" (7×7/2, max-pool), "deep" (three 3×3, max-pool: ResNet-D) or "cifar" (3×3)."""
    stem_width: int = 64
    """Channels that the stem gives."""
    style: str = "v1"
    """"v1" activates after the sum, "v2" before each convolution (exact identity)."""
    shortcut: str = "B"
    """Where shapes differ: "A" padded, "B" projection; "C" projection everywhere."""
    residual: bool = True
    """False: no shortcuts, the plain twin."""
    norm: str = "batch"
    """"batch", "group" or "none"."""
    residual_init: str | ResidualInit = "default"
    """How the branches start, see `flaxres.nets.initialize`."""
    groups: int = 1
    """Groups of the 3×3 in bottlenecks (cardinality)."""
    base_width: int = 64
    """Inner width of bottlenecks, of 64 features (a group)."""
    se: float = 0.0
    """Reduction ratio of squeeze-excitation, such as 1/16; 0 for none."""
    avg_down: bool = False
    """Average-pool before the projection (ResNet-D)."""
    antialias: bool = False
    """Blur where branches and the stem's pool subsample (Zhang 2019, arXiv 1904.11486)."""
    stochastic_depth: float = 0.0
    """Rate at which the last block's branch is dropped; earlier ones linearly less."""
    activation: str = "relu"
    """The nonlinearity g."""
    dtype: Any = jnp.float32
    """Of computation; logits are float32 always."""
    param_dtype: Any = jnp.float32
    """Of storage."""
    scan: bool = False
    """Run equal blocks of a stage as one scanned block over stacked parameters."""
    remat: str = "none"
    """Recompute in the backward pass: "block" keeps block inputs, "conv" convolutions' outputs."""
    norm_axis: str | None = None
    """Mapped axis over which batch statistics are averaged (synchronised batch norm)."""
    norm_groups: int = 1
    """Groups of the batch with statistics of their own (ghost batch norm)."""
    conv_form: str = "auto"
    """The form of every convolution, see `flaxres.nets.conv`."""
    norm_form: str | None = None
    """The form of batch norm, see `flaxres.nets.norms`; None takes what fits conv_form."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, features: bool = False) -> Any:
        self.validate()
        self.check_image(x.shape)
        act = activation(self.activation)
        taken = {}
        x = taken["stem"] = Stem(
            self.stem,
            self.stem_width,
            self.style,
            self.antialias,
            self.activation,
            self._conv(),
            self._norm(),
            functools.partial(max_pool, plain=self.norm_form == "plain"),
            name="stem",
        )(x.astype(self.dtype), train)
        rates = self.drop_rates()
        for stage, size in enumerate(self.stage_sizes, 1):
            start = sum(self.stage_sizes[: stage - 1])
            x = taken[f"stage{stage}"] = Stage(
                block=self._block(stage),
                strides=self.stage_strides(stage),
                runs=tuple(block_runs(self, stage)),
                rates=None if rates is None else rates[start : start + size],
                remat=self.remat,
                name=f"stage{stage}",
            )(x, train)
        if self.style == "v2":
            x = self._norm()(name="norm")(x, train, act)
        x = jnp.mean(x, axis=(1, 2))
        if self.num_classes:
            zero = initialize.resolve(self.residual_init).zero_head
            x = nn.Dense(
                self.num_classes,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                kernel_init=initialize.ZEROS if zero else initialize.HEADS[self.stem],
                bias_init=initialize.ZEROS,
                name="head",
            )(x)
        return (x, taken) if features else x

    def validate(self) -> None:
        """Raise ValueError if a field, or a combination of them, makes no model."""
        for field, accepted in _CHOICES.items():
            if getattr(self, field) not in accepted:
                names = ", ".join(map(str, accepted))
                raise ValueError(f"unknown {field} {getattr(self, field)!r} (accepted: {names})")
        activation(self.activation)
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be positive, not {self.stage_sizes}")
        if len(self.widths) != len(self.stage_sizes):
            raise ValueError(
                f"{len(self.widths)} widths {self.widths} do not fit "
                f"{len(self.stage_sizes)} stages {self.stage_sizes}"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, not {self.num_classes}")
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(f"stochastic_depth must be in [0, 1), not {self.stochastic_depth}")
        if self.stochastic_depth and not self.residual:
            raise ValueError(
                f"stochastic_depth={self.stochastic_depth:g} needs residual=True: a plain net has "
                "no branches to drop"
            )
        if self.block == "basic" and (self.groups, self.base_width) != (1, 64):
            raise ValueError("groups and base_width need block='bottleneck', not 'basic'")
        initialize.resolve(self.residual_init).check(
            style=self.style, norm=self.norm, residual=self.residual, block=self.block
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.stage_sizes)

    @property
    def total_stride(self) -> int:
        """Input pixels to one pixel of the last stage."""
        return (1 if self.stem == "cifar" else 4) * 2 ** (len(self.stage_sizes) - 1)

    def stage_strides(self, stage: int) -> int:
        """Stride of the first block of a stage (from 1)."""
        return 1 if stage == 1 else 2

    def stage_channels(self, stage: int) -> tuple[int, int]:
        """Channels that a stage (from 1) receives and gives."""
        expansion = BLOCKS[self.block].expansion
        received = self.stem_width if stage == 1 else self.widths[stage - 2] * expansion
        return received, self.widths[stage - 1] * expansion

    def make_block(self, stage: int, block: int) -> nn.Module:
        """The block module of this place (both from 1), to be applied to its own variables."""
        strides = self.stage_strides(stage) if block == 1 else 1
        return self._block(stage)(strides=strides, parent=None)

    def drop_rates(self) -> tuple[float, ...] | None:
        """Stochastic-depth rate of each block, None when off (Huang 2016, §3: linear in depth)."""
        if not self.stochastic_depth:
            return None
        rates = np.linspace(0, self.stochastic_depth, self.depth + 1)[1:]
        return tuple(float(rate) for rate in rates)

    def check_image(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if images `[batch, height, width, channels]` do not fit."""
        if len(shape) != 4:
            raise ValueError(f"images must be [batch, height, width, channels], not {list(shape)}")
        if min(shape[1:3]) < self.total_stride:
            raise ValueError(
                f"an image of {shape[1]}×{shape[2]} is too small for strides of "
                f"{self.total_stride} in all; use at least {self.total_stride}×{self.total_stride}"
            )

    def _conv(self) -> ModuleDef:
        return functools.partial(
            Conv,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            form=self.conv_form,
        )

    def _norm(self) -> ModuleDef:
        if self.norm == "none":
            return NoNorm
        if self.norm == "group":
            return functools.partial(GroupNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        return functools.partial(
            BatchNorm,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.norm_axis,
            groups=self.norm_groups,
            form=self.norm_form or ("onednn" if self.conv_form == "onednn" else "auto"),
        )

    def _block(self, stage: int) -> ModuleDef:
        return functools.partial(
            BLOCKS[self.block],
            features=self.widths[stage - 1],
            style=self.style,
            shortcut_kind=self.shortcut,
            residual=self.residual,
            residual_init=self.residual_init,
            blocks=self.depth,
            groups=self.groups,
            base_width=self.base_width,
            se_ratio=self.se,
            avg_down=self.avg_down,
            antialias=self.antialias,
            activation=self.activation,
            conv=self._conv(),
            norm=self._norm(),
            param_dtype=self.param_dtype,
        )


class Stem(nn.Module):
    """The layers before the first stage. v2 leaves norm and activation to the first block."""

    kind: str
    features: int
    style: str
    antialias: bool
    activation: str
    conv: ModuleDef
    norm: ModuleDef
    pool: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        act = activation(self.activation)
        if self.kind == "deep":
            for k, (width, strides) in enumerate(((2, 2), (2, 1)), 1):
                x = self.conv(self.features // width, (3, 3), strides=strides, name=f"conv{k}")(x)
                x = self.norm(name=f"norm{k}")(x, train, act)
            x = self.conv(self.features, (3, 3), name="conv3")(x)
        elif self.kind == "imagenet":
            x = self.conv(self.features, (7, 7), strides=2, name="conv")(x)
        else:
            x = self.conv(self.features, (3, 3), name="conv")(x)
        if self.style == "v1":
            x = self.norm(name="norm3" if self.kind == "deep" else "norm")(x, train, act)
        if self.kind == "cifar":
            return x
        return blur(self.pool(x, 1), 2) if self.antialias else self.pool(x, 2)


class Stage(nn.Module):
    """Blocks of one width; runs of equal blocks scanned over stacked parameters."""

    block: ModuleDef
    strides: int
    runs: tuple[tuple[int, int], ...]
    rates: tuple[float, ...] | None
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for first, last in self.runs:
            strides = self.strides if first == 1 else 1
            rates = None if self.rates is None else self.rates[first - 1 : last]
            block = self.block(strides=strides, name=run_name(first, last))
            if first == last:
                x = self._step(train)(block, x, None if rates is None else rates[0])
            else:
                x = self._scan(block, x, train, last - first + 1, rates)
        return x

    def _scan(
        self,
        blocks: nn.Module,
        x: jax.Array,
        train: bool,
        length: int,
        rates: tuple[float, ...] | None,
    ) -> jax.Array:
        step = self._step(train, in_scan=True)
        scan = nn.scan(
            lambda block, carry, rate: (step(block, carry, rate), None),
            variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=length,
        )
        return scan(blocks, x, None if rates is None else jnp.asarray(rates, jnp.float32))[0]

    def _step(self, train: bool, in_scan: bool = False) -> Any:
        def step(block: nn.Module, x: jax.Array, rate: Any) -> jax.Array:
            return block(x, train, rate)  # type: ignore[operator]

        if self.remat == "none":
            return step
        names = jax.checkpoint_policies.save_only_these_names("conv")
        policy = names if self.remat == "conv" else None
        # A loop's body is not merged with its recomputation, so the guard would only cost.
        return nn.remat(step, policy=policy, prevent_cse=not in_scan)


def run_name(first: int, last: int) -> str:
    """The name of a run of blocks in its stage: "block3", or stacked, see `STACKED_RUN`."""
    return f"block{first}" if first == last else f"blocks{first}to{last}"


def block_runs(model: ResNet, stage: int) -> list[tuple[int, int]]:
    """(first, last) of every run of blocks that the model keeps together, from 1.

    Without `scan` each block is a run of its own; with it, so are only the blocks whose shapes
    differ from the next one's.
    """
    size = model.stage_sizes[stage - 1]
    if not model.scan:
        return [(block, block) for block in range(1, size + 1)]
    received, given = model.stage_channels(stage)
    same = received == given and model.stage_strides(stage) == 1
    if same:
        return [(1, size)]
    return [(1, 1)] + ([(2, size)] if size > 1 else [])


def scan_pays(model: ResNet) -> bool:
    """Whether some stage has so many equal blocks that one scanned block beats separate ones.

    Below eight, the compiler's time is short either way, and a scan of big blocks spends a tenth of
    a step on moving what it keeps for the backward pass.
    """
    scanned = model.clone(scan=True)
    stages = range(1, len(model.stage_sizes) + 1)
    return any(last - first >= 7 for stage in stages for first, last in block_runs(scanned, stage))
