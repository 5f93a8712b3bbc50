"""Numbers of a run: each step once, whatever happened to the run before."""

import json
import logging
import pathlib
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flaxres.train import metrics
from flaxres.train.metrics import InFlight, MetricsWriter, NoWriter
from flaxres.train.workdir import Workdir


@pytest.fixture
def work(tmp_path):
    return Workdir(tmp_path)


def write(work, steps, start=0, split="train"):
    writer = MetricsWriter(work, start)
    for step in steps:
        writer.write(step, split, {"loss": step / 2})
    writer.close()


def steps(work, split="train"):
    return [line["step"] for line in metrics.read(work.metrics_file, split)]


def test_lines_are_json_objects_with_step_and_split(work):
    write(work, [1, 2])
    lines = [json.loads(line) for line in work.metrics_file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "split": "train", "loss": 0.5},
        {"step": 2, "split": "train", "loss": 1.0},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(work):
    writer = MetricsWriter(work)
    writer.write(1, "train", {"loss": 1.0})
    assert steps(work) == [1]
    writer.close()


def test_a_run_that_goes_on_has_each_step_once(work):
    write(work, range(1, 10))
    write(work, range(7, 13), start=6)
    assert steps(work) == list(range(1, 13))


def test_a_run_that_starts_again_has_only_the_new_steps(work):
    write(work, range(1, 10))
    write(work, range(1, 4), start=0)
    assert steps(work) == [1, 2, 3]


def test_a_torn_last_line_is_taken_away(work):
    write(work, range(1, 5))
    with work.metrics_file.open("a") as file:
        file.write('{"step": 5, "spl')
    assert steps(work) == [1, 2, 3, 4]
    write(work, [5, 6], start=4)
    assert steps(work) == [1, 2, 3, 4, 5, 6]


def test_taking_lines_away_is_atomic(work, monkeypatch):
    write(work, range(1, 10))

    def fails(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", fails)
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left"):
        MetricsWriter(work, 4)
    assert steps(work) == list(range(1, 10))
    assert [p.name for p in work.path.iterdir() if p.name.startswith(".")] == []


def test_numbers_that_json_lacks_are_null(work):
    writer = MetricsWriter(work)
    writer.write(1, "train", {"loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    (line,) = metrics.read(work.metrics_file)
    assert line["loss"] is None and line["grad_norm"] is None


def test_it_knows_which_evaluations_are_written(work):
    write(work, [4], split="eval")
    writer = MetricsWriter(work, 4)
    assert writer.evaluated(4) and not writer.evaluated(8)
    writer.write(8, "eval", {"accuracy": 0.5})
    assert writer.evaluated(8)
    writer.close()
    writer = MetricsWriter(work, 3)
    assert not writer.evaluated(4)
    writer.close()


def test_tensorboard_reads_the_scalars(work):
    write(work, [1, 2])
    (file,) = work.events.iterdir()
    content, place, found = file.read_bytes(), 0, {}
    from tensorboardX.proto import event_pb2

    while place < len(content):  # records of length, checksum, event, checksum
        (size,) = struct.unpack("<Q", content[place : place + 8])
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        place += 16 + size
    assert found == {("train/loss", 1): 0.5, ("train/loss", 2): 1.0}


def test_other_processes_write_nothing(work):
    writer = NoWriter()
    writer.write(1, "train", {"loss": 1.0})
    writer.scalars(1, "time", {})
    writer.flush()
    writer.close()
    assert list(work.path.iterdir()) == []


def test_the_host_runs_two_steps_ahead_and_no_more():
    flight = InFlight(ahead=2)
    seen = []
    for step in range(1, 6):
        flight.push(step, {"loss": jnp.float32(step)})
        seen.append([number for number, _ in flight.pop()])
    assert seen == [[], [], [1], [2], [3]]
    assert list(flight.pop(everything=True)) == [(4, {"loss": 4.0}), (5, {"loss": 5.0})]
    assert list(flight.pop(everything=True)) == []


def test_log_holds_the_run_and_every_warning_and_tells_nobody_else(work, capfd):
    with metrics.logging_to(work.log):
        metrics.run_log.info("step 1")
        logging.getLogger("flaxres.data").warning("example 3 cannot be read")
    metrics.run_log.info("afterwards")
    lines = work.log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO step 1",
        "WARNING example 3 cannot be read",
    ]
    assert "step 1" not in capfd.readouterr().err


def test_an_error_is_not_printed_where_there_is_no_log():
    """In a process of its own, since pytest gives every logger a handler."""
    code = "from flaxres.train.metrics import run_log; run_log.error('lost')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "lost" not in done.stderr


def test_a_batch_is_kept_with_what_came_of_it(work):
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, np.int32)}
    file = metrics.keep_batch(work, 7, batch, {"loss": float("nan")})
    with np.load(file) as kept:
        assert kept["image"].shape == (2, 8, 8, 1)
    assert json.loads(file.with_suffix(".json").read_text()) == {"step": 7, "loss": "nan"}
