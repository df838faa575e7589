"""aTLAS without labels: adapting the base to a task by the vectors of other tasks.

For every task the base is adapted on unlabelled images by pseudo-labels (UFM), by
contrast of two views (SimCLR) or by reliable entropy (SAR), in its LayerNorms or in the
coefficients of the other tasks' vectors; accuracy is measured on other images.

Command:  python experiments/atlas_test_time.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 15 per seed.
Expect:   one seed: base 70.4 %; LayerNorms 67 to 70, coefficients 70 to 71.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro
from rich.progress import track

from experiments import merge_bench_models as merge_bench
from experiments.atlas_shared import tune, views
from experiments.merge_bench_measures import Measures, with_mean
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.data.pseudo_labels import trusted_labels, two_streams
from mtjax.losses.fixmatch import fixmatch_loss
from mtjax.losses.reliable_entropy import reliable_entropy_loss
from mtjax.losses.simclr import simclr_loss
from mtjax.systems import atlas
from mtjax.systems.adamerging import collapsed

NORMS = "LayerNorm|norm/"
OBJECTIVES = ("SimCLR", "SAR", "UFM")


@dataclass(frozen=True)
class Config:
    """What is adapted, and how."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    seeds: int = 3  # of the models and of the batches
    steps: int = 200
    batch_size: int = 64  # unlabelled images
    learning_rate: float = 1e-2  # of coefficients, falls like a cosine
    norm_rate: float = 1e-3  # of LayerNorms
    threshold: float | None = None  # of pseudo-labels; None: the mean confidence
    temperature: float = 0.5  # of contrast
    margin: float = 0.4  # of reliable entropies
    rho: float = 0.05  # of SAR, in the coefficients or in the LayerNorms


QUICK = Config(merge_bench.QUICK, seeds=1, steps=5, batch_size=16)


def objectives(
    bench: merge_bench.Bench, task: str, config: Config
) -> dict[str, Callable[[Any, Any], Any]]:
    """By name, of parameters and a batch."""
    logits = lambda params, images: bench.logits(params, task, images)
    encode = lambda params, x: merge_bench.features(bench.model, params, x)
    return {
        "SimCLR": lambda params, batch: simclr_loss(
            encode(params, batch["strong"]),
            encode(params, batch["other"]),
            temperature=config.temperature,
        ),
        "SAR": lambda params, batch: reliable_entropy_loss(
            logits(params, batch["weak"]), margin=config.margin
        ),
        "UFM": lambda params, batch: fixmatch_loss(
            logits(params, batch["weak"]),
            logits(params, batch["strong"]),
            batch["labels"],
            threshold=config.threshold,
            over="used",
        ),
    }


def stream(
    images: np.ndarray, labels: np.ndarray, size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Images as they are, two strong views, and labels that are trusted (or -1)."""
    rng = np.random.default_rng(seed)
    for rows in two_streams(labels, size, seed=seed):
        shown = images[rows]
        yield {
            "weak": shown.astype(np.float32),
            "strong": views(shown, rng),
            "other": views(shown, rng),
            "labels": labels[rows],
        }


def adapt(
    m: Measures, task: str, name: str, what: str, config: Config, seed: int
) -> merge_bench.Params:
    """The base, adapted to one task without its labels."""
    bench = m.bench
    images = bench.data[task]["stream"]["images"]
    trusted = trusted_labels(m.logits(bench.base, {task: images})[task])
    if name != "UFM":
        trusted = np.full_like(trusted, -1)  # all images alike
    batches = stream(images, trusted, config.batch_size, seed)
    objective = objectives(bench, task, config)[name]
    rho = config.rho if name == "SAR" else 0.0
    if what == "LayerNorm":
        given = objective, bench.base, batches
        other = partial(tune, where=NORMS, learning_rate=config.norm_rate, rho=rho)
        return other(*given, steps=config.steps)
    # The task's own vector would be a leak.
    others = {t: model for t, model in bench.models.items() if t != task}
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return atlas.fit(
        objective,
        bench.base,
        merging.task_vectors(bench.base, others),
        batches,
        atlas.AtlasConfig(rho=rho),
        steps=config.steps,
        optimizer=atlas.atlas_optimizer(rate),
    ).params


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)
    test, streams = m.split("test"), m.split("stream")
    ways = [(what, name) for what in ("LayerNorm", "aTLAS") for name in OBJECTIVES]
    right: dict[str, dict[str, float]] = {"base": {}}
    fallen = {f"{what}, {name}": {"collapsed tasks": 0} for what, name in ways}
    for task in track(bench.tasks, f"tasks, seed {seed}"):
        right["base"][task] = bench.accuracy(bench.base, task)
        for what, name in ways:
            params = adapt(m, task, name, what, config, seed)
            found = m.logits(params, {task: streams[task]})[task]
            fallen[f"{what}, {name}"]["collapsed tasks"] += collapsed(found)
            of_test = m.logits(params, {task: test[task]})[task].argmax(-1)
            labels = bench.data[task]["test"]["labels"]
            rows = right.setdefault(f"{what}, {name}", {})
            rows[task] = float(np.mean(of_test == labels))
    rows = {name: with_mean(row) for name, row in right.items()}
    return {"rows": rows | {"individual": m.individual()}, "collapsed": fallen}


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Adapts in all ways for every seed; writes tables."""
    results = per_seed(config, out, models, run)
    parts = {
        "Test accuracy, %": "rows",
        "Tasks of which one class is named nearly always": "collapsed",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/atlas_test_time_quick")
) -> None:
    """A minute: a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/atlas_test_time"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
