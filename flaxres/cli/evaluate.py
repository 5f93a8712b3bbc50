"""`flaxres eval`: evaluate a checkpoint of a run on the held-out split."""

import dataclasses

from flaxres.cli import options


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's network on the held-out split, every example once. Example:

    flaxres eval --workdir runs/resnet20_cifar-digits
    """

    workdir: str
    """Work directory of the run."""
    checkpoint: str | None = None
    """Step of the checkpoint, or best (of the highest accuracy); default the newest."""
    data_dir: str | None = None
    """TFDS directory; default the one that the run had."""
    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Evaluate, argv, "eval")
    from flaxres.train import loop

    result = loop.evaluate(
        command.workdir, options.checkpoint(command.checkpoint), command.data_dir
    )
    options.say(
        f"step {result.step}: test accuracy {result.accuracy:.2%}, loss {result.loss:.4f} over "
        f"{result.examples} examples",
        command.json,
    )
    if command.json:
        options.print_json(dataclasses.asdict(result))
    return 0
