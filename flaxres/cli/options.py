"""Typed flags from dataclasses, and printing a JSON object as the last line."""

import contextlib
import inspect
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse(
    kind: type[T], argv: Sequence[str], command: str, default: T | None = None, more: str = ""
) -> T:
    """An instance of a dataclass from the command line; one sentence and exit 2 if it is none.

    Args:
      kind: the dataclass; its docstring is the help.
      argv: words behind the command.
      command: its name.
      default: what the flags override.
      more: text to put below the docstring in the help.
    """
    import tyro

    keywords: dict[str, Any] = {} if default is None else {"default": default}
    if more:
        keywords["description"] = f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{more}"
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(kind, args=list(argv), prog=f"flaxres {command}", **keywords)
    except SystemExit as stop:
        if stop.code and (sentence := _sentence(boxes.getvalue())):
            print(
                f"flaxres: {sentence} (flaxres {command} --help shows what is accepted)",
                file=sys.stderr,
            )
            boxes.truncate(0)
        raise
    finally:
        sys.stderr.write(boxes.getvalue())


def checkpoint(text: str | None) -> Any:
    """A step, "best" or None from what a person typed for --checkpoint."""
    if text is None or text == "best":
        return text
    if not text.isdigit():
        raise ValueError(f"checkpoint must be a step or best, not {text!r}")
    return int(text)


# A box has a title and parts with rules between them; its form follows the terminal's encoding.
_RULE = re.compile(r"^[ │╭╰]*(?:-{10,}|─{2,}|─ .* ─*)[ │╮╯]*$", re.MULTILINE)


def _sentence(boxes: str) -> str:
    """What tyro says in a box of several parts, as one sentence."""
    parts = [" ".join(part.replace("│", " ").split()) for part in _RULE.split(boxes)]
    if len(parts) < 3:
        return " ".join(boxes.split())
    said, hint = parts[1].partition(" Got errors:")[0], parts[2]
    if bad := re.match(r"Error parsing (\S+): .*?(\[?'[^']*'\]?)\.?$", said):
        kind = re.search(r"--\S+ (.*?) (?=[A-Z][a-z])", f"{hint} Z")
        takes = kind.group(1).replace("{None}|", "") if kind else "another value"
        return f"{bad.group(1)} takes {takes}, not {bad.group(2).strip('[]')}"
    if hint.startswith("Unrecognized options"):
        said += f"; {hint[:1].lower()}{hint[1:]}"
    if hint.startswith("Perhaps you meant"):
        flags = dict.fromkeys(re.findall(r"--[a-z][\w-]*", hint))
        said += f"; did you mean {' or '.join(list(flags)[:3])}?"
    return (said[:1].lower() + said[1:]).rstrip(".")


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
