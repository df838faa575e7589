"""Learnt merging of text encoders: AdaMerging and Twin-Merging on MiniLM.

The fine-tuned encoders of the text merge-bench are merged by coefficients that are
learnt on unlabelled test sentences, and into a shared expert with compressed vectors of
all tasks, which a router mixes for every sentence; beside task arithmetic TA.

Command:  python -m experiments.text_learned_merging paper --config.bench.data-dir DATA
          (data and packages as in text_merge_bench.py; the models are those of its run
          folder, or are trained first)
Machine:  two CPU cores.    Minutes: 15 per seed, models included.
Expect:   of the individual accuracy layer-wise AdaMerging keeps 96.5 %, TA 95.7 (tuned
          on labels), Twin-Merging 98.5: docs/studies/text_merge_bench.md
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments import text_merge_bench_models as texts
from experiments.adamerging import adapt
from experiments.merge_bench_measures import mean_entropy
from experiments.merge_bench_seeds import per_seed, table
from experiments.text_merge_bench_training import Kind
from experiments.twin_merging_measures import Twin, nbytes
from mtjax.merging.coefficients import clamped_share
from mtjax.systems.adamerging import AdaMergingConfig, collapsed
from mtjax.systems.twin_merging import RouterConfig, TwinMergingConfig


@dataclass(frozen=True)
class Config:
    """What is merged, and how it is learnt."""

    bench: texts.Config = field(default_factory=lambda: texts.Config(seeds=3))
    kind: Kind = "full"  # of the fine-tunings
    seeds: int = 3  # of the fine-tunings, the order of the stream and the router
    steps: int = 100  # of Adam on the coefficients
    batch_size: int = 16  # unlabelled sentences per task and step
    learning_rate: float = 1e-2
    value: float = 0.3  # of all coefficients at the start
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0)  # tried for TA
    router: RouterConfig = field(default_factory=RouterConfig)
    rate: float = 0.9  # of singular directions that Twin-Merging leaves out


QUICK = Config(
    texts.QUICK,
    seeds=1,
    steps=5,
    scales=(0.3, 1.0),
    router=RouterConfig(epochs=10, batch_size=64, learning_rate=3e-3),
)


def run(bench: texts.TextBench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    twin = Twin(bench, config.router, config.scales, jax.random.key(seed))
    measures, one = twin.measures, nbytes(bench.base)
    stream = measures.split("test")
    models = measures.unlearned(twin.scale)
    entropies, outside = {}, {}
    for granularity in ("task", "layer"):
        found = adapt(
            measures,
            measures.vectors,
            stream,
            AdaMergingConfig(granularity, config.value),
            f"{granularity}-wise",
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=seed,
        )
        name = f"AdaMerging, {granularity}-wise"
        models[name], total = found.params, sum(found.entropies.values())
        entropies[name] = {"first": float(total[0]), "last": float(total[-1])}
        last = {group: path[-1] for group, path in found.trajectory.items()}
        outside[name] = {"outside [0, 1], %": 100 * clamped_share(last)}
    rows, about = {}, {}
    for name, params in models.items():
        rows[name] = twin.fixed(dict.fromkeys(bench.tasks, params), one)
        logits = measures.logits(params, stream)
        about[name] = {
            "entropy, nats": mean_entropy(logits),
            "collapsed tasks": sum(map(collapsed, logits.values())),
        }
    rows["fine-tuned"] = twin.fixed(bench.models, len(bench.tasks) * one)
    experts = twin.experts(TwinMergingConfig(rho=config.rate))
    routed = twin.learned(experts)
    rows["Twin"] = routed["heads"]
    rows["Twin, heads routed"] = routed["routed heads"]
    rows["Twin, equal weights"] = twin.weighted(experts, uniform=True)
    rows["Twin, oracle"] = twin.weighted(experts)
    right = {task: routed["router"][task] for task in (*bench.tasks, "mean")}
    return {
        "rows": rows,
        "predictions": about,
        "stream": entropies,
        "clamp": outside,
        "router": {"accuracy, %": right},
        "scale": {"TA (tuned)": {"scale": twin.scale}},
    }


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Merges in all ways for every seed; writes a table."""
    prepare = lambda bench, seed, folder: texts.prepare(
        bench, config.kind, seed, folder
    )
    results = per_seed(config, out, models, run, prepare)
    titles = {
        "rows": "Test accuracy, %, and size",
        "predictions": "Predictions on the stream",
        "stream": "Entropy of a batch, summed over tasks, nats",
        "clamp": "Coefficients that the clamp changed",
        "router": "Router on test sentences",
        "scale": "Task arithmetic",
    }
    parts = [f"{text}:\n\n{table(results, part)}\n" for part, text in titles.items()]
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/text_learned_merging_quick")
) -> None:
    """A minute: drawn sentences, a tiny encoder."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/text_learned_merging"),
    models: Path = Path("runs/text_merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
