"""Where the time goes: shares of waiting, stepping and saving; images a second; traces."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds by activity, for one process, since it was made or restarted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, such as compiling."""
        self._began = time.perf_counter()
        self._seconds = {"data": 0.0, "eval": 0.0, "save": 0.0}

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count the body's time under this name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._seconds[activity] = self._seconds.get(activity, 0.0) + spent

    def shares(self) -> dict[str, float]:
        """Share of the time that each activity took; what none of them took is `step`."""
        whole = max(time.perf_counter() - self._began, 1e-9)
        shares = {name: seconds / whole for name, seconds in self._seconds.items()}
        return {"step": max(0.0, 1 - sum(shares.values())), **shares}


class Meter:
    """Images a second over the time spent training; the first step, which compiles, is left out."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._pending = 0
        self._images = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """The clock runs from here: after the first step, an evaluation, a save."""
        self._since = time.perf_counter()
        self._pending = 0

    def add(self, images: int) -> None:
        """So many more images have been trained on."""
        if self._since is not None:
            self._pending += images

    def lap(self) -> float:
        """Images a second since the last lap, or since `begin`; 0 where nothing was counted."""
        now = time.perf_counter()
        if self._since is None or not self._pending:
            return 0.0
        images, seconds = self._pending, max(now - self._since, 1e-9)
        self._images += images
        self._seconds += seconds
        self._since, self._pending = now, 0
        return images / seconds

    def mean(self) -> float:
        """Images a second over all laps."""
        return self._images / self._seconds if self._seconds else 0.0


class Tracer:
    """Writes a trace of the steps from FROM up to, not including, TO; for TensorBoard, Perfetto.

    Steps count from 0; of a run that goes on, those that it still takes are traced.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: pathlib.Path) -> None:
        self._steps = steps
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        """To be called before the step of this number."""
        import jax

        if self._steps and not self._running and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, values: object) -> bool:
        """To be called after it, with what it gave; whether a trace was written."""
        import jax

        if not self._running or step + 1 < (self._steps or (0, 0))[1]:
            return False
        jax.block_until_ready(values)
        self.close()
        return True

    def close(self) -> None:
        """End a trace that is still running."""
        import jax

        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def seconds_since_start() -> float:
    """Seconds since this process began, where the system tells; else since this module loaded."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _LOADED


_LOADED = time.perf_counter()
