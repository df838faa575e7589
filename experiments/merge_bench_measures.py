"""What experiments on the merge-bench share: accuracy, streams, baselines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter

from experiments.merge_bench_data import number_of, parts, taken
from experiments.merge_bench_models import Bench, Params
from experiments.text_merge_bench_models import TextBench
from mtjax import merging
from mtjax.losses import entropy_loss

Inputs = Mapping[str, Any]
"""By task: images, uint8 of shape `(n, 28, 28)`, or the arrays of `n` sentences."""


class Measures:
    """The models of one bench and how good merged ones are.

    Attributes:
      bench: the models; images or sentences.
      vectors: their task vectors, in the order of the tasks' names.
    """

    def __init__(self, bench: Bench | TextBench):
        """Takes the task vectors."""
        self.bench = bench
        self.vectors = merging.task_vectors(bench.base, bench.models)
        self._logits = jax.jit(bench.logits, static_argnums=1)

    def split(self, name: str) -> dict[str, Any]:
        """The inputs of all tasks."""
        return {t: self.bench.inputs(t, name) for t in self.bench.tasks}

    def labels(self, name: str) -> dict[str, np.ndarray]:
        """Of all tasks."""
        return {t: self.bench.data[t][name]["labels"] for t in self.bench.tasks}

    def logits(self, params: Params, inputs: Inputs) -> dict[str, np.ndarray]:
        """Of all inputs, by task."""
        of = lambda t, x: np.concatenate([self._logits(params, t, p) for p in parts(x)])
        return {t: of(t, x) for t, x in inputs.items()}

    def accuracy(
        self, params: Params, split: str, inputs: Inputs | None = None
    ) -> dict[str, float]:
        """In per cent, by task and their `mean`; of `inputs` instead of the split's."""
        found = self.logits(params, self.split(split) if inputs is None else inputs)
        labels = self.labels(split)
        return with_mean({t: np.mean(found[t].argmax(-1) == labels[t]) for t in found})

    def individual(self, split: str = "test") -> dict[str, float]:
        """In per cent, each task with its own fine-tuned model, and their `mean`."""
        models, tasks = self.bench.models, self.bench.tasks
        return with_mean({t: self.bench.accuracy(models[t], t, split) for t in tasks})

    def ratios(
        self, found: Mapping[str, float], individual: Mapping[str, float]
    ) -> list[float]:
        """Accuracies relative to the individual models, by task, in per cent."""
        return [100 * found[t] / individual[t] for t in self.bench.tasks]

    def scaled(self, scale: float) -> Params:
        """Task arithmetic."""
        return merging.merge(self.bench.base, self.vectors, scale)

    def best_scale(self, scales: Sequence[float]) -> float:
        """Of task arithmetic, by mean accuracy on the validation images."""
        score = lambda s: self.accuracy(self.scaled(s), "validation")["mean"]
        return max(scales, key=score)

    def fixed(self, scales: Sequence[float]) -> tuple[float, dict[str, Params]]:
        """The best scale of task arithmetic, and the models without learning."""
        best = self.best_scale(scales)
        return best, self.unlearned(best)

    def unlearned(self, best: float) -> dict[str, Params]:
        """The models without learning, task arithmetic also with this scale."""
        base, models = self.bench.base, self.bench.models
        return {
            "base": base,
            "average": merging.average()(base, models),
            "TA (0.3)": self.scaled(0.3),
            "TA (tuned)": self.scaled(best),
            "TIES": merging.ties(0.2, 0.3, reduction="sum")(base, models),
        }


def with_mean(fractions: Mapping[str, Any]) -> dict[str, float]:
    """In per cent, and their `mean`."""
    found = {task: 100 * float(x) for task, x in fractions.items()}
    return found | {"mean": float(np.mean([*found.values()]))}


def mean_entropy(logits: Mapping[str, np.ndarray]) -> float:
    """Of predictions, in nats, averaged over tasks."""
    return float(np.mean([entropy_loss(jnp.array(z)) for z in logits.values()]))


def batches(inputs: Inputs, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Unlabelled batches without end, drawn with replacement."""
    rng = np.random.default_rng(seed)
    some = lambda x: taken(x, rng.integers(number_of(x), size=size))
    while True:
        yield {t: some(x) for t, x in inputs.items()}


def corrupted(images: Inputs, kind: str, amount: float, seed: int) -> Inputs:
    """The same images with `noise`, `blur`, or as they are (`clean`).

    Args:
      images: by task.
      kind: `"noise"`, `"blur"` or `"clean"`.
      amount: standard deviation, of pixels in 0..255 or in pixels.
      seed: of the noise.

    Returns:
      Images by task, uint8.
    """
    rng, found = np.random.default_rng(seed), {}
    for task, x in images.items():
        y = x.astype(np.float32)
        if kind == "noise":
            y += amount * rng.standard_normal(x.shape, np.float32)
        elif kind == "blur":
            y = gaussian_filter(y, amount, axes=(1, 2))
        found[task] = np.clip(np.rint(y), 0, 255).astype(x.dtype)
    return found
