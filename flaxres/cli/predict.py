"""`flaxres predict`: classify image files with a run's network."""

import dataclasses

import tyro

from flaxres.cli import options


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify image files with a run's network. Example:

    flaxres predict --workdir runs/resnet20_cifar-digits seven.png
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, of any size: they are resized to what the network was trained on."""
    workdir: str
    """Work directory of the run."""
    checkpoint: str | None = None
    """Step of the checkpoint, or best (of the highest accuracy); default the newest."""
    data_dir: str | None = None
    """TFDS directory; default the one that the run had."""
    top: int = 3
    """Classes to name for each image."""
    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Predict, argv, "predict")
    if not command.images:
        raise ValueError("no image given: flaxres predict --workdir DIR IMAGE …")
    if command.top < 1:
        raise ValueError(f"top must be at least 1, not {command.top}")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flaxres.data import augment, images
    from flaxres.train import loop

    model, variables, config, info = loop.load(
        command.workdir, options.checkpoint(command.checkpoint), command.data_dir
    )
    pixels = [images.read(path, info, config.image_size) for path in command.images]
    batch = augment.normalize(jnp.asarray(np.stack(pixels)), info.mean, info.std)
    shares = jax.nn.softmax(jax.jit(model.apply)(variables, batch), axis=-1)
    found = {}
    for path, row in zip(command.images, np.asarray(shares), strict=True):
        best = np.argsort(-row)[: command.top]
        found[path] = [{"class": info.class_names[i], "probability": float(row[i])} for i in best]
        named = ", ".join(f"{info.class_names[i]} {row[i]:.1%}" for i in best)
        options.say(f"{path}: {named}", command.json)
    if command.json:
        options.print_json({"workdir": command.workdir, "predictions": found})
    return 0
