"""Every form of convolution is lax's, in all passes and derivatives; oneDNN where it is there."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from flaxres.nets import conv as module
from flaxres.nets import forms, onednn
from flaxres.nets.conv import Conv, choose, conv, explicit_padding
from flaxres.nets.forms import Geometry

PLAIN_FORMS = [form for form in module.FORMS if form != "onednn"]
needs_onednn = pytest.mark.skipif(
    not onednn.available(), reason=f"oneDNN is not here: {onednn.reason()}"
)
ALL_FORMS = [*PLAIN_FORMS, pytest.param("onednn", marks=needs_onednn)]
CASES = [
    # kernel, strides, padding, groups, (batch, height, width, channels, features)
    ((1, 1), (1, 1), "SYMMETRIC", 1, (3, 5, 4, 6, 8)),
    ((1, 1), (2, 2), "SYMMETRIC", 1, (2, 7, 6, 4, 6)),
    ((3, 3), (1, 1), "SYMMETRIC", 1, (1, 6, 5, 4, 8)),
    ((3, 3), (1, 1), "SAME", 2, (2, 5, 9, 4, 6)),
    ((3, 3), (2, 2), "SYMMETRIC", 1, (2, 8, 7, 4, 6)),
    ((3, 3), (2, 2), "SAME", 4, (1, 6, 6, 8, 4)),
    ((3, 3), (2, 1), ((0, 2), (3, 1)), 1, (2, 9, 8, 4, 6)),
    ((2, 5), (1, 2), "VALID", 2, (2, 7, 9, 4, 4)),
    ((7, 7), (2, 2), "SYMMETRIC", 1, (2, 16, 14, 3, 8)),
    ((5, 3), (3, 3), 2, 1, (1, 11, 10, 2, 3)),
]


def reference(x, kernel, strides, padding, groups):
    pads = explicit_padding(padding, x.shape[1:3], kernel.shape[:2], strides)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def drawn(kernel, groups, sizes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    batch, height, width, channels, features = sizes
    shapes = (batch, height, width, channels), (*kernel, channels // groups, features)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnums=(0,))
def passes(function, x, kernel):
    """Output and both gradients, for a fixed cotangent."""
    out, pull = jax.vjp(function, x, kernel)
    return out, *pull(
        jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
    )


def assert_same(ours, theirs, tolerance=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * (1 + np.max(np.abs(b), initial=0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_every_form_is_lax_in_every_pass(form, dtype):
    for kernel, strides, padding, groups, sizes in CASES:
        x, k = drawn(kernel, groups, sizes, dtype)
        ours = passes(lambda x, k: conv(x, k, strides, padding, groups, form), x, k)  # noqa: B023
        theirs = passes(lambda x, k: reference(x, k, strides, padding, groups), x, k)  # noqa: B023
        assert_same(ours, theirs, 2e-6 if dtype == jnp.float32 else 2e-2)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([*PLAIN_FORMS, *(["onednn"] if onednn.available() else [])]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["SYMMETRIC", "SAME", 2, ((1, 0), (0, 3))]),
    st.integers(1, 3),
    st.tuples(*[st.integers(1, 3), st.integers(5, 11), st.integers(5, 11)]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_drawn_convolutions_are_lax(form, kernel, strides, padding, groups, sizes, widths):
    channels, features = (groups * width for width in widths)
    x, k = drawn(kernel, groups, (*sizes, channels, features))
    ours = passes(lambda x, k: conv(x, k, strides, padding, groups, form), x, k)
    assert_same(ours, passes(lambda x, k: reference(x, k, strides, padding, groups), x, k))


X, K = drawn((3, 3), 1, (2, 6, 5, 3, 4))


def scalar(function, x, k):
    return jnp.sum(jnp.sin(function(x, k, (2, 1), "SYMMETRIC", 1)))


@pytest.mark.parametrize("form", ALL_FORMS)
def test_second_derivatives_and_forward_mode(form):
    ours = functools.partial(conv, form=form)
    tangents = (X[::-1], K[::-1])

    def everything(function):
        value = functools.partial(scalar, function)
        _, forward = jax.jvp(value, (X, K), tangents)
        over = jax.jvp(jax.grad(value, (0, 1)), (X, K), tangents)[1]
        back = jax.grad(
            lambda x, k: sum(jnp.sum(g**2) for g in jax.grad(value, (0, 1))(x, k)), (0, 1)
        )
        return jax.tree.leaves((forward, over, back(X, K)))

    # Sines of sums and their derivatives grow the rounding of the sums.
    assert_same(jax.jit(everything, static_argnums=0)(ours), everything(reference), 2e-5)


@pytest.mark.parametrize("form", ["auto", "rows", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 3)], ids=str)
def test_vmap_over_input_kernel_and_both(form, axes):
    def stacked(array, axis):
        return array if axis is None else jnp.stack([array, 2 * array, array - 1], axis)

    operands = stacked(X, axes[0]), stacked(K, axes[1])

    def run(function):
        mapped = jax.vmap(
            lambda x, k: passes(lambda a, b: function(a, b, (2, 2), 1, 1), x, k), axes
        )
        return mapped(*operands)

    assert_same(run(functools.partial(conv, form=form)), run(reference))


def test_vmap_in_vmap_and_gradient_through_it():
    x, k = jnp.stack([X, X + 1]), jnp.stack([K, K - 1, 2 * K])

    def loss(function, x, k):
        every = jax.vmap(jax.vmap(lambda a, b: function(a, b, (1, 1), 1, 1), (None, 0)), (0, None))
        return jnp.sum(jnp.sin(every(x, k)))

    ours, theirs = (jax.grad(loss, (1, 2))(f, x, k) for f in (conv, reference))
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("form", ["auto", pytest.param("onednn", marks=needs_onednn)])
def test_scan_and_remat(form):
    kernels = jnp.stack([drawn((3, 3), 1, (1, 1, 1, 3, 3), seed=s)[1] for s in range(3)]) / 5

    def loss(function, kernels):
        step = jax.checkpoint(lambda x, k: (jnp.tanh(function(x, k)), None))
        return jnp.sum(jax.lax.scan(step, X, kernels)[0] ** 2)

    ours = jax.grad(functools.partial(loss, functools.partial(conv, form=form)))(kernels)
    theirs = jax.grad(
        functools.partial(loss, lambda x, k: reference(x, k, (1, 1), "SYMMETRIC", 1))
    )(kernels)
    assert_same([ours], [theirs])


@pytest.mark.parametrize("form", ALL_FORMS)
def test_pmap_and_shard_map_with_its_checks(form):
    x = jnp.stack([X + i for i in range(8)])
    run = functools.partial(conv, form=form)
    expected = [passes(run, one, K) for one in x]
    found = jax.pmap(lambda one: passes(run, one, K))(x)
    assert_same([f[3] for f in found], expected[3])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, k):
        return jax.lax.pmean(jnp.sum(run(x[0], k) ** 2), "data")

    sharded = jax.shard_map(
        jax.grad(loss, 1), mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )  # fmt: skip
    theirs = jax.grad(lambda k: jnp.mean(jnp.stack([jnp.sum(run(o, k) ** 2) for o in x])))(K)
    assert_same([jax.jit(sharded)(x, K)], [theirs])


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_module_is_a_drop_in_for_flax(self):
        fields = {"features": 4, "kernel_size": (3, 3), "strides": 2, "use_bias": True}
        theirs = nn.Conv(**fields, padding=((1, 1), (1, 1)))
        ours = Conv(**fields)
        variables = theirs.init(jax.random.key(0), X)
        chex.assert_trees_all_equal_shapes(variables, ours.init(jax.random.key(0), X))
        out = self.variant(ours.apply)(variables, X)
        assert_same([out], [theirs.apply(variables, X)])


def test_integers_work_without_derivatives():
    x, k = (jnp.round(array * 3).astype(jnp.int32) for array in (X, K))
    chex.assert_trees_all_equal(conv(x, k), reference(x, k, (1, 1), "SYMMETRIC", 1))


def test_an_empty_batch_gives_an_empty_batch():
    assert conv(X[:0], K).shape == (0, 6, 5, 4)


def test_vmapped_kernels_choose_by_their_own_channels(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "choose", lambda *args: seen.append(args[3]) or "im2col")
    jax.vmap(lambda x, k: conv(x, k, (2, 2)))(jnp.stack([X, X]), jnp.stack([K, K]))
    assert set(seen) == {X.shape[-1]}


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_accelerators_get_their_own_convolution_and_tpus_a_deep_stem(platform):
    block = Geometry((56, 56), (3, 3), pads=((1, 1), (1, 1)))
    stem = Geometry((224, 224), (7, 7), (2, 2), ((3, 3), (3, 3)))
    for which in forms.FORMS:
        assert choose(which, platform, block, 64) == "lax"
        deep = platform == "tpu" and which == "forward"
        assert choose(which, platform, stem, 3) == ("s2d" if deep else "lax")


def test_no_gradient_on_cpu_takes_the_form_that_crawls_in_a_loop():
    for size, channels in itertools.product((2, 8, 14, 32, 56), (3, 16, 64, 512)):
        for strides in ((1, 1), (2, 2)):
            geometry = Geometry((size, size), (3, 3), strides, ((1, 1), (1, 1)))
            assert choose("input", "cpu", geometry, channels) != "lax"
            assert choose("weight", "cpu", geometry, channels) != "lax"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"form": "winograd"}, "unknown convolution form 'winograd' (accepted: auto, lax"),
        ({"padding": "REFLECT"}, "unknown padding 'REFLECT' (accepted: SYMMETRIC, SAME"),
        ({"groups": 2}, "does not fit an input of 3 channels in 2 groups"),
        ({"padding": ((-4, 0), (0, 0))}, "is too small for a kernel of (3, 3)"),
    ],
)
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError) as error:
        conv(X, K, **arguments)
    assert sentence in str(error.value)


def test_log_says_that_onednn_is_for_the_cpu(monkeypatch):
    monkeypatch.setattr(onednn.jax, "default_backend", lambda: "gpu")
    assert onednn.describe("onednn") == "XLA, since oneDNN is for the CPU only and this is gpu"
    assert onednn.describe("rows") == "XLA, form rows"


def test_without_onednn_the_pure_form_is_taken(monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda: False)
    jax.clear_caches()
    chex.assert_trees_all_equal(conv(X, K, form="onednn"), conv(X, K))
    jax.clear_caches()


def test_a_missing_compiler_is_said_in_one_sentence(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(onednn, "_prefix", lambda: tmp_path)
    monkeypatch.setattr(onednn.shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level("WARNING", "flaxres.onednn"):
        reason = onednn.reason.__wrapped__()
    assert "no C++ compiler" in reason and len(caplog.records) == 1
    assert "the pure forms are" in caplog.text and not list(tmp_path.iterdir())
