"""`flaxres data`: list, describe and prepare data sets."""

import dataclasses
from typing import Literal

import tyro

from flaxres.cli import options


@dataclasses.dataclass(frozen=True)
class Data:
    """List, describe and prepare data sets. Examples:

    flaxres data list
    flaxres data info digits
    flaxres data prepare cifar10 --data-dir ~/tensorflow_datasets
    """

    action: tyro.conf.Positional[Literal["list", "info", "prepare"]] = "list"
    """What to do."""
    name: tyro.conf.Positional[str | None] = None
    """A data set of TensorFlow Datasets, or digits."""
    data_dir: str | None = None
    """TFDS directory; default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    manual_dir: str | None = None
    """Folder of files that were downloaded by hand (imagenet2012)."""
    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Data, argv, "data")
    from flaxres.data import sources

    if command.manual_dir is not None and command.action != "prepare":
        raise ValueError(
            f"--manual-dir {command.manual_dir} needs flaxres data prepare, not {command.action}"
        )
    if command.action == "list" and command.name is not None:
        raise ValueError(
            f"flaxres data list takes no name, not {command.name!r}: flaxres data info "
            f"{command.name} describes one"
        )
    if command.action == "list":
        names = sources.known(command.data_dir)
        options.say("\n".join(names), command.json)
        found: dict = {"datasets": names}
    elif command.name is None:
        raise ValueError(f"flaxres data {command.action} needs the name of a data set")
    elif command.action == "info":
        info = sources.describe(command.name, command.data_dir)
        found = dataclasses.asdict(info)
        for key, value in found.items():
            options.say(f"{key:12} {value}", command.json)
    else:
        path = sources.prepare(command.name, command.data_dir, command.manual_dir)
        options.say(f"prepared in {path}", command.json)
        found = {"path": str(path)}
    if command.json:
        options.print_json(found)
    return 0
