import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import (
    __main__,
    accelerator,
    depth,
    environment,
    linen_resnet,
    report,
    steps,
    timing,
)
from flaxres import create_model
from flaxres.nets.summary import count_params

MODELS = ("resnet18", "resnet50", "resnet20_cifar", "resnet110_cifar")


def shapes(model, side):
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)


def multiply_adds(model, side=64):
    """Of a forward pass, by the compiler's analysis of what was traced."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    run = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    return run.lower(shapes(model, side), images).cost_analysis()["flops"] / 2


@pytest.mark.parametrize("name", MODELS)
def test_plain_linen_has_as_many_parameters_as_ours(name):
    ours = create_model(name)
    found = shapes(linen_resnet.like(ours), 64)
    expected = shapes(ours, 64)
    assert count_params(found["params"]) == count_params(expected["params"])
    assert count_params(found["batch_stats"]) == count_params(expected["batch_stats"])


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnet20_cifar"))
def test_plain_linen_does_the_same_work_as_ours(name):
    ours = create_model(name, conv_form="lax")
    assert multiply_adds(linen_resnet.like(ours)) == pytest.approx(multiply_adds(ours), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_torch_has_as_many_parameters_as_ours(name):
    pytest.importorskip("torch")
    from experiments.benchmark import torch_resnet

    ours = create_model(name)
    theirs = torch_resnet.TorchResNet(ours)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == count_params(shapes(ours, 64)["params"])


def test_steps_of_torch_change_its_loss():
    pytest.importorskip("torch")
    from experiments.benchmark import torch_resnet

    ours = create_model("resnet8_cifar")
    step = torch_resnet.training(ours, *steps.examples((4, 8, 8, 3), 10))
    first, second = step(), step()
    assert np.isfinite([first, second]).all() and first != second
    logits = torch_resnet.inference(ours, steps.examples((4, 8, 8, 3), 10)[0])()
    assert logits.shape == (4, 10)


def test_a_step_trains_in_the_memory_of_its_state():
    model = linen_resnet.PlainResNet((1,), 1, (8,), 10, cifar=True)
    step = steps.training(model, *steps.examples((4, 8, 8, 3), 10))
    before = step.state
    kernel = np.array(before[0]["Dense_0"]["kernel"])
    step()
    assert not np.array_equal(kernel, step.state[0]["Dense_0"]["kernel"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before[0]))


class FakeClock:
    """Time passes only where a step says so."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def step(self, side, seconds):
        durations = iter(seconds)

        def run():
            self.order.append(side)
            self.now += next(durations)

        return run


def test_sides_take_turns_and_are_warm_before_they_count():
    clock = FakeClock()
    warm = [9.0]  # one slow step is warm enough
    calls = {
        "ours": clock.step("ours", [*warm, 1.0, 2.0, 4.0]),
        "theirs": clock.step("theirs", [*warm, 2.0, 2.0]),
    }
    times = timing.take_turns(calls, {"ours": 3, "theirs": 2}, clock)
    assert clock.order[2:] == ["ours", "theirs", "ours", "theirs", "ours"]
    assert times == {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0]}


def test_speed_is_the_median_of_ratios_of_the_same_round():
    times = {"ours": [1.0, 2.0, 10.0, 7.0], "theirs": [3.0, 4.0, 50.0]}
    spread = timing.speed(times, "ours", "theirs")
    assert spread == timing.Spread(median=3.0, low=2.5, high=4.0, count=3)
    assert str(spread) == "3 (2.5 to 4)"


def test_peak_is_that_of_the_longest_name_that_fits():
    assert accelerator.peak("TPU v5 lite") == accelerator.PEAKS["TPU v5 lite"]
    assert accelerator.peak("TPU v5p slice") == accelerator.PEAKS["TPU v5p"]
    assert accelerator.peak("NVIDIA H100 80GB HBM3") == accelerator.PEAKS["NVIDIA H100"]
    assert accelerator.peak("abacus") is None


def test_commands_run_without_the_benchmarks_own_settings(monkeypatch):
    monkeypatch.setenv("FLAXRES_BENCHMARK_ALLOCATOR", "tuned")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("ELSE", "kept")
    found = environment.of_a_user()
    assert found["ELSE"] == "kept" and "MALLOC_ARENA_MAX" not in found


def test_unknown_case_gets_one_sentence_and_exit_2(capsys, tmp_path):
    assert __main__.main(["traning", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"benchmark: unknown case 'traning' \(accepted: training, .*\)\n", said)
    assert not list(tmp_path.iterdir())


def test_cases_are_added_to_the_file_one_by_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "QUICK_DEPTHS", (8,))
    file = tmp_path / "benchmark-quick.json"
    file.write_text(json.dumps({"tpu": {"quick": True, "model": "resnet50"}}))
    assert __main__.main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads(file.read_text())
    assert found["tpu"]["model"] == "resnet50"
    bytes_ = found["memory"]["flaxres, remat=none"]["8"]
    assert 0 < bytes_["temporary"] < bytes_["peak"]
    assert found["memory"]["conditions"]["settings"]["OMP_WAIT_POLICY"]
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "| plain linen |" in capsys.readouterr().out


def test_small_forms_never_count_as_reached_targets():
    results = {"memory": {"remat / none at 110": 0.1}, "first_step": {"warm": {"median": 4.0}}}
    assert "| ≤ 0.4 | 0.10 | reached |" in report.targets(results)
    assert "| ≤ 5 | 4.00 | reached |" in report.targets(results)
    results["memory"]["quick"] = True
    assert "| ≤ 0.4 | not measured |  |" in report.targets(results)


def test_step_time_is_the_inverse_of_speed():
    speed = {"flaxres / plain linen": {"median": 4.0, "low": 3.0, "high": 5.0, "count": 3}}
    results = {"training": {"resnet56_cifar": {"speed": speed}}}
    assert "step time ÷ plain linen | ≤ 0.4 | 0.25 | reached |" in report.targets(results)
