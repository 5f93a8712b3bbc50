"""Every driver computes what one device computes, and falls into none of the known traps."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxres.data.sources import DataInfo
from flaxres.identity import layout
from flaxres.train import TrainConfig, create_state, make_train_step
from flaxres.train.drivers import make_driver
from flaxres.train.step import train_step

INFO = DataInfo("fake", 4, (8, 8, 1), tuple("abcd"), {"train": 64, "test": 64}, (0.5,), (0.3,))
CONFIG = TrainConfig(
    model="resnet8_cifar", steps=20, batch_size=32, lr=0.1, augment="crop_flip", ghost_size=2
)


def batches(count=5, size=32):
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = rng.integers(0, 4, size).astype(np.int32)
        images = rng.integers(0, 80, (size, 8, 8, 1)) + 40 * labels[:, None, None, None]
        yield {"image": images.astype(np.uint8), "label": labels}


def run(config, driver, devices=None, steps=5):
    stepper = make_train_step(config, driver, None if devices is None else jax.devices()[:devices])
    state = stepper.replicate(create_state(config, INFO)[1])
    seen = []
    for batch in batches(steps):
        state, metrics = stepper(state, stepper.shard(batch))
        seen.append(jax.device_get(metrics))
    return stepper.unreplicate(state), seen


@functools.cache
def on_one_device(**changes):
    return run(dataclasses.replace(CONFIG, **changes), "device", 1)


def assert_same(found, expected, tolerance=1e-5):
    (state, metrics), (reference, reference_metrics) = found, expected
    np.testing.assert_allclose(
        [m["loss"] for m in metrics], [m["loss"] for m in reference_metrics], rtol=1e-4
    )
    for tree, other in (
        (state.params, reference.params),
        (state.batch_stats, reference.batch_stats),
    ):
        chex.assert_trees_all_close(tree, other, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("driver", ["pmap", "mesh"])
@pytest.mark.parametrize("mode", ["sync", "ghost"])
def test_eight_devices_give_the_parameters_of_one(driver, mode):
    config = dataclasses.replace(CONFIG, batch_norm=mode)
    assert_same(run(config, driver), on_one_device(batch_norm=mode))


@pytest.mark.parametrize("driver", ["pmap", "mesh"])
def test_device_statistics_are_those_of_ghost_batches_as_large_as_a_device_share(driver):
    config = dataclasses.replace(CONFIG, batch_norm="device")
    assert_same(run(config, driver), on_one_device(batch_norm="ghost", ghost_size=4))


def test_sharded_parameters_change_nothing():
    # Deeper nets amplify rounding with the size of their steps.
    config = dataclasses.replace(CONFIG, fsdp=True, model="resnet14_cifar", lr=0.01)
    reference = dataclasses.replace(config, fsdp=False)
    assert_same(run(config, "mesh"), run(reference, "device", 1))
    driver = make_driver(config, "mesh")
    state = driver.replicate(create_state(config, INFO)[1])
    kernel = state.params["stage3"]["block2"]["branch"]["conv2"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.parametrize("driver", ["pmap", "mesh"])
def test_stacked_layout_trains_the_same(driver):
    config = dataclasses.replace(CONFIG, model="resnet14_cifar", lr=0.01)
    stacked, _ = run(dataclasses.replace(config, scan="on"), driver, steps=2)
    whole, _ = run(dataclasses.replace(config, scan="off"), driver, steps=2)
    assert layout.is_stacked(stacked.params)
    chex.assert_trees_all_close(
        layout.unstack_tree(stacked.params), whole.params, atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("driver", ["device", "pmap", "mesh"])
def test_every_driver_repeats_bitwise(driver):
    first, _ = run(CONFIG, driver, steps=3)
    again, _ = run(CONFIG, driver, steps=3)
    chex.assert_trees_all_equal(first.params, again.params)


def test_gradients_are_the_mean_and_not_the_sum_over_devices():
    """A step of plain SGD moves by lr · gradient: N times too large would show at once."""
    config = dataclasses.replace(CONFIG, momentum=0.0, weight_decay=0.0, schedule="constant")
    one, metrics = run(config, "device", 1, steps=1)
    eight, metrics_eight = run(config, "pmap", steps=1)
    np.testing.assert_allclose(metrics[0]["grad_norm"], metrics_eight[0]["grad_norm"], rtol=1e-4)
    chex.assert_trees_all_close(one.params, eight.params, atol=1e-6)


def test_statistics_under_device_batch_norm_are_the_same_on_every_device():
    config = dataclasses.replace(CONFIG, batch_norm="device")
    driver = make_driver(config, "pmap")
    state = driver.replicate(create_state(config, INFO)[1])
    state, _ = driver(state, driver.shard(next(batches())))
    for leaf in jax.tree.leaves(state.batch_stats):
        values = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(values[0], value) for value in values)


@pytest.mark.parametrize("driver", ["device", "pmap", "mesh"])
def test_state_is_donated_and_the_step_compiled_once(driver):
    stepper = make_driver(CONFIG, driver)
    state = stepper.replicate(create_state(CONFIG, INFO)[1])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_args, **_keywords: compiled.append(name)
    )
    for number, batch in enumerate(batches(20)):
        before = jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state)
        state, metrics = stepper(state, stepper.shard(batch))
        jax.block_until_ready(metrics)
        assert all(leaf.is_deleted() for leaf in before)
        if number == 0:
            assert any(name.endswith("backend_compile_duration") for name in compiled)
            compiled.clear()
    jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if name.endswith("backend_compile_duration")]


@pytest.mark.parametrize("driver", ["device", "pmap", "mesh"])
def test_accumulation_equals_the_big_batch(driver):
    # Products of patches: XLA's kernels round differently for another size of the batch.
    config = dataclasses.replace(CONFIG, norm="group", accumulate=2, conv_form="im2col")
    assert_same(run(config, driver), on_one_device(norm="group", conv_form="im2col"))


def test_accumulated_batch_statistics_run_through_the_micro_batches():
    one, _ = run(dataclasses.replace(CONFIG, accumulate=2), "device", 1, steps=1)
    whole, _ = run(CONFIG, "device", 1, steps=1)
    mean = one.batch_stats["stem"]["norm"]["mean"]
    # 0.9 · 0.1 + 0.1 of two half batches, against 0.1 of the whole.
    ratio = np.linalg.norm(mean) / np.linalg.norm(whole.batch_stats["stem"]["norm"]["mean"])
    assert abs(ratio - 1.9) < 0.1


def test_mixing_does_not_depend_on_the_driver():
    config = dataclasses.replace(CONFIG, mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    assert_same(run(config, "pmap"), on_one_device(mixup=0.4, cutmix=1.0, label_smoothing=0.1))


def test_stochastic_depth_under_mesh_is_that_of_one_device_and_under_pmap_repeats():
    config = dataclasses.replace(CONFIG, stochastic_depth=0.5)
    assert_same(run(config, "mesh"), on_one_device(stochastic_depth=0.5))
    first, _ = run(config, "pmap", steps=2)
    again, _ = run(config, "pmap", steps=2)
    chex.assert_trees_all_equal(first.params, again.params)


def test_nonfinite_update_is_left_out_and_counted():
    config = dataclasses.replace(CONFIG, driver="device")
    _, state = create_state(config, INFO)
    batch = next(batches())
    broken = jax.tree.map(np.copy, state.params)
    broken["head"]["bias"][0] = np.inf
    state = state.replace(params=broken)
    after, metrics = jax.jit(functools.partial(train_step, config=config))(state, batch)
    assert metrics["nonfinite"] == 1 and after.skipped == 1 and after.step == 1
    chex.assert_trees_all_equal(after.params, state.params)
    chex.assert_trees_all_equal(after.opt_state, state.opt_state)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    state, metrics = run(dataclasses.replace(CONFIG, dtype="bfloat16"), "device", 1, steps=2)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.batch_stats))
    np.testing.assert_allclose(metrics[0]["loss"], on_one_device()[1][0]["loss"], rtol=0.02)


def test_float16_scales_its_loss_and_halves_the_scale_on_overflow():
    config = dataclasses.replace(CONFIG, dtype="float16")
    _, state = create_state(config, INFO)
    state = state.replace(scale=state.scale.replace(scale=jnp.float32(2.0**40)))
    after, metrics = jax.jit(functools.partial(train_step, config=config))(state, next(batches()))
    assert metrics["nonfinite"] == 1 and after.scale.scale == 2.0**39
    fine, metrics = run(config, "device", 1, steps=2)
    assert metrics[-1]["nonfinite"] == 0 and fine.skipped == 0


def test_ema_is_the_moving_average_of_the_parameters():
    config = dataclasses.replace(CONFIG, ema=0.5)
    _, state = create_state(config, INFO)
    after, _ = jax.jit(functools.partial(train_step, config=config))(state, next(batches()))
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, state.params, after.params)
    chex.assert_trees_all_close(after.ema, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, driver, sentence",
    [
        ({"batch_size": 30}, "pmap", "batch_size=30 does not divide over 8 devices"),
        ({"accumulate": 8}, "pmap", "4 examples a device do not divide into accumulate=8"),
        ({"batch_norm": "ghost", "ghost_size": 3}, "pmap", "groups of ghost_size=3"),
        ({"devices": 9}, "pmap", r"devices=9 asks for more than there are \(8 cpu\)"),
        ({}, "horovod", "unknown driver 'horovod' .accepted: auto, device, pmap, mesh"),
        ({"mixup": 0.2, "batch_size": 8}, "pmap", "pair neighbours: 1 examples"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(changes, driver, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_driver(dataclasses.replace(CONFIG, **changes), driver)


def test_several_devices_mean_pmap():
    assert make_driver(CONFIG).name == "pmap"
    assert make_driver(dataclasses.replace(CONFIG, devices=1)).name == "device"
    assert make_driver(dataclasses.replace(CONFIG, fsdp=True)).name == "mesh"
