"""What a run tells: its result, what happens while it goes, and why it had to stop."""

import dataclasses
from typing import Any

from flaxres.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run, or an evaluation, came to."""

    step: int
    loss: float
    """Mean cross-entropy of the held-out split; NaN where the run was stopped before its end."""
    accuracy: float
    """Share of the held-out split classified right; NaN likewise."""
    examples: int
    """Examples evaluated."""
    images_per_second: float
    """While training, after the first step; of an evaluation, while evaluating."""
    time_to_first_step: float | None
    """Seconds from the start of the process; None where no step was taken."""
    params_sha256: str
    workdir: str
    resumed_from: int | None = None
    """The step that the run went on from."""
    stopped_by: str | None = None
    """SIGTERM or SIGINT, where one ended the run early."""
    skipped: int = 0
    """Updates left out because they were not finite."""
    corrupt: int = 0
    """Training examples that could not be read and had others in their place, since the start of
    the process."""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of the time after the first step: step, data, eval and save."""


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite, and the run is to stop at that."""


class Listener:
    """What a run tells while it goes; all methods may be left out."""

    def on_start(self, config: TrainConfig, total: int, driver: Any, step: int) -> None:
        """The run begins at `step` of `total`, with this `drivers.Driver`."""

    def on_compile(self) -> None:
        """The first step is being compiled."""

    def on_step(self, step: int, metrics: dict[str, float], images_per_second: float) -> None:
        """Steps up to `step` are done; metrics are those of the last."""

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint is being written."""

    def on_stopping(self, signal: str) -> None:
        """SIGTERM or SIGINT came: the run ends after this step. Called from a signal handler."""

    def on_done(self, result: Result) -> None:
        """The run is over."""
