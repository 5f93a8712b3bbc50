"""The work directory: what lies where, who it belongs to, files that are whole or not there."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Self

from flaxres.train.config import TrainConfig

_SCRATCH = ".partial-"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
    """Paths of a run: config.json, metrics.jsonl, events, checkpoints/, figures/, report.html."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events"
        self.figures = self.path / "figures"
        self.curves = self.figures / "curves.png"
        self.report = self.path / "report.html"
        self.trace = self.path / "trace"
        self.nonfinite = self.path / "nonfinite"
        self.damaged = self.path / "damaged"
        self.log = self.path / "log.txt"
        self._lock = self.path / ".lock"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> Self:
        """The work directory of an earlier run, or ValueError."""
        work = cls(path)
        if not work.config_file.is_file():
            raise ValueError(
                f"{str(path)!r} is not a work directory: it has no config.json; "
                "`flaxres train --workdir DIR` makes one"
            )
        return work

    def config(self) -> TrainConfig:
        """The configuration of the run that lies here."""
        try:
            stored = json.loads(self.config_file.read_text())
            return TrainConfig.from_json(stored["config"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.config_file} is no configuration: {error}") from None

    def origin(self) -> dict[str, Any]:
        """What the run was begun with: time, command, versions, commit."""
        stored = json.loads(self.config_file.read_text())
        command = " ".join(map(str, stored.get("command", [])))
        return {
            "command": command,
            "started": stored.get("started"),
            "commit": stored.get("git"),
            **stored.get("versions", {}),
        }

    def claim(self, config: TrainConfig) -> bool:
        """Write the configuration, or compare it with the one that is there.

        Returns whether a run was here already. Raises ValueError if it is another run's
        directory, naming the fields that differ. Call it while `locked`, or two runs that start
        together may both find nothing here.
        """
        if self.config_file.is_file():
            if differing := self.config().diff(config):
                raise ValueError(
                    f"{str(self.path)!r} holds a run of another configuration "
                    f"({'; '.join(differing)}): use another --workdir or the same configuration"
                )
            return True
        about = {
            "config": config.to_json(),
            "seed": config.seed,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "versions": versions(),
            "git": _git_commit(),
        }
        write_text(self.config_file, json.dumps(about, indent=2) + "\n")
        return False

    def _open_lock(self) -> IO[str]:
        """The lock in the directory, which is made; ValueError if that is no place for a run."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"{str(self.path)!r} is a file: --workdir needs a directory")
            self.path.mkdir(parents=True, exist_ok=True)
            files = list(self.path.iterdir())
            if self.config_file.is_file() or all(_is_ours(file) for file in files):
                return open(self._lock, "a+")
        except OSError as error:
            raise ValueError(
                f"{str(self.path)!r} cannot be written to ({error.strerror or error}): use another "
                "--workdir"
            ) from None
        raise ValueError(
            f"{str(self.path)!r} is not empty and not a work directory: use another --workdir"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one run; the system lets go of it however the process ends.

        Raises ValueError if a run holds it already, somebody else's files are there, or it cannot
        be written to.
        """
        with self._open_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{str(self.path)!r} is being trained in by {file.read().strip() or 'a run'}: "
                    "wait for it, or use another --workdir"
                ) from None
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what a kill left of files that were being written."""
        for folder in (self.path, self.figures, self.nonfinite):
            for file in folder.glob(f".*{_SCRATCH}*"):
                file.unlink(missing_ok=True)


def default_workdir(config: TrainConfig) -> str:
    """runs/MODEL-DATA of the current folder, with the seed where it is not 0."""
    suffix = f"-seed{config.seed}" if config.seed else ""
    return str(pathlib.Path("runs") / f"{config.model}-{config.data}{suffix}")


def _is_ours(file: pathlib.Path) -> bool:
    """Whether it is what a run that was killed in its first moments leaves."""
    return file.name == ".lock" or (file.name.startswith(".") and _SCRATCH in file.name)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it computes with."""
    found = {"python": sys.version.split()[0]}
    for package in ("flaxres", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git_commit() -> str | None:
    """Commit of the code in use, with + where it has changes; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        run = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A scratch file beside `path` that takes its name if the body succeeds, else goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name}{_SCRATCH}", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    scratch = pathlib.Path(name)
    try:
        yield scratch
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as scratch:
        scratch.write_text(text)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
