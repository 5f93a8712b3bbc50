"""Runs: learn, leave what they promise, go on bitwise, refuse what does not fit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import flaxres
from flaxres.train import loop, metrics
from flaxres.train.config import TrainConfig
from flaxres.train.workdir import Workdir

CONFIG = TrainConfig(
    model="resnet8_cifar",
    steps=12,
    batch_size=16,
    lr=0.05,
    log_every=4,
    eval_every=6,
    checkpoint_every=4,
    eval_batch_size=360,
    driver="device",
)


def config(tmp_path, **changes):
    return dataclasses.replace(CONFIG, workdir=str(tmp_path / "run"), **changes)


class StopAt(loop.Listener):
    """Sends this process a signal once a step has been logged."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, step, metrics, images_per_second):
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return loop.train(config(path))


def steps_of(result, split):
    return [line["step"] for line in metrics.read(Workdir(result.workdir).metrics_file, split)]


def test_run_leaves_what_it_promises(whole):
    work = Workdir(whole.workdir)
    stored = json.loads(work.config_file.read_text())
    assert stored["config"]["model"] == "resnet8_cifar" and stored["versions"]["jax"]
    assert steps_of(whole, "train") == list(range(1, 13))
    assert steps_of(whole, "eval") == [6, 12]
    assert sorted(int(p.name) for p in work.checkpoints.iterdir()) == [6, 8, 12]
    assert list(work.events.iterdir())
    assert whole.examples == 360 and np.isfinite(whole.loss)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_stopped_run_goes_on_bitwise(tmp_path, whole, number, name):
    stopped = loop.train(config(tmp_path), listener=StopAt(4, number))
    assert stopped.stopped_by == name and stopped.step < 12
    resumed = loop.train(config(tmp_path))
    assert resumed.resumed_from == stopped.step
    assert resumed.params_sha256 == whole.params_sha256
    assert resumed.accuracy == whole.accuracy
    assert steps_of(resumed, "train") == list(range(1, 13))


def test_killed_run_goes_on_bitwise(tmp_path, whole):
    """SIGKILL after step 9: the newest checkpoint is of step 8, lines of step 9 are there twice
    unless the resumed run takes them away."""
    code = """
import dataclasses, json, os, signal, sys
from flaxres.train import loop
from flaxres.train.config import TrainConfig
class Kill(loop.Listener):
    def on_step(self, step, metrics, rate):
        if step >= 9:
            os.kill(os.getpid(), signal.SIGKILL)
config = TrainConfig.from_json(json.loads(sys.argv[1]))
loop.train(config, listener=Kill())
"""
    killed = dataclasses.replace(config(tmp_path), log_every=1)
    arguments = [sys.executable, "-c", code, json.dumps(killed.to_json())]
    assert subprocess.run(arguments, timeout=200).returncode == -signal.SIGKILL
    assert 9 in [line["step"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl", "train")]
    resumed = loop.train(config(tmp_path))
    assert resumed.resumed_from in (4, 6, 8)
    assert resumed.params_sha256 == whole.params_sha256
    assert steps_of(resumed, "train") == list(range(1, 13))


def test_stacked_checkpoint_restores_into_the_per_block_layout(tmp_path):
    deep = {"model": "resnet14_cifar", "steps": 4, "eval_every": 4}
    stacked = loop.train(config(tmp_path, scan="on", **deep))
    restored = loop.train(config(tmp_path, scan="off", **deep))
    assert restored.resumed_from == 4
    assert restored.params_sha256 == stacked.params_sha256


def test_run_of_one_device_goes_on_with_eight(tmp_path, whole):
    loop.train(config(tmp_path), listener=StopAt(4))
    resumed = loop.train(config(tmp_path, driver="pmap"))
    assert resumed.resumed_from < 12
    model, variables, _, _ = loop.load(resumed.workdir)
    _, reference, _, _ = flaxres.load(whole.workdir)
    for name in ("stem", "head"):
        for a, b in zip(
            variables["params"][name].values(), reference["params"][name].values(), strict=True
        ):
            for x, y in zip(_leaves(a), _leaves(b), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-4)


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_finished_run_is_left_as_it_is(whole):
    again = loop.train(TrainConfig.from_json(Workdir(whole.workdir).config().to_json()))
    assert again.time_to_first_step is None
    assert again.params_sha256 == whole.params_sha256


def test_evaluate_gives_the_numbers_of_the_run(whole):
    found = loop.evaluate(whole.workdir)
    assert (found.step, found.accuracy, found.examples) == (12, whole.accuracy, 360)
    assert found.params_sha256 == whole.params_sha256
    assert loop.evaluate(whole.workdir, 8).step == 8
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 in .*there are: 6, 8, 12"):
        loop.evaluate(whole.workdir, 5)


@pytest.mark.parametrize("groups", [{}, {"batch_norm": "ghost", "ghost_size": 4}])
def test_evaluation_asks_nothing_that_only_training_needs(tmp_path, groups):
    """Neither 12 images, nor their micro-batches and pairs, fit eight devices."""
    changes = {"batch_size": 12, "accumulate": 3, "mixup": 0.2, "steps": 2, "eval_every": 2}
    result = loop.train(config(tmp_path, **changes, **groups))
    assert loop.evaluate(result.workdir).accuracy == pytest.approx(result.accuracy, abs=1e-6)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(tmp_path, whole, caplog):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(whole.workdir, run)
    for file in (run / "checkpoints" / "12").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(b"torn")
    found = loop.evaluate(str(run))
    assert found.step == 8
    assert "checkpoint of step 12" in caplog.text and "is damaged" in caplog.text


def test_work_directory_of_another_configuration_names_the_fields(whole):
    other = dataclasses.replace(CONFIG, workdir=whole.workdir, lr=0.1, seed=3)
    with pytest.raises(ValueError, match=r"seed: 0 here, 3 there; lr: 0.05 here, 0.1 there"):
        loop.train(other)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and not a work directory"):
        loop.train(config(tmp_path))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is not a work directory: it has no config.json"):
        loop.evaluate(str(tmp_path / "run"))


def test_nothing_is_written_when_the_input_is_wrong(tmp_path):
    for changes in ({"data": "digit"}, {"model": "resnet21_cifar"}, {"model": "resnet50"}):
        with pytest.raises(ValueError):
            loop.train(config(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_nonfinite_loss_stops_and_keeps_the_batch(tmp_path):
    broken = config(tmp_path, lr=1e30, checkpoint_every=2)
    with pytest.raises(loop.NonFiniteError, match="not finite at step [0-9]+ .*--clip-norm"):
        loop.train(broken)
    (file,) = (tmp_path / "run" / "nonfinite").glob("*.npz")
    with np.load(file) as batch:
        assert batch["image"].shape == (16, 8, 8, 1)


def test_nonfinite_updates_are_skipped_and_counted(tmp_path):
    result = loop.train(config(tmp_path, lr=1e30, on_nonfinite="skip"))
    assert result.step == 12 and result.skipped > 0


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(loop.train(config(tmp_path, steps=2, eval_every=2)))
    )
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_a_run_holds_its_directory(tmp_path):
    """A second run in it is refused while the first goes on, and nothing of it is written."""
    refused = []

    class Second(loop.Listener):
        def on_step(self, step, metrics, images_per_second):
            if not refused:
                with pytest.raises(ValueError, match="is being trained in by process [0-9]+ on"):
                    loop.train(config(tmp_path, log_every=2))
                refused.append(step)

    result = loop.train(config(tmp_path), listener=Second())
    assert refused and steps_of(result, "train") == list(range(1, 13))


def test_a_second_start_is_refused_before_anything_is_written(tmp_path):
    """Also in the moment when the first run has the directory and no configuration yet."""
    work = Workdir(tmp_path / "run")
    with work.locked():
        with pytest.raises(ValueError, match="is being trained in by process"):
            loop.train(config(tmp_path))
        assert [file.name for file in work.path.iterdir()] == [".lock"]


def test_what_a_kill_leaves_of_the_first_moments_is_no_obstacle(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.partial-abc.json").write_text("{")
    (run / ".lock").write_text("process 1 on elsewhere")
    assert loop.train(config(tmp_path)).params_sha256 == whole.params_sha256
    assert not list(run.glob(".*partial*"))


def test_signal_while_compiling_ends_the_run_before_it_began(tmp_path, whole):
    class Stop(loop.Listener):
        def on_start(self, config, total, driver, step):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = loop.train(config(tmp_path), listener=Stop())
    assert (stopped.step, stopped.stopped_by) == (0, "SIGTERM")
    resumed = loop.train(config(tmp_path))
    assert resumed.resumed_from == 0
    assert resumed.params_sha256 == whole.params_sha256
    assert steps_of(resumed, "train") == list(range(1, 13))


@pytest.mark.parametrize("step", [6, 12])
def test_evaluation_that_a_signal_ends_is_made_up_for(tmp_path, whole, monkeypatch, step):
    real = loop.run_evaluation

    def stopped_there(configuration, info, driver, state, interrupted=lambda: None):
        if int(jax.device_get(state.step)) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(configuration, info, driver, state, interrupted)

    monkeypatch.setattr(loop, "run_evaluation", stopped_there)
    stopped = loop.train(config(tmp_path))
    assert (stopped.step, stopped.stopped_by) == (step, "SIGTERM")
    assert step not in steps_of(stopped, "eval")
    monkeypatch.undo()
    resumed = loop.train(config(tmp_path))
    assert resumed.stopped_by is None and resumed.accuracy == whole.accuracy
    assert steps_of(resumed, "eval") == [6, 12]
    assert steps_of(resumed, "train") == list(range(1, 13))


def test_signal_after_the_last_step_is_too_late(tmp_path):
    result = loop.train(config(tmp_path), listener=StopAt(12))
    assert result.stopped_by in (None, "SIGTERM")
    assert result.step == 12


def test_second_ctrl_c_ends_a_run_without_saving(tmp_path):
    class Twice(loop.Listener):
        def on_step(self, step, metrics, images_per_second):
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.train(config(tmp_path, checkpoint_every=12), listener=Twice())
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


def test_kept_batch_is_the_one_of_that_step(tmp_path):
    from flaxres.data import pipeline, sources

    with pytest.raises(loop.NonFiniteError) as caught:
        loop.train(config(tmp_path, lr=1e30))
    (about,) = (tmp_path / "run" / "nonfinite").glob("*.json")
    step = json.loads(about.read_text())["step"]
    assert f"at step {step} " in str(caught.value)
    source = pipeline.train_iterator(
        sources.describe("digits"), batch_size=16, seed=0, start_step=step - 1
    )
    with np.load(about.with_suffix(".npz")) as kept:
        batch = next(source)
        np.testing.assert_array_equal(kept["image"], batch["image"])
        np.testing.assert_array_equal(kept["label"], batch["label"])
    assert "there is no checkpoint yet" in str(caught.value)


def test_diverged_run_goes_on_where_updates_may_be_skipped(tmp_path):
    with pytest.raises(loop.NonFiniteError):
        loop.train(config(tmp_path, lr=1e30, checkpoint_every=1))
    result = loop.train(config(tmp_path, lr=1e30, checkpoint_every=1, on_nonfinite="skip"))
    assert result.step == 12 and result.skipped > 0
    assert steps_of(result, "train") == list(range(1, 13))


@pytest.mark.slow
def test_overflow_of_a_float16_gradient_is_no_reason_to_stop(tmp_path):
    result = loop.train(config(tmp_path, dtype="float16", steps=4, eval_every=4))
    assert result.step == 4 and np.isfinite(result.loss)


def test_averaged_parameters_go_on_bitwise(tmp_path):
    average = {"ema": 0.9, "optimizer": "adamw", "lr": 1e-3}
    reference = loop.train(config(tmp_path / "whole", **average))
    stopped = loop.train(config(tmp_path, **average), listener=StopAt(4))
    assert stopped.step < 12
    resumed = loop.train(config(tmp_path, **average))
    assert (resumed.params_sha256, resumed.loss) == (reference.params_sha256, reference.loss)


def test_best_is_kept_and_loads(whole):
    best = max(
        metrics.read(Workdir(whole.workdir).metrics_file, "eval"), key=lambda line: line["accuracy"]
    )
    assert loop.evaluate(whole.workdir, "best").accuracy == best["accuracy"]
    model, variables, stored, info = loop.load(whole.workdir, "best")
    assert model.num_classes == info.num_classes == 10 and stored.model == "resnet8_cifar"
    assert set(variables) == {"params", "batch_stats"}


def test_log_and_result_share_out_the_time(whole):
    assert set(whole.shares) == {"step", "data", "eval", "save"}
    assert sum(whole.shares.values()) == pytest.approx(1)
    log = Workdir(whole.workdir).log.read_text()
    assert "step 12/12" in log and "time: step" in log and "test accuracy" in log


def test_profile_steps_leave_a_trace(tmp_path):
    loop.train(config(tmp_path, profile_steps="3:5", steps=6))
    assert list((tmp_path / "run" / "trace").rglob("perfetto_trace.json.gz"))


def test_a_run_compiles_its_step_once(tmp_path, caplog):
    caplog.set_level("WARNING")
    jax.config.update("jax_log_compiles", True)  # as a context it would not reach other threads
    try:
        loop.train(config(tmp_path, steps=20))
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r for r in caplog.records if "Compiling jit(train_step)" in r.getMessage()]
    assert len(compiled) == 1


def test_metrics_that_cannot_be_written_end_the_run_in_a_sentence(tmp_path, monkeypatch):
    def full(self, step, split, values):
        raise OSError("runs/a/metrics.jsonl could not be written: No space left on device")

    monkeypatch.setattr(loop.MetricsWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(config(tmp_path))
    monkeypatch.undo()
    assert loop.train(config(tmp_path)).step == 12


def test_compiled_programs_are_kept_unless_told_otherwise(tmp_path):
    code = "from flaxres.train import loop; import jax; loop.enable_compilation_cache()\n"
    code += "print(jax.config.values['jax_compilation_cache_dir'])"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "FLAXRES"))}

    def folder(**env):
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env={**own, **env}, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert folder(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "flaxres" / "compiled")
    assert folder(JAX_COMPILATION_CACHE_DIR="/there") == "/there"
    assert folder(FLAXRES_COMPILATION_CACHE="0") == "None"
