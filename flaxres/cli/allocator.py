"""The C library's allocator, tuned for arrays: one restart of the command with other variables.

XLA's CPU backend takes its arrays from malloc and gives them back within a step. By default large
ones are mapped and unmapped each time, which costs up to a third of a step in page faults. The
variables are read when a process starts, so the command starts itself once more.
"""

import os
import platform
import sys

FLAG = "--no-allocator"
_MARK = "FLAXRES_ALLOCATOR"
VARIABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_ARENA_MAX": "1",
}
COMMANDS = frozenset({"train", "eval", "predict", "claims"})
"""Those that compute."""


def environment(current: dict[str, str]) -> dict[str, str] | None:
    """The environment to start again with, or None where nothing is to be done.

    Nothing is, where the C library is another, where it was done already or is turned off
    (FLAXRES_ALLOCATOR=0), or where any of the variables was set by somebody who knows better.
    """
    if platform.libc_ver()[0] != "glibc" or _MARK in current:
        return None
    if any(name in current for name in VARIABLES):
        return None
    return {**current, **VARIABLES, _MARK: "tuned"}


def tune(arguments: list[str]) -> None:
    """Start this command again with a tuned allocator, if it computes and that is wanted."""
    if not arguments or arguments[0] not in COMMANDS or {FLAG, "--help", "-h"} & set(arguments):
        return
    if (tuned := environment(dict(os.environ))) is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], tuned)
