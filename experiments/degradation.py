"""Do deeper plain nets train worse, and do residual ones not?

Question  He 2015 (arXiv 1512.03385, Fig. 1 and 6): a deeper plain net has higher *training* error
          than a shallow one, so it is not overfitting; with shortcuts the deeper net is no worse.
Command   python -m experiments.degradation [--quick] [--seeds 3]
Time      about five minutes on two CPU cores; --quick (56 layers, one seed) about one.
Came out  as published: after 200 steps on the digits plain nets of 20, 32 and 56 layers classify
          99.9, 88.6 and 19.4 % of the images they train on, residual nets 100, 100 and 99.2 %.
"""

import numpy as np

from experiments.common import Options, options, save
from flaxres.cli import plots
from flaxres.train import TrainConfig, fit

STEPS = 200


def config(kind: str, depth: int, seed: int) -> TrainConfig:
    """The same recipe for all: only depth and shortcuts differ."""
    return TrainConfig(
        model=f"{kind}{depth}_cifar",
        data="digits",
        steps=STEPS,
        batch_size=64,
        lr=0.1,
        warmup_steps=20,
        weight_decay=1e-4,
        augment="none",
        seed=seed,
    )


def measure(depths: tuple[int, ...], seeds: int) -> dict[tuple[str, int], np.ndarray]:
    """Training error in % by step, `[seeds, steps]`, for each kind and depth."""
    return {
        (kind, depth): np.stack(
            [100 - 100 * fit(config(kind, depth, s)).history["accuracy"] for s in range(seeds)]
        )
        for depth in depths
        for kind in ("plain", "resnet")
    }


def draw(errors: dict[tuple[str, int], np.ndarray], opts: Options) -> None:
    """Training error over time, plain and residual side by side."""
    kinds = (("plain", "plain nets"), ("resnet", "residual nets"))
    path = opts.out / "degradation.png"
    with plots.figure(path, columns=2, sharey=True, figsize=(9, 3.6)) as panels:
        for axes, (kind, title) in zip(panels, kinds, strict=True):
            depths = sorted(depth for k, depth in errors if k == kind)
            for depth, colour in zip(
                depths, (plots.SKY, plots.BLUE, plots.RED)[-len(depths) :], strict=True
            ):
                runs = np.stack([plots.smooth(run, 10) for run in errors[kind, depth]])
                steps = np.arange(1, runs.shape[1] + 1)
                axes.plot(steps, runs.mean(0), color=colour, label=f"{depth} layers")
                if len(runs) > 1:
                    axes.fill_between(
                        steps, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0
                    )
            axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
            axes.set(title=title, xlabel="step", ylim=(0, 100))
            axes.legend()
        panels[0].set_ylabel("training error, %")
        panels[0].annotate(
            "chance", (0, 90), textcoords="offset points", xytext=(2, 3), color="grey", fontsize=8
        )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run, draw, print the mean training accuracy of the last 20 steps."""
    opts = options(__doc__ or "", argv, seeds=3)
    errors = measure((56,) if opts.quick else (20, 32, 56), opts.seeds)
    draw(errors, opts)
    numbers = {
        f"{kind}{depth} training accuracy, %": round(100 - float(runs[:, -20:].mean()), 1)
        for (kind, depth), runs in errors.items()
    }
    save(opts.out, "degradation", numbers)
    return numbers


if __name__ == "__main__":
    main()
