"""Typed flags from dataclasses, and printing a JSON object as the last line."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], command: str, default: T | None = None) -> T:
    """An instance of a dataclass from the command line; exits with 2 where that fails."""
    import tyro

    keywords: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        args=list(argv),
        prog=f"flaxres {command}",
        config=(tyro.conf.FlagCreatePairsOff,),
        **keywords,
    )


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on a line of its own; NaN, which JSON lacks, becomes null."""
    print(json.dumps(_plain(value)), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(text: str, json_output: bool = False) -> None:
    """A line for a person: on standard output, or on standard error beside JSON."""
    print(text, file=sys.stderr if json_output else sys.stdout, flush=True)
