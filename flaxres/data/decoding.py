"""Examples of a TFDS source, decoded and brought to one size, in threads or worker processes."""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flaxres.data import images, sources
from flaxres.data.sources import DataInfo

Batch = dict[str, np.ndarray]
Places = Callable[[int], tuple[np.ndarray, np.ndarray]]
MAX_CORRUPT = 100
_IN_MEMORY_BYTES = 1 << 30
_THREADS = 8
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Decodes examples by index; picklable, so that worker processes can have it."""

    info: DataInfo
    split: str
    data_dir: str | None = None
    image_size: int | None = None
    """Side to resize to; default the data's own, 224 where sizes differ."""
    random_crop: bool = False
    """Random resized crops, where images differ in size."""
    seed: int = 0
    max_corrupt: int = MAX_CORRUPT
    memory: tuple[np.ndarray, np.ndarray] | None = None
    """All images and labels, where they fit."""

    def batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """Examples at `indices` `[n]`; `positions` `[n]` are their places in the whole order.

        Returns:
          {"image": uint8 `[n, h, w, c]`, "label": int32 `[n]`, "corrupt": int64 `[n]`, the index
          where another example stands in for an unreadable one, else -1}.
        """
        if self.memory is not None:
            pixels, labels = self.memory
            corrupt = np.full(len(indices), -1, np.int64)
            return {"image": pixels[indices], "label": labels[indices], "corrupt": corrupt}
        rows = [self._one(int(p), int(i)) for p, i in zip(positions, indices, strict=True)]
        return {
            "image": np.stack([row[0] for row in rows]),
            "label": np.array([row[1] for row in rows], np.int32),
            "corrupt": np.array([row[2] for row in rows], np.int64),
        }

    def _one(self, position: int, index: int) -> tuple[np.ndarray, int, int]:
        """One example, or the next readable one in its place, so that batches keep their size."""
        source = _source(self.info.name, self.split, self.data_dir)
        corrupt = -1
        for shift in range(min(len(source), self.max_corrupt + 2)):
            try:
                record = source[(index + shift) % len(source)]
                pixels = self._fit(record[self.info.image_key], position)
                return pixels, int(record[self.info.label_key]), corrupt
            except Exception as error:  # decoders raise whatever they like
                _log.debug("example %d of %s: %s", index, self.split, error)
                corrupt = index if corrupt < 0 else corrupt
        raise ValueError(
            f"example {index} of {self.info.name!r} ({self.split}) and the {shift} after it cannot "
            "be read: prepare the data set again"
        )

    def _fit(self, pixels: np.ndarray, position: int) -> np.ndarray:
        height, width, channels = self.info.image_shape
        pixels = images.to_channels(np.asarray(pixels), channels)
        if self.random_crop:
            rng = np.random.Generator(np.random.Philox(key=(self.seed, position)))
            return images.random_resized_crop(pixels, self.image_size or 224, rng)
        if height is None or width is None:
            return images.centre_crop(pixels, self.image_size or 224)
        return images.resize(pixels, self.image_size or height, self.image_size or width)


# Handles of open files, one per process; not state that changes any result.
_SOURCES: dict[tuple[str, str, str | None], Any] = {}


def _source(name: str, split: str, data_dir: str | None) -> Any:
    key = (name, split, data_dir)
    if key not in _SOURCES:
        _SOURCES[key] = sources.open_source(name, split, data_dir)
    return _SOURCES[key]


def prepare(reader: Reader, faults: "Faults") -> Reader:
    """The reader, checked, and holding the whole split if that is small.

    Raises ValueError if there is no such split, or too much of it cannot be read.
    """
    info = reader.info
    if reader.split not in info.splits:
        raise ValueError(
            f"data set {info.name!r} has no split {reader.split!r} "
            f"(found: {', '.join(info.splits)})"
        )
    height, width, channels = info.image_shape
    if height is None or width is None:
        return reader
    reader = dataclasses.replace(reader, random_crop=False)
    side = (reader.image_size or height) * (reader.image_size or width)
    count = info.splits[reader.split]
    if count * side * channels > _IN_MEMORY_BYTES:
        return reader
    everything = np.arange(count)
    decoded = faults.take_from(reader.batch(everything, everything))
    return dataclasses.replace(reader, memory=(decoded["image"], decoded["label"]))


class Faults:
    """Counts examples that cannot be read, names each once, and ends a run that has too many."""

    def __init__(self, info: DataInfo, split: str, limit: int) -> None:
        self._name, self._split, self._limit = info.name, split, limit
        self._seen: collections.Counter[int] = collections.Counter()

    def take_from(self, batch: Batch) -> Batch:
        """The batch without its "corrupt". Raises ValueError above the limit."""
        corrupt = batch.pop("corrupt")
        for index in sorted({int(i) for i in corrupt if i >= 0} - set(self._seen)):
            self._seen[index] += 1
            _log.warning(
                "example %d of %s (%s) cannot be read; the next readable one stands in for it",
                index,
                self._name,
                self._split,
            )
        if len(self._seen) > self._limit:
            raise ValueError(
                f"more than {self._limit} examples of {self._name!r} ({self._split}) cannot be "
                f"read, such as number {min(self._seen)}: prepare the data set again, or allow "
                "more with --max-corrupt"
            )
        return batch

    @property
    def indices(self) -> tuple[int, ...]:
        """Examples that could not be read so far."""
        return tuple(sorted(self._seen))


class Stream(Iterator[Batch]):
    """Batches of the numbers start … stop - 1, in order, decoded ahead by grain.

    A batch is decoded in parts by threads or, with `workers`, by so many processes. One batch is
    complete or in the making ahead of the one that was given, and with workers another one.

    Args:
      reader: prepared.
      places: gives the positions and indices of a batch, by its number.
      rows: examples in a batch.
      start: number of the first.
      stop: number after the last.
      workers: processes.
    """

    def __init__(
        self, reader: Reader, places: Places, rows: int, start: int, stop: int, workers: int = 0
    ) -> None:
        import grain

        self._parts = 1 if reader.memory is not None else min(rows, workers or _THREADS)

        def part(number: int) -> Batch:
            batch, index = divmod(number, parts)
            mine = np.array_split(np.arange(rows), parts)[index]
            positions, indices = places(batch)
            return reader.batch(positions[mine], indices[mine])

        parts = self._parts
        numbers = grain.MapDataset.range(start * parts, stop * parts).map(part)
        if reader.memory is not None:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        elif workers:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        else:
            options = grain.ReadOptions(num_threads=parts, prefetch_buffer_size=parts)
        dataset = numbers.to_iter_dataset(options)
        if workers and reader.memory is None:
            _parse_flags()
            # Through pipes, not shared memory: containers have little of it, blocks in flight at
            # the end would leak, and it would save the parent 25 microseconds an image.
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=1 << 60)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=parts, per_worker_buffer_size=1),
                worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            )
        with _signals_held():
            self._iterator = iter(dataset)
        self._started = False

    def __next__(self) -> Batch:
        # The first call starts the workers.
        with contextlib.nullcontext() if self._started else _signals_held():
            made = [next(self._iterator) for _ in range(self._parts)]
        self._started = True
        if len(made) == 1:
            return made[0]
        return {name: np.concatenate([part[name] for part in made]) for name in made[0]}

    def close(self) -> None:
        """End its threads and processes."""
        self._iterator.close()


def _parse_flags() -> None:
    """Grain asks flags that only a program of absl's would have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started meanwhile keep signals waiting, until `_begin_worker` ignores them.

    Otherwise Ctrl-C would end a worker that is still importing its modules.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent: int, index: int, count: int) -> None:
    """What a worker does first: leave signals to its parent, and end when that is gone.

    Ctrl-C and many schedulers signal every process of a job, and the run ends in good order.
    """
    del index, count
    for number in _LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_PARENT)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the parent's
    _parse_flags()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="flaxres-orphan").start()
