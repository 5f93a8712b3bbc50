"""The scripts that kill runs and compare their forms, in a small form of their own."""

import importlib.util
import pathlib
import random

import pytest


def script(name):
    """A script beside this file, as a module."""
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed_of(moments):
    """The first seed with which run 0 is killed at exactly these moments."""
    chaos = script("chaos")
    for seed in range(1000):
        dice = random.Random(f"{seed}-0")
        if chaos.planned(dice) == moments:
            return seed
    raise AssertionError(moments)


def test_a_run_killed_while_it_saves_goes_on_bitwise(capsys):
    seed = seed_of(["saving"])
    arguments = ["--runs", "1", "--processes", "1", "--seed", str(seed), "--steps", "16"]
    code = script("chaos").main(arguments)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "1 of 1 reached bitwise" in said


def test_two_devices_and_two_processes_have_the_losses_of_one(capsys):
    arguments = ["--data", "digits", "--model", "resnet8_cifar"]
    code = script("same_run").main([*arguments, "--forms", "pmap on two devices", "two processes"])
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_two_devices_and_two_processes_have_the_losses_of_one_on_fashion_mnist(tfds_dir, capsys):
    code = script("same_run").main(["--data-dir", str(tfds_dir)])
    assert code == 0, capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_killed_at_random_go_on_bitwise(capsys):
    assert script("chaos").main(["--runs", "2", "--processes", "2"]) == 0, capsys.readouterr().out
