"""Claims that need trained nets: degradation, early layers, lesions, growing."""

import dataclasses

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
    lines: dict[str, tuple[list[float], list[float]]] = {}

    def measure(seed: int) -> dict[str, float]:
        numbers = {}
        for kind in ("plain", "resnet"):
            blocks = _movement(context, f"{kind}{_DEEP}_cifar", seed)
            lines[f"{kind} · {seed}"] = ([float(i) for i in range(1, len(blocks) + 1)], blocks)
            third = len(blocks) // 3
            share = float(np.mean(blocks[:third]) / np.mean(blocks[-third:]))
            numbers[f"first third over last third: {kind}"] = share
        return numbers

    numbers = context.means(measure)
    plain, residual = (numbers[f"first third over last third: {k}"] for k in ("plain", "resnet"))
    numbers["residual over plain"] = residual / plain
    text = f"first third moves {plain:.2f}× as far as the last (residual: {residual:.2f}×)"
    return numbers, Verdict.of(plain < 0.1), text, Series("block", "‖w − w₀‖ / ‖w₀‖", lines, True)


def _movement(context: Context, name: str, seed: int) -> list[float]:
    """How far training moved each block."""
    fitted = context.fit(name, seed)
    start = context.start(fitted.model, seed)
    moved = probes.movement(fitted.model, start, fitted.variables)
    return [float(block) for block in moved["blocks"]]


def _shortcuts_help_early_layers(context: Context) -> Judged:
    def measure(seed: int) -> dict[str, float]:
        numbers = {}
        for kind in ("plain", "resnet"):
            name = f"{kind}{_DEEP}_cifar"
            blocks = _movement(context, name, seed)
            numbers[kind] = float(np.mean(blocks[: len(blocks) // 3]))
            history = context.fit(name, seed).history["accuracy"]
            numbers[f"{kind} accuracy"] = float(np.mean(history[-20:]))
        return numbers

    numbers = context.means(measure)
    # What counts is what the movement buys, since noise moves weights too.
    plain, residual = (
        numbers[f"{kind} accuracy"] / max(numbers[kind], 1e-9) for kind in ("plain", "resnet")
    )
    numbers["accuracy per movement, residual over plain"] = residual / plain
    text = f"accuracy gained per movement of the first third: ×{residual / plain:.1f}"
    return numbers, Verdict.of(residual > plain), text, None


def _lesion(context: Context) -> Judged:
    lines: dict[str, tuple[list[float], list[float]]] = {}

    def measure(seed: int) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for kind in ("resnet", "plain"):
            fitted = context.fit(f"{kind}{_SHALLOW}_cifar", seed)
            model, variables = layout.unstack(fitted.model, fitted.variables)
            places, values = [], []
            for row in branches.table(model, variables):
                if row.keeps_shape:
                    left = branches.drop(model, variables, row.address)
                    places.append(float(row.depth))
                    values.append(100 * context.accuracy(*left))
            lines[f"{kind} · {seed}"] = (places, values)
            numbers |= {
                f"{kind} whole, %": 100 * context.accuracy(model, variables),
                f"{kind} without one block, mean %": float(np.mean(values)),
                f"{kind} without one block, least %": float(np.min(values)),
            }
        return numbers

    numbers = context.means(measure)
    whole, left = (
        {kind: numbers[f"{kind} {what}"] for kind in ("resnet", "plain")}
        for what in ("whole, %", "without one block, mean %")
    )
    kept = {kind: left[kind] / whole[kind] for kind in whole}
    holds = kept["resnet"] > 0.75 and kept["plain"] < 0.5
    text = ", ".join(f"{kind} {whole[kind]:.0f} % → {left[kind]:.0f} %" for kind in whole)
    series = Series("block taken out", "test accuracy, %", lines)
    return numbers, Verdict.of(holds), f"one block taken out: {text}", series


def _deepening(context: Context) -> Judged:
    numbers = context.means(lambda seed: _deepened(context, seed))
    before, after = (numbers[f"test accuracy {when}, %"] for when in ("before", "after going on"))
    change = numbers["largest difference of logits"]
    text = (
        f"max |Δ logits| = {change:g}; test accuracy {before:.1f} % → {after:.1f} % with nine more "
        "blocks"
    )
    return numbers, Verdict.of(change == 0 and after >= before - 1), text, None


def _deepened(context: Context, seed: int) -> dict[str, float]:
    from flaxres.train import fit

    fitted = context.fit("resnet8_cifar", seed)
    model, variables = layout.unstack(fitted.model, fitted.variables)
    deeper, more = branches.deepen(model, variables, {f"stage{s}": 3 for s in (1, 2, 3)})
    images = context.images[:16]
    # Operation by operation, as the claim says: a compiler may round two programs differently.
    change = jnp.abs(model.apply(variables, images) - deeper.apply(more, images))
    jitted = jnp.abs(jax.jit(model.apply)(variables, images) - jax.jit(deeper.apply)(more, images))
    config = dataclasses.replace(fitted.config, steps=context.settings.steps // 3, lr=0.02)
    grown = fit(config, start=(deeper, more))
    return {
        "largest difference of logits": float(jnp.max(change)),
        "largest difference of logits, each compiled": float(jnp.max(jitted)),
        "test accuracy before, %": 100 * fitted.accuracy,
        "test accuracy after going on, %": 100 * grown.accuracy,
    }


def _branches_are_small(context: Context) -> Judged:
    lines: dict[str, tuple[list[float], list[float]]] = {}

    def measure(seed: int) -> dict[str, float]:
        fitted = context.fit(f"resnet{_DEEP}_cifar", seed)
        numbers = {}
        for when, variables in (
            ("at the start", context.start(fitted.model, seed)),
            ("trained", fitted.variables),
        ):
            found = probes.identity(fitted.model, variables, context.images, train=True)["ratio"]
            ratios = [float(ratio) for ratio in found]
            lines[f"{when} · {seed}"] = ([float(i) for i in range(1, len(ratios) + 1)], ratios)
            numbers[f"median ratio {when}"] = float(np.median(ratios))
        return numbers

    numbers = context.means(measure)
    text = ", ".join(
        f"{name.removeprefix('median ratio ')} {value:.2f}" for name, value in numbers.items()
    )
    series = Series("block", "‖branch‖ / ‖shortcut‖", lines, True)
    holds = numbers["median ratio trained"] < 1
    return numbers, Verdict.of(holds), f"median ‖branch‖/‖shortcut‖: {text}", series


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
