"""Every probe against an independent computation, in both layouts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxres
from flaxres import branches, probes
from flaxres.identity import layout
from flaxres.identity.probes import common
from flaxres.nets.drawing import init_variables

IMAGES = jax.random.normal(jax.random.key(0), (6, 8, 8, 2))
LABELS = jnp.arange(6) % 3


@functools.cache
def small(name="resnet14_cifar", **fields):
    model = flaxres.create_model(name, widths=(4, 6, 8), stem_width=4, num_classes=3, **fields)
    return model, jax.tree.map(jnp.asarray, init_variables(model, 1, IMAGES.shape))


def by_hand(model, variables, images):
    """Inputs and outputs of every block, applied one after another."""
    _, features = model.apply(variables, images, features=True)
    x, seen = features["stem"], []
    for row in branches.table(model, variables):
        place = (f"stage{row.stage}", f"block{row.block}")
        own = {k: v[place[0]][place[1]] for k, v in variables.items() if place[1] in v[place[0]]}
        out = model.make_block(row.stage, row.block).apply(own, x)
        seen.append((row, x, out))
        x = out
    return seen


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_identity_distance_is_that_of_blocks_applied_by_hand(style):
    model, variables = small(style=style)
    report = jax.jit(lambda v, x: probes.identity(model, v, x))(variables, IMAGES)
    for place, (_row, x, out) in enumerate(by_hand(model, variables, IMAGES)):
        if x.shape != out.shape:
            assert np.isnan(report["distance"][place])
            continue
        flat, change = x.reshape(6, -1), (out - x).reshape(6, -1)
        expected = np.mean(np.linalg.norm(change, axis=1) / np.linalg.norm(flat, axis=1))
        np.testing.assert_allclose(report["distance"][place], expected, rtol=1e-4)
        if style == "v2":
            np.testing.assert_allclose(report["branch"][place], expected, rtol=1e-4)


def test_zero_branches_are_exactly_the_identity():
    model, variables = small(style="v2")
    report = probes.identity(model, branches.zero(model, variables), IMAGES)
    same = ~np.isnan(report["distance"])
    assert same.sum() == 4 and not np.any(report["distance"][same])
    assert not np.any(report["branch"]) and report["net"] == 0
    assert probes.identity(model, variables, IMAGES)["net"] > 0


def test_an_example_without_any_activation_counts_as_unchanged():
    model, variables = small(norm="none")
    images = IMAGES.at[0].set(0)
    report = probes.identity(model, variables, images)
    rest = probes.identity(model, variables, images[1:])
    count = len(images)
    for name in ("distance", "branch", "ratio", "net"):
        np.testing.assert_allclose(report[name] * count, rest[name] * (count - 1), rtol=1e-5)


def test_plain_net_has_no_shortcut_to_compare_with():
    model, variables = small("plain14_cifar")
    report = probes.identity(model, variables, IMAGES)
    assert np.all(np.isinf(report["ratio"])) and np.isnan(report["net"])


def test_probes_agree_in_both_layouts():
    model, variables = small("resnet20_cifar")
    stacked_model, stacked = layout.stack(model, variables)
    for probe in (
        probes.identity,
        probes.activations,
        functools.partial(probes.gradients, labels=LABELS),
    ):
        chex.assert_trees_all_close(
            probe(model, variables, IMAGES), probe(stacked_model, stacked, IMAGES), rtol=2e-3
        )


def test_activation_moments_are_those_of_the_features():
    model, variables = small()
    moments = probes.activations(model, variables, IMAGES)
    _, features = model.apply(variables, IMAGES, features=True)
    for place, name in ((0, "stem"), (2, "stage1"), (6, "stage3")):
        np.testing.assert_allclose(moments["mean"][place], features[name].mean(), rtol=1e-5)
        np.testing.assert_allclose(moments["variance"][place], features[name].var(), rtol=1e-4)
        np.testing.assert_allclose(moments["zeros"][place], np.mean(features[name] == 0))


def test_gradient_norms_by_depth_add_up_to_the_whole():
    model, variables = small(shortcut="A")
    found = probes.gradients(model, variables, IMAGES, LABELS, train=False)

    def loss(params):
        logits = model.apply({**variables, "params": params}, IMAGES)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), LABELS])

    whole = optax.global_norm(jax.grad(loss)(variables["params"]))
    parts = [*found["parameters"], found["stem"], found["head"]]
    np.testing.assert_allclose(np.linalg.norm(parts), whole, rtol=1e-4)


def test_movement_is_the_relative_change_of_kernels():
    model, variables = small()
    moved = jax.tree.map(lambda leaf: leaf * 1.5, variables)
    found = probes.movement(model, variables, moved)
    for value in jax.tree.leaves(found):
        np.testing.assert_allclose(value, 0.5, rtol=1e-5)
    assert not np.any(probes.movement(model, variables, variables)["blocks"])


def dense(function, point):
    matrix = jax.jacobian(function)(point)
    return matrix.reshape(-1, point.size)


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_block_singular_values_are_those_of_the_dense_jacobian(style):
    model, variables = small(style=style)
    function, point = probes.block_jacobian(model, variables, IMAGES[0], "stage3/block2")
    expected = np.linalg.svd(dense(function, point), compute_uv=False)
    found = probes.singular_values(function, point, jax.random.key(3), steps=point.size)
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-3)
    few = probes.singular_values(function, point, jax.random.key(3), steps=8)
    np.testing.assert_allclose(few[0], expected[0], rtol=0.05)
    if style == "v2":
        np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-2)


def test_log_determinant_is_that_of_the_dense_jacobian():
    model, variables = small(style="v2")
    variables = branches.scale(model, variables, by=0.3)
    function, point = probes.block_jacobian(model, variables, IMAGES[0], "stage3/block2")
    _, expected = np.linalg.slogdet(dense(function, point))
    found = probes.log_determinant(function, point, jax.random.key(0), steps=24, samples=64)
    np.testing.assert_allclose(found, expected, atol=0.1 * abs(expected) + 0.1)


def test_zero_branch_has_singular_values_one_and_log_determinant_zero():
    model, variables = small(style="v2")
    zeroed = branches.zero(model, variables)
    function, point = probes.block_jacobian(model, zeroed, IMAGES[0], "stage1/block2")
    found = probes.singular_values(function, point, jax.random.key(0), steps=1)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        probes.log_determinant(function, point, jax.random.key(0), steps=1), 0.0, atol=1e-4
    )


def test_network_singular_values_are_those_of_the_dense_jacobian():
    model, variables = small()
    function, point = probes.network_jacobian(model, variables, IMAGES[0])
    expected = np.linalg.svd(dense(function, point), compute_uv=False)
    found = probes.singular_values(function, point, jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("train", [False, True])
def test_network_jacobian_passes_the_pool_of_an_imagenet_stem(train):
    model = flaxres.create_model(
        "resnet18", stage_sizes=(1,), widths=(4,), stem_width=4, num_classes=3
    )
    image = IMAGES[:2, :8, :8]
    variables = model.init(jax.random.key(0), image)
    function, point = probes.network_jacobian(model, variables, image, train)
    jacobian = jax.jacrev(function)(point).reshape(function(point).size, -1)
    found = probes.singular_values(function, point, jax.random.key(0))
    np.testing.assert_allclose(found[0], np.linalg.svd(jacobian)[1][0], rtol=1e-3)


def test_jacobians_are_taken_of_training_batches_too():
    model, variables = small()
    images = IMAGES[:2, :4, :4]
    for function, point in (
        probes.network_jacobian(model, variables, images, train=True),
        probes.block_jacobian(model, variables, images, "stage2/block1", train=True),
    ):
        dense = jax.jacrev(function)(point).reshape(function(point).size, -1)
        found = probes.singular_values(function, point, jax.random.key(0), steps=60)
        np.testing.assert_allclose(found[0], np.linalg.svd(dense)[1][0], rtol=1e-3)


def test_gradient_correlation_is_that_of_gradients_taken_one_by_one():
    model, variables = small()
    key = jax.random.key(4)
    found = probes.gradient_correlation(
        model, variables, IMAGES[0], IMAGES[1], key, points=5, train=False
    )
    direction = jax.random.normal(key, (3,))
    grads = []
    for t in np.linspace(0, 1, 5):
        image = (1 - t) * IMAGES[:1] + t * IMAGES[1:2]
        grads.append(np.ravel(jax.grad(lambda x: model.apply(variables, x)[0] @ direction)(image)))
    grads = np.stack(grads)
    unit = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    neighbours = np.mean([unit[i] @ unit[i + 1] for i in range(4)])
    np.testing.assert_allclose(found["neighbours"], neighbours, rtol=1e-3)
    centred = grads - grads.mean(0)
    lag_one = np.sum(centred[:-1] * centred[1:]) / np.sum(centred**2)
    np.testing.assert_allclose(found["autocorrelation"][:2], [1.0, lag_one], rtol=1e-3, atol=1e-5)


def test_a_linear_net_has_one_gradient_everywhere():
    model, variables = small(activation="identity", norm="none")
    found = probes.gradient_correlation(
        model, variables, IMAGES[0], IMAGES[1], jax.random.key(0), points=4
    )
    np.testing.assert_allclose([found["neighbours"], found["any"]], 1.0, rtol=1e-4)


def test_path_gradients_of_a_linear_net_add_up_to_its_gradient():
    """Without nonlinearity the gradient is the sum over all subsets of branches."""
    model, variables = small("resnet8_cifar", activation="identity", norm="none")

    def gradient(mask):
        def loss(x):
            from flax import linen as nn

            from flaxres.identity.probes.paths import _gate

            with nn.intercept_methods(_gate(model, mask)):
                logits = model.apply(variables, x)
            # A linear function, for the loss itself is none.
            return jnp.sum(logits[:, 0])

        return jax.grad(loss)(IMAGES)

    masks = [jnp.array([(i >> b) & 1 for b in range(3)], bool) for i in range(8)]
    total = sum(gradient(mask) for mask in masks)
    whole = jax.grad(lambda x: jnp.sum(model.apply(variables, x)[:, 0]))(IMAGES)
    np.testing.assert_allclose(total, whole, rtol=1e-3, atol=1e-5)


def test_zero_branches_leave_the_path_of_length_zero_only():
    model, variables = small("resnet8_cifar", style="v2")
    found = probes.path_gradients(
        model, branches.zero(model, variables), IMAGES, LABELS, jax.random.key(0), samples=2
    )
    assert found["per_path"][0] > 0 and not np.any(found["per_path"][1:])
    np.testing.assert_allclose(found["share"][0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["length"], 0.0, atol=1e-4)


def test_awakening_follows_zero_gamma_layer_by_layer():
    model, variables = small("resnet8_cifar", residual_init="zero_gamma")
    alive = probes.awakening(model, variables, IMAGES, LABELS)
    branch = alive["stage1"]["block1"]["branch"]
    assert branch["norm2"]["scale"][0] > 0
    assert branch["conv2"]["kernel"][0] == 0 and branch["conv1"]["kernel"][0] == 0
    assert all(leaf[2] > 0 for leaf in jax.tree.leaves(branch))


def test_awakening_finds_zero_branches_dead():
    model, variables = small("resnet8_cifar", style="v2", norm="none", residual_init="zero_branch")
    alive = probes.awakening(model, variables, IMAGES, LABELS, steps=4)
    for leaf in jax.tree.leaves(alive["stage1"]["block1"]["branch"]):
        assert leaf.shape == (4,) and not np.any(leaf)


def test_line_has_the_losses_of_its_ends():
    model, a = small()
    b = jax.tree.map(lambda leaf: leaf * 1.1, a)
    found = probes.line(model, a, b, IMAGES, LABELS, points=3, train=False)
    ends = [common.loss(model, v, IMAGES, LABELS) for v in (a, b)]
    np.testing.assert_allclose(found["loss"][jnp.array([0, 2])], ends, rtol=1e-5)


def test_plane_has_the_nets_loss_in_its_middle_and_filters_of_its_length():
    from flaxres.identity.probes.landscape import _direction

    model, variables = small()
    found = probes.plane(model, variables, IMAGES, LABELS, jax.random.key(0), points=3, train=False)
    np.testing.assert_allclose(
        found["loss"][1, 1], common.loss(model, variables, IMAGES, LABELS), rtol=1e-5
    )
    direction = _direction(variables["params"], jax.random.key(1))
    kernel = variables["params"]["stage1"]["block1"]["branch"]["conv1"]["kernel"]
    drawn = direction["stage1"]["block1"]["branch"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        np.linalg.norm(drawn.reshape(-1, 4), axis=0),
        np.linalg.norm(kernel.reshape(-1, 4), axis=0),
        rtol=1e-5,
    )
    assert not np.any(direction["head"]["bias"])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda m, v: probes.block_jacobian(m, v, IMAGES[0], "stage*/block1"),
            "means 3 blocks: a Jacobian is of one",
        ),
        (
            lambda m, v: probes.log_determinant(
                *probes.block_jacobian(m, v, IMAGES[0], "stage2/block1"), jax.random.key(0)
            ),
            "has no determinant: it is not square",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*small())
    plain, variables = small("plain14_cifar")
    with pytest.raises(ValueError, match="one path only"):
        probes.path_gradients(plain, variables, IMAGES, LABELS, jax.random.key(0))
