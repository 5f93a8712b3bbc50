"""Can a trained net be made deeper without losing anything, and is it worth it?

Question  Chen 2015 (Net2Net, arXiv 1511.05641) and Gong 2019 grow trained nets; a block that starts
          at zero leaves the function untouched. Does training go on from there, and how does the
          grown net compare with one that was deep from the start?
Command   python -m experiments.deepen [--quick] [--seeds 3]
Time      about two minutes on two CPU cores; --quick half a minute.
Came out  8 layers deepened to 26: logits the same bit for bit (2e-6 between two compiled programs)
          and no step in the loss, where the same blocks at their random start throw the net back to
          chance (loss 0.18 to 3.2). Growing beats being deep from the start (94.9 against 93.2 % on
          the digits), but hardly staying shallow (94.5 %): these digits ask for no depth.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import options, save
from flaxres.cli import plots
from flaxres.identity import branches
from flaxres.identity.claims import Context, Settings
from flaxres.train import fit

# So narrow that 8 layers do not learn the (shifted) digits at once, and more layers could help.
NARROW = {"widths": (4, 8, 16), "stem_width": 4}
ADDED = {"stage1": 3, "stage2": 3, "stage3": 3}
STYLES = {
    "deep from the start": (plots.ORANGE, "-"),
    "deepened by random blocks": (plots.RED, "-"),
    "deepened by zero blocks": (plots.BLUE, "-"),
    "stays shallow": (plots.BLACK, ":"),
}
Net = tuple[Any, Any]
Curve = tuple[np.ndarray, np.ndarray]
"""Loss at each step, test accuracy in % at every 25th."""
EVERY = 25


def made(context: Context, name: str, seed: int) -> Net:
    """A narrow net at its start."""
    model = context.model(name, **NARROW)
    return model, context.start(model, seed)


def deepened(context: Context, net: Net, seed: int) -> tuple[Net, Net]:
    """Nine blocks deeper: with branches that are zero, and with branches started as ever."""
    deeper, variables = branches.deepen(*net, ADDED, seed=seed)
    fresh = context.start(deeper, seed)
    sizes = dict(zip(ADDED, net[0].stage_sizes, strict=True))

    def new(row: branches.Row) -> bool:
        return row.block > sizes[f"stage{row.stage}"]

    return (deeper, variables), (deeper, branches.interpolate(deeper, variables, fresh, 1.0, new))


def difference(a: Net, b: Net, images: jax.Array, compiled: bool = False) -> float:
    """Largest difference of logits."""
    wrap = jax.jit if compiled else lambda function: function
    one, other = (wrap(model.apply)(variables, images) for model, variables in (a, b))
    return float(jnp.max(jnp.abs(one - other)))


def train(context: Context, net: Net, seed: int, steps: int, lr: float = 0.1) -> tuple[Net, Curve]:
    """One period of training, with its own warm-up and decay of the rate."""
    seen: list[Any] = []
    config = context.config(
        "resnet8_cifar", seed, steps=steps, lr=lr, warmup_steps=steps // 10, augment="crop"
    )
    fitted = fit(
        config,
        start=net,
        watch=lambda step, state: seen.append(jax.device_get(state.variables)),
        watch_every=EVERY,
    )
    accuracies = [100 * context.accuracy(net[0], each) for each in seen]
    return (fitted.model, fitted.variables), (fitted.history["loss"], np.array(accuracies))


def measure(context: Context, seed: int, steps: tuple[int, int]) -> dict[str, Any]:
    """Two periods of each kind; what deepening in between changes."""
    shallow, shallow_curve = train(context, made(context, "resnet8_cifar", seed), seed, steps[0])
    deep, deep_curve = train(context, made(context, "resnet26_cifar", seed), seed, steps[0])
    zero, random = deepened(context, shallow, seed)
    seconds = {
        "deepened by zero blocks": (zero, shallow_curve),
        "deepened by random blocks": (random, shallow_curve),
        "stays shallow": (shallow, shallow_curve),
        "deep from the start": (deep, deep_curve),
    }
    return {
        "curves": {
            name: (before, train(context, net, seed, steps[1], lr=0.03)[1])
            for name, (net, before) in seconds.items()
        },
        "logits, zero blocks": difference(shallow, zero, context.images),
        "logits, zero blocks, each compiled": difference(shallow, zero, context.images, True),
        "logits, random blocks": difference(shallow, random, context.images),
    }


def draw(runs: list[dict[str, Any]], steps: tuple[int, int], path: pathlib.Path) -> None:
    """Training loss and test accuracy over both periods, mean and range."""
    with plots.figure(path, columns=2, figsize=(10, 4)) as panels:
        for name, (colour, line) in STYLES.items():
            both = [run["curves"][name] for run in runs]
            losses = np.array(
                [np.concatenate([plots.smooth(part[0], 10) for part in pair]) for pair in both]
            )
            accuracies = np.array([np.concatenate([part[1] for part in pair]) for pair in both])
            times = np.arange(0, steps[0], EVERY), np.arange(0, steps[1], EVERY)
            at = [*times[0], steps[0], *(steps[0] + times[1]), sum(steps)]
            for axes, x, values in (
                (panels[0], np.arange(1, sum(steps) + 1), losses),
                (panels[1], np.array(at), accuracies),
            ):
                axes.plot(x, values.mean(0), line, color=colour, label=name)
                axes.fill_between(
                    x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
                )
        for axes in panels:
            axes.axvline(steps[0], color="grey", linewidth=0.8, linestyle="--")
            axes.set_xlabel("step")
        panels[0].set(title="training loss, nats", yscale="log")
        panels[1].set(title="test accuracy, %", ylim=(0, 100))
        panels[1].legend(loc="lower right")
        panels[0].annotate(
            "8 → 26 layers",
            (steps[0], 0.98),
            (3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color="grey",
        )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run, draw, print the change of the logits, losses and accuracies around the deepening."""
    opts = options(__doc__ or "", argv, seeds=3)
    context = Context(Settings(opts.quick, opts.seeds))
    steps = (75, 75) if opts.quick else (200, 300)
    runs = [measure(context, seed, steps) for seed in range(opts.seeds)]
    draw(runs, steps, opts.out / "deepen.png")
    numbers = {
        f"{key}: largest difference": max(run[key] for run in runs)
        for key in runs[0]
        if key != "curves"
    }
    for name in STYLES:
        first, second = zip(*(run["curves"][name] for run in runs), strict=True)
        for when, part, place in (
            ("before", first, slice(-5, None)),
            ("just after", second, slice(5)),
            ("at the end", second, slice(-20, None)),
        ):
            numbers[f"{name}: loss {when}"] = float(np.mean([p[0][place] for p in part]))
        numbers[f"{name}: test accuracy before, %"] = float(np.mean([p[1][-1] for p in first]))
        numbers[f"{name}: test accuracy at the end, %"] = float(np.mean([p[1][-1] for p in second]))
    numbers = {name: float(f"{value:.4g}") for name, value in numbers.items()}
    save(opts.out, "deepen", numbers)
    return numbers


if __name__ == "__main__":
    main()
