"""What does a network cost, beside what one would take instead?

Question  Ours, a plain linen ResNet and PyTorch's, on one machine: who is faster in training and
          inference; what depth costs in time to compile, in memory and until the first step.
Command   python -m experiments.benchmark [NAME …] [--quick] [--out DIR] [--data-dir DIR]
          NAME is one of training, inference, compile, memory, first_step, input, tpu, default all
          of them, or forms: the convolution's forms, of which "auto" takes the fastest.
Time      about twenty-five minutes on two CPU cores with nothing else running; --quick about three.
Writes    benchmark.json, to which cases are added one by one, and benchmark.png; with --quick
          benchmark-quick.json and -quick.png, so that small forms never replace measurements.

Sides are measured step by step in turn, in one process with one allocator (--allocator) and as many
threads each as there are cores; ratios are medians over rounds, with quartiles. Let nothing else
run meanwhile.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmark import environment
from experiments.common import FIGURES

DEFAULT = ("training", "inference", "compile", "memory", "first_step", "input", "tpu")
CASES = (*DEFAULT, "forms")


def main(argv: list[str] | None = None) -> int:
    """Measure the cases that are named; return the exit code."""
    options = _options(argv)
    if unknown := [name for name in options.names if name not in CASES]:
        print(
            f"benchmark: unknown case {unknown[0]!r} (accepted: {', '.join(CASES)})",
            file=sys.stderr,
        )
        return 2
    # Imported late: a wrong name should be told at once.
    from experiments.benchmark import report
    from flaxres.train.workdir import write_json

    stem = "benchmark-quick" if options.quick else "benchmark"
    file = options.out / f"{stem}.json"
    conditions = environment.conditions()
    print(f"{conditions['processor']}, {conditions['cores']} cores, {conditions['device']}")
    print(", ".join(f"{name}={value}" for name, value in conditions["settings"].items()))
    for name in options.names or DEFAULT:
        print(f"\n## {name}", flush=True)
        found = _measure(name, options)
        if found is None:
            continue
        results = json.loads(file.read_text()) if file.exists() else {}
        results[name] = {**found, "quick": options.quick, "conditions": conditions}
        write_json(file, results)
        report.draw(results, file.with_suffix(".png"))
        print(report.table(name, results[name]), flush=True)
    if file.exists() and not options.quick:
        print(f"\n## targets\n{report.targets(json.loads(file.read_text()))}")
    print(f"\n{file}")
    return 0


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """A case's numbers, or None, and a sentence, where something that it needs is missing."""
    from experiments.benchmark import depth, feeding, first_step, forms, speed, tpu

    measures: dict[str, Callable[[bool], dict[str, Any]]] = {
        "training": speed.training,
        "inference": speed.inference,
        "compile": depth.compile_time,
        "memory": depth.memory,
        "first_step": first_step.measure,
        "input": functools.partial(feeding.measure, data_dir=options.data_dir),
        "tpu": tpu.measure,
        "forms": forms.measure,
    }
    start = time.perf_counter()
    try:
        found = measures[name](options.quick)
    except tpu.NotHere as missing:
        print(f"{name} is left out: {missing}")
        return None
    return {**found, "took": time.perf_counter() - start}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to measure")
    parser.add_argument("--quick", action="store_true", help="small forms, to see that it works")
    parser.add_argument("--out", type=pathlib.Path, default=FIGURES, help="folder of the results")
    parser.add_argument("--data-dir", help="TFDS directory with fashion_mnist, for input")
    parser.add_argument(
        "--allocator",
        choices=("tuned", "default"),
        default="tuned",
        help="tuned keeps freed memory, in huge pages, for all sides alike",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    environment.start_again(_options(None).allocator)
    sys.exit(main())
