"""The one door to TFDS: what a data set is, how it is opened, how it is prepared."""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxres.cache import cache_dir

# Mean and standard deviation a channel of the training images, as fractions of 255, as published.
_MOMENTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3054,), (0.3753,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_MEASURED_EXAMPLES = 2_000
_EMBEDDED = ("digits",)
_EVAL_SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What training needs to know of a data set."""

    name: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    """(height, width, channels); None where images differ in size."""
    class_names: tuple[str, ...]
    splits: dict[str, int]
    """Examples in each split."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_key: str = "image"
    label_key: str = "label"

    @property
    def eval_split(self) -> str:
        """The split that is held out: test, or validation where there is no labelled test."""
        order = reversed(_EVAL_SPLITS) if self.name == "imagenet2012" else _EVAL_SPLITS
        for split in order:
            if split in self.splits:
                return split
        raise ValueError(
            f"data set {self.name!r} has no split to evaluate on (found: {', '.join(self.splits)})"
        )


def known(data_dir: str | None = None) -> list[str]:
    """Data sets that are embedded, that have a preset normalisation, or lie in `data_dir`."""
    names = {*_EMBEDDED, *_MOMENTS}
    directory = _directory(data_dir)
    if directory.is_dir():
        names |= {p.name for p in directory.iterdir() if p.is_dir() and p.name.isidentifier()}
    return sorted(names - {"downloads"})


def describe(name: str, data_dir: str | None = None) -> DataInfo:
    """Classes, shapes, splits and pixel moments of a prepared data set.

    Raises:
      ValueError: unknown, not prepared (the sentence has the command), or not images with classes.
    """
    import tensorflow_datasets as tfds

    info = _builder(name, data_dir).info
    features = info.features
    images = [k for k, f in features.items() if _is_image(f)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"data set {name!r} is not image classification: it needs one image and one class "
            f"label, and has {', '.join(f'{k}: {type(f).__name__}' for k, f in features.items())}"
        )
    shape = features[images[0]].shape
    shape = (*shape, 1) if len(shape) == 2 else shape
    splits = {split: info.splits[split].num_examples for split in info.splits}
    label = features[labels[0]]
    described = DataInfo(
        name=name,
        num_classes=label.num_classes,
        image_shape=tuple(shape),
        class_names=tuple(label.names),
        splits=splits,
        mean=(),
        std=(),
        image_key=images[0],
        label_key=labels[0],
    )
    mean, std = _MOMENTS.get(name) or _measure(described, data_dir)
    return dataclasses.replace(described, mean=mean, std=std)


def open_source(name: str, split: str, data_dir: str | None = None) -> Sequence[dict[str, Any]]:
    """Random access to a split; items are dicts of numpy arrays, decoded on access."""
    builder = _builder(name, data_dir)
    if split not in builder.info.splits:
        raise ValueError(
            f"data set {name!r} has no split {split!r} (found: {', '.join(builder.info.splits)})"
        )
    return builder.as_data_source(split)


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> pathlib.Path:
    """Write a data set as array_record into `data_dir`; return where it lies.

    Digits need nothing; TFDS's own builders need TensorFlow while they prepare (not to be read).
    """
    import tensorflow_datasets as tfds

    if name in _EMBEDDED:
        return pathlib.Path(_embedded(data_dir).data_dir)
    with contextlib.suppress(ValueError):
        return pathlib.Path(_builder(name, data_dir).data_dir)  # it is there already
    if name.partition("/")[0] not in tfds.list_builders(with_community_datasets=False):
        raise ValueError(_unknown(name, data_dir))
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"preparing {name!r} needs TensorFlow (reading it does not): "
            "pip install 'flaxres[prepare]'"
        )
    try:
        builder = tfds.builder(name, data_dir=str(_directory(data_dir)), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(_unknown(name, data_dir)) from None
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_dir)


def _directory(data_dir: str | None) -> pathlib.Path:
    if data_dir:
        return pathlib.Path(data_dir).expanduser()
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return True
    return (
        type(feature) is tfds.features.Tensor
        and len(feature.shape) in (2, 3)
        and feature.np_dtype == np.uint8
    )


def _builder(name: str, data_dir: str | None) -> Any:
    """A read-only builder of a prepared data set."""
    import tensorflow_datasets as tfds

    if name in _EMBEDDED:
        return _embedded(data_dir)
    directory = _directory(data_dir)
    if not name.replace("/", "").isidentifier():
        raise ValueError(_unknown(name, data_dir))
    try:
        builder = tfds.builder(name, data_dir=str(directory), try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ModuleNotFoundError):
        raise ValueError(_unknown(name, data_dir)) from None
    if not pathlib.Path(builder.data_dir).is_dir():
        raise ValueError(
            f"data set {name!r} is not prepared in {directory}: run "
            f"flaxres data prepare {name} --data-dir {directory}"
        )
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"data set {name!r} in {directory} is stored as {builder.info.file_format.value}, "
            "which cannot be read at random: prepare it again in another folder with "
            f"flaxres data prepare {name} --data-dir DIR"
        )
    return builder


def _unknown(name: str, data_dir: str | None) -> str:
    close = difflib.get_close_matches(name, known(data_dir), 3, 0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return (
        f"unknown data set {name!r}{hint} (accepted: {', '.join(known(data_dir))}, or any image "
        "classification set of TensorFlow Datasets)"
    )


def _embedded(data_dir: str | None) -> Any:
    """The digits, prepared on first use; processes that start at once may all prepare."""
    from flaxres.data.digits import Digits

    home = _directory(data_dir) if data_dir else cache_dir() / "data"
    builder = Digits(data_dir=str(home), file_format="array_record")
    target = pathlib.Path(builder.data_dir)
    if target.is_dir():
        return builder
    home.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".digits-", dir=home))
    try:
        maker = Digits(data_dir=str(scratch), file_format="array_record")
        with _quiet():
            maker.download_and_prepare()
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(maker.data_dir, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Digits(data_dir=str(home), file_format="array_record")


@contextlib.contextmanager
def _quiet() -> Any:
    """TFDS draws progress bars on standard error; two seconds of them are only noise."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _measure(info: DataInfo, data_dir: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Moments of the first training images: the same numbers on every process and run."""
    split = "train" if "train" in info.splits else next(iter(info.splits))
    source = open_source(info.name, split, data_dir)
    count = min(len(source), _MEASURED_EXAMPLES)
    sums = np.zeros((2, info.image_shape[2]))
    pixels = 0
    for index in range(count):
        image = np.asarray(source[index][info.image_key], np.float64) / 255
        flat = image.reshape(-1, info.image_shape[2])
        sums += flat.sum(0), np.square(flat).sum(0)
        pixels += len(flat)
    mean = sums[0] / pixels
    std = np.sqrt(np.maximum(sums[1] / pixels - mean**2, 1e-6))
    return tuple(map(float, mean.round(4))), tuple(map(float, std.round(4)))
