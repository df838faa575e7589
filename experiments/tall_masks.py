"""TALL-masks and Consensus: how much of a fine-tuned model does one bit bring back?

One small ViT, fine-tuned on several image sets, is merged into one model (average, task
arithmetic TA, TIES, Consensus) and compressed into a vector and a mask per task
(TALL-masks, magnitude masks, EMR). Only the latter need to know the task.

Command:  python experiments/tall_masks.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 3, and 20 for the models.
Expect:   of fine-tuned accuracy, TALL-masks and EMR keep 98 %, TA 90 %; Consensus is
          about as good as TA here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from experiments.merge_bench_models import QUICK as QUICK_BENCH
from experiments.merge_bench_models import Bench
from experiments.merge_bench_models import Config as BenchConfig
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.compressed import CompressedTasks, apply_vector, task_vector
from mtjax.merging.emr import emr
from mtjax.merging.masks import density_of, magnitude_mask, masked, pack_mask
from mtjax.merging.selection import select_coefficient
from mtjax.systems import tall_masks
from mtjax.systems.tall_masks import TallMasksConfig

AVERAGE, MEAN_TIES = merging.average(), merging.ties(0.2)
# What masks are made for, without a coefficient.
MERGERS = {
    "TA": merging.task_arithmetic(1.0),
    "TIES": merging.ties(0.2, reduction="sum"),
}
# Methods whose accuracy is drawn over the number of tasks.
CURVES = ("average", "TA", "Consensus TA")
CURVES += ("magnitude masks", "EMR", "TALL + TA", "TALL + TIES")
KERNELS = {"all": None, "attention": "attention.*kernel", "MLP": "mlp.*kernel"}
LAYERS = KERNELS | {"biases, norms": "bias|scale"}


@dataclass(frozen=True)
class Config:
    """What is merged and what is searched."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    search: TallMasksConfig = field(default_factory=TallMasksConfig)
    fixed_threshold: float = 0.4  # of masks that need no validation data
    magnitude: float = 0.1  # fraction of elements in magnitude masks
    numbers: tuple[int, ...] = (2, 4)  # of tasks, the first ones; beside all
    validation_size: int = 300  # images per task, at most
    seeds: int = 3  # of the fine-tunings


FEW = TallMasksConfig((0.4, 0.6), coefficients=(0.3, 0.6))
QUICK = Config(QUICK_BENCH, FEW, numbers=(2,), validation_size=40, seeds=1)


class Result(NamedTuple):
    """Parameters by task, and the bytes of all that has to be stored."""

    restore: Callable[[str], Any]
    nbytes: int


def compare(
    bench: Bench, tasks: Sequence[str], config: Config, seed: int, only=None
) -> dict[str, Any]:
    """All methods, or some, on some tasks of the bench: test accuracy, masks, sizes."""
    base, search = bench.base, config.search
    models = {task: bench.models[task] for task in tasks}
    most = config.validation_size
    validate = lambda params, task: bench.accuracy(params, task, "validation", most)
    single = {task: validate(models[task], task) for task in tasks}
    search_masks = partial(tall_masks.tall_masks, base, models, validate, search)
    tall = {name: search_masks(merger=merger) for name, merger in MERGERS.items()}
    one_threshold = replace(search, thresholds=(config.fixed_threshold,))
    fixed = tall_masks.tall_masks(base, models, config=one_threshold)
    whole = sum(x.nbytes for x in jax.tree.leaves(base))
    rng, coefficients, densities = np.random.default_rng(seed), {}, {}

    def one(params):
        return Result(lambda task: params, whole)

    def best(name, vector):
        found = select_coefficient(base, vector, validate, single, search.coefficients)
        coefficients[name] = {"coefficient": found.coefficient}
        return one(found.params)

    def consensus(name, method, min_agreement=search.min_agreement):
        compressed = tall[method].compressed
        return best(name, tall_masks.consensus_vector(compressed, min_agreement))

    def each(name, compressed):
        densities[name] = {t: density_of(compressed.mask(t)) for t in tasks}
        return Result(compressed.restore, compressed.nbytes)

    def with_masks(name, mask_of):
        masks = {task: pack_mask(mask_of(task)) for task in tasks}
        return each(name, CompressedTasks(base, fixed.compressed.vector, masks))

    def own(task):
        return task_vector(base, models[task])

    def largest(task):
        return magnitude_mask(own(task), config.magnitude)

    def shuffled(task):
        mix = lambda x: jnp.asarray(rng.permutation(np.ravel(x)).reshape(x.shape))
        return jax.tree.map(mix, tall["TA"].compressed.mask(task))

    def pruned(task):
        return apply_vector(base, masked(own(task), largest(task)))

    # A mask per task, and the values that it takes.
    bits = len(tasks) * fixed.compressed.elements * (1 + 32 * config.magnitude)
    every = {
        "one model per task": lambda _: Result(models.__getitem__, len(tasks) * whole),
        "zero-shot": lambda _: one(base),
        "average": lambda _: one(AVERAGE(base, models)),
        "TA": lambda n: best(n, MERGERS["TA"].vector(base, models)),
        "TIES": lambda n: best(n, MEAN_TIES.vector(base, models)),
        "Consensus TA, k = 1": lambda n: consensus(n, "TA", 1),
        "Consensus TA": lambda n: consensus(n, "TA"),
        "Consensus TIES": lambda n: consensus(n, "TIES"),
        "magnitude pruning": lambda _: Result(pruned, whole + int(bits / 8)),
        "magnitude masks": lambda n: with_masks(n, largest),
        "random masks": lambda n: with_masks(n, shuffled),
        "EMR": lambda n: each(n, emr(base, models)),
        "TALL + TA": lambda n: each(n, tall["TA"].compressed),
        "TALL + TA, fixed": lambda n: each(n, fixed.compressed),
        "TALL + TIES": lambda n: each(n, tall["TIES"].compressed),
    }
    rows, alone = {}, None
    for name in ("one model per task", *(only or every)):
        found = every[name](name)
        test = {t: bench.accuracy(found.restore(t), t, "test") for t in tasks}
        alone = test if alone is None else alone
        rows[name] = {task: 100 * x for task, x in test.items()} | {
            "mean": 100 * np.mean([*test.values()]),
            "normalised": 100 * np.mean([test[t] / alone[t] for t in tasks]),
            "MB": found.nbytes / 1e6,
        }
    return {
        "rows": rows,
        "coefficients": coefficients,
        "densities": densities,
        "thresholds": {name: found.thresholds for name, found in tall.items()},
        "agreement": {name: histograms(x.compressed) for name, x in tall.items()},
    }


def histograms(compressed: CompressedTasks) -> dict[str, list[float]]:
    """How many tasks want an element, by type of layer."""
    number, merged = len(compressed.tasks), compressed.vector
    counts = tall_masks.agreement([compressed.mask(t) for t in compressed.tasks])
    of = lambda where: tall_masks.agreement_histogram(counts, merged, number, where)
    return {name: of(where).tolist() for name, where in LAYERS.items()}


def run(bench: Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    found = compare(bench, bench.tasks, config, seed)
    curves = {len(bench.tasks): found["rows"]}
    for number in track(config.numbers, f"tasks, seed {seed}"):
        tasks = bench.tasks[:number]
        curves[number] = compare(bench, tasks, config, seed, CURVES)["rows"]
    normalised = lambda rows: {name: rows[name]["normalised"] for name in CURVES}
    return found | {"curves": {n: normalised(curves[n]) for n in sorted(curves)}}


def plot(results: list[dict[str, Any]]) -> Figure:
    """How many tasks want an element, and accuracy over the number of tasks."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = {
        f"{name}, {layers}": np.mean([r["agreement"][name][layers] for r in results], 0)
        for name, layers in [("TA", layers) for layers in LAYERS] + [("TIES", "all")]
    }
    width = 0.8 / len(bars)
    for i, (label, color) in enumerate(method_colors([*bars]).items()):
        places = np.arange(len(bars[label])) + (i - (len(bars) - 1) / 2) * width
        left.bar(places, bars[label], width, color=color, label=label)
    left.set(xlabel="tasks that want an element", ylabel="fraction of elements")
    left.legend(frameon=False)
    numbers = [int(number) for number in results[0]["curves"]]
    for name, color in method_colors(CURVES).items():
        values = np.array([[c[name] for c in r["curves"].values()] for r in results])
        right.plot(numbers, values.mean(0), "o-", color=color, label=name)
        style = {"color": color, "alpha": 0.12, "linewidth": 0}
        right.fill_between(numbers, values.min(0), values.max(0), **style)
    right.set(xlabel="tasks", ylabel="normalised accuracy, %", xticks=numbers)
    right.legend(frameon=False)
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Merges in all ways for every seed; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    parts = {
        "Test accuracy, %, and size": "rows",
        "Fraction of elements in a mask": "densities",
        "Thresholds": "thresholds",
        "Coefficients": "coefficients",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results).savefig(out / "tall_masks.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/tall_masks_quick")) -> None:
    """Seconds: small models of four turned digits."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/tall_masks"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
