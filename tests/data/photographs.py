"""A TFDS data set as imagenet2012 is: JPEGs of many sizes, 1,000 classes, train and validation.

The pictures are drawn: a class is a hue and a direction of stripes.

    PYTHONPATH=. python tests/data/photographs.py FOLDER [--torn]
"""

import colorsys
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import PIL.Image

SPLITS = {"train": 40, "validation": 12}
CLASSES = 4
# Training images that cannot be decoded.
TORN = {5: b"no JPEG", 6: b"", 9: b"\xff\xd8\xff\xe0 only its first bytes"}


def picture(seed: int, label: int) -> PIL.Image.Image:
    """Stripes in the hue of the class, of a size that differs from seed to seed."""
    rng = np.random.default_rng((seed, label))
    height, width = rng.integers(40, 160, 2)
    rows, columns = np.mgrid[:height, :width]
    angle = np.pi * label / CLASSES
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) / 3 + rng.uniform(0, 6))
    hue = np.array(colorsys.hsv_to_rgb(label / CLASSES, 0.8, 1.0))
    pixels = (140 + 80 * wave[..., None]) * hue + rng.normal(0, 5, (height, width, 3))
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(seed: int, label: int) -> bytes:
    """The picture as a JPEG file; every tenth is grey, every tenth CMYK, as in the original."""
    image = picture(seed, label)
    mode = {3: "L", 7: "CMYK"}.get(seed % 10, "RGB")
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def examples(split: str, torn: dict[int, bytes]) -> Iterator[tuple[bytes, int]]:
    """(file, label) of each picture of a split; `torn` stands in for some of the training files."""
    first = 0 if split == "train" else 1000
    for number in range(SPLITS[split]):
        label = number % CLASSES
        file = torn.get(number) if split == "train" else None
        yield jpeg(first + number, label) if file is None else file, label


def write(folder: str, *options: str) -> str:
    """Prepare it in a process of its own, where TFDS's builder of the name is not known yet."""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, __file__, folder, *options]
    subprocess.run(command, check=True, capture_output=True, env=env)
    return folder


if __name__ == "__main__":
    from experiments.benchmark.photographs import builder

    torn = TORN if "--torn" in sys.argv else {}
    builder(sys.argv[1], {s: examples(s, torn) for s in SPLITS}).download_and_prepare()
    assert "tensorflow" not in sys.modules
