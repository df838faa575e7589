"""Twin-Merging: does a router bring back what merging loses, and at which size?

One small ViT, fine-tuned on several image sets, is merged into one model (average, task
arithmetic TA, TIES) and into a shared expert with compressed vectors of all tasks. They
are mixed for every image: by a learned router, by an oracle that knows the task, or all
alike.

Command:  python experiments/twin_merging.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 5 per seed, and 20 for the models.
Expect:   of fine-tuned accuracy 95 % with the learned router, 99 with the oracle, 90
          for TA; the router is right on 84 % of test images.
"""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from experiments.merge_bench_models import QUICK as QUICK_BENCH
from experiments.merge_bench_models import Bench
from experiments.merge_bench_models import Config as BenchConfig
from experiments.merge_bench_seeds import per_seed, table
from experiments.twin_merging_measures import (
    Twin,
    costs,
    disjoint,
    entropies,
    first,
    nbytes,
    shorter,
    with_one_vector,
)
from mtjax.analysis.plots import method_colors
from mtjax.systems.twin_merging import RouterConfig, TwinMergingConfig

METHODS = {
    "SVD": TwinMergingConfig(),
    "magnitude": TwinMergingConfig(method="magnitude"),
    "random": TwinMergingConfig(method="bernoulli"),
}
TWIN = "Twin, SVD 0.9"  # the default


@dataclass(frozen=True)
class Config:
    """What is merged, and how vectors are compressed and routed."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    seeds: int = 3  # of the fine-tunings, the router and random elements
    rates: tuple[float, ...] = (0.5, 0.9, 0.99)  # that are left out
    router: RouterConfig = field(default_factory=RouterConfig)
    scales: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))  # tried for TA
    numbers: tuple[int, ...] = (2, 4)  # of tasks, the first ones; beside all
    steps: tuple[int, ...] = (150,)  # of shorter fine-tunings, beside the full one
    halves: tuple[str, str] = ("attention", "mlp")  # leaves that do not overlap


QUICK = Config(
    QUICK_BENCH,
    seeds=1,
    rates=(0.9, 0.99),
    router=RouterConfig(epochs=20, batch_size=64, learning_rate=3e-3),
    scales=(0.2, 0.4),
    numbers=(2,),
    steps=(50,),
)


def run(bench: Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    twin = Twin(bench, config.router, config.scales, jax.random.key(seed))
    one, tasks = nbytes(bench.base), bench.tasks
    models = twin.measures.unlearned(twin.scale)
    rows = {n: twin.fixed(dict.fromkeys(tasks, p), one) for n, p in models.items()}
    rows["fine-tuned"] = twin.fixed(bench.models, len(tasks) * one)
    default = twin.experts()
    found = twin.learned(default)
    router = found["router"]
    rows[f"{TWIN}, heads routed"] = found["routed heads"]
    rows[f"{TWIN}, equal weights"] = twin.weighted(default, uniform=True)
    variants = [*itertools.product(METHODS, config.rates)]
    for method, rate in track(variants, f"seed {seed}"):
        experts = twin.experts(replace(METHODS[method], rho=rate))
        name = f"Twin, {method} {rate}"
        rows[name] = twin.learned(experts)["heads"]
        rows[f"{name}, oracle"] = twin.weighted(experts)
    curves = {}
    for number in (*config.numbers, len(tasks)):
        some = replace(twin, bench=first(bench, number))
        found = {"TA (tuned)": some.of_shared()}
        found[TWIN] = some.learned(some.experts())["heads"]
        curves[number] = {name: row["normalised"] for name, row in found.items()}
    lengths = {n: shorter(twin, replace(config.bench, steps=n)) for n in config.steps}
    lengths[config.bench.steps] = with_one_vector(twin)
    right = {t: router[t] for t in (*tasks, "mean")}
    return {
        "rows": rows,
        "router": {"accuracy, %": right, "entropy, nats": entropies(twin)},
        "tasks": {f"{number} tasks": row for number, row in curves.items()},
        "steps": {f"{steps} steps": row for steps, row in lengths.items()},
        "disjoint": {"no overlap": disjoint(twin, *config.halves)},
        "cost": costs(twin, default),
        "scale": twin.scale,
    }


def plot(results: list[dict[str, Any]], rates: tuple[float, ...]) -> Figure:
    """Normalised accuracy over the size, and over the number of tasks."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    of = lambda name, key: [r["rows"][name][key] for r in results]
    for method, color in method_colors([*METHODS]).items():
        for end, style in (("", "o-"), (", oracle", "x:")):
            names = [f"Twin, {method} {rate}{end}" for rate in rates]
            values = np.array([of(name, "normalised") for name in names])
            sizes = np.mean([of(name, "MB") for name in names], axis=1)
            left.plot(sizes, values.mean(1), style, color=color, label=method + end)
            low, high = values.min(1), values.max(1)
            left.fill_between(sizes, low, high, color=color, alpha=0.1, linewidth=0)
    for name, style in (("TA (tuned)", "--"), ("fine-tuned", ":")):
        left.axhline(
            np.mean(of(name, "normalised")), color="grey", ls=style, label=name
        )
    left.set(xlabel="MB of all that is stored", ylabel="normalised accuracy, %")
    left.legend(frameon=False)
    numbers = [int(name.split()[0]) for name in results[0]["tasks"]]
    for name, color in method_colors(["TA (tuned)", TWIN]).items():
        values = np.array([[row[name] for row in r["tasks"].values()] for r in results])
        right.plot(numbers, values.mean(0), "o-", color=color, label=name)
        style = {"color": color, "alpha": 0.12, "linewidth": 0}
        right.fill_between(numbers, values.min(0), values.max(0), **style)
    right.set(xlabel="tasks", ylabel="normalised accuracy, %", xticks=numbers)
    right.legend(frameon=False)
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Merges in all ways for every seed; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    titles = {
        "rows": "Test accuracy, %, and size",
        "router": "Router on test images; entropy of its weights without the last task",
        "tasks": "Normalised accuracy by number of tasks, %",
        "steps": "Normalised accuracy by length of the fine-tunings, %",
        "disjoint": "Normalised accuracy of vectors that share no parameter, %",
        "cost": "Time and memory",
    }
    lines = [f"{text}:\n\n{table(results, part)}\n" for part, text in titles.items()]
    lines.append(f"Scales of TA: {', '.join(str(r['scale']) for r in results)}.\n")
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results, config.rates).savefig(out / "twin_merging.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/twin_merging_quick")) -> None:
    """A minute or two: small models of four turned digits."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/twin_merging"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
