"""Batches are a function of seed and step; every example counts once; no TensorFlow."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from flaxres.data import decoding, pipeline, sources


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return sources.describe("digits")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def train(info, **changes):
    return pipeline.train_iterator(info, **{"batch_size": 48, "seed": 0, **changes})


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"image", "label"}
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_digits_are_the_real_ones(info):
    from sklearn.datasets import load_digits

    assert info.splits == {"train": 1437, "test": 360}
    assert (info.num_classes, info.image_shape) == (10, (8, 8, 1))
    digits = load_digits()
    batch = next(pipeline.eval_batches(info, "test", batch_size=360))
    np.testing.assert_array_equal(batch["label"], digits.target[-360:])
    expected = np.round(digits.images[-360:] * 255 / 16)
    np.testing.assert_array_equal(batch["image"][..., 0], expected)


def test_published_moments_are_those_of_the_images(info):
    source = sources.open_source("digits", "train")
    pixels = np.stack([source[i]["image"] for i in range(len(source))]) / 255
    np.testing.assert_allclose(
        [pixels.mean(), pixels.std()], [info.mean[0], info.std[0]], atol=1e-4
    )


def test_same_seed_same_batches_other_seed_other_batches(info):
    assert_same(take(train(info), 3), take(train(info), 3))
    first, other = next(train(info)), next(train(info, seed=1))
    assert np.any(first["label"] != other["label"])


def test_every_epoch_holds_every_example_once(info):
    """Twice 1,437 examples are 59.875 batches of 48: two whole permutations, end to end."""
    images = np.concatenate([b["image"] for b in take(train(info), 60)]).reshape(-1, 64)
    everything = next(pipeline.eval_batches(info, "train", batch_size=1437))["image"]
    for epoch in (images[:1437], images[1437:2874]):
        np.testing.assert_array_equal(
            np.sort(epoch.view("S64").ravel()),
            np.sort(everything.reshape(-1, 64).view("S64").ravel()),
        )
    assert np.any(images[:1437] != images[1437:2874])


@pytest.mark.parametrize("step", [1, 29, 30, 77])
def test_resumes_at_any_step(info, step):
    whole = train(info)
    take(whole, step)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = train(info)
    resumed.set_state(state)
    expected = take(whole, 3)
    assert_same(take(resumed, 3), expected)
    assert_same(take(train(info, start_step=step), 3), expected)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shards_of_processes_make_up_the_batch_of_one(info, count):
    whole = take(train(info), 2)
    parts = [take(train(info, process_index=p, process_count=count), 2) for p in range(count)]
    for step, batch in enumerate(whole):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, batch["image"])


@pytest.mark.parametrize("batch_size, count", [(50, 1), (360, 1), (7, 1), (33, 3), (720, 2)])
def test_evaluation_counts_every_example_once(info, batch_size, count):
    if batch_size % count:
        pytest.fail("a case that tests nothing")
    lists = [
        list(
            pipeline.eval_batches(
                info, "test", batch_size=batch_size, process_index=p, process_count=count
            )
        )
        for p in range(count)
    ]
    assert len({len(batches) for batches in lists}) == 1
    seen = np.concatenate([b["image"][b["mask"] > 0] for batches in lists for b in batches])
    everything = next(pipeline.eval_batches(info, "test", batch_size=360))["image"]
    assert len(seen) == 360
    np.testing.assert_array_equal(
        np.sort(seen.reshape(-1, 64).view("S64").ravel()),
        np.sort(everything.reshape(-1, 64).view("S64").ravel()),
    )


def test_prefetch_keeps_order_and_stays_two_ahead():
    taken = []

    def numbers():
        for number in range(10):
            taken.append(number)
            yield number

    ahead = pipeline.prefetch(numbers(), lambda n: n, size=2)
    seen = []
    for number in ahead:
        seen.append(number)
        assert len(taken) <= number + 1 + 2  # given, and two ahead
    assert seen == list(range(10))


def test_prefetch_raises_the_error_of_the_source_at_its_place():
    def broken():
        yield 1
        raise ValueError("no more")

    ahead = pipeline.prefetch(broken(), lambda n: n)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)


def test_training_on_digits_never_imports_tensorflow(tmp_path):
    """A TensorFlow that cannot be imported lies on the path: touching it would fail."""
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = """
import sys
from flaxres.data import decoding, pipeline, sources
info = sources.describe("digits", sys.argv[1])
next(pipeline.train_iterator(info, batch_size=8, seed=0, data_dir=sys.argv[1]))
assert "tensorflow" not in sys.modules
print("fine")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(trap.parent)},
    )
    assert run.stdout == "fine\n", run.stderr
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["digits"]


def test_processes_that_prepare_at_once_all_succeed(tmp_path):
    code = "import sys; from flaxres.data import sources; sources.describe('digits', sys.argv[1])"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for run in runs:
        assert run.wait(120) == 0, run.stderr.read().decode()
        run.stderr.close()
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_fashion_mnist_through_the_same_door(tfds_dir):
    info = sources.describe("fashion_mnist", str(tfds_dir))
    assert info.splits == {"train": 60_000, "test": 10_000}
    assert info.class_names[-1] == "Ankle boot" and info.eval_split == "test"
    batch = next(pipeline.eval_batches(info, "test", batch_size=100, data_dir=str(tfds_dir)))
    assert batch["image"].shape == (100, 28, 28, 1) and batch["image"].dtype == np.uint8


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("fashon_mnist", "unknown data set 'fashon_mnist'; did you mean fashion_mnist"),
        ("../etc", "unknown data set"),
        ("cifar10", "'cifar10' is not prepared in .*: run flaxres data prepare cifar10 --data-dir"),
    ],
)
def test_what_is_not_there_says_what_to_do(name, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        sources.describe(name, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_batch_that_does_not_divide_over_processes_is_refused(info):
    with pytest.raises(ValueError, match="a batch of 50 does not divide over 4 processes; use 48"):
        train(info, batch_size=50, process_count=4)


def test_unreadable_examples_are_replaced_by_the_next_and_named(info, monkeypatch, caplog):
    source = sources.open_source("digits", "test")

    class Torn:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            if index in (3, 4):
                raise OSError("torn record")
            return source[index]

    monkeypatch.setattr(decoding, "_source", lambda *args: Torn())
    batch = next(pipeline.eval_batches(info, "test", batch_size=8))
    np.testing.assert_array_equal(batch["image"][3], source[5]["image"])
    np.testing.assert_array_equal(batch["image"][4], source[5]["image"])
    assert "example 3 of digits (test) cannot be read" in caplog.text
    with pytest.raises(ValueError, match="more than 1 examples of 'digits'"):
        next(pipeline.eval_batches(info, "test", batch_size=8, max_corrupt=1))
