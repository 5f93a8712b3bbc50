"""Runs killed by SIGKILL at random moments and started again until they are done.

    python tests/chaos.py --runs 30

Every run goes through the command line, in one or two processes, and is killed one to three times:
while it starts, while it trains, or while a checkpoint is being written; of two processes, one or
both are killed. A run has survived if it reaches, bit for bit, the parameters of one never killed,
if metrics.jsonl holds every step once, and if a process left alone ends by itself within 15 s.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

SAVE_EVERY = 4
MOMENTS = ("starting", "training", "saving")
PEER_SECONDS = 15.0
_COMMAND = (sys.executable, "-m", "flaxres.cli.main", "train")
_OPTIONS = (
    "--model=resnet8_cifar --batch-size=16 --lr=0.01 --ema=0.9 --log-every=20 --keep=2 --json "
    f"--eval-batch-size=360 --warmup-steps=0 --checkpoint-every={SAVE_EVERY}"
).split()


@dataclasses.dataclass
class Reference:
    """A run that nobody killed."""

    steps: int
    eval_every: int
    sha256: str
    losses: list[float]
    starting: float
    """Seconds from its start to its first step."""
    training: float
    """Seconds from there to its end."""

    @property
    def evaluated(self) -> list[int]:
        """Steps with an evaluation; the last is always one."""
        every = list(range(self.eval_every, self.steps + 1, self.eval_every))
        return every if every[-1] == self.steps else [*every, self.steps]


@dataclasses.dataclass
class Outcome:
    """What became of a run that was killed."""

    processes: int
    kills: list[str]
    halves: int
    """Half-written checkpoints that the kills left."""
    resumed_from: int | None
    faults: list[str]
    bitwise: bool
    metrics_whole: bool


class Attempt:
    """One start of a run: its processes, and what they print."""

    def __init__(self, work: pathlib.Path, count: int, steps: int, eval_every: int) -> None:
        self.work = work
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        length = [f"--steps={steps}", f"--eval-every={eval_every}"]
        joined = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "MPLBACKEND": "Agg",
        }
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(work.parent / "compiled"))
        self.outputs, self.processes = [], []
        for number in range(count):
            own = [*joined, f"--process-id={number}"] if count > 1 else []
            output = work.parent / f"{work.name}-{time.monotonic_ns()}.txt"
            with output.open("w") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [*_COMMAND, *_OPTIONS, *length, f"--workdir={work}", *own],
                        env=env,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
            self.outputs.append(output)
        self.began = time.monotonic()
        self._old = self._lines()

    def _lines(self) -> tuple[int, ...]:
        file = self.work / "metrics.jsonl"
        return (file.stat().st_size, file.stat().st_ino) if file.exists() else ()

    def stepped(self) -> bool:
        """Whether it has written its first step."""
        return self._lines() not in (self._old, ()) and self._lines()[0] > 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.halves())

    def halves(self) -> list[pathlib.Path]:
        """Half-written checkpoints."""
        return list((self.work / "checkpoints").glob("*orbax-checkpoint-tmp*"))

    def running(self) -> bool:
        """Whether any process has not ended."""
        return any(process.poll() is None for process in self.processes)

    def until(self, condition) -> bool:
        """Wait for it to be true; False if the processes end first."""
        while not condition():
            if not self.running():
                return False
            time.sleep(0.002)
        return True

    def kill(self, numbers) -> bool:
        """SIGKILL to some; whether one was still there to be killed."""
        alive = [n for n in numbers if self.processes[n].poll() is None]
        for number in alive:
            self.processes[number].send_signal(signal.SIGKILL)
        return bool(alive)

    def end(self, seconds: float) -> list[int | None]:
        """Exit codes; None for those that would not end in time, which are then killed."""
        deadline = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        return codes

    def said(self) -> str:
        """The last lines of every process."""
        return " | ".join(" / ".join(o.read_text().splitlines()[-3:]) for o in self.outputs)

    def result(self) -> dict:
        """The JSON object that process 0 ended with."""
        return json.loads(self.outputs[0].read_text().splitlines()[-1])


def lines(work: pathlib.Path, split: str) -> list[dict]:
    """Lines of metrics.jsonl, all of which must be whole."""
    text = (work / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def reference(folder: pathlib.Path, count: int, steps: int) -> Reference:
    """Train once without a kill."""
    eval_every = max(1, steps // 3)
    attempt = Attempt(folder / f"reference-{count}", count, steps, eval_every)
    attempt.until(attempt.stepped)
    first = time.monotonic()
    if any(attempt.end(600)):
        raise SystemExit(f"the run that nobody killed failed: {attempt.said()}")
    losses = [line["loss"] for line in lines(attempt.work, "train")]
    spent = time.monotonic() - first
    sha256 = attempt.result()["params_sha256"]
    return Reference(steps, eval_every, sha256, losses, first - attempt.began, spent)


def planned(dice: random.Random) -> list[str]:
    """One to three moments to kill a run at."""
    return dice.choices(MOMENTS, weights=(1, 2, 3), k=dice.randint(1, 3))


def survive(
    folder: pathlib.Path, number: int, count: int, plain: Reference, dice: random.Random
) -> Outcome:
    """Kill a run one to three times, start it again until it is done, and judge it."""
    work = folder / f"run-{number}"
    outcome = Outcome(count, [], 0, None, [], False, False)
    for moment in [*planned(dice), None]:
        attempt = Attempt(work, count, plain.steps, plain.eval_every)
        if moment is not None and _kill_at(attempt, moment, plain, dice, outcome):
            continue
        codes = attempt.end(600)
        if any(codes):
            outcome.faults.append(f"ended with {codes}: {attempt.said()}")
            return outcome
    result = attempt.result()
    outcome.resumed_from = result["resumed_from"]
    outcome.bitwise = result["params_sha256"] == plain.sha256
    train, evaluations = lines(work, "train"), lines(work, "eval")
    outcome.metrics_whole = (
        [line["step"] for line in train] == list(range(1, plain.steps + 1))
        and [line["step"] for line in evaluations] == plain.evaluated
        and [line["loss"] for line in train] == plain.losses
    )
    return outcome


def _kill_at(
    attempt: Attempt, moment: str, plain: Reference, dice: random.Random, outcome: Outcome
) -> bool:
    """Kill at such a moment; False if the run was done before."""
    count = len(attempt.processes)
    victims = dice.sample(range(count), dice.randint(1, count))
    if moment == "starting":
        time.sleep(dice.uniform(0, plain.starting))
    else:
        if not attempt.until(attempt.stepped):
            return False
        if moment == "training":
            time.sleep(dice.uniform(0, plain.training / 2))
        else:
            time.sleep(dice.uniform(0, plain.training / 3))
            if not attempt.until(attempt.saving):
                return False
            time.sleep(dice.uniform(0, 0.03))
    if not attempt.kill(victims):
        return False
    # While they are still meeting, it is not a peer that died but one that has not come.
    met = moment != "starting"
    codes = attempt.end(PEER_SECONDS if met else 120.0)
    outcome.kills.append(moment)
    outcome.halves += len(attempt.halves())
    for process, code in enumerate(codes):
        if process not in victims and code in (0, None):
            outcome.faults.append(
                f"process {process} ended with {code} after {victims} were killed {moment}: "
                f"{attempt.said()}"
            )
    return True


def main(argv: list[str] | None = None) -> int:
    """Run it all; 0 if every run survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="taken in turn")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = pathlib.Path(scratch)
        plain = {n: reference(folder, n, arguments.steps) for n in arguments.processes}
        for number in range(arguments.runs):
            count = arguments.processes[number % len(arguments.processes)]
            dice = random.Random(f"{arguments.seed}-{number}")
            outcome = survive(folder, number, count, plain[count], dice)
            outcomes.append(outcome)
            print(
                f"run {number + 1:2}: {count} process{'es' if count > 1 else ''}, killed "
                f"{', '.join(outcome.kills) or 'never'}; went on from {outcome.resumed_from}; "
                f"{'bitwise equal' if outcome.bitwise else 'DIFFERENT'}, metrics "
                f"{'whole' if outcome.metrics_whole else 'NOT WHOLE'}",
                *outcome.faults,
                sep="\n  ",
                flush=True,
            )
    bitwise = sum(outcome.bitwise for outcome in outcomes)
    whole = sum(outcome.metrics_whole for outcome in outcomes)
    quiet = sum(not outcome.faults for outcome in outcomes)
    kills = collections.Counter(kill for outcome in outcomes for kill in outcome.kills)
    print(
        f"{bitwise} of {len(outcomes)} reached bitwise the parameters of a run never killed; "
        f"metrics.jsonl has every step once in {whole} of {len(outcomes)}; "
        f"{quiet} of {len(outcomes)} without another fault\n"
        f"{sum(kills.values())} kills ({', '.join(f'{n} {kill}' for kill, n in kills.items())}), "
        f"which left {sum(outcome.halves for outcome in outcomes)} half-written checkpoints; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0 if bitwise == whole == quiet == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
