"""Does weight decay alone pull residual blocks to the identity, and a plain net to a constant?

Question  the argument for residual learning (He 2015, arXiv 1512.03385, §3.1): weights near 0 make
          a residual block the identity, so decay leads to the shallow skeleton; a plain net is led
          to a constant. Is that so with batch norm, which does not see the scale of kernels?
Command   python -m experiments.weight_decay_to_identity [--quick]
Time      one and a half minutes on one CPU core; --quick a quarter of one.
Came out  yes without norm (nets that had learnt little, 29 and 33 %): a decay of 3 in all brings
          the residual net to 1e-3 of its distance from the skeleton, the plain one to its constant.
          With batch norm only if norms decay too (2 and 3 %); if kernels alone do, nothing happens
          before a decay of 6, where epsilon begins to count. With data, decay of 0.01 costs the
          residual net nothing (97 %), the plain one much (85 to 61 %); branches do not shrink yet.
          At 0.1 they do (0.64 to 0.37 of the shortcut, if norms decay), but neither net learns.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import options, save, tower
from flaxres.cli import plots
from flaxres.identity import branches, probes
from flaxres.identity.claims import Context, Settings
from flaxres.train import Fitted, fit

BLOCKS, STEPS = 8, 150
KERNELS, ALL = ("kernel",), ("kernel", "scale", "bias")
AMOUNTS = np.linspace(0, 10, 41)
"""Sum of learning rate times decay over steps: weights are multiplied by exp(-amount)."""
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
RESIDUAL: dict[str, Any] = {}
PLAIN = {"residual": False}
FREE_RESIDUAL = {"norm": "none", "residual_init": "zero_last"}
FREE_PLAIN = {"residual": False, "norm": "none", "residual_init": "dirac"}
ALONE: dict[str, tuple[dict[str, Any], tuple[str, ...], str, str]] = {
    "residual, no norm": (FREE_RESIDUAL, ALL, plots.BLUE, "--"),
    "residual, kernels and norms decay": (RESIDUAL, ALL, plots.BLUE, "-"),
    "residual, kernels decay": (RESIDUAL, KERNELS, plots.SKY, "-"),
    "plain, no norm": (FREE_PLAIN, ALL, plots.RED, "--"),
    "plain, kernels and norms decay": (PLAIN, ALL, plots.RED, "-"),
    "plain, kernels decay": (PLAIN, KERNELS, plots.ORANGE, "-"),
}
DATA = {name: ALONE[name] for name in ALONE if name.endswith(" decay")}


def train(context: Context, fields: dict[str, Any], mask: tuple[str, ...], decay: float) -> Fitted:
    """A net of equal blocks, trained with this decay of these parameters."""
    model = context.model("resnet8_cifar", **tower(BLOCKS, 8), **fields)
    config = context.config(
        "resnet8_cifar",
        steps=STEPS,
        batch_size=32,
        lr=0.03 if "norm" in fields else 0.1,
        weight_decay=decay,
        decay_mask=tuple(f"{name}$" for name in mask if name != "scale" or model.norm != "none"),
    )
    return fit(config, start=(model, context.start(model)))


def decay_alone(context: Context, fitted: Fitted, mask: tuple[str, ...]) -> np.ndarray:
    """Distance of the features from those without branches, over AMOUNTS, 1 for the trained net.

    Decay without data multiplies the branches' weights by (1 - ηλ) at every step.
    """
    model = fitted.model.clone(num_classes=0)
    params = {k: v for k, v in fitted.variables["params"].items() if k != "head"}
    variables = jax.tree.map(jnp.asarray, {**fitted.variables, "params": params})

    def features(variables: Any) -> jax.Array:
        return model.apply(variables, context.images, train=True, mutable=["batch_stats"])[0]

    goal = features(branches.zero(model, variables, "*", "all"))

    def distance(amount: jax.Array) -> jax.Array:
        def shrink(path: Any, leaf: jax.Array) -> jax.Array:
            names = [key.key for key in path]
            return leaf * jnp.exp(-amount) if "branch" in names and names[-1] in mask else leaf

        shrunk = jax.tree_util.tree_map_with_path(shrink, params)
        return jnp.linalg.norm(features({**variables, "params": shrunk}) - goal)

    found = np.asarray(jax.lax.map(distance, jnp.asarray(AMOUNTS, jnp.float32)))
    return found / found[0]


def with_data(context: Context, fitted: Fitted) -> dict[str, float]:
    """Training accuracy, and how large branches are beside their shortcuts."""
    ratio = probes.identity(fitted.model, fitted.variables, context.images, train=True)["ratio"]
    return {
        "accuracy, %": 100 * fitted.last_accuracy(),
        "branch over shortcut": float(np.median(ratio)),
    }


def draw(
    alone: dict[str, np.ndarray], data: dict[str, dict[float, dict[str, float]]], path: pathlib.Path
) -> None:
    """Decay without data; with data, accuracy and size of the branches over the rate of decay."""
    with plots.figure(path, columns=3, figsize=(13.5, 4.4)) as panels:
        for name, values in alone.items():
            _, _, colour, line = ALONE[name]
            panels[0].plot(AMOUNTS, np.maximum(values, 1e-9), line, color=colour, label=name)
        panels[0].set(
            title="decay alone: distance from the net\nwithout branches (trained: 1)",
            xlabel="Σ learning rate × decay",
            yscale="log",
            ylim=(1e-6, 3),
        )
        for axes, key in zip(panels[1:], ("accuracy, %", "branch over shortcut"), strict=True):
            for name, by_decay in data.items():
                y = [found[key] for found in by_decay.values()]
                if np.isfinite(y).all():
                    _, _, colour, line = ALONE[name]
                    axes.plot(list(by_decay), y, line, color=colour, marker="o", markersize=5)
            axes.set(xscale="log", xlabel="weight decay")
        panels[1].set(title="trained with decay:\ntraining accuracy, %", ylim=(0, 102))
        panels[1].axhline(10, color="grey", linewidth=0.8, linestyle=":")
        panels[2].set(title="trained with decay:\n‖branch‖ / ‖shortcut‖", ylim=(0, None))
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=3)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, let decay, draw, print distances, accuracies and ratios."""
    opts = options(__doc__ or "", argv)
    context = Context(Settings())
    rates = RATES[:1] if opts.quick else RATES
    nets = {
        name: {rate: train(context, fields, mask, rate) for rate in rates}
        for name, (fields, mask, *_) in (list(DATA.items())[:1] if opts.quick else DATA.items())
    }
    trained = {name: by_rate[RATES[0]] for name, by_rate in nets.items()}
    if not opts.quick:
        for name in ("residual, no norm", "plain, no norm"):
            trained[name] = train(context, *ALONE[name][:2], RATES[0])
    alone = {
        name: decay_alone(context, trained[name], ALONE[name][1])
        for name in ALONE
        if name in trained
    }
    data = {
        name: {rate: with_data(context, fitted) for rate, fitted in by_rate.items()}
        for name, by_rate in nets.items()
    }
    draw(alone, data, opts.out / "weight_decay_to_identity.png")
    numbers = {
        "trained accuracy, %": {name: 100 * net.last_accuracy() for name, net in trained.items()},
        "distance after decay of 3 alone": {n: float(v[12]) for n, v in alone.items()},
        "distance after decay of 10 alone": {n: float(v[-1]) for n, v in alone.items()},
        "with data": data,
    }
    save(opts.out, "weight_decay_to_identity", numbers)
    return numbers


if __name__ == "__main__":
    main()
