"""`flaxres info`: stages, shapes, parameters and multiply-adds of a model."""

import dataclasses

import tyro

from flaxres.cli import options


@dataclasses.dataclass(frozen=True)
class Info:
    """Stages, shapes, parameters and multiply-adds of a model; without a name, the models. Example:

    flaxres info resnet50 --image-size 224
    """

    model: tyro.conf.Positional[str | None] = None
    """A name of the zoo, or a pattern such as 'resnet*'."""
    image_size: int | None = None
    """Side of the image; default 224, or 32 for the CIFAR families."""
    channels: int = 3
    """Channels of the image."""
    num_classes: int | None = None
    """Classes; default 1000, or 10 for the CIFAR families."""
    json: bool = False
    """End with one JSON object on standard output."""


_PLACES = {"stem": 0, "head": 2}
"""Of parts in the order of the data's way; stages are between."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Info, argv, "info")
    from flaxres.nets import zoo

    if command.model is None or "*" in command.model:
        _refuse_fields(command)
        names = zoo.list_models(command.model or "*")
        if not names:
            raise ValueError(f"no model matches {command.model!r}")
        options.say("\n".join(names), command.json)
        if command.json:
            options.print_json({"models": names})
        return 0
    return _one(command, command.model)


def _refuse_fields(command: Info) -> None:
    """A list of names has no shapes."""
    for field in ("image_size", "channels", "num_classes"):
        value = getattr(command, field)
        if value != getattr(Info, field):
            raise ValueError(
                f"--{field.replace('_', '-')} {value} needs the name of one model, not "
                f"{command.model or 'none'}"
            )


def _one(command: Info, name: str) -> int:
    from flaxres.nets import zoo
    from flaxres.nets.summary import summarize

    fields = {} if command.num_classes is None else {"num_classes": command.num_classes}
    model = zoo.create_model(name, **fields)
    size = command.image_size
    if size is None:
        size = 32 if model.stem == "cifar" else 224
    if size < 1 or command.channels < 1:
        raise ValueError(
            f"image-size and channels must be positive, not {size} and {command.channels}"
        )
    summary = summarize(model, size, command.channels)
    kind = "residual" if model.residual else "plain"
    options.say(
        f"{name}: {kind}, {model.block} blocks, {model.style}, for {size}×{size}×"
        f"{command.channels} images\n{'part':8}{'blocks':>8}{'output':>16}{'parameters':>14}"
        f"{'MMACs':>10}",
        command.json,
    )
    parts = tuple(sorted(summary.parts, key=lambda part: _PLACES.get(part.name, 1)))
    for part in parts:
        shape = "×".join(map(str, part.output))
        options.say(
            f"{part.name:8}{part.blocks or '':>8}{shape:>16}{part.params:>14,}"
            f"{part.macs / 1e6:>10.1f}",
            command.json,
        )
    options.say(
        f"{'total':8}{model.depth:>8}{'':16}{summary.params:>14,}{summary.macs / 1e6:>10.1f}"
        f"   = {summary.macs / 1e9:.3f} GMACs",
        command.json,
    )
    if command.json:
        about = dataclasses.asdict(dataclasses.replace(summary, parts=parts))
        options.print_json(
            {"model": name, "image_size": size, **about, "gmacs": summary.macs / 1e9}
        )
    return 0
