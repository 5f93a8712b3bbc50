"""One run in one process, over two devices and in two processes: how far apart the losses are.

    python tests/same_run.py --data fashion_mnist --data-dir DIR --steps 50

Every form goes through the command line, in float32, with the recipe of its data set and the rate
of its warm-up. Branches start as the identity (zero_gamma): from the default start the last bit of
every weight alone, on one device, moves the losses of 50 steps by 2e-3 (resnet8 on fashion_mnist,
batch 64), as much as the order of sums over devices does, so that no bound could be held there.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

FORMS = {
    "one device": (1, 1, ["--driver=device"]),
    "pmap on two devices": (1, 2, ["--driver=pmap"]),
    "mesh of two devices": (1, 2, ["--driver=mesh"]),
    "two processes": (2, 1, []),
}
"""name -> processes, simulated devices in each, flags."""


def train(folder: pathlib.Path, form: str, options: list[str]) -> dict:
    """Train in this form; what `--json` gives, with "losses", one a step."""
    count, devices, flags = FORMS[form]
    work = folder / form.replace(" ", "-")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "MPLBACKEND": "Agg",
    }
    command = [sys.executable, "-m", "flaxres.cli.main", "train", "--json", f"--workdir={work}"]
    processes = []
    for number in range(count):
        joined = [f"--coordinator={address}", f"--num-processes={count}", f"--process-id={number}"]
        processes.append(
            subprocess.Popen(
                [*command, *options, *flags, *(joined if count > 1 else [])],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{form}: {' | '.join(error[-1000:] for _, error in said)}")
    for output, error in said[1:]:
        if printed := [line for line in (output + error).splitlines() if "[Gloo]" not in line]:
            raise RuntimeError(f"{form}: another process than the first printed {printed}")
    lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return {**json.loads(said[0][0].splitlines()[-1]), "losses": losses}


def differences(results: dict[str, dict]) -> dict[str, float]:
    """The largest distance of any step's loss from that on one device, by form."""
    reference = results["one device"]["losses"]
    return {
        form: max(abs(a - b) for a, b in zip(reference, result["losses"], strict=True))
        for form, result in results.items()
        if form != "one device"
    }


def main(argv: list[str] | None = None) -> int:
    """Run it all; 0 if every loss of every form is within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20_cifar")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02, help="after so many steps of warm-up")
    parser.add_argument("--residual-init", default="zero_gamma")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS)[1:], default=list(FORMS)[1:])
    parser.add_argument("--tolerance", type=float, default=1e-4)
    chosen = parser.parse_args(argv)
    options = [
        f"--model={chosen.model}",
        f"--data={chosen.data}",
        f"--steps={chosen.steps}",
        f"--batch-size={chosen.batch_size}",
        f"--lr={chosen.lr}",
        f"--warmup-steps={chosen.steps - 1}",
        "--warmup-epochs=0",
        f"--residual-init={chosen.residual_init}",
        "--eval-batch-size=360" if chosen.data == "digits" else "--eval-batch-size=1000",
    ]
    if chosen.data_dir:
        options.append(f"--data-dir={chosen.data_dir}")
    results = {}
    with tempfile.TemporaryDirectory(prefix="same-run-") as scratch:
        for form in ["one device", *chosen.forms]:
            results[form] = train(pathlib.Path(scratch), form, options)
            found = results[form]
            print(
                f"{form}: loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}, accuracy "
                f"{found['accuracy']:.2%} over {found['examples']} test examples",
                flush=True,
            )
    apart = differences(results)
    for form, distance in apart.items():
        print(f"{form}: losses of {chosen.steps} steps within {distance:.1e} of one device")
    return 0 if max(apart.values()) <= chosen.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
