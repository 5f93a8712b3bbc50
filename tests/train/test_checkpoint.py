"""Checkpoints: exact, whole or absent, free of layout, and honest about damage."""

import contextlib
import json
import os
import shutil
import subprocess
import time

import jax
import numpy as np
import optax
import pytest
from flax import struct

from flaxres.identity import layout
from flaxres.nets import drawing, zoo
from flaxres.train import checkpoint
from flaxres.train.checkpoint import Checkpoints
from flaxres.train.config import TrainConfig

CONFIG = TrainConfig(model="resnet14_cifar", seed=7)


class Task:
    def __init__(self, model):
        self.model = model


class State(struct.PyTreeNode):
    """What checkpoints need of a training state."""

    step: object
    params: object
    opt_state: object
    ema: object
    task: Task = struct.field(pytree_node=False)


def state(seed=0, scan=False, dtype=np.float32):
    model = zoo.create_model("resnet14_cifar", num_classes=10, scan=scan)
    params = drawing.init_variables(model, seed, (1, 8, 8, 1))["params"]
    params["head"]["bias"] = np.array([-0.0, np.nan, np.inf, 1e-42, *range(6)], np.float32)
    momentum = jax.tree.map(lambda leaf: (leaf * 3).astype(dtype), params)
    optimizer = (optax.EmptyState(), optax.TraceState(momentum))
    return State(np.int32(seed), params, optimizer, None, Task(model))


def bits(tree):
    return {
        jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@contextlib.contextmanager
def opened(folder, keep=3):
    checkpoints = Checkpoints(folder, keep, folder.parent / "damaged")
    yield checkpoints
    checkpoints.close()


def save(folder, *steps, keep=3, accuracies=None):
    with opened(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, state(step), {"step": step}, CONFIG, (accuracies or {}).get(step)
            )


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


def test_what_is_restored_is_what_was_saved_bit_for_bit(folder):
    save(folder, 3)
    with opened(folder) as checkpoints:
        restored = checkpoints.restore(state(99))
    assert restored.step == 3 and restored.data == {"step": 3}
    assert bits(restored.state) == bits(state(3))


def test_seed_configuration_and_data_position_are_inside(folder):
    save(folder, 3)
    run = json.loads((folder / "3" / "run" / "metadata").read_text())
    assert run["seed"] == 7 and run["data"] == {"step": 3}
    assert TrainConfig.from_json(run["config"]) == CONFIG


def test_nothing_is_pickled(folder):
    save(folder, 3)
    for file in files(folder):
        assert not file.read_bytes().startswith(b"\x80\x04"), file


@pytest.mark.parametrize("scan", [False, True])
def test_either_layout_restores_into_the_other(folder, scan):
    with opened(folder) as checkpoints:
        checkpoints.save(1, state(1, scan=scan), {"step": 1}, CONFIG)
        checkpoints.wait()
        restored = checkpoints.restore(state(2, scan=not scan)).state
    assert bits(restored) == bits(state(1, scan=not scan))
    assert layout.is_stacked(restored.params) is not scan
    assert layout.is_stacked(restored.opt_state) is not scan


def test_save_returns_before_the_files_are_complete(folder):
    with opened(folder) as checkpoints:
        checkpoints.save(1, state(1), {"step": 1}, CONFIG)
        assert checkpoint.steps_on_disk(folder) == []
        checkpoints.wait()
        assert checkpoint.steps_on_disk(folder) == [1]


def test_a_state_may_change_while_it_is_being_saved(folder):
    changing = state(1)
    with opened(folder) as checkpoints:
        checkpoints.save(1, changing, {"step": 1}, CONFIG)
        for leaf in jax.tree.leaves(changing.params):
            leaf[...] = 0
        checkpoints.wait()
        assert bits(checkpoints.restore(state(0)).state) == bits(state(1))


def test_newest_and_best_are_kept(folder):
    accuracies = {1: 0.2, 2: 0.9, 3: 0.5}
    save(folder, *range(1, 8), keep=2, accuracies=accuracies)
    assert checkpoint.steps_on_disk(folder) == [2, 6, 7]
    with opened(folder) as checkpoints:
        assert checkpoints.best() == 2 and checkpoints.best_accuracy() == 0.9
        assert checkpoints.restore(state(), "best").step == 2
        assert checkpoints.latest() == 7


def test_without_evaluations_there_is_no_best(folder):
    save(folder, 1, 2)
    with opened(folder) as checkpoints:
        assert checkpoints.best() is None and checkpoints.best_accuracy() is None
        with pytest.raises(ValueError, match=r"has been evaluated.* \(there are: 1, 2\)"):
            checkpoints.restore(state(), "best")


def test_checkpoint_of_other_classes_is_not_called_damaged(folder):
    save(folder, 3, 4)
    other = state()
    other.params["head"]["bias"] = np.zeros(7, np.float32)
    with opened(folder) as checkpoints:
        for step in (None, 3):
            with pytest.raises(
                ValueError,
                match=r"another number of classes \(params.head.bias: \[10\] there, \[7\] here",
            ):
                checkpoints.restore(other, step)
        assert checkpoints.steps() == [3, 4]
    assert not (folder.parent / "damaged").exists()


def test_empty_folder_restores_nothing(folder):
    with opened(folder) as checkpoints:
        assert checkpoints.restore(state()) is None


def test_unknown_step_names_those_that_there_are(folder):
    save(folder, 2, 4)
    with opened(folder) as checkpoints, pytest.raises(ValueError, match="step 3 .*are: 2, 4"):
        checkpoints.restore(state(), 3)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(folder):
    return max(files(folder), key=lambda file: file.stat().st_size)


DAMAGE = {
    "truncated": lambda step: truncate(largest(step)),
    "a bit flipped": lambda step: flip_a_bit(largest(step)),
    "a file lost": lambda step: largest(step).unlink(),
    "everything emptied": lambda step: [file.write_bytes(b"") for file in files(step)],
    "run torn": lambda step: truncate(step / "run" / "metadata"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_newest_is_named_in_a_sentence_and_the_one_before_used(folder, caplog, how):
    save(folder, 1, 2)
    DAMAGE[how](folder / "2")
    with opened(folder) as checkpoints:
        restored = checkpoints.restore(state())
        assert restored.step == 1 and bits(restored.state) == bits(state(1))
        (record,) = [r for r in caplog.records if r.name == checkpoint.__name__]
        assert "checkpoint of step 2" in record.message and "is damaged" in record.message
        assert "\n" not in record.message
        # The run takes step 2 once more.
        checkpoints.save(2, state(2), {"step": 2}, CONFIG)
        checkpoints.wait()
        assert bits(checkpoints.restore(state()).state) == bits(state(2))
    assert (folder.parent / "damaged" / "2").is_dir()


def test_reading_leaves_a_damaged_checkpoint_where_it_is(folder):
    save(folder, 1, 2)
    truncate(largest(folder / "2"))
    before = sorted(files(folder))
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(state()).step == 1
    with pytest.raises(ValueError, match=r"step 2 in .* cannot be read .*there are: 1, 2"):
        checkpoints.restore(state(), 2)
    checkpoints.close()
    assert sorted(files(folder)) == before


def test_when_all_are_damaged_it_says_so_and_touches_none(folder):
    save(folder, 1, 2)
    for step in (1, 2):
        truncate(largest(folder / str(step)))
    tried = r"no checkpoint in .* can be read \(tried steps 1, 2"
    with opened(folder) as checkpoints, pytest.raises(ValueError, match=tried):
        checkpoints.restore(state())
    assert checkpoint.steps_on_disk(folder) == [1, 2]


def test_what_a_kill_leaves_is_swept_by_the_run_and_not_by_a_reader(folder):
    save(folder, 1, 2)
    half = folder / "3.orbax-checkpoint-tmp-1"
    half.mkdir()
    (half / "part").write_text("half")
    for item in (folder / "1" / "state").iterdir():  # the kill came while 1 was being deleted
        if item.is_file():
            item.unlink()
    shutil.rmtree(folder / "1" / "run")
    reader = Checkpoints(folder)
    assert reader.restore(state()).step == 2
    reader.close()
    assert half.is_dir()
    with opened(folder) as checkpoints:
        assert checkpoints.restore(state()).step == 2
        checkpoints.save(3, state(3), {"step": 3}, CONFIG)
    assert checkpoint.steps_on_disk(folder) == [2, 3]
    assert not half.exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 6 MB, or a skip."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_is_an_error_in_a_sentence_and_the_previous_stays(tiny_disk, capfd):
    folder = tiny_disk / "checkpoints"
    checkpoints = Checkpoints(folder, 3, tiny_disk / "damaged")
    checkpoints.save(1, state(1), {"step": 1}, CONFIG)
    checkpoints.wait()
    (tiny_disk / "filler").write_bytes(b"x" * _free(tiny_disk, leave=200_000))
    with pytest.raises(OSError, match=r"no space left on the disk\); the last complete .*step 1"):
        checkpoints.save(2, state(2), {"step": 2}, CONFIG)
        checkpoints.wait()
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoint.steps_on_disk(folder) == [1]
    (tiny_disk / "filler").unlink()
    again = Checkpoints(folder, 3, tiny_disk / "damaged")
    assert bits(again.restore(state()).state) == bits(state(1))
    again.save(2, state(2), {"step": 2}, CONFIG)
    again.close()
    assert checkpoint.steps_on_disk(folder) == [1, 2]


def _free(disk, leave):
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize - leave


def test_failed_save_is_noticed_without_waiting_and_leaves_nothing(tiny_disk):
    folder = tiny_disk / "checkpoints"
    checkpoints = Checkpoints(folder, 3, tiny_disk / "damaged")
    (tiny_disk / "filler").write_bytes(b"x" * _free(tiny_disk, leave=400_000))
    with pytest.raises(OSError, match="no space left on the disk.*last complete one: none"):
        checkpoints.save(1, state(1), {"step": 1}, CONFIG)
        for _ in range(100):
            time.sleep(0.1)
            checkpoints.check()
    assert not [p for p in folder.iterdir() if p.is_dir()]
