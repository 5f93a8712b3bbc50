"""The 1,797 handwritten digits that ship with scikit-learn, as a TFDS builder.

Real data (Alpaydin & Kaynak 1998, UCI), 8×8 pixels, ten classes; needs no network and no
TensorFlow. The last 360 images, of other writers than most of the first, are the test split.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `digits`: image uint8 `[8, 8, 1]` with 0 … 255, label 0 … 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor rather than Image: preparing an Image needs TensorFlow to encode it.
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            description="Handwritten digits of 8×8 pixels from scikit-learn.",
            # The split is by order: the last images are other writers'.
            disable_shuffling=True,
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        data = load_digits()
        # Ink is 0 … 16 in the source.
        images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = data.target
        return {
            "train": self._generate_examples(images[:-TEST_SIZE], labels[:-TEST_SIZE]),
            "test": self._generate_examples(images[-TEST_SIZE:], labels[-TEST_SIZE:]),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": int(label)}
