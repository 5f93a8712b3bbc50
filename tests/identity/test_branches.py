"""Operations on branches: exact functions, exact refusals, both layouts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flaxres
from flaxres import branches
from flaxres.identity import layout
from flaxres.nets.drawing import init_variables

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


@functools.cache
def trained(name="resnet14_cifar", **fields):
    """A model whose weights, scales, biases and statistics are all away from their start."""
    model = flaxres.create_model(name, **fields)
    variables = init_variables(model, 0, IMAGES.shape)
    rng = np.random.default_rng(1)
    # Without norms larger weights would saturate the softmax to exact zeros.
    size = 0.001 if model.norm == "none" else 0.1
    noisy = jax.tree.map(
        lambda leaf: (leaf + size * np.abs(rng.standard_normal(leaf.shape))).astype(leaf.dtype),
        variables,
    )
    return model, noisy


STYLES = [
    {},
    {"style": "v2"},
    {"norm": "none", "residual_init": "fixup"},
    {"norm": "none", "style": "v2", "residual_init": "skipinit"},
    {"residual_init": "layerscale(0.1)", "scan": True},
    {"norm": "group"},
    {"se": 1 / 16},
    {"style": "v2", "scan": True},
]


def skeleton(model, variables, images):
    """Stem, shortcuts of the blocks that open stages, head: written without any block."""
    params = variables["params"]
    _, features = model.clone(scan=False).apply(
        layout.unstack_tree(variables), images, features=True
    )
    x = features["stem"]
    for stage in range(1, len(model.stage_sizes) + 1):
        if stage > 1:  # option A
            x = x[:, ::2, ::2]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, model.widths[stage - 1] - x.shape[-1])))
            x = nn.relu(x) if model.style == "v1" else x
    if model.style == "v2":
        norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        if model.norm == "batch":
            x = norm().apply(
                {
                    "params": params["norm"],
                    "batch_stats": variables["batch_stats"]["norm"],
                },
                x,
            )
        x = nn.relu(x)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("fields", STYLES, ids=str)
@pytest.mark.parametrize("part", ["last", "all"])
def test_net_of_zero_branches_is_its_skeleton(fields, part):
    model, variables = trained(**fields)
    zeroed = branches.zero(model, variables, "*", part)
    np.testing.assert_allclose(
        model.apply(zeroed, IMAGES), skeleton(model, variables, IMAGES), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("fields", STYLES, ids=str)
def test_zeroed_identity_blocks_can_be_dropped_bitwise(fields):
    """The skeleton, bit for bit: the same net with those blocks taken out."""
    model, variables = trained(**fields)
    zeroed = branches.zero(model, variables, lambda row: row.can_be_identity and row.block > 1)
    dropped_model, dropped = branches.drop(model, zeroed, lambda row: row.block > 1)
    assert dropped_model.stage_sizes == (1, 1, 1)
    chex.assert_trees_all_equal(
        model.clone(scan=False).apply(layout.unstack_tree(zeroed), IMAGES),
        dropped_model.clone(scan=False).apply(layout.unstack_tree(dropped), IMAGES),
    )


@pytest.mark.parametrize("fields", STYLES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_deepened_net_is_the_same_function_bitwise(fields, dtype, train):
    model, variables = trained(**{**fields, "scan": False})
    model = model.clone(dtype=dtype)
    deeper, more = branches.deepen(model, variables, {"stage1": 1, "stage3": 3}, seed=5)
    assert deeper.stage_sizes == (3, 2, 5)

    def logits(model, variables):
        out = model.apply(variables, IMAGES, train=train, mutable=["batch_stats"])
        return out[0]

    chex.assert_trees_all_equal(logits(model, variables), logits(deeper, more))


@pytest.mark.parametrize("fields", STYLES, ids=str)
def test_new_blocks_learn_by_the_second_step(fields):
    model, variables = trained(**fields)
    deeper, more = branches.deepen(model, variables, {"stage2": 2})
    stats = {k: v for k, v in more.items() if k != "params"}

    def loss(params):
        logits, _ = deeper.apply(
            {"params": params, **stats}, IMAGES, train=True, mutable=["batch_stats"]
        )
        labels = jnp.arange(4)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grad = jax.jit(jax.grad(loss))
    params = more["params"]
    for _ in range(2):
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grad(params))
    for block in (3, 4):
        alive = layout.unstack_tree(grad(params))["stage2"][f"block{block}"]["branch"]
        assert all(np.any(leaf) for leaf in jax.tree.leaves(alive))


@pytest.mark.parametrize("fields", [f for f in STYLES if "se" not in f], ids=str)
def test_scale_multiplies_what_the_branch_gives(fields):
    model, variables = trained(**{**fields, "scan": False})

    def given(variables):
        _, seen = model.apply(variables, IMAGES, capture_intermediates=True, mutable=True)
        return seen["intermediates"]["stage1"]["block1"]["branch"]["__call__"][0]

    scaled = jax.jit(lambda v, by: branches.scale(model, v, "stage1/block1", by=by))(variables, 0.5)
    np.testing.assert_allclose(given(scaled), 0.5 * given(variables), rtol=1e-4, atol=1e-6)


def test_scale_one_changes_nothing_and_zero_by_scale_is_zero():
    model, variables = trained()
    chex.assert_trees_all_equal(branches.scale(model, variables, by=1.0), variables)
    chex.assert_trees_all_equal(
        branches.scale(model, variables, by=0.0), branches.zero(model, variables)
    )


@pytest.mark.parametrize("scan", [False, True])
def test_reordering_back_restores_and_other_orders_differ(scan):
    model, variables = trained("resnet26_cifar", scan=scan)
    there_model, there = branches.reorder(model, variables, "stage3", [1, 3, 4, 2])
    assert np.any(model.apply(variables, IMAGES) != there_model.apply(there, IMAGES))
    back_model, back = branches.reorder(there_model, there, "stage3", [1, 4, 2, 3])
    assert back_model == model
    chex.assert_trees_all_equal(back, variables)


def test_permute_moves_only_what_is_selected_and_keeps_every_block():
    model, variables = trained("resnet26_cifar")
    _, shuffled = branches.permute(model, variables, "stage2/*", seed=1)
    chex.assert_trees_all_equal(shuffled["params"]["stage1"], variables["params"]["stage1"])
    before, after = (
        sorted(float(b["branch"]["conv2"]["kernel"].sum()) for b in v["params"]["stage2"].values())
        for v in (variables, shuffled)
    )
    assert before == after


def test_operations_agree_in_both_layouts():
    model, variables = trained("resnet26_cifar")
    stacked_model, stacked = layout.stack(model, variables)
    for operation in (
        lambda m, v: (m, branches.zero(m, v, "stage*/block[2-9]")),
        lambda m, v: (m, branches.scale(m, v, "stage1/*", by=0.5)),
        lambda m, v: branches.drop(m, v, "stage2/block3"),
        lambda m, v: branches.deepen(m, v, {"stage2": 2}),
    ):
        changed_model, changed = operation(stacked_model, stacked)
        assert changed_model.scan
        expected_model, expected = operation(model, variables)
        assert changed_model.clone(scan=False) == expected_model
        chex.assert_trees_all_equal(layout.unstack_tree(changed), expected)


def test_optimiser_state_moves_along():
    model, variables = trained("resnet26_cifar")
    params = variables["params"]
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimiser = optax.chain(
        optax.masked(optax.trace(0.9), mask), optax.scale_by_adam(), optax.scale(-1.0)
    )
    state = optimiser.init(params)
    _, state = optimiser.update(jax.tree.map(jnp.ones_like, params), state, params)
    model2, variables2, moved = branches.drop(model, variables, "stage1/block2", opt_state=state)
    chex.assert_trees_all_equal(moved[1].mu["stage1"]["block2"], state[1].mu["stage1"]["block3"])
    model3, variables3, grown = branches.deepen(model2, variables2, {"stage1": 1}, opt_state=moved)
    assert jax.tree.structure(grown) == jax.tree.structure(optimiser.init(variables3["params"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grown[1].mu["stage1"]["block4"]))
    optimiser.update(jax.tree.map(jnp.ones_like, variables3["params"]), grown, variables3["params"])
    assert model3.stage_sizes == model.stage_sizes


def test_interpolation_has_its_ends_and_its_middle():
    model, a = trained()
    b = jax.tree.map(lambda leaf: leaf + 1, a)
    chex.assert_trees_all_equal(branches.interpolate(model, a, b, 0.0), a)
    chex.assert_trees_all_close(branches.interpolate(model, a, b, 1.0), b, rtol=1e-6)
    half = branches.interpolate(model, a, b, 0.5, "stage2/block1")
    chex.assert_trees_all_equal(half["params"]["stage1"], a["params"]["stage1"])
    got = half["params"]["stage2"]["block1"]["branch"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        got, a["params"]["stage2"]["block1"]["branch"]["conv1"]["kernel"] + 0.5, rtol=1e-5
    )


def test_table_says_what_can_be_the_identity():
    model, variables = trained("resnet14_cifar", shortcut="B")
    rows = branches.table(model, variables)
    assert [row.address for row in rows[:3]] == ["stage1/block1", "stage1/block2", "stage2/block1"]
    assert [row.kind for row in rows[:3]] == ["identity", "identity", "projection"]
    assert [row.can_be_identity for row in rows[:3]] == [True, True, False]
    assert rows[0].branch_params == 2 * 9 * 16 * 16 + 4 * 16
    plain = flaxres.create_model("plain14_cifar")
    rows = branches.table(plain, init_variables(plain, 0, IMAGES.shape))
    assert not any(row.can_be_identity for row in rows)


def test_plain_blocks_can_be_dropped_where_shapes_agree():
    model, variables = trained("plain14_cifar")
    smaller, rest = branches.drop(model, variables, "stage2/block2")
    assert smaller.apply(rest, IMAGES).shape == (4, 10)


def refuse(operation, **fields):
    model, variables = trained(**fields)
    with pytest.raises(ValueError) as error:
        operation(model, variables)
    return str(error.value)


@pytest.mark.parametrize(
    "operation, fields, words",
    [
        (
            lambda m, v: branches.zero(m, v, "stage9/*"),
            {},
            "'stage9/*' matches no block; there are",
        ),
        (lambda m, v: branches.zero(m, v, lambda row: False), {}, "matches no block"),
        (lambda m, v: branches.zero(m, v, "*", "half"), {}, "unknown part 'half'"),
        (lambda m, v: branches.zero(m, v, "*", "scale"), {"style": "v2"}, "end in no scale"),
        (lambda m, v: branches.scale(m, v, by=2.0), {"se": 1 / 16}, "not linear"),
        (lambda m, v: branches.drop(m, v, "stage2/block1"), {}, "opens its stage (padded)"),
        (lambda m, v: branches.drop(m, v, "stage1/*"), {}, "leave stage1 without blocks"),
        (lambda m, v: branches.reorder(m, v, "stage2", [2, 1]), {}, "stage2/block1 cannot move"),
        (lambda m, v: branches.reorder(m, v, "stage1", [1, 1]), {}, "is no permutation"),
        (lambda m, v: branches.reorder(m, v, "stage7", [1]), {}, "no 'stage7' in the model"),
        (lambda m, v: branches.deepen(m, v, {"stage4": 1}), {}, "no 'stage4'"),
        (lambda m, v: branches.deepen(m, v, {"stage1": 0}), {}, "at least 1, not 0"),
        (lambda m, v: branches.deepen(m, v, {"stage1": 1}), {"residual": False}, "plain net"),
        (lambda m, v: branches.deepen(m, v, {"stage1": 1}), {"shortcut": "C"}, "projections"),
        (
            lambda m, v: branches.deepen(m, v, {"stage1": 1}),
            {"activation": "gelu"},
            "activation='gelu' cannot be deepened",
        ),
        (
            lambda m, v: branches.deepen(m, v, {"stage1": 1}),
            {"residual_init": "zero_branch"},
            "would never learn",
        ),
        (lambda m, v: branches.interpolate(m, v, v["params"], 0.5), {}, "different models"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(operation, fields, words):
    assert words in refuse(operation, **fields)
