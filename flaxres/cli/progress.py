"""What a run shows while it goes: a bar on a terminal, plain lines in a pipe."""

import contextlib
import os
import sys
import time
from typing import Any

from flaxres.train.loop import Listener


def listener(json_output: bool) -> "Lines":
    """A bar where a person watches, lines elsewhere, nothing on processes other than the first."""
    stream = sys.stderr if json_output else sys.stdout
    return Bar(json_output) if stream.isatty() else Lines(stream)


def _silent() -> bool:
    from flaxres.train import distributed

    return not distributed.is_main()


def _opening(config: Any, total: int, driver: Any, step: int) -> str:
    devices = f"{driver.num_devices} {driver.devices[0].platform.upper()} device"
    plural = "s" if driver.num_devices > 1 else ""
    again = f", going on from step {step}" if step else ""
    return (
        f"{config.model} on {config.data}: {total} steps of {config.batch_size} on "
        f"{devices}{plural} ({driver.name}), in {config.workdir}{again}"
    )


class Lines(Listener):
    """One line an event."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._total = 0
        self._began = time.monotonic()

    def _say(self, text: str) -> None:
        if not _silent():
            print(text, file=self._stream, flush=True)

    def on_start(self, config: Any, total: int, driver: Any, step: int) -> None:
        """Say what begins."""
        self._total = total
        self._say(_opening(config, total, driver, step))

    def on_compile(self) -> None:
        """Say that compiling takes a while."""
        self._say("compiling the first step …")

    def on_step(self, step: int, metrics: dict[str, float], images_per_second: float) -> None:
        """Step, loss, accuracy, rate."""
        rate = f"  {images_per_second:.0f} images/s" if images_per_second else ""
        skipped = "  NOT FINITE, skipped" if metrics["nonfinite"] else ""
        self._say(
            f"step {step}/{self._total}  loss {metrics['loss']:.4f}  accuracy "
            f"{metrics['accuracy']:.2%}  lr {metrics['lr']:.4f}{rate}{skipped}"
        )

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Test accuracy."""
        self._say(
            f"step {step}/{self._total}  test accuracy {metrics['accuracy']:.2%}  test loss "
            f"{metrics['loss']:.4f}"
        )

    def on_stopping(self, signal: str) -> None:
        """Say that the signal has been heard; a print could be in the middle of another."""
        again = "; Ctrl-C again stops at once" if signal == "SIGINT" else ""
        if not _silent():
            with contextlib.suppress(OSError):  # nobody is there to read it
                os.write(2, f"\n{signal}: finishing this step and saving{again}\n".encode())

    def close(self) -> None:
        """To be called however the run ends."""

    def on_done(self, result: Any) -> None:
        """Shares of the time."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.shares.items())
        first = result.time_to_first_step
        opening = f"first step after {first:.1f} s; " if first is not None else ""
        self._say(f"{opening}{result.images_per_second:.0f} images/s; time: {shares}")


class Bar(Lines):
    """A progress bar with step, loss, accuracy, images/s and time left; other events as lines."""

    def __init__(self, json_output: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        super().__init__(None)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=json_output),
        )
        self._task: Any = None

    def _say(self, text: str) -> None:
        if not _silent():
            self._progress.console.print(text, highlight=False)

    def on_start(self, config: Any, total: int, driver: Any, step: int) -> None:
        """Say what begins, and open the bar."""
        super().on_start(config, total, driver, step)
        if not _silent():
            self._task = self._progress.add_task("starting", total=total, completed=step)
            self._progress.start()

    def on_compile(self) -> None:
        """Shown in the bar."""
        if self._task is not None:
            self._progress.update(self._task, description="compiling the first step …")

    def on_step(self, step: int, metrics: dict[str, float], images_per_second: float) -> None:
        """Shown in the bar."""
        if self._task is not None:
            rate = f"  {images_per_second:.0f} images/s" if images_per_second else ""
            description = f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.1%}{rate}"
            self._progress.update(self._task, completed=step, description=description)

    def close(self) -> None:
        """Take the bar off and show the cursor, which it hides."""
        self._progress.stop()

    def on_done(self, result: Any) -> None:
        """Close the bar."""
        self.close()
        super().on_done(result)
