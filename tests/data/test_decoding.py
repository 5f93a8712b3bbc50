"""Photographs: decoded in threads and workers alike, cropped as published; faults are named."""

import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest

from flaxres.data import decoding, images, pipeline, sources
from flaxres.train import loop, presets
from flaxres.train.state import input_shape

_spec = importlib.util.spec_from_file_location(
    "photographs", pathlib.Path(__file__).with_name("photographs.py")
)
photographs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(photographs)
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photographs.write(str(tmp_path_factory.mktemp("photographs")))


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    return photographs.write(str(tmp_path_factory.mktemp("torn")), "--torn")


@pytest.fixture(scope="module")
def info(folder):
    return sources.describe("imagenet2012", folder)


def batches(info, folder, count, **changes):
    options = {"batch_size": 8, "seed": 0, "image_size": SIZE, **changes}
    source = pipeline.train_iterator(info, data_dir=folder, **options)
    found = [next(source) for _ in range(count)]
    source.close()
    return found


@pytest.fixture(scope="module")
def some(info, folder):
    """The first eleven batches: two epochs and a bit."""
    return batches(info, folder, 11)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_it_is_what_the_official_builder_reads(info):
    assert info.splits == photographs.SPLITS and info.eval_split == "validation"
    assert info.num_classes == 1000 and info.image_shape == (None, None, 3)
    assert info.class_names[0] == "n01440764"  # TFDS's own list
    assert input_shape(presets.get("imagenet"), info) == (1, 224, 224, 3)


def test_training_images_are_crops_of_one_size_and_others_every_epoch(some):
    assert some[0]["image"].shape == (8, SIZE, SIZE, 3)
    assert some[0]["image"].dtype == np.uint8
    epochs = [np.concatenate([b["image"] for b in some[i : i + 5]]) for i in (0, 5)]
    for epoch in epochs:
        assert len(np.unique(epoch.reshape(40, -1), axis=0)) == 40
    both = np.concatenate(epochs).reshape(80, -1)
    assert len(np.unique(both, axis=0)) == 80


def test_workers_give_the_batches_of_threads_and_resume_anywhere(info, folder, some):
    assert_same(batches(info, folder, 3, workers=3), some[:3])
    assert_same(batches(info, folder, 2, workers=2, start_step=9), some[9:])


def test_processes_share_a_batch(info, folder, some):
    halves = [batches(info, folder, 1, process_index=i, process_count=2)[0] for i in (0, 1)]
    joined = np.concatenate([half["image"] for half in halves])
    np.testing.assert_array_equal(joined, some[0]["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_the_centre_of_every_image_once(info, folder, workers):
    found = list(
        pipeline.eval_batches(
            info, "validation", batch_size=5, data_dir=folder, image_size=SIZE, workers=workers
        )
    )
    assert [batch["mask"].tolist() for batch in found[-1:]] == [[1, 1, 0, 0, 0]]
    pixels = np.concatenate([batch["image"] for batch in found])[:12]
    assert np.concatenate([b["label"] for b in found])[:12].tolist() == [0, 1, 2, 3] * 3
    for number, image in enumerate(pixels):
        file = io.BytesIO(photographs.jpeg(1000 + number, number % 4))
        with PIL.Image.open(file) as picture:
            expected = images.centre_crop(np.asarray(picture.convert("RGB")), SIZE)
        # Decoders differ by rounding, and in how CMYK becomes RGB.
        assert np.abs(image.astype(int) - expected).mean() < (3 if number % 10 != 7 else 40)


def test_grey_pictures_have_three_equal_channels(info, folder):
    found = next(
        pipeline.eval_batches(info, "train", batch_size=8, data_dir=folder, image_size=SIZE)
    )
    np.testing.assert_array_equal(found["image"][3, ..., 0], found["image"][3, ..., 2])
    assert np.any(found["image"][2, ..., 0] != found["image"][2, ..., 2])


def test_no_more_than_two_batches_are_decoded_ahead(info, folder, monkeypatch):
    real, decoded = decoding.Reader._one, []

    def counted(self, position, index):
        decoded.append(position)
        return real(self, position, index)

    monkeypatch.setattr(decoding.Reader, "_one", counted)
    source = pipeline.train_iterator(info, batch_size=8, seed=0, data_dir=folder, image_size=SIZE)
    ahead = pipeline.prefetch(source, lambda batch: batch)
    for given in (1, 2, 3):
        next(ahead)
        time.sleep(0.5)
        assert max(decoded) < 8 * (given + 2)
    ahead.close()


def test_what_cannot_be_decoded_is_counted_named_and_replaced(torn, caplog):
    info = sources.describe("imagenet2012", torn)
    source = pipeline.train_iterator(
        info, batch_size=40, seed=0, data_dir=torn, image_size=SIZE, workers=2
    )
    assert len(next(source)["label"]) == 40
    source.close()
    assert source.corrupt == tuple(photographs.TORN)
    for number in photographs.TORN:
        assert caplog.text.count(f"example {number} of imagenet2012 (train) cannot be read") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_of_them_end_the_run(torn, tmp_path, workers):
    config = dataclasses.replace(
        presets.get("imagenet"),
        model="resnet8_cifar",
        data_dir=torn,
        image_size=16,
        batch_size=8,
        epochs=3,
        driver="device",
        workers=workers,
        max_corrupt=2,
        workdir=str(tmp_path / "run"),
    )
    with pytest.raises(ValueError, match=r"more than 2 examples of 'imagenet2012' \(train\)"):
        loop.train(config)
    assert not [t for t in threading.enumerate() if t.name.startswith("flaxres")]


def test_damage_on_the_disk_is_a_fault_too(folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (file,) = (damaged / "imagenet2012" / "5.1.0").glob("*train*")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    info = sources.describe("imagenet2012", str(damaged))
    source = pipeline.train_iterator(
        info, batch_size=40, seed=0, data_dir=str(damaged), image_size=SIZE
    )
    next(source)
    source.close()
    assert 1 <= len(source.corrupt) <= 3


READ = """
import os, sys, time
from flaxres.data import pipeline, sources
if __name__ == "__main__":
    info = sources.describe("imagenet2012", sys.argv[1])
    source = pipeline.train_iterator(
        info, batch_size=8, seed=0, data_dir=sys.argv[1], image_size=32, workers=2
    )
    next(source)
    try:
        print("reading", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        next(source)
        source.close()
        print("fine", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_leave_ctrl_c_to_the_run_and_do_not_outlive_it(folder, tmp_path, number):
    (tmp_path / "read.py").write_text(READ)
    reading = subprocess.Popen(
        [sys.executable, str(tmp_path / "read.py"), folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert reading.stdout.readline() == "reading\n"
    if number == signal.SIGINT:
        os.killpg(reading.pid, number)  # as a terminal does
        out, err = reading.communicate(timeout=60)
        assert (out, err) == ("fine\n", "")
    else:
        reading.send_signal(number)
        reading.communicate(timeout=60)  # until the last has closed its standard output
    deadline = time.monotonic() + 20
    while members(reading.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def members(group):
    found = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in found.stdout.splitlines()]
    return [row for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def small(folder, workdir, model):
    """The ImageNet recipe on a few small pictures, as one would try it."""
    return [
        *("train", "--preset", "imagenet_resnet50", "--model", model, "--data-dir", folder),
        *("--image-size", "32", "--batch-size", "8", "--steps", "2", "--warmup-epochs", "0"),
        *("--workers", "2", "--workdir", str(workdir), "--json"),
    ]


@pytest.mark.parametrize("model", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_imagenet_recipe_runs_from_the_command_line(folder, tmp_path, model):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "flaxres.cli.main", *small(folder, tmp_path / "run", model)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["step"], result["examples"], result["corrupt"]) == (2, 12, 0)
    assert np.isfinite(result["loss"])
    assert "Traceback" not in run.stderr and "leaked" not in run.stderr
