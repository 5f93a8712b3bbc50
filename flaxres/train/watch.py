"""Noticing that another process of a run has died, hangs or has failed, and saying so.

Every process writes a beat into the key-value store of JAX's coordination service. Process 0
judges the beats and writes down who is lost; the others read that, and judge process 0 by whether
the store answers. JAX would end a run with a lost process by itself, but with a stack trace, and
it would not notice one that hangs while its heart goes on beating.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# A process whose beats stay out this long is lost. JAX's own limit is 15 s.
_SILENT_SECONDS = 6.5
# Processes start to beat at different times; one that dies before is JAX's to notice.
_START_SECONDS = 60.0
# Time for the main thread to end by itself once it is known that the run is lost.
_GRACE_SECONDS = 1.5


@dataclasses.dataclass
class _Peer:
    """What process 0 knows of a process."""

    beat: int = -1
    heard: float = 0.0
    state: str = "busy"
    step: int = -1
    pace: float = 0.0
    moved: float = 0.0
    """When its step last changed."""


class Watch:
    """The watch of one process over the others, in two threads.

    Args:
      client: of JAX's coordination service.
      process: number of this process.
      count: how many there are.
      run: a number that the processes agree on, new for every run.
      hanging: seconds without a step, while others wait for it, after which a process counts as
        hanging; never less than ten steps take. 0 turns that off. Default FLAXRES_HANG_SECONDS, 9.
    """

    def __init__(
        self, client: Any, process: int, count: int, run: int, hanging: float | None = None
    ) -> None:
        self._client = client
        self._process = process
        self._beats = f"flaxres/{run}/beat/"
        self._lost = f"flaxres/{run}/lost/"
        # A pod of thousands shall not drown its coordinator.
        self._period = max(0.5, count / 500)
        if hanging is None:
            hanging = float(os.environ.get("FLAXRES_HANG_SECONDS", "9"))
        self._hanging = hanging
        self._stop = threading.Event()
        self._known = threading.Event()
        self._reason: str | None = None
        self._count = 0
        self._step, self._pace, self._stepped = -1, 0.0, time.monotonic()
        self._busy = 1
        now = time.monotonic()
        self._peers = {n: _Peer(heard=now + _START_SECONDS, moved=now) for n in range(count)}
        self._judged = self._answered = now
        targets = (self._beating, self._listening)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def stepped(self, step: int) -> None:
        """Tell the others that this process is about to take this step."""
        now = time.monotonic()
        if self._step < 0:
            self._busy = 0  # until now it compiled
        else:
            self._pace = max(now - self._stepped, 0.9 * self._pace)
        self._step, self._stepped = step, now

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While in the body, such as saving, do not take the lack of steps for hanging."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._stepped = time.monotonic()

    def announce(self, reason: str) -> None:
        """Tell the others why this process cannot go on."""
        with contextlib.suppress(Exception):  # the coordinator itself may be gone
            self._client.key_value_set(f"{self._lost}{self._process}", reason)

    def reason(self, seconds: float) -> str | None:
        """Why the run is lost; waits so long for it to be known."""
        self._known.wait(seconds)
        return self._reason

    def close(self, done: bool) -> None:
        """End the watch; `done` tells the others that this process has finished its work."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._period + 1)
        if done:
            with contextlib.suppress(Exception):
                self._send("done")

    def _send(self, state: str) -> None:
        self._count += 1
        beat = json.dumps([self._count, state, self._step, self._pace])
        self._client.key_value_set(f"{self._beats}{self._process}", beat, allow_overwrite=True)

    def _beating(self) -> None:
        """Beat, judge (on process 0), and read what has been judged."""
        while not self._stop.wait(self._period):
            try:
                self._send("busy" if self._busy else "run")
                if self._process == 0:
                    self._judge(self._client.key_value_dir_get(self._beats))
                lost = self._client.key_value_dir_get(self._lost)
            except Exception:  # no answer: `_listening` counts how long
                continue
            self._answered = time.monotonic()
            if lost:
                self._end(lost[0][1])
                return

    def _listening(self) -> None:
        """Notice that process 0, which holds the store, does not answer."""
        last = time.monotonic()
        while not self._stop.wait(self._period):
            now = time.monotonic()
            if now - last > _SILENT_SECONDS / 2:  # it was this process that stood still
                self._answered = now
            last = now
            if now - self._answered > _SILENT_SECONDS + self._period:
                self._end(f"process 0, which coordinates the run, {_silent(now - self._answered)}")
                return

    def _judge(self, beats: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        stood_still = now - self._judged > _SILENT_SECONDS / 2
        self._judged = now
        for key, value in beats:
            peer = self._peers[int(key.rpartition("/")[2])]
            beat, state, step, pace = json.loads(value)
            if beat != peer.beat or stood_still:
                peer.heard = now
            if step != peer.step or state != "run" or stood_still:
                peer.moved = now
            peer.beat, peer.state, peer.step, peer.pace = beat, state, step, pace
        furthest = max(peer.step for peer in self._peers.values())
        for number, peer in self._peers.items():
            if peer.state == "done":
                continue
            name = f"process {number} of {len(self._peers)}"
            if now - peer.heard > _SILENT_SECONDS:
                self.announce(f"{name} {_silent(now - peer.heard)}")
            patience = max(self._hanging, 10 * peer.pace)
            if self._hanging and peer.step < furthest and now - peer.moved > patience:
                self.announce(
                    f"{name} hangs: it has taken no step for {now - peer.moved:.0f} s "
                    f"after step {peer.step + 1}, while others wait for it"
                )

    def _end(self, reason: str) -> None:
        """Give the main thread time to say it; it may be waiting for the lost process for ever."""
        self._reason = reason
        self._known.set()
        if self._stop.wait(_GRACE_SECONDS):
            return
        if self._process == 0:  # with it goes the store, from which the others learn the reason
            time.sleep(2 * self._period)
        sys.stdout.flush()
        print(
            f"flaxres: {reason}; started again, the run goes on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _silent(seconds: float) -> str:
    return f"has not been heard of for {seconds:.0f} s: it died or hangs"
