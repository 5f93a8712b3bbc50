"""Where the time goes: shares of waiting, stepping and saving; profiler traces."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds by activity, for one process."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

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
        """Share of the time since the start that each activity took; the rest is `step`."""
        whole = max(time.perf_counter() - self._began, 1e-9)
        shares = {name: seconds / whole for name, seconds in self._seconds.items()}
        return {**shares, "step": max(0.0, 1 - sum(shares.values()))}


class Tracer:
    """Writes a trace of steps FROM to TO that TensorBoard and Perfetto open."""

    def __init__(self, steps: tuple[int, int] | None, directory: pathlib.Path) -> None:
        self._steps = steps
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        """To be called before the step of this number (from 0)."""
        import jax

        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, values: object) -> None:
        """To be called after it, with what it gave."""
        import jax

        if self._running and self._steps and step + 1 >= self._steps[1]:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """End a trace that is still running."""
        import jax

        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def seconds_since_start() -> float:
    """Seconds since this process began, where the system tells; else since this module loaded."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _LOADED


_LOADED = time.perf_counter()
