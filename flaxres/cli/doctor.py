"""`flaxres doctor`: versions, devices, caches, and what is missing for which use."""

import dataclasses
import importlib.util

from flaxres.cli import options

_EXTRAS = {
    "tensorflow": "flaxres data prepare of TFDS's own data sets: pip install 'flaxres[prepare]'",
    "torch": "comparison with PyTorch: pip install 'flaxres[torch]'",
}


@dataclasses.dataclass(frozen=True)
class Doctor:
    """What is installed, which devices there are, what is missing for which use."""

    json: bool = False
    """End with one JSON object on standard output."""


def run(argv: list[str]) -> int:
    """The command."""
    command = options.parse(Doctor, argv, "doctor")
    import jax

    from flaxres.cache import cache_dir
    from flaxres.nets import onednn
    from flaxres.train.workdir import versions

    missing = {name: use for name, use in _EXTRAS.items() if importlib.util.find_spec(name) is None}
    found = {
        "versions": versions(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "cache": str(cache_dir()),
        "onednn": onednn.reason() or "available",
        "missing": missing,
    }
    for name, version in versions().items():
        options.say(f"{name:18} {version}", command.json)
    options.say(f"{'devices':18} {', '.join(found['devices'])}", command.json)
    options.say(f"{'cache':18} {found['cache']}", command.json)
    options.say(f"{'oneDNN':18} {found['onednn']}", command.json)
    for name, use in missing.items():
        options.say(f"without {name:10} no {use}", command.json)
    if command.json:
        options.print_json(found)
    return 0
