"""Stopping well: SIGTERM and Ctrl-C finish the step; a second Ctrl-C stops at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np


class StopRequest:
    """Whether, and by what, the run has been asked to stop."""

    def __init__(self) -> None:
        self._signal: str | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def agreed(self, step: int, every: int) -> str | None:
        """The signal to stop by after this step, the same on all processes, or None.

        A preemption reaches processes at different steps; JAX's own service settles one for all
        (it holds the SIGTERM handler there). Ctrl-C is settled every so many steps.
        """
        if jax.process_count() == 1:
            return self._signal
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return "SIGTERM"
        if step % every:
            return None
        interrupted = multihost_utils.process_allgather(np.array(self._signal == "SIGINT"))
        return "SIGINT" if np.any(interrupted) else None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect signals for the duration of a run. Outside the main thread nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT]
    if jax.process_count() == 1:
        # With several processes a Python handler would take the place of JAX's own.
        numbers.append(signal.SIGTERM)
    previous = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
