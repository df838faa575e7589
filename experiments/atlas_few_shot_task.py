"""A new task with few labelled images, for `experiments/atlas_few_shot.py`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import merge_bench_models as merge_bench
from experiments.atlas_shared import views
from experiments.merge_bench_data import Splits
from experiments.merge_bench_models import Bench, Params, features, outputs
from mtjax.data.few_shot import few_shot_rows
from mtjax.systems import atlas
from mtjax.systems.atlas import AtlasConfig

PLAIN = AtlasConfig()


@dataclass(frozen=True)
class Config:
    """What is held out, and how it is learnt from few images."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    held_out: str = "kannada"
    seeds: int = 3  # of the models and of the images
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)  # labelled images per class
    budget_shots: int = 4  # with which budgets of task vectors are compared
    budgets: tuple[int, ...] = (1, 2)
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-1  # of the coefficients
    other_rates: tuple[float, float, float] = (1e-2, 1e-2, 1e-3)  # head, norms, all
    sharpness: float = 10.0  # of the head of class means
    alpha: float = 3.0  # of the cache of the Tip-Adapter
    beta: float = 5.5

    @property
    def others(self) -> merge_bench.Config:
        """The bench without the task that is held out."""
        rest = tuple(task for task in self.bench.tasks if task != self.held_out)
        if len(rest) == len(self.bench.tasks):
            raise ValueError(
                f"`held_out` must be one of {self.bench.tasks}, got {self.held_out!r}."
            )
        return replace(self.bench, tasks=rest)


class Task:
    """A new task with few labelled images, and everything that may be trained on it."""

    def __init__(self, bench: Bench, data: Splits, shots: int, seed: int, c: Config):
        """Draws the images and makes the head."""
        part = data["train"]
        rows = few_shot_rows(part["labels"], shots, seed=seed)
        self.bench, self.config, self.seed, self.test = bench, c, seed, data["test"]
        self.images, self.labels = part["images"][rows], part["labels"][rows]
        self.classes = int(part["labels"].max()) + 1
        self.encode = jax.jit(partial(features, bench.model))
        z = np.asarray(self.encode(bench.base, self.images))
        means = np.stack([z[self.labels == k].mean(0) for k in range(self.classes)])
        # The larger the logit, the nearer the mean, in units of the mean distance.
        unit = ((z[:, None] - means[None]) ** 2).sum(-1).mean() / c.sharpness
        kernel, bias = 2 * means.T / unit, -(means**2).sum(1) / unit
        self.head = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    def logits(self, params, images):
        """With the frozen head."""
        return outputs(self.head, features(self.bench.model, params, images))

    def objective(self, params, batch):
        """Cross-entropy of parameters of the encoder."""
        return cross_entropy(self.logits(params, batch["images"]), batch["labels"])

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Weak views of the labelled images, without end."""
        rng = np.random.default_rng(self.seed)
        while True:
            rows = rng.integers(len(self.labels), size=self.config.batch_size)
            images = views(self.images[rows], rng, strength=0.3)
            yield {"images": images, "labels": self.labels[rows]}

    def optimizer(self) -> optax.GradientTransformation:
        """Of coefficients."""
        c = self.config
        rate = optax.cosine_decay_schedule(c.learning_rate, c.steps)
        return atlas.atlas_optimizer(rate)

    def compose(self, vectors: Any, how: AtlasConfig = PLAIN) -> Params:
        """Learns coefficients."""
        start = self.objective, self.bench.base, vectors, self.batches(), how
        steps = self.config.steps
        return atlas.fit(*start, steps=steps, optimizer=self.optimizer()).params

    def accuracy(self, logits_fn: Callable, *variables: Any) -> float:
        """On the test images, in per cent."""
        run = jax.jit(logits_fn)
        images, labels = self.test["images"], self.test["labels"]
        parts = [images[i : i + 500] for i in range(0, len(images), 500)]
        found = np.concatenate([run(*variables, part) for part in parts])
        return 100 * float(np.mean(found.argmax(-1) == labels))


def cross_entropy(logits, labels):
    """The mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
