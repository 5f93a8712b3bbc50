"""Where the time goes: shares add up, rates leave out what is no training, traces open."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from flaxres.train.profile import Meter, Stopwatch, Tracer, seconds_since_start


def test_shares_add_up_to_one():
    watch = Stopwatch()
    with watch.during("data"):
        time.sleep(0.03)
    with watch.during("save"):
        time.sleep(0.01)
    shares = watch.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["data"] > shares["save"] > 0 and shares["eval"] == 0
    assert list(shares) == ["step", "data", "eval", "save"]


def test_restarting_forgets():
    watch = Stopwatch()
    with watch.during("data"):
        time.sleep(0.02)
    watch.restart()
    assert watch.shares()["data"] == 0


def test_time_counts_even_if_the_body_fails():
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.during("data"):
        time.sleep(0.01)
        raise KeyError
    assert watch.shares()["data"] > 0


def test_rate_leaves_out_what_came_before_and_between():
    meter = Meter()
    meter.add(1000)  # the first step, which compiles
    assert meter.lap() == 0
    meter.begin()
    meter.add(10)
    time.sleep(0.02)
    rate = meter.lap()
    assert 100 < rate < 500
    time.sleep(0.1)  # an evaluation
    meter.begin()
    meter.add(10)
    time.sleep(0.02)
    meter.lap()
    assert 100 < meter.mean() < 500


def test_lap_without_images_is_zero_and_changes_nothing():
    meter = Meter()
    meter.begin()
    assert meter.lap() == 0 and meter.mean() == 0


def test_seconds_since_start_goes_up():
    before = seconds_since_start()
    time.sleep(0.02)
    assert 0 < before < seconds_since_start()


def traced(folder, steps, taken):
    tracer = Tracer(steps, folder)
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    value, written = jnp.ones((8, 8)), []
    for number in taken:
        tracer.before(number)
        value = step(value)
        if tracer.after(number, value):
            written.append(number)
    tracer.close()
    return written


def test_trace_of_the_named_steps_opens(tmp_path):
    assert traced(tmp_path, (2, 4), range(6)) == [3]
    (file,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(
        "tanh" in event.get("name", "") or "dot" in event.get("name", "") for event in events
    )
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_trace_that_the_run_ends_within_is_closed(tmp_path):
    assert traced(tmp_path, (2, 40), range(4)) == []
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_run_that_goes_on_traces_the_steps_that_are_left(tmp_path):
    assert traced(tmp_path, (2, 6), range(4, 8)) == [5]


def test_without_steps_nothing_is_traced(tmp_path):
    assert traced(tmp_path, None, range(3)) == []
    assert list(tmp_path.iterdir()) == []
