"""Runs: learn, leave what they promise, go on bitwise, refuse what does not fit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

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
