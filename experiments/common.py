"""What the experiments share: their options, where they write, how they say a number."""

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from flaxres.nets.initialize import residual_inits, resolve
from flaxres.train.workdir import write_json

FIGURES = pathlib.Path(__file__).parent / "figures"


@dataclasses.dataclass(frozen=True)
class Options:
    """Of every experiment."""

    quick: bool
    out: pathlib.Path
    seeds: int


def options(about: str, argv: list[str] | None = None, seeds: int = 1) -> Options:
    """--quick, --out and --seeds, with the script's header as help."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small form, within a minute or so")
    parser.add_argument("--out", type=pathlib.Path, default=FIGURES, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=seeds, help="runs from different seeds")
    found = parser.parse_args(argv)
    if found.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {found.seeds}")
    return Options(found.quick, found.out, 1 if found.quick else found.seeds)


def save(out: pathlib.Path, name: str, numbers: dict[str, Any]) -> None:
    """Write the numbers as NAME.json and print them; NaN, which JSON lacks, becomes null."""
    plain = _plain(numbers)
    write_json(out / f"{name}.json", plain)
    print(json.dumps(plain, indent=2))


def starts(
    styles: tuple[str, ...] = ("v1", "v2"),
    norms: tuple[str, ...] = ("batch", "none"),
    residual: bool = True,
) -> list[dict[str, Any]]:
    """Fields of a model for every residual_init in every style and norm that it fits."""
    found = []
    for style in styles:
        for norm in norms:
            for name in residual_inits():
                init = resolve(name)
                try:
                    init.check(style=style, norm=norm, residual=residual)
                except ValueError:
                    continue  # dead or meaningless there
                found.append(
                    {
                        "style": style,
                        "norm": norm,
                        "residual": residual,
                        "residual_init": init.name,
                    }
                )
    return found


def tower(blocks: int, width: int = 16) -> dict[str, Any]:
    """Fields of a model whose blocks are all equal, so that only depth changes."""
    return {"stage_sizes": (blocks,), "widths": (width,), "stem_width": width, "scan": True}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
