"""Residual blocks: a shortcut plus a branch, a[l+2] = g(z[l+2] + a[l]) (He 2015, arXiv 1512.03385).

`Residual` joins any two linen modules. `BasicBlock` and `BottleneckBlock` are the published ones:
with an identity shortcut they are the *identity block*, with a projection the *convolution block*
that opens a stage. In every block the two parts are scopes of the tree, `branch` and `shortcut`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from flaxres.nets import initialize
from flaxres.nets.conv import Conv
from flaxres.nets.initialize import ResidualInit
from flaxres.nets.norms import BatchNorm, NoNorm

ModuleDef = Any
Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "identity": lambda x: x,
}


def activation(name: str) -> Activation:
    """The activation function of this name, or ValueError with the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def join(shortcut: jax.Array, branch: jax.Array, act: Activation | None) -> jax.Array:
    """g(shortcut + branch), or ValueError that names the shortcut that would fit."""
    if shortcut.shape != branch.shape:
        raise ValueError(_misfit(shortcut.shape, branch.shape))
    total = shortcut + branch
    return act(total) if act else total


def _misfit(shortcut: tuple[int, ...], branch: tuple[int, ...]) -> str:
    sentence = f"the shortcut gives {list(shortcut)} and the branch {list(branch)}: no sum exists"
    if len(shortcut) != len(branch) or len(branch) != 4:
        return f"{sentence}; end the branch in a layer that gives the shape of its input"
    strides = {-(-a // b) for a, b in zip(shortcut[1:3], branch[1:3], strict=True)}
    if len(strides) != 1 or strides == {0}:
        return f"{sentence}; give both the same spatial shape (symmetric padding does)"
    fit = f"features={branch[-1]}, strides={strides.pop()}"
    return f"{sentence}; shortcut=Projection({fit}) or shortcut=Padded({fit}) would fit"


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
    """Stochastic depth: zero whole examples with probability `rate`, scale the rest by 1/(1-rate).

    x: `[batch, …]`. Huang 2016, arXiv 1603.09382 (with the scaling of its successors).
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    mask = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * (mask / keep).astype(x.dtype)


def blur(x: jax.Array, strides: int) -> jax.Array:
    """Anti-aliased subsampling by a 3×3 binomial filter (Zhang 2019, arXiv 1904.11486)."""
    taps = jnp.asarray([1.0, 2.0, 1.0], x.dtype) / 4
    channels = x.shape[-1]
    kernel = jnp.tile(jnp.outer(taps, taps)[:, :, None, None], (1, 1, 1, channels))
    # Edge padding, since reflection does not exist for maps of one pixel.
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return jax.lax.conv_general_dilated(
        padded,
        kernel,
        (strides, strides),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


class Identity(nn.Module):
    """The identity shortcut: no parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Padded(nn.Module):
    """Option A: every `strides`-th pixel, new channels zero; no parameters (He 2015, §4.2)."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.strides, :: self.strides]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))


class Projection(nn.Module):
    """Options B and C: a strided 1×1 convolution and a norm.

    `avg_down` averages 2×2 before a convolution of stride 1 (ResNet-D: He 2018, arXiv 1812.01187).
    """

    features: int
    strides: int = 1
    avg_down: bool = False
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        strides = self.strides
        if self.avg_down and strides > 1:
            window = (strides, strides)
            x = nn.avg_pool(x, window, window, "SAME", count_include_pad=False)
            strides = 1
        x = self.conv(self.features, (1, 1), strides=strides, name="conv")(x)
        return self.norm(name="norm")(x, train)


class SqueezeExcite(nn.Module):
    """Channel gates σ(W₂ relu(W₁ mean(x))) (Hu 2017, arXiv 1709.01507)."""

    ratio: float = 1 / 16
    conv: ModuleDef = Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        reduced = max(8, int(channels * self.ratio + 4) // 8 * 8)
        gates = jnp.mean(x, axis=(1, 2), keepdims=True)
        gates = nn.relu(self.conv(reduced, (1, 1), use_bias=True, name="reduce")(gates))
        return x * nn.sigmoid(self.conv(channels, (1, 1), use_bias=True, name="expand")(gates))


class Residual(nn.Module):
    """g(shortcut(x) + branch(x)) around any linen modules.

    The branch may hold arbitrarily many transformations: what it gives must only have the shape of
    what the shortcut gives. Without a shortcut the input itself is added. `train` is handed to
    those parts that take it.

    >>> block = Residual(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)]), activation=nn.relu)

    Raises:
      ValueError: the shapes differ; the sentence names both and the shortcut that would fit.
    """

    branch: nn.Module
    shortcut: nn.Module | None = None
    activation: Activation | None = nn.relu

    def __post_init__(self) -> None:
        # A module made inside somebody's compact method already belongs to that module; its
        # parameters shall stand under `branch` and `shortcut` all the same.
        for part in ("branch", "shortcut"):
            if isinstance(getattr(self, part), nn.Module):
                object.__setattr__(self, part, getattr(self, part).clone(parent=None, name=None))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kept = x if self.shortcut is None else _call(self.shortcut, x, train)
        return join(kept, _call(self.branch, x, train), self.activation)


def _call(module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    return module(x, train=train) if takes_train else module(x)  # type: ignore[operator]


class Layer(NamedTuple):
    """One convolution of a branch."""

    features: int
    kernel: int
    strides: int = 1
    groups: int = 1


class ConvBranch(nn.Module):
    """The branch F of a residual block: convolutions with norms, activations and its own start.

    v1: conv norm act … conv norm (the activation follows the sum). v2: norm act conv … norm act
    conv; `preactivated` leaves out the first norm and act, where the block has applied them.
    """

    layers: tuple[Layer, ...]
    style: str = "v1"
    preactivated: bool = False
    start: ResidualInit = initialize.RESIDUAL_INITS["default"]
    blocks: int = 1
    se_ratio: float = 0.0
    antialias: bool = False
    activation: str = "relu"
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    param_dtype: Any = jnp.float32
    gain_init: Any = initialize.ZEROS
    bias_init: Any = initialize.ZEROS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        act = activation(self.activation)
        count = len(self.layers)
        for k, layer in enumerate(self.layers, 1):
            if self.style == "v2" and not (k == 1 and self.preactivated):
                x = self._norm(k)(x, train, act)
            x = self._convolve(self._shift(x, f"bias{k}a"), k, layer)
            if self.style == "v1":
                x = self._shift(x, f"bias{k}b") if k < count else x
                x = self._norm(k)(x, train, act if k < count else None)
            if self.antialias and layer.strides > 1:
                x = blur(x, layer.strides)
        if self.se_ratio:
            x = SqueezeExcite(self.se_ratio, conv=self.conv, name="se")(x)
        return self._shift(self._multiply(x), f"bias{count}b")

    def _norm(self, k: int) -> nn.Module:
        if _is_none(self.norm):
            return self.norm(name=f"norm{k}")
        is_last = self.style == "v1" and k == len(self.layers)
        scale_init = self.start.scale_init(is_last, self.blocks)
        return self.norm(name=f"norm{k}", scale_init=scale_init)

    def _convolve(self, x: jax.Array, k: int, layer: Layer) -> jax.Array:
        count = len(self.layers)
        last_is_norm = self.style == "v1" and not _is_none(self.norm)
        conv = self.conv(
            layer.features,
            (layer.kernel, layer.kernel),
            strides=1 if self.antialias else layer.strides,
            feature_group_count=layer.groups,
            kernel_init=self.start.kernel_init(k, count, self.blocks, last_is_norm),
            name=f"conv{k}",
        )
        return checkpoint_name(conv(x), "conv")

    def _shift(self, x: jax.Array, name: str) -> jax.Array:
        if not self.start.scalar_biases:
            return x
        return x + self.param(name, self.bias_init, (), self.param_dtype).astype(x.dtype)

    def _multiply(self, x: jax.Array) -> jax.Array:
        if self.start.gain == "none":
            return x
        shape = (x.shape[-1],) if self.start.gain == "channel" else ()
        return x * self.param("gain", self.gain_init, shape, self.param_dtype).astype(x.dtype)


def _is_none(norm: ModuleDef) -> bool:
    return (norm.func if isinstance(norm, functools.partial) else norm) is NoNorm


class PreActivation(nn.Module):
    """norm and act before the fork of a v2 convolution block (He 2016, arXiv 1603.05027, §4.1).

    Both arms read it, so it belongs to neither: `preact` in the tree.
    """

    activation: str = "relu"
    norm: ModuleDef = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.norm(name="norm")(x, train, activation(self.activation))


class _Block(nn.Module):
    """What basic and bottleneck blocks share; they differ in the layers of their branch."""

    features: int
    strides: int = 1
    style: str = "v1"
    shortcut_kind: str = "B"
    residual: bool = True
    residual_init: str | ResidualInit = "default"
    blocks: int = 1
    groups: int = 1
    base_width: int = 64
    se_ratio: float = 0.0
    avg_down: bool = False
    antialias: bool = False
    activation: str = "relu"
    conv: ModuleDef = Conv
    norm: ModuleDef = BatchNorm
    param_dtype: Any = jnp.float32

    expansion = 1

    def layers(self) -> tuple[Layer, ...]:
        """The convolutions of the branch."""
        raise TypeError("use BasicBlock or BottleneckBlock")

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, drop_rate: jax.Array | float | None = None
    ) -> jax.Array:
        act = activation(self.activation) if self.style == "v1" else None
        kind = self.kind(x.shape[-1])
        preactivated = self.style == "v2" and kind == "projection"
        if preactivated:
            x = PreActivation(self.activation, self.norm, name="preact")(x, train)
        start = initialize.resolve(self.residual_init)
        branch = ConvBranch(
            self.layers(),
            self.style,
            preactivated,
            start,
            self.blocks,
            self.se_ratio,
            self.antialias,
            self.activation,
            self.conv,
            self.norm,
            self.param_dtype,
            gain_init=initialize.Constant(start.value),
            name="branch",
        )(x, train)
        if kind == "plain":
            return act(branch) if act else branch
        if train and drop_rate is not None:
            branch = drop_path(branch, drop_rate, self.make_rng("dropout"))
        return join(self._shortcut(kind, x, train), branch, act)

    def kind(self, channels: int) -> str:
        """ "plain", "identity", "padded" or "projection", for an input of so many channels."""
        if not self.residual:
            return "plain"
        out = self.features * self.expansion
        fits = self.strides == 1 and channels == out
        if self.shortcut_kind == "C" or (self.shortcut_kind == "B" and not fits):
            return "projection"
        if fits:
            return "identity"
        if channels > out:
            raise ValueError(
                f"a padded shortcut (A) cannot give {out} channels of {channels}; use shortcut='B'"
            )
        return "padded"

    def _shortcut(self, kind: str, x: jax.Array, train: bool) -> jax.Array:
        if kind == "identity":
            return Identity(name="shortcut")(x)
        out = self.features * self.expansion
        if kind == "padded":
            return Padded(out, self.strides, name="shortcut")(x)
        # In v2 the norm that reads the projection is that of the next block.
        norm = NoNorm if self.style == "v2" else self.norm
        return Projection(out, self.strides, self.avg_down, self.conv, norm, name="shortcut")(
            x, train
        )


class BasicBlock(_Block):
    """Two 3×3 convolutions beside a shortcut: a[l+2] = g(z[l+2] + a[l]).

    Input `[batch, height, width, channels]`, output `[batch, ⌈height/strides⌉, ⌈width/strides⌉,
    features]`. It is the identity block where the shapes agree, and a convolution block (1×1
    projection in the shortcut) where they do not, or with `shortcut_kind="A"` a padded one.
    `residual=False` leaves the shortcut out. `style="v2"` activates before each convolution and
    not after the sum, so that the shortcut is an exact identity (He 2016, arXiv 1603.05027).
    """

    def layers(self) -> tuple[Layer, ...]:
        """Two 3×3 convolutions, the first with the stride."""
        return (Layer(self.features, 3, self.strides), Layer(self.features, 3))


class BottleneckBlock(_Block):
    """1×1, 3×3, 1×1 convolutions beside a shortcut; gives 4 · features channels.

    The stride stands on the 3×3 ("v1.5"). `groups` and `base_width` make ResNeXt (Xie 2016, arXiv
    1611.05431) and wide nets (Zagoruyko 2016, arXiv 1605.07146). Otherwise as `BasicBlock`.
    """

    expansion = 4

    def layers(self) -> tuple[Layer, ...]:
        """1×1 to the inner width, strided and grouped 3×3, 1×1 to 4 · features."""
        width = self.features * self.base_width // 64 * self.groups
        return (
            Layer(width, 1),
            Layer(width, 3, self.strides, self.groups),
            Layer(self.features * self.expansion, 1),
        )


BLOCKS: dict[str, type[_Block]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}
