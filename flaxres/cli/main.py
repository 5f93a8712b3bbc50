"""`flaxres COMMAND …`: finds the command, and turns errors into sentences and exit codes.

0 done, 2 bad input, 130 Ctrl-C, 1 anything else. Imports no JAX, so that help comes at once.
"""

import difflib
import importlib
import os
import sys
import threading
from collections.abc import Sequence

from flaxres.cli import allocator

# command -> (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("flaxres.cli.train", "train a network, or go on with a run"),
    "eval": ("flaxres.cli.evaluate", "evaluate a checkpoint of a run"),
    "predict": ("flaxres.cli.predict", "classify image files with a run's network"),
    "info": ("flaxres.cli.info", "stages, shapes, parameters and multiply-adds of a model"),
    "claims": ("flaxres.cli.claims", "measure every claim of the argument on real data"),
    "data": ("flaxres.cli.data", "list, describe and prepare data sets"),
    "doctor": ("flaxres.cli.doctor", "what is installed, which devices there are, what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        allocator.tune(arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument not in ("--debug", allocator.FLAG)]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from flaxres import __version__

        print(__version__)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _fail(f"unknown command {command!r}{hint} (accepted: {', '.join(COMMANDS)})", 2)
    try:
        return importlib.import_module(COMMANDS[command][0]).run(rest)
    except (ValueError, FileNotFoundError) as error:
        if debug or not str(error):
            raise
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _fail("stopped", 130)
        if threading.active_count() > 1:  # Python would wait for savers and compilers to finish
            sys.stdout.flush()
            os._exit(code)
        return code
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        text = str(error) if isinstance(error, (RuntimeError, OSError)) else repr(error)
        return _fail(f"{text} (--debug shows where)", 1)


def _fail(sentence: str, code: int) -> int:
    print(f"flaxres: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [f"  {name:9} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flaxres COMMAND [options]",
            "",
            "Residual networks in JAX and Flax: train them, look into them, use their parts.",
            "",
            "commands:",
            *lines,
            "",
            "flaxres COMMAND --help shows a command's options with their defaults; --debug shows",
            f"where an error came from, {allocator.FLAG} leaves the allocator of C as it is.",
            "Without options, `flaxres train` trains a small network on real digits in a minute.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
