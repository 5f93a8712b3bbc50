"""Batches: deterministic, resumable, sharded by process; read by grain.

The global batch of step s is a pure function of (seed, s, batch size). Process p of n takes its
contiguous rows of it, so a run may go on with another number of processes. Small sets are decoded
once into memory; the batches are the same.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from flaxres.data.decoding import MAX_CORRUPT, Batch, Faults, Reader, Stream, prepare
from flaxres.data.sources import DataInfo


class TrainIterator(Iterator[Batch]):
    """Endless batches of this process's rows; its whole state is the step."""

    def __init__(
        self, make: Callable[[int], Stream], faults: Faults, ahead: int, step: int
    ) -> None:
        self._make = make
        self._faults = faults
        self.ahead = ahead
        """Batches that it makes ready itself, ahead of the one asked for."""
        self._batches: Stream | None = None
        self.set_state({"step": step})

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._make(self._step)
        batch = self._faults.take_from(next(self._batches))
        self._step += 1
        return batch

    @property
    def corrupt(self) -> tuple[int, ...]:
        """Indices of the examples that could not be read so far."""
        return self._faults.indices

    def get_state(self) -> dict[str, int]:
        """The step whose batch comes next."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a state that `get_state` gave."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """End threads and processes that decode; the next batch would start them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


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
    max_corrupt: int = MAX_CORRUPT,
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
      max_corrupt: unreadable examples to put up with, each replaced by the next readable one;
        one more raises ValueError.
      start_step: the first batch to give.
      split: TFDS split.

    Returns:
      An iterator of {"image": uint8 `[local_batch, h, w, c]`, "label": int32 `[local_batch]`}.
    """
    import grain

    local = local_size(batch_size, process_count)
    faults = Faults(info, split, max_corrupt)
    reader = prepare(
        Reader(info, split, data_dir, image_size, True, seed, max_corrupt=max_corrupt), faults
    )
    order = grain.MapDataset.range(info.splits[split]).seed(seed).shuffle().repeat()
    first = process_index * local

    def places(batch: int) -> tuple[np.ndarray, np.ndarray]:
        positions = batch * batch_size + first + np.arange(local)
        return positions, np.array([order[int(p)] for p in positions])

    def make(step: int) -> Stream:
        # As many numbers as any run can want.
        return Stream(reader, places, local, step, 1 << 40, workers)

    return TrainIterator(make, faults, 0 if reader.memory is not None else 1, start_step)


def eval_batches(
    info: DataInfo,
    split: str,
    *,
    batch_size: int,
    data_dir: str | None = None,
    image_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    max_corrupt: int = MAX_CORRUPT,
) -> Generator[Batch, None, None]:
    """Every example of a split exactly once, in order, in batches of one size.

    The last batch is filled up with examples of mask 0; every process gives the same number of
    batches. Arguments as `train_iterator` has them.

    Returns:
      An iterator of {"image", "label", "mask": float32 `[local_batch]`}.
    """
    local = local_size(batch_size, process_count)
    faults = Faults(info, split, max_corrupt)
    reader = prepare(Reader(info, split, data_dir, image_size, max_corrupt=max_corrupt), faults)
    count = info.splits[split]

    def places(batch: int) -> tuple[np.ndarray, np.ndarray]:
        positions = batch * batch_size + process_index * local + np.arange(local)
        return positions, np.minimum(positions, count - 1)

    batches = Stream(reader, places, local, 0, -(-count // batch_size), workers)
    try:
        for number, batch in enumerate(batches):
            mask = (places(number)[0] < count).astype(np.float32)
            yield {**faults.take_from(batch), "mask": mask}
    finally:
        batches.close()


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
    """Hand batches to the device in a thread, never more than `size` ahead of the consumer.

    Those that the source makes ready itself (its `ahead`) count. An error of the source is raised
    to the consumer at its place. Closing the generator stops the thread and closes the source.
    """
    room = threading.Semaphore(max(1, size - getattr(batches, "ahead", 0)))
    ready: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def fill() -> None:
        try:
            while True:
                room.acquire()
                if stop.is_set():
                    return
                ready.put((put(next(batches)), None))
        except BaseException as error:  # StopIteration among them
            ready.put((None, error))

    thread = threading.Thread(target=fill, daemon=True, name="flaxres-prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        thread.join()
        if close := getattr(batches, "close", None):
            close()
