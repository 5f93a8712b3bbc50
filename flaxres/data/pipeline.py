"""Batches: deterministic, resumable, sharded by process; read by grain.

The global batch of step s is a pure function of (seed, s, batch size). Process p of n takes its
contiguous rows of it, so a run may go on with another number of processes. Small sets are decoded
once into memory; the batches are the same.
"""

import collections
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from flaxres.data import images, sources
from flaxres.data.sources import DataInfo

Batch = dict[str, np.ndarray]
_IN_MEMORY_BYTES = 1 << 30
_CORRUPT_LIMIT = 100
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Decodes examples by index; picklable, so that worker processes can have it."""

    info: DataInfo
    split: str
    data_dir: str | None
    image_size: int | None
    random_crop: bool
    seed: int
    memory: tuple[np.ndarray, np.ndarray] | None = None

    def batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """Examples at `indices`; `positions` are their places in the whole order, for crops."""
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
        for shift in range(len(source)):
            try:
                record = source[(index + shift) % len(source)]
                pixels = self._fit(record[self.info.image_key], position)
                return pixels, int(record[self.info.label_key]), corrupt
            except Exception as error:  # decoders raise whatever they like
                _log.debug("example %d of %s: %s", index, self.split, error)
                corrupt = index if corrupt < 0 else corrupt
        raise ValueError(f"no example of {self.info.name!r}, split {self.split!r}, can be read")

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


def _reader(
    info: DataInfo, split: str, data_dir: str | None, image_size: int | None, crop: bool, seed: int
) -> _Reader:
    if split not in info.splits:
        raise ValueError(
            f"data set {info.name!r} has no split {split!r} (found: {', '.join(info.splits)})"
        )
    crop = crop and None in info.image_shape
    reader = _Reader(info, split, data_dir, image_size, crop, seed)
    height, width, channels = info.image_shape
    if height is None or width is None:
        return reader
    side = (image_size or height) * (image_size or width)
    count = info.splits[split]
    if count * side * channels > _IN_MEMORY_BYTES:
        return reader
    everything = np.arange(count)
    decoded = reader.batch(everything, everything)
    _report(decoded["corrupt"], collections.Counter(), info, split)
    return dataclasses.replace(reader, memory=(decoded["image"], decoded["label"]))


def _report(corrupt: np.ndarray, seen: collections.Counter, info: DataInfo, split: str) -> None:
    """Name examples that could not be read, each once; stop when there are too many."""
    for index in sorted({int(i) for i in corrupt if i >= 0} - set(seen)):
        seen[index] += 1
        _log.warning(
            "example %d of %s (%s) cannot be read; the next readable one stands in for it",
            index,
            info.name,
            split,
        )
    if len(seen) > _CORRUPT_LIMIT:
        raise ValueError(
            f"more than {_CORRUPT_LIMIT} examples of {info.name!r} ({split}) cannot be read, "
            f"such as number {min(seen)}: prepare the data set again"
        )


class TrainIterator(Iterator[Batch]):
    """Endless batches of this process's rows; its whole state is the step."""

    def __init__(
        self,
        reader: _Reader,
        make: Callable[[int], Iterator[Batch]],
        step: int,
    ) -> None:
        self._reader = reader
        self._make = make
        self._corrupt: collections.Counter = collections.Counter()
        self.set_state({"step": step})

    def __next__(self) -> Batch:
        batch = next(self._batches)
        _report(batch.pop("corrupt"), self._corrupt, self._reader.info, self._reader.split)
        self._step += 1
        return batch

    @property
    def corrupt(self) -> tuple[int, ...]:
        """Indices of the examples that could not be read so far."""
        return tuple(sorted(self._corrupt))

    def get_state(self) -> dict[str, int]:
        """The step whose batch comes next."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a state that `get_state` gave."""
        self._step = int(state["step"])
        self._batches = self._make(self._step)


def train_iterator(
    info: DataInfo,
    *,
    batch_size: int,
    seed: int,
    data_dir: str | None = None,
    image_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    start_step: int = 0,
    split: str = "train",
) -> TrainIterator:
    """Shuffled training batches for one process.

    Every epoch is another permutation, drawn from the seed; batches run on over its end, so each
    example comes exactly once an epoch. Sets with images of differing sizes get a random resized
    crop of `image_size` (224 by default) on the host.

    Args:
      info: from `sources.describe`.
      batch_size: of all processes together.
      seed: of order and crops.
      data_dir: TFDS directory.
      image_size: side to resize to; default the data's own.
      process_index: which rows of each batch to give.
      process_count: how many processes share a batch.
      workers: processes that decode; 0 decodes in threads of this one.
      start_step: the first batch to give.
      split: TFDS split.

    Returns:
      An iterator of {"image": uint8 `[local_batch, h, w, c]`, "label": int32 `[local_batch]`}.
    """
    import grain

    local = local_size(batch_size, process_count)
    reader = _reader(info, split, data_dir, image_size, crop=True, seed=seed)
    order = grain.MapDataset.range(info.splits[split]).seed(seed).shuffle().repeat()
    first = process_index * local

    def rows(batch: int) -> Batch:
        positions = batch * batch_size + first + np.arange(local)
        return reader.batch(positions, np.array([order[int(p)] for p in positions]))

    def make(step: int) -> Iterator[Batch]:
        # A range of batch numbers, long enough for any run, from the one to go on with.
        numbers = grain.MapDataset.range(step, 1 << 40).map(rows)
        threads = 0 if reader.memory is not None else 8
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * bool(threads))
        batches = numbers.to_iter_dataset(options)
        if workers and reader.memory is None:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(batches)

    return TrainIterator(reader, make, start_step)


def eval_batches(
    info: DataInfo,
    split: str,
    *,
    batch_size: int,
    data_dir: str | None = None,
    image_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example of a split exactly once, in order, in batches of one size.

    The last batch is filled up with examples of mask 0; every process gives the same number of
    batches.

    Returns:
      An iterator of {"image", "label", "mask": float32 `[local_batch]`}.
    """
    local = local_size(batch_size, process_count)
    reader = _reader(info, split, data_dir, image_size, crop=False, seed=0)
    count = info.splits[split]
    seen: collections.Counter = collections.Counter()
    for start in range(0, count, batch_size):
        positions = start + process_index * local + np.arange(local)
        batch = reader.batch(positions, np.minimum(positions, count - 1))
        _report(batch.pop("corrupt"), seen, info, split)
        yield {**batch, "mask": (positions < count).astype(np.float32)}


def local_size(batch_size: int, process_count: int) -> int:
    """Rows of a global batch that each process has; ValueError if it does not divide."""
    if batch_size < 1:
        raise ValueError(f"batch size must be positive, not {batch_size}")
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} does not divide over {process_count} processes; use "
            f"{batch_size // process_count * process_count or process_count}"
        )
    return batch_size // process_count


def prefetch(
    batches: Iterator[Batch], put: Callable[[Batch], Any], size: int = 2
) -> Generator[Any, None, None]:
    """Hand batches to the device in a thread, at most `size` ahead of the consumer.

    An error of the source is raised to the consumer at its place. Closing the generator stops the
    thread.
    """
    # One batch waits in the thread's hand beside those in the queue.
    ahead: queue.Queue = queue.Queue(maxsize=max(1, size - 1))
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for batch in batches:
                if not offer((put(batch), None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))

    thread = threading.Thread(target=fill, daemon=True, name="flaxres-prefetch")
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
