"""Stopping well: SIGTERM and Ctrl-C finish the step; a second Ctrl-C stops at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from flaxres.train import distributed


class StopRequest:
    """Whether, and by what, the run has been asked to stop."""

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self.signal: str | None = None
        """What this process was asked by: SIGTERM, SIGINT or None."""
        self._notify = notify

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler. A second Ctrl-C raises KeyboardInterrupt; a third kills."""
        name = signal.Signals(number).name
        if name == "SIGINT" and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = name
        if name == "SIGINT" and jax.process_count() > 1:
            # JAX's preemption service, which listens for SIGTERM, finds a step that all can reach.
            signal.raise_signal(signal.SIGTERM)
        if self._notify is not None:
            self._notify(name)

    def now(self) -> str | None:
        """The signal to stop by at once, where no other process has to agree."""
        return self.signal if jax.process_count() == 1 else None

    def agreed(self, step: int) -> str | None:
        """The signal to stop by after this step, the same on all processes, or None.

        To be called after every step. A request reaches processes at different steps: JAX's
        service settles on one that none has passed.
        """
        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        return "SIGINT" if "SIGINT" in distributed.gather(self.signal) else "SIGTERM"


@contextlib.contextmanager
def stop_requests(notify: Callable[[str], None] | None = None) -> Iterator[StopRequest]:
    """Collect signals for the duration of a run. Outside the main thread nothing is caught.

    To be entered after `distributed.initialize`: a Python handler for SIGTERM, set after JAX has
    joined its processes, would take the place of JAX's own, so several processes leave it alone.
    """
    request = StopRequest(notify)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT]
    if jax.process_count() == 1:
        numbers.append(signal.SIGTERM)
    previous = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
