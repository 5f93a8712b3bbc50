"""What claims are made of, and what their measurements share: models, data, trained nets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxres.nets import drawing, zoo
from flaxres.nets.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Verdict:
    """holds · holds if … · does not hold."""

    text: str

    @classmethod
    def of(cls, holds: bool, condition: str = "") -> "Verdict":
        """From a comparison; `condition` completes "holds if …"."""
        if not holds:
            return cls("does not hold")
        return cls(f"holds if {condition}" if condition else "holds")

    @property
    def holds(self) -> bool:
        """Whether it holds, if only under a condition."""
        return self.text.startswith("holds")


@dataclasses.dataclass(frozen=True)
class Series:
    """What a picture of a claim shows: lines over one axis."""

    x: str
    y: str
    lines: dict[str, tuple[list[float], list[float]]]
    """Label to (x, y); several seeds are several labels with " · " and a number behind."""
    log_y: bool = False
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim with what was measured."""

    claim: "Claim"
    number: str
    """The decisive number, as a person reads it."""
    numbers: dict[str, float]
    verdict: Verdict
    series: Series | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the argument."""

    name: str
    sentence: str
    source: str
    measured: str
    """What is measured, and the rule of the verdict."""
    evaluate: Callable[["Context"], tuple[dict[str, float], Verdict, str, Series | None]]
    trains: bool = False

    def measure(self, context: "Context") -> Outcome:
        """Measure it and judge."""
        numbers, verdict, number, series = self.evaluate(context)
        return Outcome(self, number, numbers, verdict, series)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much work the measurements may be."""

    quick: bool = True
    seeds: int = 1
    data: str = "digits"
    data_dir: str | None = None

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return 150 if self.quick else 300

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths, 6n+2, that are compared."""
        return (8, 56) if self.quick else (8, 20, 32, 56, 110)


class Context:
    """Makes models, data and trained nets for the measurements; trains each net once."""

    def __init__(self, settings: Settings, make: Callable[..., ResNet] = zoo.create_model) -> None:
        self.settings = settings
        self._make = make
        self._fitted: dict[Any, Any] = {}

    def model(self, name: str, **fields: Any) -> ResNet:
        """A model of the zoo with the classes of the data."""
        fields = {"num_classes": self.info.num_classes, **fields}
        return self._make(name, **fields)

    def start(self, model: ResNet, seed: int = 0) -> dict[str, Any]:
        """Freshly drawn variables."""
        return jax.tree.map(
            jnp.asarray, drawing.init_variables(model, seed, (1, *self.images.shape[1:]))
        )

    @functools.cached_property
    def info(self) -> Any:
        """The data set."""
        from flaxres.data import sources

        return sources.describe(self.settings.data, self.settings.data_dir)

    @functools.cached_property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """(images, labels): 64 real training examples, normalised."""
        from flaxres.data import augment, pipeline

        batch = next(
            pipeline.train_iterator(
                self.info, batch_size=64, seed=0, data_dir=self.settings.data_dir
            )
        )
        images = augment.normalize(jnp.asarray(batch["image"]), self.info.mean, self.info.std)
        return images, jnp.asarray(batch["label"])

    @property
    def images(self) -> jax.Array:
        """The images of `batch`."""
        return self.batch[0]

    @property
    def labels(self) -> jax.Array:
        """Their labels."""
        return self.batch[1]

    def config(self, name: str, seed: int = 0, **changes: Any) -> Any:
        """The one recipe of all trainings here; only `changes` differ."""
        from flaxres.train import TrainConfig

        recipe = {
            "model": name,
            "data": self.settings.data,
            "data_dir": self.settings.data_dir,
            "steps": self.settings.steps,
            "batch_size": 64,
            "lr": 0.1,
            "warmup_steps": self.settings.steps // 10,
            "weight_decay": 1e-4,
            "augment": "none",
            "driver": "device",
            "seed": seed,
        }
        return TrainConfig(**{**recipe, **changes})

    def fit(self, name: str, seed: int = 0, **changes: Any) -> Any:
        """A trained net, `flaxres.train.Fitted`; the same call trains once."""
        from flaxres.train import fit

        key = (name, seed, tuple(sorted(changes.items())))
        if key not in self._fitted:
            self._fitted[key] = fit(self.config(name, seed, **changes))
        return self._fitted[key]

    def accuracy(self, model: ResNet, variables: Any) -> float:
        """Share of the held-out images classified right."""
        images, labels = self._held_out
        logits = _logits(model, variables, images)
        return float(np.mean(np.argmax(logits, -1) == labels))

    @functools.cached_property
    def _held_out(self) -> tuple[jax.Array, np.ndarray]:
        from flaxres.data import augment, pipeline

        count = min(1000, self.info.splits[self.info.eval_split])
        batch = next(
            pipeline.eval_batches(
                self.info,
                self.info.eval_split,
                batch_size=count,
                data_dir=self.settings.data_dir,
            )
        )
        images = augment.normalize(jnp.asarray(batch["image"]), self.info.mean, self.info.std)
        return images, batch["label"]

    def each_seed(self, value: Callable[[int], float]) -> list[float]:
        """A number for each seed."""
        return [float(value(seed)) for seed in range(self.settings.seeds)]

    def means(self, measure: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """Over the seeds, the mean of each of the numbers that `measure` gives for one."""
        found = [measure(seed) for seed in range(self.settings.seeds)]
        return {name: float(np.mean([numbers[name] for numbers in found])) for name in found[0]}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: ResNet, variables: Any, images: jax.Array) -> Any:
    """Compiled once for equal models, however many sets of variables are evaluated."""
    return model.apply(variables, images)
