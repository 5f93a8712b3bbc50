"""Claims that need trained nets: degradation, early layers, lesions, growing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxres.identity import branches, layout, probes
from flaxres.identity.claims.context import Claim, Context, Series, Verdict

Judged = tuple[dict[str, float], Verdict, str, Series | None]
_SHALLOW, _DEEP = 20, 56


def _curves(context: Context, kinds: tuple[str, ...]) -> Series:
    lines = {}
    for kind in kinds:
        for depth in (_SHALLOW, _DEEP):
            for seed in range(context.settings.seeds):
                history = context.fit(f"{kind}{depth}_cifar", seed).history["accuracy"]
                window = np.convolve(100 - 100 * history, np.ones(10) / 10, "valid")
                steps = [float(step) for step in range(10, 10 + len(window))]
                lines[f"{kind} {depth} · {seed}"] = (steps, [float(v) for v in window])
    return Series("step", "training error, %", lines)


def _errors(context: Context, name: str) -> list[float]:
    """Training error in % of the last 20 batches, for each seed."""
    return context.each_seed(lambda seed: 100 - 100 * context.fit(name, seed).last_accuracy())


def _deeper_plain_is_worse(context: Context) -> Judged:
    shallow, deep = (_errors(context, f"plain{d}_cifar") for d in (_SHALLOW, _DEEP))
    numbers = {"plain20, %": float(np.mean(shallow)), "plain56, %": float(np.mean(deep))}
    holds = min(deep) > max(shallow)
    text = f"training error {np.mean(shallow):.1f} % → {np.mean(deep):.1f} %"
    return numbers, Verdict.of(holds), text, _curves(context, ("plain",))


def _deeper_residual_is_not_worse(context: Context) -> Judged:
    numbers: dict[str, float] = {}
    gaps: dict[str, float] = {}
    for kind in ("plain", "resnet"):
        shallow, deep = (np.mean(_errors(context, f"{kind}{d}_cifar")) for d in (_SHALLOW, _DEEP))
        numbers |= {f"{kind}20, %": float(shallow), f"{kind}56, %": float(deep)}
        gaps[kind] = float(deep - shallow)
    # After so few steps the deeper net is still on its way: not worse is less than a quarter of
    # what the plain nets lose.
    close = gaps["resnet"] < 0.25 * gaps["plain"]
    exactly = gaps["resnet"] <= 1.0
    verdict = Verdict.of(close, "" if exactly else "one allows it time: it is close behind")
    text = f"training error +{gaps['resnet']:.1f} points with depth (plain +{gaps['plain']:.1f})"
    return numbers, verdict, text, _curves(context, ("resnet",))


def _failure_is_overfitting(context: Context) -> Judged:
    train, test = {}, {}
    for depth in (_SHALLOW, _DEEP):
        name = f"plain{depth}_cifar"
        train[depth] = float(np.mean(_errors(context, name)))
        errors = [100 - 100 * context.fit(name, s).accuracy for s in range(context.settings.seeds)]
        test[depth] = float(np.mean(errors))
    numbers = {
        "training error grows by": train[_DEEP] - train[_SHALLOW],
        "test error grows by": test[_DEEP] - test[_SHALLOW],
    }
    overfits = train[_DEEP] <= train[_SHALLOW] and test[_DEEP] > test[_SHALLOW]
    text = f"with depth the training error changes by {numbers['training error grows by']:+.1f}"
    return numbers, Verdict.of(overfits), f"{text} points: overfitting would lower it", None


def _early_layers_stop(context: Context) -> Judged:
    lines, stem = {}, {}
    for kind in ("plain", "resnet"):
        fitted = context.fit(f"{kind}{_DEEP}_cifar")
        start = context.start(fitted.model, fitted.config.seed)
        moved = probes.movement(fitted.model, start, fitted.variables)
        blocks = [float(v) for v in moved["blocks"]]
        lines[kind] = ([float(i) for i in range(1, len(blocks) + 1)], blocks)
        third = len(blocks) // 3
        stem[kind] = float(np.mean(blocks[:third]) / np.mean(blocks[-third:]))
    numbers = {f"first third over last third: {kind}": value for kind, value in stem.items()}
    stops = stem["plain"] < 0.1
    numbers["residual over plain"] = stem["resnet"] / stem["plain"]
    text = f"first third moves {stem['plain']:.2f}× as far as the last (residual: "
    series = Series("block", "‖w − w₀‖ / ‖w₀‖", lines, True)
    return numbers, Verdict.of(stops), f"{text}{stem['resnet']:.2f}×)", series


def _shortcuts_help_early_layers(context: Context) -> Judged:
    shares = {}
    for kind in ("plain", "resnet"):
        fitted = context.fit(f"{kind}{_DEEP}_cifar")
        history = fitted.history["accuracy"]
        start = context.start(fitted.model, fitted.config.seed)
        moved = probes.movement(fitted.model, start, fitted.variables)
        third = len(moved["blocks"]) // 3
        shares[kind] = float(np.mean(moved["blocks"][:third]))
        shares[f"{kind} accuracy"] = float(np.mean(history[-20:]))
    # What counts is what the movement buys, since noise moves weights too.
    gain = {k: shares[f"{k} accuracy"] / max(shares[k], 1e-9) for k in ("plain", "resnet")}
    numbers = {
        **shares,
        "accuracy per movement, residual over plain": gain["resnet"] / gain["plain"],
    }
    return (
        numbers,
        Verdict.of(gain["resnet"] > gain["plain"]),
        f"accuracy gained per movement of the first third: ×{gain['resnet'] / gain['plain']:.1f}",
        None,
    )


def _lesion(context: Context) -> Judged:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    worst: dict[str, float] = {}
    numbers: dict[str, float] = {}
    for kind in ("resnet", "plain"):
        fitted = context.fit(f"{kind}{_SHALLOW}_cifar")
        model, variables = layout.unstack(fitted.model, fitted.variables)
        whole = context.accuracy(model, variables)
        places, values = [], []
        for row in branches.table(model, variables):
            if row.keeps_shape:
                left = branches.drop(model, variables, row.address)
                places.append(float(row.depth))
                values.append(100 * context.accuracy(*left))
        lines[kind] = (places, values)
        worst[kind] = float(np.mean(values))
        numbers |= {
            f"{kind} whole, %": 100 * whole,
            f"{kind} without one block, mean %": worst[kind],
            f"{kind} without one block, least %": float(np.min(values)),
        }
    kept = {k: worst[k] / numbers[f"{k} whole, %"] for k in worst}
    holds = kept["resnet"] > 0.75 and kept["plain"] < 0.5
    text = ", ".join(
        f"{k} {numbers[f'{k} whole, %']:.0f} % → {worst[k]:.0f} %" for k in ("resnet", "plain")
    )
    series = Series("block taken out", "test accuracy, %", lines)
    return numbers, Verdict.of(holds), f"one block taken out: {text}", series


def _deepening(context: Context) -> Judged:
    from flaxres.train import fit

    fitted = context.fit("resnet8_cifar")
    model, variables = layout.unstack(fitted.model, fitted.variables)
    deeper, more = branches.deepen(model, variables, {f"stage{s}": 3 for s in (1, 2, 3)})
    images = context.images[:16]
    # Operation by operation, as the claim says: a compiler may round two programs differently.
    change = float(jnp.max(jnp.abs(model.apply(variables, images) - deeper.apply(more, images))))
    jitted = float(
        jnp.max(
            jnp.abs(jax.jit(model.apply)(variables, images) - jax.jit(deeper.apply)(more, images))
        )
    )
    config = dataclasses.replace(fitted.config, steps=context.settings.steps // 3, lr=0.02)
    grown = fit(config, start=(deeper, more))
    numbers = {
        "largest difference of logits": change,
        "largest difference of logits, each compiled": jitted,
        "test accuracy before, %": 100 * fitted.accuracy,
        "test accuracy after going on, %": 100 * grown.accuracy,
    }
    holds = change == 0 and grown.accuracy >= fitted.accuracy - 0.01
    text = (
        f"max |Δ logits| = {change:g}; test accuracy {100 * fitted.accuracy:.1f} % → "
        f"{100 * grown.accuracy:.1f} % with nine more blocks"
    )
    return numbers, Verdict.of(holds), text, None


def _branches_are_small(context: Context) -> Judged:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, variables, model in _at_start_and_end(context):
        ratio = probes.identity(model, variables, context.images, train=True)["ratio"]
        lines[name] = ([float(i) for i in range(1, len(ratio) + 1)], [float(r) for r in ratio])
    means = {name: float(np.median(y)) for name, (_, y) in lines.items()}
    numbers = {f"median ratio {name}": value for name, value in means.items()}
    text = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    series = Series("block", "‖branch‖ / ‖shortcut‖", lines, True)
    return numbers, Verdict.of(means["trained"] < 1), f"median ‖branch‖/‖shortcut‖: {text}", series


def _at_start_and_end(context: Context) -> list[tuple[str, Any, Any]]:
    fitted = context.fit(f"resnet{_DEEP}_cifar")
    start = context.start(fitted.model, fitted.config.seed)
    return [
        ("at the start", start, fitted.model),
        ("trained", fitted.variables, fitted.model),
    ]


CLAIMS = (
    Claim(
        "deeper_plain_is_worse",
        "The training error of plain nets gets worse with depth.",
        "He 2015, Fig. 1 and Table 2",
        "training error of the last 20 batches, 20 against 56 layers; every deep run must be worse "
        "than every shallow one",
        _deeper_plain_is_worse,
        trains=True,
    ),
    Claim(
        "failure_is_overfitting",
        "Deep plain nets fail because they overfit.",
        "what He 2015, §1, rules out",
        "change of training and test error with depth; overfitting lowers the first and raises the "
        "second",
        _failure_is_overfitting,
        trains=True,
    ),
    Claim(
        "deeper_residual_is_not_worse",
        "The training error of residual nets does not get worse with depth.",
        "He 2015, Table 2 and 6",
        "the same errors with shortcuts; the gap must be less than a quarter of the plain nets'",
        _deeper_residual_is_not_worse,
        trains=True,
    ),
    Claim(
        "early_layers_stop",
        "Very deep plain nets stop learning in their early layers.",
        "the text this project grew from",
        "‖w − w₀‖/‖w₀‖ of the first third of blocks over that of the last third after training; "
        "stopping: below a tenth",
        _early_layers_stop,
        trains=True,
    ),
    Claim(
        "shortcuts_help_early_layers",
        "Skip connections update early weights better.",
        "the text this project grew from",
        "training accuracy gained per movement of the first third of blocks; the residual net's "
        "must be the larger",
        _shortcuts_help_early_layers,
        trains=True,
    ),
    Claim(
        "branches_are_corrections",
        "Trained branches are small corrections of what the shortcut carries.",
        "He 2015, Fig. 7; De & Smith 2020, arXiv 2002.10444",
        "median over blocks of ‖branch‖/‖shortcut‖ after training; must be below 1",
        _branches_are_small,
        trains=True,
    ),
    Claim(
        "lesion",
        "Taking one block out of a residual net barely hurts, out of a plain net it ruins it.",
        "Veit 2016, arXiv 1605.06431",
        "test accuracy without each block that keeps the shape; on average the residual net must "
        "keep three quarters of its accuracy, the plain one less than half",
        _lesion,
        trains=True,
    ),
    Claim(
        "deepening",
        "A net that is deepened by zero blocks starts exactly where it was, and goes on learning.",
        "Chen 2015, arXiv 1511.05641; Gong 2019",
        "largest difference of logits (must be 0) and test accuracy before and after going on "
        "(must not fall by more than a point)",
        _deepening,
        trains=True,
    ),
)
