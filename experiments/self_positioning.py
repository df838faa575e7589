"""Self Positioning: can merging replace the choice of how to mix unequal tasks?

The last layer of a sentence encoder (all-MiniLM-L6-v2) is fine-tuned on few pairs of
similar sentences and on ten times as many pairs of requests with one intent, each task
alone and both together; the single ones are merged in all ways.

Command:  python experiments/self_positioning.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 20.
Expect:   mean score 73.5 %, joint training 73.1, TIES 71.9, SLERP half way 72.2, the
          best of a grid of 55 positions 73.4.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress, track

from experiments.kept import kept
from experiments.self_positioning_baselines import (
    more,
    number_of,
    shared_out,
    single_models,
    tuned,
)
from experiments.self_positioning_bench import TASKS, Bench, fisher
from experiments.self_positioning_bench import Config as BenchConfig
from experiments.self_positioning_data import Sizes
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.slerp import gramian
from mtjax.systems import self_positioning
from mtjax.systems.self_positioning import Rule, SelfPositioningConfig, direction
from mtjax.training import seed_table
from mtjax.training.run_config import open_run_folder


@dataclass(frozen=True)
class Config:
    """What is trained, merged and searched."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    growth: tuple[int, ...] = (12, 25, 50, 100, 200)  # batches of the larger task
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the smaller task, resampled
    mus: tuple[float, ...] = (0.0, 0.01, 0.05, 0.2)
    probe: int = 8  # batches per task that are searched on
    passes: int = 5  # through them
    search_rate: float = 0.05  # of Adam
    fractions: tuple[float, ...] = tuple(i / 10 for i in range(11))  # of the grid
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    seeds: int = 3


QUICK = Config(
    BenchConfig(None, Sizes(60, 240, 40, 60, 60), batch_size=12, fisher_examples=8),
    growth=(5, 10, 20),
    shares=(0.5,),
    mus=(0.0, 0.2),
    probe=2,
    passes=3,
    fractions=(0.0, 0.5, 1.0),
    scales=(0.5, 1.0),
    seeds=1,
)


def search(
    bench: Bench,
    vectors: Any,
    config: Config,
    title: str,
    mu: float,
    split: str = "train",
    rule: Rule = "slerp-mean",
) -> self_positioning.Positioned:
    """Self Positioning on pairs of both tasks, with hard negatives."""
    rows = {task: bench.rows(task, split) for task in TASKS}
    probe = [
        {t: bench.batch(t, split, next(rows[t]), hard=True) for t in TASKS}
        for _ in range(config.probe)
    ]
    steps = config.probe * config.passes
    with Progress() as progress:
        bar = progress.add_task(title, total=steps)
        return self_positioning.fit(
            bench.embed,
            bench.base,
            vectors,
            itertools.cycle(probe),
            SelfPositioningConfig(rule, mu, bench.config.temperature),
            steps=steps,
            optimizer=optax.adam(config.search_rate),
            on_step=lambda *_: progress.advance(bar),
        )


def run(config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    bench = Bench(config.bench, seed)
    passes = number_of(bench)

    # What happens without merging.
    single, stages = single_models(bench, config.growth)
    models = {"base": bench.base} | {f"{t} alone": x for t, x in single.items()}
    models["joint"] = tuned(bench, passes)
    for share in config.shares:
        number = shared_out(passes, share, "total")
        models[f"joint, {share:.0%} sts"] = tuned(bench, number)

    # What happens to the vectors.
    of = lambda found: merging.task_vectors(bench.base, found)
    vectors = of(single)
    pairs = [n * config.bench.batch_size for n in config.growth]
    growth = self_positioning.norm_growth(of(stages), pairs)
    three = self_positioning.angles(of([*single.values(), models["joint"]]))

    # Merging without learning.
    products, base = gramian(vectors), bench.base
    lengths = jnp.sqrt(jnp.diagonal(products))
    models["average"] = merging.average()(None, single)
    ties = merging.ties(0.2).vector(base, single)
    models["TIES"] = jax.tree.map(jnp.add, base, ties)
    longer = float(jnp.mean(lengths) / optax.tree.norm(ties))
    models["TIES, rescaled"] = jax.tree.map(lambda x, y: x + longer * y, base, ties)
    fishers = {task: fisher(bench, single[task], task) for task in TASKS}
    models["Fisher"] = merging.fisher_average(single, fishers, normalise=True)

    def at(rule, fraction, scale):
        weights = jnp.array([1 - fraction, fraction], jnp.float32)
        return merging.merge(base, vectors, scale * direction(products, weights, rule))

    models["SLERP, half way"] = at("slerp-mean", 0.5, 1.0)
    places = [*itertools.product(config.fractions, config.scales)]
    grids, best = {}, {}
    for name, rule in (("average", "average"), ("SLERP", "slerp-mean")):
        grids[name] = [
            bench.scores(at(rule, *place), "validation")["mean"]
            for place in track(places, f"grid of {name}, seed {seed}")
        ]
        best[name] = places[int(np.argmax(grids[name]))]
        models[f"{name}, grid"] = at(rule, *best[name])

    # Merging that learns.
    find = lambda title, *more: search(bench, vectors, config, title, *more)
    found = {f"SP, {mu:g}": find(f"mu {mu:g}, seed {seed}", mu) for mu in config.mus}
    found["SP, 0, held out"] = find(f"held out, seed {seed}", 0.0, "held-out")
    found["SP, 0, average"] = find(f"average, seed {seed}", 0.0, "train", "average")
    models |= {name: place.params for name, place in found.items()}
    tests = track(models.items(), f"test, seed {seed}")
    return {
        "rows": {name: bench.scores(params, "test") for name, params in tests},
        "positions": {name: position(place, config) for name, place in found.items()}
        | {
            f"{name}, grid": {"fraction of sts": place[0], "scale": place[1]}
            for name, place in best.items()
        },
        "vectors": {
            "joint": {
                "angle to intent": three[2, 0],
                "angle to sts": three[2, 1],
                "intent to sts": three[0, 1],
                **{f"norm of {t}": float(n) for t, n in zip(TASKS, lengths)},
                "R squared": growth.r_squared,
            }
        },
        "norms": growth.norms.tolist(),
        "grids": grids,
    }


def position(found: self_positioning.Positioned, config: Config) -> dict[str, float]:
    """Where a search ended, and the loss of the probe in its first and last pass."""
    loss, few = np.mean([*found.losses.values()], axis=0), config.probe
    return {
        "fraction of sts": float(found.weights[1] / found.weights.sum()),
        "scale": found.scale,
        "of intent": float(found.coefficients[0]),
        "of sts": float(found.coefficients[1]),
        "first pass": float(loss[:few].mean()),
        "last pass": float(loss[-few:].mean()),
    }


def plot(results: list[dict[str, Any]], config: Config) -> Figure:
    """Norms over amounts of data, and the places that were searched and found."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pairs = [n * config.bench.batch_size for n in config.growth]
    for result in results:
        left.plot(pairs, result["norms"], "o-", color="0.4")
    left.set(xlabel="training pairs (intent)", ylabel="norm of the task vector")
    shape = len(config.fractions), len(config.scales)
    mean = np.mean([r["grids"]["SLERP"] for r in results], axis=0).reshape(shape)
    drawn = right.pcolormesh(config.fractions, config.scales, mean.T, cmap="Greys")
    figure.colorbar(drawn, ax=right, label="mean score, validation, %")
    names = [f"SP, {mu:g}" for mu in config.mus] + ["SP, 0, held out", "SLERP, grid"]
    for name, color in method_colors(names).items():
        places = [r["positions"][name] for r in results]
        x, y = ([p[axis] for p in places] for axis in ("fraction of sts", "scale"))
        right.plot(x, y, "o", color=color, label=name)
    right.set(xlabel="fraction of sts", ylabel="scale")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.25, 0.5))
    return figure


def main(config: Config, out: Path) -> list[dict[str, Any]]:
    """Trains and merges in all ways for every seed; writes tables and a figure."""
    open_run_folder(out, config)
    results = []
    for seed in range(config.seeds):
        results.append(kept(out / f"seed_{seed}.json", partial(run, config, seed)))
        later = partial(more, config.bench, config.shares, seed)
        results[-1]["rows"] |= kept(out / f"more_{seed}.json", later)
    parts = {
        "Test scores, %": "rows",
        "Positions, and loss of the probe, nats": "positions",
        "Angles in degrees, and norms": "vectors",
    }
    lines = []
    for title, part in parts.items():
        rows = {name: [r[part][name] for r in results] for name in results[0][part]}
        lines.append(f"{title}:\n\n{seed_table(rows)}\n")
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results, config).savefig(out / "self_positioning.png", dpi=110)
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/self_positioning_quick")
) -> None:
    """Seconds: docstrings of NumPy and a tiny encoder."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/self_positioning")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
