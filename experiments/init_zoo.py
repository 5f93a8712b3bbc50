"""Which starts let which depths train, at which learning rates?

Question  Zhang 2019 (Fixup, arXiv 1901.09321), De & Smith 2020 (SkipInit, 2002.10444), Bachlechner
          2020 (ReZero, 2003.04887) and others train deep nets without norm by a small start of the
          branch. All starts side by side: does it take a norm, shortcuts, or only the start?
Command   python -m experiments.init_zoo [--quick]
Time      six minutes on one CPU core; --quick a quarter of one.
Came out  with batch norm as published: at 50 layers the plain net reaches 25 % at its best rate,
          from dirac 59; the residual net 60, and only at the smallest rate, from zero_gamma 78 and
          from rezero 95 at a rate of 0.3. Without norm it does NOT come out in these 80 steps of
          narrow nets: the default stays at chance at 50 layers, and small starts (11 to 25 %) do
          not reach even their skeleton, which is what zero_branch trains (41 % at any depth). A
          trial of some with AdamW was no better: they need more steps than this map can afford.
"""

import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import options, save, tower
from flaxres.cli import plots
from flaxres.data import pipeline
from flaxres.identity.claims import Context, Settings
from flaxres.train import train_step
from flaxres.train.state import state_of

PLAIN, FREE, V2 = {"residual": False}, {"norm": "none"}, {"style": "v2"}
STARTS: dict[str, dict[str, Any]] = {
    "plain, batch norm\ndefault": PLAIN,
    "plain, batch norm\ndirac": {**PLAIN, "residual_init": "dirac"},
    "plain, no norm\ndefault": {**PLAIN, **FREE},
    "plain, no norm\ndirac": {**PLAIN, **FREE, "residual_init": "dirac"},
    "v1, batch norm\ndefault": {},
    "v1, batch norm\nzero_gamma": {"residual_init": "zero_gamma"},
    "v2, batch norm\nrezero": {**V2, "residual_init": "rezero"},
    "v1, no norm\ndefault": FREE,
    "v1, no norm\nfixup": {**FREE, "residual_init": "fixup"},
    "v2, no norm\nzero_last": {**V2, **FREE, "residual_init": "zero_last"},
    "v2, no norm\nskipinit": {**V2, **FREE, "residual_init": "skipinit"},
    "v2, no norm\nlayerscale(1e-4)": {**V2, **FREE, "residual_init": "layerscale(1e-4)"},
    "v2, no norm\nscaled(0.5)": {**V2, **FREE, "residual_init": "scaled(0.5)"},
    "v2, no norm\nzero_branch": {**V2, **FREE, "residual_init": "zero_branch"},
}
BLOCKS = (2, 8, 24)
RATES = (0.01, 0.03, 0.1, 0.3)
STEPS, BATCH = 80, 32


def images(context: Context) -> dict[str, jax.Array]:
    """The batches of all steps, `[steps, batch, …]`, the same for every net."""
    batches = pipeline.train_iterator(context.info, batch_size=BATCH, seed=0)
    taken = list(itertools.islice(batches, STEPS))
    return {key: jnp.stack([batch[key] for batch in taken]) for key in ("image", "label")}


def train(context: Context, fields: dict[str, Any], blocks: int, batches: Any) -> np.ndarray:
    """Training accuracy in % of the last 10 steps, for each learning rate; all rates at once."""
    model = context.model("resnet8_cifar", **tower(blocks, 8), **fields)
    config = context.config(
        "resnet8_cifar", steps=STEPS, lr=1.0, warmup_steps=STEPS // 10, batch_size=BATCH
    )
    start = jax.tree.map(jnp.asarray, state_of(config, context.info, model, context.start(model)))

    def run(rate: jax.Array) -> jax.Array:
        def step(state: Any, batch: Any) -> Any:
            return train_step(state, batch, config, lr_factor=rate)

        return jax.lax.scan(step, start, batches)[1]["accuracy"]

    found = jax.jit(jax.vmap(run))(jnp.array(RATES))
    return 100 * np.asarray(found)[:, -10:].mean(1)


def draw(maps: dict[str, np.ndarray], layers: list[int], path: pathlib.Path) -> None:
    """A small map a start: depth downwards, learning rate to the right, accuracy as colour."""
    columns = min(7, len(maps))
    rows = -(-len(maps) // columns)
    size = (2.1 * columns + 0.6, 1.9 * rows + 0.5)
    with plots.figure(
        path, columns, rows, figsize=size, sharex=True, sharey=True, squeeze=False
    ) as panels:
        for axes, (name, values) in zip(panels.flat, maps.items(), strict=True):
            plots.heat(axes, values, (10, 100), text=lambda v: f"{v:.0f}", size=9)
            axes.set_title(name, size=9.5)
            axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES], size=8.5)
            axes.set_yticks(range(len(layers)), layers)
        for axes in panels[-1]:
            axes.set_xlabel("learning rate", size=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("layers", size=9)
        about = f"training accuracy after {STEPS} steps, % (chance: 10)"
        panels[0, 0].figure.suptitle(about, x=0.01, ha="left", fontsize=11)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train every start at every depth and rate, draw, print the accuracies."""
    opts = options(__doc__ or "", argv)
    context = Context(Settings())
    batches = images(context)
    depths = BLOCKS[:1] if opts.quick else BLOCKS
    chosen = [*STARTS][4::5] if opts.quick else [*STARTS]
    maps = {
        name: np.stack([train(context, STARTS[name], blocks, batches) for blocks in depths])
        for name in chosen
    }
    layers = [2 * blocks + 2 for blocks in depths]
    draw(maps, layers, opts.out / "init_zoo.png")
    numbers = {
        name.replace("\n", ", "): {
            f"{count} layers": {f"rate {r:g}": float(v) for r, v in zip(RATES, row, strict=True)}
            for count, row in zip(layers, values, strict=True)
        }
        for name, values in maps.items()
    }
    save(opts.out, "init_zoo", numbers)
    return numbers


if __name__ == "__main__":
    main()
