"""`flaxres train`: train a network, or go on with the run in the work directory."""

import contextlib
import dataclasses
from typing import Any

import tyro

from flaxres.cli import options
from flaxres.train import presets
from flaxres.train.config import TrainConfig

_EXIT_CODES = {None: 0, "SIGTERM": 0, "SIGINT": 130}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a network, or go on with the run in the work directory.

    With no options: resnet20 on scikit-learn's digits, about half a minute on two cores. Example:

      flaxres train --model resnet56_cifar --data digits --steps 500 --workdir runs/deep
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    preset: str | None = None
    """Recipe to start from (digits, fashion_mnist, cifar10, imagenet, …); flags override it."""
    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    default = default_config(argv)
    command = options.parse(Train, argv, "train", Train(default), presets.listing())
    config = command.config.validate()
    _check_warmup(argv, config)
    from flaxres.cli import progress
    from flaxres.train import loop

    with contextlib.closing(progress.listener(command.json)) as listener:
        result = loop.train(config, listener=listener)
    if not _is_main():
        return _EXIT_CODES[result.stopped_by]
    finish(result, command.json)
    return _EXIT_CODES[result.stopped_by]


def _is_main() -> bool:
    from flaxres.train import distributed

    return distributed.is_main()


def default_config(argv: list[str]) -> TrainConfig:
    """The configuration that the other flags override: that of --preset, or of the data set.

    A recipe's length gives way to --steps or --epochs, whichever it was given in; so does its
    warm-up to its two flags, and its drops to a schedule that has none.
    """
    name = _flag(argv, "--preset")
    data = _flag(argv, "--data")
    if name is None:
        name = presets.for_data(data) or "digits"
    config = presets.get(name)
    if data is not None and _flag(argv, "--preset") is None and data != config.data:
        # A data set without a recipe: the digits' recipe for ten epochs.
        config = dataclasses.replace(config, data=data, image_size=None, steps=None, epochs=10)
    changes: dict[str, Any] = {}
    for pair in (("steps", "epochs"), ("warmup_steps", "warmup_epochs")):
        missing = [field for field in pair if _flag(argv, f"--{field.replace('_', '-')}") is None]
        if len(missing) == 1:
            changes[missing[0]] = getattr(TrainConfig, missing[0])
    if _flag(argv, "--schedule") not in (None, "step"):
        changes["drops"] = TrainConfig.drops
    return dataclasses.replace(config, **changes)


def _check_warmup(argv: list[str], config: TrainConfig) -> None:
    """Refuse a warm-up as long as the run, if it was asked for; a recipe's is cut to fit."""
    for unit in ("steps", "epochs"):
        warmup, length = getattr(config, f"warmup_{unit}"), getattr(config, unit)
        given = _flag(argv, f"--warmup-{unit}") is not None
        if given and length is not None and warmup >= length:
            raise ValueError(
                f"warmup_{unit} must be less than {unit}={length:g}, the whole run, not {warmup:g}"
            )


def _flag(argv: list[str], name: str) -> str | None:
    """The value of a flag, as `--flag value` or `--flag=value`, with hyphens or underscores."""
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") != name:
            continue
        if equals:
            return value
        if position + 1 < len(argv):
            return argv[position + 1]
    return None


def finish(result: Any, json_output: bool) -> None:
    """Draw the curves, write the report, and say where everything is."""
    from flaxres.cli import plots, report
    from flaxres.train.workdir import Workdir

    work = Workdir(result.workdir)
    plots.training_curves(work.metrics_file, work.curves, _title(work), _training_loss(work))
    report.write_run(work, dataclasses.asdict(result))
    if result.stopped_by:
        options.say(
            f"stopped by {result.stopped_by} at step {result.step}, which is saved; go on with "
            f"the same command, or flaxres train --workdir {result.workdir} and the same options",
            json_output,
        )
    else:
        options.say(
            f"test accuracy {result.accuracy:.2%}, loss {result.loss:.4f} over "
            f"{result.examples} examples after {result.step} steps",
            json_output,
        )
    for name, path in (
        ("curves", work.curves),
        ("report", work.report),
        ("metrics", work.metrics_file),
        ("checkpoints", work.checkpoints),
        ("log", work.log),
        ("trace", work.trace),
    ):
        if path.exists():  # there are no curves before the first step, and few runs have a trace
            options.say(f"  {name:12} {path}", json_output)
    options.say(f"  again        flaxres eval --workdir {result.workdir}", json_output)
    if json_output:
        options.print_json(dataclasses.asdict(result))


def _title(work: Any) -> str:
    config = work.config()
    return f"{config.model} on {config.data}"


def _training_loss(work: Any) -> str:
    """What is not in the held-out loss, which is the plain cross-entropy."""
    config = work.config()
    parts = [
        name
        for name, there in (
            ("binary", config.loss == "bce"),
            ("smoothed labels", config.label_smoothing),
            ("mixed images", config.mixup or config.cutmix),
        )
        if there
    ]
    return f"training ({', '.join(parts)})" if parts else "training"
