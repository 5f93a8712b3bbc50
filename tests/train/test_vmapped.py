"""Runs trained together are the runs trained alone."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from flaxres.train import TrainConfig, fit
from flaxres.train.vmapped import sweep

CONFIG = TrainConfig(
    model="resnet8_cifar", steps=4, batch_size=16, lr=0.02, eval_batch_size=360, driver="device"
)


@pytest.fixture(scope="module")
def together():
    return sweep(CONFIG, seeds=(0, 5), lrs=(0.02, 0.01))


@pytest.mark.parametrize("run, seed, lr", [(0, 0, 0.02), (1, 5, 0.01)])
def test_each_run_is_the_one_trained_alone(together, run, seed, lr):
    alone = fit(dataclasses.replace(CONFIG, seed=seed, lr=lr))
    for name in ("loss", "accuracy", "lr"):
        np.testing.assert_allclose(together.history[name][run], alone.history[name], rtol=1e-4)
    chex.assert_trees_all_close(together.variables(run), alone.variables, atol=1e-5, rtol=1e-3)
    assert abs(together.accuracy[run] - alone.accuracy) <= 1 / 360


def test_shapes_have_runs_first(together):
    assert together.history["loss"].shape == (2, 4) and together.accuracy.shape == (2,)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(together.states.params))


def test_what_makes_no_sweep_is_refused():
    with pytest.raises(ValueError, match="3 learning rates do not fit 2 seeds"):
        sweep(CONFIG, (0, 1), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="at least one seed"):
        sweep(CONFIG, ())
    for mode in ("ghost", "device"):
        with pytest.raises(ValueError, match=f"batch_norm must be sync in a sweep, not {mode}"):
            sweep(dataclasses.replace(CONFIG, batch_norm=mode), (0,))
    with pytest.raises(ValueError, match="lr must be more than 0, not -1.0"):
        sweep(CONFIG, (0,), (-1.0,))
