"""Sides measured in turn, and what their times say: medians, quartiles, ratios round by round.

Machines vary by a third from minute to minute, so only ratios of steps taken one after the other
mean anything.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# A side is warm after so many steps, or so many seconds.
_WARM_STEPS, _WARM_SECONDS = 3, 2.0


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one number."""
        low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step of each side: ours, theirs, ours, theirs, …, after warming up.

    Args:
      steps: by side; a call does one step and returns when it is done.
      rounds: how many rounds a side takes part in, from the first one on.
      clock: gives seconds.
    """
    for step in steps.values():
        start = clock()
        for _ in range(_WARM_STEPS):
            step()
            if clock() - start > _WARM_SECONDS:
                break
    times: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(max(rounds[side] for side in steps)):
        for side, step in steps.items():
            if number < rounds[side]:
                start = clock()
                step()
                times[side].append(clock() - start)
    return times


def speed(times: Mapping[str, Sequence[float]], side: str, other: str) -> Spread:
    """How many times as fast as the other a side is, over the rounds that both were in."""
    pairs = zip(times[side], times[other], strict=False)
    return Spread.of([theirs / ours for ours, theirs in pairs])
