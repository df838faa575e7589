"""AdaMerging: unseen tasks, short streams, and whether entropy stands for the loss.

Layer-wise coefficients of the merge-bench's models are learnt without some tasks and
tried on these, and from a small part of the stream. Then the order of test images by
entropy is compared with that by loss.

Command:  python experiments/adamerging_ablations.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 15, and 20 for the models.
Expect:   seen tasks gain 1 point over the scale 0.3, unseen ones lose 2; a tenth of the
          stream is as good as all of it; entropy and loss correlate, 0.9 by image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from optax.losses import softmax_cross_entropy_with_integer_labels
from scipy.stats import spearmanr

from experiments import merge_bench_models as merge_bench
from experiments.adamerging import adapt
from experiments.merge_bench_measures import Inputs, Measures, mean_entropy
from experiments.merge_bench_seeds import per_seed, table
from mtjax.losses import entropy_loss
from mtjax.systems.adamerging import AdaMergingConfig

PAIRS = (("mnist", "fashion"), ("kmnist", "kannada"), ("notmnist", "usps"))


@dataclass(frozen=True)
class Config:
    """What is left out."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    seeds: int = 3  # of the fine-tunings and of the order of the stream
    steps: int = 500  # of Adam on the coefficients
    batch_size: int = 16  # unlabelled images per task and step
    learning_rate: float = 1e-3
    scales: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))  # tried for TA
    unseen: tuple[tuple[str, ...], ...] = PAIRS  # tasks that are left out together
    fractions: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 1.0)  # of the stream
    bins: int = 20  # of as many images each, sorted by entropy


QUICK = Config(
    merge_bench.QUICK,
    seeds=1,
    steps=5,
    scales=(0.2, 0.4),
    unseen=(("digits_180", "digits_270"),),
    fractions=(0.1, 1.0),
    bins=5,
)
Learn = Callable[[Measures, Inputs, str], merge_bench.Params]


def unseen(m: Measures, config: Config, learn: Learn) -> dict[str, dict[str, float]]:
    """Mean accuracy on tasks whose vectors are merged, and on the others."""
    rows: dict[str, dict[str, list[float]]] = {}
    for others in config.unseen:
        known = tuple(t for t in m.bench.tasks if t not in others)
        models = {t: m.bench.models[t] for t in known}
        part = Measures(replace(m.bench, tasks=known, models=models))
        _, merged = part.fixed(config.scales)
        title = f"without {', '.join(others)}"
        merged["layer-wise"] = learn(part, part.split("stream"), title)
        for name, params in merged.items():
            found, row = m.accuracy(params, "test"), rows.setdefault(name, {})
            row.setdefault("seen", []).append(mean_of(found, known))
            row.setdefault("unseen", []).append(mean_of(found, others))
            row[title] = [mean_of(found, others)]
    return {n: {k: float(np.mean(x)) for k, x in r.items()} for n, r in rows.items()}


def mean_of(accuracy: dict[str, float], tasks: tuple[str, ...]) -> float:
    """Over some tasks."""
    return float(np.mean([accuracy[t] for t in tasks]))


def partial_streams(
    m: Measures, config: Config, learn: Learn
) -> tuple[dict[str, dict[str, float]], merge_bench.Params]:
    """By the part of the stream that is there; and the model of the last one."""
    stream, test = m.split("stream"), m.split("test")

    def row(params, images):
        return {
            "images per task": float(np.mean([len(x) for x in images.values()])),
            "accuracy": m.accuracy(params, "test")["mean"],
            "entropy, test": mean_entropy(m.logits(params, test)),
            "entropy, these images": mean_entropy(m.logits(params, images)),
        }

    params = m.scaled(0.3)
    rows = {"start, TA (0.3)": row(params, stream)}
    for fraction in config.fractions:
        size = lambda x, fraction=fraction: max(1, round(fraction * len(x)))
        few = {t: x[: size(x)] for t, x in stream.items()}
        params = learn(m, few, f"{100 * fraction:g} %")
        rows[f"{100 * fraction:g} %"] = row(params, few)
    return rows, params


def correlations(
    m: Measures, params: merge_bench.Params, bins: int
) -> dict[str, float]:
    """Rank correlation of entropy and loss over images, over bins, over tasks."""
    labels, loss = m.labels("test"), softmax_cross_entropy_with_integer_labels
    row, binned, means = {}, [], []
    for task, logits in m.logits(params, m.split("test")).items():
        entropies = jax.vmap(entropy_loss)(jnp.array(logits))
        both = np.stack([entropies, loss(jnp.array(logits), jnp.array(labels[task]))])
        row[task] = float(spearmanr(*both)[0])
        parts = np.array_split(both[:, np.argsort(both[0])], bins, axis=1)
        binned.append(float(spearmanr(*zip(*[x.mean(1) for x in parts]))[0]))
        means.append(both.mean(1))
    return row | {
        "mean": float(np.mean([*row.values()])),
        f"{bins} bins": float(np.mean(binned)),
        "tasks": float(spearmanr(*zip(*means))[0]),
    }


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)

    def learn(part, images, title):
        return adapt(
            part,
            part.vectors,
            images,
            AdaMergingConfig("layer"),
            title,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=seed,
        ).params

    rows, last = partial_streams(m, config, learn)
    models = {"base": bench.base, "TA (0.3)": m.scaled(0.3), "layer-wise": last}
    return {
        "unseen": unseen(m, config, learn),
        "partial": rows,
        "correlation": {n: correlations(m, p, config.bins) for n, p in models.items()},
    }


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Learns in all ways for every seed; writes tables."""
    results = per_seed(config, out, models, run)
    parts = {
        "Test accuracy, %, on tasks that were merged and on others": "unseen",
        "Test accuracy, %, and entropy by the part of the stream": "partial",
        "Spearman correlation of entropy and loss on test images": "correlation",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/adamerging_ablations_quick")
) -> None:
    """A minute: a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/adamerging_ablations"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
