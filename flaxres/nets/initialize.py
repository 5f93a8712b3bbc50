"""How weights start: initialisers, and `ResidualInit` for residual branches.

One object decides how a residual branch begins, and refuses the combinations that are dead or
meaningless with the reason. The names are those of the literature; see `RESIDUAL_INITS`.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class FanOutNormal:
    """He normal, fan-out: N(0, gain / (k_h · k_w · features_out)) (He 2015, arXiv 1502.01852).

    The mode that keeps the variance of gradients, as published ResNets use it; `multiplier`
    scales the drawn weights (fixup, scaled). Kernels are HWIO or [in, out].
    """

    gain: float = 2.0
    multiplier: float = 1.0

    def std(self, shape: tuple[int, ...]) -> float:
        """Standard deviation for a kernel of this shape."""
        fan_out = math.prod(shape[:-2]) * shape[-1]
        return self.multiplier * math.sqrt(self.gain / fan_out)

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * self.std(shape)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The same distribution from a numpy generator, float32."""
        return rng.standard_normal(shape, np.float32) * np.float32(self.std(shape))


@dataclasses.dataclass(frozen=True)
class Normal:
    """N(0, std²). The classifier's head starts at std 0.01 (Goyal 2017, arXiv 1706.02677)."""

    std: float = 0.01

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * self.std

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The same distribution from a numpy generator, float32."""
        return rng.standard_normal(shape, np.float32) * np.float32(self.std)


@dataclasses.dataclass(frozen=True)
class FanInNormal:
    """LeCun normal: N(0, 1 / features_in), for a dense kernel `[in, out]` of a linear output."""

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return Normal(math.sqrt(1 / shape[0]))(key, shape, dtype)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The same distribution from a numpy generator, float32."""
        return Normal(math.sqrt(1 / shape[0])).draw(rng, shape)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every entry the same value."""

    value: float = 0.0

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.full(shape, self.value, dtype)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The constant as a float32 array; takes nothing from the generator."""
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True)
class Dirac:
    """Output channel o copies input channel o mod features_in (Zagoruyko 2017, arXiv 1706.00388).

    Wrapping around, rather than zeros, keeps every channel of a widening layer alive.
    """

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(self._kernel(shape), dtype)

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The same kernel; takes nothing from the generator."""
        return self._kernel(shape)

    @staticmethod
    def _kernel(shape: tuple[int, ...]) -> np.ndarray:
        kernel = np.zeros(shape, np.float32)
        centre = tuple((k - 1) // 2 for k in shape[:-2])
        out = np.arange(shape[-1])
        kernel[centre][out % shape[-2], out] = 1.0
        return kernel


ZEROS = Constant(0.0)
ONES = Constant(1.0)
HE = FanOutNormal()
HEADS: dict[str, Initializer] = {
    "imagenet": Normal(0.01),  # Goyal 2017, §5.1
    "deep": Normal(0.01),
    "cifar": FanInNormal(),  # keeps the variance of the pooled features (LeCun 1998)
}


@dataclasses.dataclass(frozen=True)
class ResidualInit:
    """How the residual branch of every block starts, and where that makes sense.

    `changes`, `formula`, `paper` say what it does; `styles`, `norms`, `plain` and `why_not` say
    which models it fits and the reason that is given when it does not. The other fields are what
    blocks read. L is the number of residual blocks of the model, m the convolutions of a branch.
    """

    name: str
    changes: str
    formula: str
    paper: str
    styles: tuple[str, ...] = ("v1", "v2")
    norms: tuple[str, ...] = ("batch", "group", "none")
    fits: tuple[tuple[str, str], ...] | None = None
    """Pairs (style, norm) that fit; None: every pair of `styles` and `norms`."""
    plain: str = "no"
    """Whether it fits nets without shortcuts: "no", "also" or "only"."""
    why_not: str = ""
    last: str = "he"
    """Start of the branch's last linear part: "he", "zero" or "scaled" (by L^-exponent)."""
    inner: str = "he"
    """Start of the other convolutions: "he", "zero", "dirac" or "fixup" (He · L^(-1/(2m-2)))."""
    gain: str = "none"
    """Learnable multiplier at the end of the branch: "none", "scalar" or "channel"."""
    value: float = 0.0
    """Start of the multiplier."""
    exponent: float = 0.0
    scalar_biases: bool = False
    zero_head: bool = False

    def check(self, *, style: str, norm: str, residual: bool, block: str = "basic") -> None:
        """Raise ValueError with the reason if this start is dead or meaningless in such a model."""
        if not residual and self.plain == "no":
            raise ValueError(
                f"residual_init {self.name!r} starts residual branches, and a plain net "
                "(residual=False) has none: use 'default', 'dirac' or 'zero_branch'"
            )
        if residual and self.plain == "only":
            raise ValueError(
                f"residual_init {self.name!r} is for plain nets: a residual block already "
                "carries the identity in its shortcut; use residual=False"
            )
        if self.plain == "only" and block == "bottleneck":
            raise ValueError(
                f"residual_init {self.name!r} does not fit bottleneck blocks: their narrow middle "
                "cannot carry the identity; use block='basic'"
            )
        fits = self.fits or tuple((s, n) for s in self.styles for n in self.norms)
        if (style, norm) not in fits:
            where = ", ".join(f"style={s!r} with norm={n!r}" for s, n in fits)
            raise ValueError(
                f"residual_init {self.name!r} does not fit style={style!r} with norm={norm!r}: "
                f"{self.why_not}; it fits {where}"
            )

    def kernel_init(self, k: int, m: int, blocks: int, last_is_norm: bool) -> Initializer:
        """Initialiser of convolution k of m (from 1) in a net of `blocks` branches."""
        if k < m or last_is_norm:
            return self._inner(m, blocks)
        if self.last == "zero":
            return ZEROS
        if self.last == "scaled":
            return FanOutNormal(multiplier=blocks**-self.exponent)
        return self._inner(m, blocks)

    def _inner(self, m: int, blocks: int) -> Initializer:
        if self.inner == "zero":
            return ZEROS
        if self.inner == "dirac":
            return Dirac()
        if self.inner == "fixup":
            power = -1 / (2 * m - 2) if m > 1 else 0.0
            return FanOutNormal(multiplier=blocks**power)
        return HE

    def scale_init(self, is_last: bool, blocks: int) -> Initializer:
        """Initialiser of a branch norm's scale; `is_last`: nothing linear stands behind it."""
        if self.inner == "zero" or (is_last and self.last == "zero"):
            return ZEROS
        if is_last and self.last == "scaled":
            return Constant(blocks**-self.exponent)
        return ONES


def layerscale(value: float = 1e-4) -> ResidualInit:
    """LayerScale: one learnable multiplier a channel, started at `value` (1e-4 … 1e-6)."""
    if not value > 0:
        raise ValueError(f"layerscale needs a positive value, not {value}: at 0 use 'rezero'")
    return ResidualInit(
        name=f"layerscale({value:g})",
        changes="multiplies the branch by one small learnable number a channel",
        formula=f"x + diag(λ) F(x), λ = {value:g}",
        paper="Touvron 2021, arXiv 2103.17239",
        gain="channel",
        value=value,
    )


def scaled(exponent: float = 0.5) -> ResidualInit:
    """Start every branch L^exponent smaller: the last norm's scale, or the last kernel without one.

    Keeps the variance of the sum of L branches of order one (De & Smith 2020).
    """
    if not exponent > 0:
        raise ValueError(f"scaled needs a positive exponent, not {exponent}: at 0 use 'default'")
    return ResidualInit(
        name=f"scaled({exponent:g})",
        changes="shrinks the last linear part of the branch by L^-exponent",
        formula=f"x + F(x) with F's last scale or kernel times L^-{exponent:g}",
        paper="De & Smith 2020, arXiv 2002.10444",
        last="scaled",
        exponent=exponent,
    )


RESIDUAL_INITS: dict[str, ResidualInit] = {
    init.name: init
    for init in (
        ResidualInit(
            name="default",
            changes="nothing: He fan-out kernels, norm scales 1",
            formula="W ~ N(0, 2/fan_out), γ = 1",
            paper="He 2015, arXiv 1502.01852",
            plain="also",
        ),
        ResidualInit(
            name="zero_gamma",
            changes="starts the scale of the branch's last norm at 0",
            formula="γ_last = 0, so g(x + 0) = g(x)",
            paper="Goyal 2017, arXiv 1706.02677, §5.1",
            fits=(("v1", "batch"), ("v1", "group")),
            why_not="in v2 the last norm stands before a ReLU whose derivative at 0 is 0, so its "
            "scale and the convolution behind it would never get a gradient, and without a norm "
            "there is no scale (use 'zero_last')",
            last="zero",
        ),
        ResidualInit(
            name="zero_last",
            changes="starts the branch's last convolution at 0",
            formula="W_last = 0, so x + 0 = x",
            paper="Zhang 2019, arXiv 1901.09321 (the zero of Fixup, alone)",
            fits=(("v2", "batch"), ("v2", "group"), ("v2", "none"), ("v1", "none")),
            why_not="in v1 a norm follows the last convolution, and a norm of zeros multiplies the "
            "gradient by 1/sqrt(epsilon), about 316 (use 'zero_gamma')",
            last="zero",
        ),
        ResidualInit(
            name="zero_branch",
            changes="starts every weight of the branch at 0, to show that it is dead",
            formula="W = 0 and γ = 0 throughout the branch",
            paper="a counter-example: the function is the identity, but no weight ever learns "
            "(with a norm in v1 the last norm's bias alone moves)",
            plain="also",
            last="zero",
            inner="zero",
        ),
        ResidualInit(
            name="fixup",
            changes="shrinks the inner convolutions, zeroes the last and the head, adds scalar "
            "biases and one scalar multiplier",
            formula="W_inner · L^(-1/(2m-2)), W_last = 0, multiplier 1, biases 0",
            paper="Zhang 2019, arXiv 1901.09321",
            fits=(("v1", "none"),),
            why_not="Fixup stands in for the norm of post-activation blocks",
            last="zero",
            inner="fixup",
            gain="scalar",
            value=1.0,
            scalar_biases=True,
            zero_head=True,
        ),
        ResidualInit(
            name="skipinit",
            changes="multiplies the branch by one learnable scalar that starts at 0",
            formula="x + α F(x), α = 0",
            paper="De & Smith 2020, arXiv 2002.10444",
            norms=("none",),
            why_not="SkipInit stands in for the norm (with a norm use 'rezero')",
            gain="scalar",
        ),
        ResidualInit(
            name="rezero",
            changes="multiplies the branch by one learnable scalar that starts at 0",
            formula="x + α F(x), α = 0",
            paper="Bachlechner 2020, arXiv 2003.04887",
            gain="scalar",
        ),
        ResidualInit(
            name="dirac",
            changes="starts every convolution of a plain block as the identity map",
            formula="W[centre, o mod in, o] = 1, else 0",
            paper="Zagoruyko 2017, arXiv 1706.00388",
            plain="only",
            inner="dirac",
        ),
    )
}
_MAKERS: dict[str, Callable[[float], ResidualInit]] = {"layerscale": layerscale, "scaled": scaled}


def residual_inits() -> list[str]:
    """Names that `residual_init` accepts."""
    return [*RESIDUAL_INITS, *_MAKERS]


def resolve(init: "str | ResidualInit") -> ResidualInit:
    """The object behind a name such as "zero_gamma", "layerscale(1e-5)" or "scaled(0.5)"."""
    if isinstance(init, ResidualInit):
        return init
    name, _, argument = init.partition("(")
    if name in RESIDUAL_INITS and not argument:
        return RESIDUAL_INITS[name]
    if name in _MAKERS:
        if not argument:
            return _MAKERS[name]()  # type: ignore[call-arg]
        try:
            return _MAKERS[name](_number(argument.rstrip(")")))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"residual_init {init!r}: {error}") from None
    close = difflib.get_close_matches(name, residual_inits(), 3, 0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"unknown residual_init {init!r}{hint} (known: {', '.join(residual_inits())})")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
