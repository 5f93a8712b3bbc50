"""The command starts itself once more with a tuned allocator, and only where that is wanted."""

import sys

import pytest

from flaxres.cli import allocator

BARE = {"PATH": "/bin"}


@pytest.fixture
def started(monkeypatch):
    calls = []
    monkeypatch.setattr(allocator.os, "environ", BARE)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(allocator.os, "execve", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize("command", sorted(allocator.COMMANDS))
def test_commands_that_compute_start_again_once(command, started):
    allocator.tune([command, "--json"])
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert environment["MALLOC_ARENA_MAX"] == "1" and environment["PATH"] == "/bin"
    assert allocator.environment(environment) is None


@pytest.mark.parametrize(
    "arguments", [[], ["info"], ["train", "--help"], ["train", "--no-allocator"]], ids=str
)
def test_nothing_is_started_again_for(arguments, started):
    allocator.tune(arguments)
    assert not started


@pytest.mark.parametrize("set_by_hand", ["FLAXRES_ALLOCATOR", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_was_set_by_hand_is_left_alone(set_by_hand, started):
    assert allocator.environment({**BARE, set_by_hand: "0"}) is None


def test_other_c_libraries_are_left_alone(started, monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("musl", ""))
    assert allocator.environment(BARE) is None
