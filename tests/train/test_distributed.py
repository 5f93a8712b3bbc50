"""Several real processes: one result, one word when to stop, and none left waiting for the dead."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flaxres.train import distributed, loop, metrics
from flaxres.train.config import TrainConfig

CONFIG = TrainConfig(
    model="resnet8_cifar",
    steps=5,
    batch_size=16,
    lr=0.01,
    log_every=1,
    eval_every=5,
    checkpoint_every=5,
    eval_batch_size=120,
)
LONG = {"steps": 100_000, "eval_every": 100_000, "checkpoint_every": 4}
PROGRAM = """
import dataclasses, json, sys, time
from flaxres.train import distributed, loop
from flaxres.train.config import TrainConfig
class Show(loop.Listener):
    def on_step(self, step, metrics, rate):
        print("step", step, flush=True)
config = TrainConfig.from_json(json.loads(sys.argv[1]))
code = {None: 0, "SIGTERM": 0, "SIGINT": 130}
exec(sys.argv[2])
try:
    result = loop.train(config, listener=Show())
except (RuntimeError, OSError) as error:
    print("error:", error, flush=True)
    distributed.leave(1)
    sys.exit(1)
except ValueError as error:
    print("error:", error, flush=True)
    distributed.leave(2)
    sys.exit(2)
print(json.dumps(dataclasses.asdict(result)), flush=True)
sys.exit(code[result.stopped_by])
"""


@dataclasses.dataclass
class Group:
    """Processes of one run, with what they wrote."""

    processes: list[subprocess.Popen]
    outputs: list[pathlib.Path]

    def output(self, number: int) -> str:
        return self.outputs[number].read_text()

    def wait_for(self, text: str, numbers=None, seconds: float = 120) -> None:
        numbers = range(len(self.processes)) if numbers is None else numbers
        deadline = time.monotonic() + seconds
        while not all(text in self.output(n) for n in numbers):
            assert time.monotonic() < deadline, [self.output(n)[-2000:] for n in numbers]
            assert all(self.processes[n].poll() is None for n in numbers) or all(
                text in self.output(n) for n in numbers
            ), [self.output(n)[-2000:] for n in numbers]
            time.sleep(0.1)

    def codes(self, numbers=None, seconds: float = 120) -> list[int]:
        numbers = range(len(self.processes)) if numbers is None else numbers
        deadline = time.monotonic() + seconds
        return [
            self.processes[n].wait(timeout=max(0.1, deadline - time.monotonic())) for n in numbers
        ]

    def results(self) -> list[dict]:
        return [json.loads(self.output(n).splitlines()[-1]) for n in range(len(self.processes))]


@contextlib.contextmanager
def group(folder, count, config, before=None, each=None):
    """Start a run of several processes with one device each; end them all at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    processes, outputs = [], []
    stamp = time.monotonic_ns()
    for number in range(count):
        own = dataclasses.replace(config, **(each or {}).get(number, {}))
        if count > 1:
            own = dataclasses.replace(
                own,
                coordinator=f"127.0.0.1:{port}",
                num_processes=count,
                process_id=number,
            )
        outputs.append(folder / f"output-{stamp}-{number}.txt")
        with outputs[-1].open("w") as output:
            command = [sys.executable, "-c", PROGRAM, json.dumps(own.to_json())]
            processes.append(
                subprocess.Popen(
                    [*command, (before or {}).get(number, "")],
                    env=env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield Group(processes, outputs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def config(folder, **changes):
    return dataclasses.replace(CONFIG, workdir=str(folder), **changes)


def train_steps(folder):
    return [line["step"] for line in metrics.read(folder / "metrics.jsonl", "train")]


def assert_same_parameters(one, two, tolerance=1e-5):
    for path, leaf in jax.tree_util.tree_leaves_with_path(loop.load(one)[1]):
        other = dict(jax.tree_util.tree_leaves_with_path(loop.load(two)[1]))[path]
        np.testing.assert_allclose(leaf, other, atol=tolerance, err_msg=str(path))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, on one device."""
    return loop.train(config(tmp_path_factory.mktemp("alone") / "run", driver="device"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    with group(folder, 2, config(folder / "run")) as processes:
        assert processes.codes() == [0, 0], [processes.output(n) for n in range(2)]
        return folder / "run", processes.results()


def test_two_processes_have_one_result_and_it_is_that_of_one(pair, alone):
    folder, (first, second) = pair
    assert first["params_sha256"] == second["params_sha256"]
    assert first["examples"] == second["examples"] == 360
    assert first["loss"] == pytest.approx(alone.loss, abs=1e-4)
    assert_same_parameters(folder, alone.workdir)


def test_only_the_first_process_writes(pair):
    folder, _ = pair
    assert train_steps(folder) == [1, 2, 3, 4, 5]
    assert len(list((folder / "events").iterdir())) == 1


def test_checkpoint_of_two_processes_restores_in_one(pair):
    folder, (first, _) = pair
    again = loop.train(config(folder))
    assert again.resumed_from == 5 and again.params_sha256 == first["params_sha256"]
    assert again.loss == pytest.approx(first["loss"], abs=1e-5)


def test_processes_with_other_settings_are_refused_on_all(tmp_path):
    run = config(tmp_path / "run")
    with group(tmp_path, 2, run, each={1: {"lr": 0.5}}) as processes:
        assert processes.codes() == [2, 2]
        for number in range(2):
            assert "process 1 was started with lr=0.5 instead of 0.01" in processes.output(number)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_to_one_stops_all_at_one_step(tmp_path, number, code, count):
    run = config(tmp_path / "run", **LONG)
    with group(tmp_path, count, run) as processes:
        processes.wait_for("step 2\n")
        processes.processes[1].send_signal(number)
        assert processes.codes(seconds=60) == [code] * count, processes.output(0)
        first, *others = processes.results()
    for other in others:
        for key in ("stopped_by", "step", "params_sha256"):
            assert first[key] == other[key]
    assert first["stopped_by"] == number.name
    assert train_steps(tmp_path / "run") == list(range(1, first["step"] + 1))
    assert (tmp_path / "run" / "checkpoints" / str(first["step"])).is_dir()


def assert_told(processes, lost, text, limit=15.0):
    """All but the lost ones end within the limit, with an error that has this text."""
    began = time.monotonic()
    others = [n for n in range(len(processes.processes)) if n != lost]
    codes = processes.codes(others, seconds=60)
    assert time.monotonic() - began < limit
    assert all(code not in (0, None) for code in codes), codes
    for other in others:
        assert text in processes.output(other), processes.output(other)[-3000:]


def test_killed_process_is_an_error_on_the_others_and_the_run_goes_on(tmp_path):
    run = config(tmp_path / "run", **LONG)
    with group(tmp_path, 2, run) as processes:
        processes.wait_for("step 9\n")
        processes.processes[1].kill()
        assert_told(processes, 1, "started again, the run goes on from its last checkpoint")
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    with group(tmp_path, 2, run) as processes:
        processes.wait_for(f"step {saved + 1}\n")
        processes.processes[0].send_signal(signal.SIGTERM)
        assert processes.codes(seconds=60) == [0, 0]
        assert processes.results()[0]["resumed_from"] == saved


HANG = """
from flaxres.data import pipeline
real = pipeline.prefetch
def prefetch(*args, **keywords):
    for count, batch in enumerate(real(*args, **keywords)):
        if count == 20:
            print("hanging", flush=True)
            time.sleep(1000)
        yield batch
pipeline.prefetch = prefetch
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_stopped_process_is_an_error_on_the_others(tmp_path, lost):
    with group(tmp_path, 3, config(tmp_path / "run", **LONG, batch_size=24)) as processes:
        processes.wait_for("step 3\n")
        processes.processes[lost].send_signal(signal.SIGSTOP)
        text = "has not been heard of for" if lost == 1 else ""
        assert_told(processes, lost, text)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_hanging_process_is_an_error_on_all(tmp_path, lost):
    run = config(tmp_path / "run", **LONG)
    with group(tmp_path, 2, run, before={lost: HANG}) as processes:
        processes.wait_for("hanging", [lost])
        assert_told(processes, None, f"process {lost} of 2 hangs")


@pytest.mark.slow
def test_killed_coordinator_is_an_error_on_the_others(tmp_path):
    with group(tmp_path, 2, config(tmp_path / "run", **LONG)) as processes:
        processes.wait_for("step 3\n")
        processes.processes[0].kill()
        assert_told(processes, 0, "")


@pytest.mark.slow
def test_four_processes_have_one_result_and_it_is_that_of_one(tmp_path, alone):
    with group(tmp_path, 4, config(tmp_path / "run")) as processes:
        assert processes.codes(seconds=200) == [0] * 4, processes.output(0)
        results = processes.results()
    assert len({result["params_sha256"] for result in results}) == 1
    assert results[0]["examples"] == 360
    assert_same_parameters(tmp_path / "run", alone.workdir)


@pytest.mark.slow
def test_run_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    run = config(tmp_path / "run", steps=12, eval_every=12, checkpoint_every=12)
    reference = loop.train(dataclasses.replace(run, workdir=str(tmp_path / "one"), driver="device"))
    with group(tmp_path, 2, run, before={0: STOP_AT_4}) as processes:
        assert processes.codes() == [0, 0]
        stopped = processes.results()[0]["step"]
    assert stopped < 12
    with group(tmp_path, 4, run) as processes:
        assert processes.codes(seconds=200) == [0] * 4, processes.output(0)
        result = processes.results()[0]
    assert result["resumed_from"] == stopped
    assert train_steps(tmp_path / "run") == list(range(1, 13))
    for one, two in zip(
        metrics.read(tmp_path / "run" / "metrics.jsonl", "train"),
        metrics.read(tmp_path / "one" / "metrics.jsonl", "train"),
        strict=True,
    ):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
    assert result["loss"] == pytest.approx(reference.loss, abs=1e-3)


STOP_AT_4 = """
import os, signal
class Show(Show):
    def on_step(self, step, metrics, rate):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_settings_that_do_not_fit_together_are_refused():
    for changes, message in (
        ({"num_processes": 2}, "need --coordinator HOST:PORT"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "here:1", "num_processes": 2}, "needs --num-processes and --process-id"),
        (
            {"coordinator": "here:1", "num_processes": 2, "process_id": 2},
            "process_id must be from 0 to 1 with num_processes=2, not 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.initialize(dataclasses.replace(CONFIG, **changes))


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        # A batch script, outside srun, has no step of its own: `flaxres eval` there is alone.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "here:1"}, True),
    ],
)
def test_processes_are_found_in_the_environment(monkeypatch, environment, found):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "KUBERNETES")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._in_cluster() is found


@pytest.mark.parametrize("hosts, found", [("a,b,c,d", True), ("a", False)])
def test_a_tpu_pod_is_found_and_a_single_host_is_not_a_pod(monkeypatch, hosts, found):
    from jax._src.clusters import cloud_tpu_cluster as tpu

    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    answers = {"agent-worker-number": "1", "worker-network-endpoints": hosts, "tpu-env": ""}
    monkeypatch.setattr(tpu, "get_metadata", lambda key: (answers[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert distributed._in_cluster() is found


def test_one_process_agrees_with_itself():
    assert distributed.share(lambda: {"step": 3}) == {"step": 3}
    assert distributed.gather("SIGINT") == ["SIGINT"]
    tree = {"a": np.float32([-0.0])}
    assert distributed.broadcast(tree) is tree
