"""A TFDS data set like ImageNet's: JPEGs of 500×375 pixels and some 110 kB, drawn at random.

    python -m experiments.benchmark.photographs FOLDER COUNT

A process of its own, since TFDS knows the builder's name already where its data sets are open.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

_SMOOTH = PIL.Image.Resampling.BICUBIC


def picture(seed: int) -> PIL.Image.Image:
    """Noise of all scales, each as strong as it is coarse, as photographs have it."""
    rng = np.random.default_rng(seed)
    size = (500, 375) if seed % 4 else (375, 500)
    pixels = np.zeros((size[1], size[0], 3))
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, 1, (size[1] // scale + 2, size[0] // scale + 2, 3))
        coarse = (coarse - coarse.min()) / np.ptp(coarse) * 255
        image = PIL.Image.fromarray(coarse.astype(np.uint8)).resize(size, _SMOOTH)
        pixels += (np.asarray(image, np.float64) - 128) * scale**0.2
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(seed: int) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture(seed).save(file, "JPEG", quality=95)
    return file.getvalue()


def examples(numbers: range) -> Iterator[tuple[bytes, int]]:
    """(file, label) of each number."""
    for number in numbers:
        yield jpeg(number), number % 1000


def builder(folder: str, splits: Mapping[str, Iterable[tuple[bytes, int]]]) -> Any:
    """Writes (JPEG file, label) of each split in the form of imagenet2012."""

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        """Has the features, the name and the version of TFDS's own builder, which reads them."""

        VERSION = tfds.core.Version("5.1.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=1000),
                    "file_name": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                supervised_keys=("image", "label"),
                description="Drawn pictures.",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Any:
            for number, (file, label) in enumerate(splits[split]):
                name = f"{split}_{number}.JPEG"
                yield number, {"image": file, "label": label, "file_name": name}

    return Imagenet2012(data_dir=folder, file_format="array_record")


if __name__ == "__main__":
    tfds.disable_progress_bar()
    count = int(sys.argv[2])
    splits = {"train": examples(range(count)), "validation": examples(range(count, count + 4))}
    builder(sys.argv[1], splits).download_and_prepare()
