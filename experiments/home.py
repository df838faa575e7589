"""HoME on the census: do its experts live, and does it pay?

Four tasks in two categories (work and life). HoME, mixtures of experts of the same
number of parameters and with a learning rate tuned likewise, and HoME without one
component at a time; then a learning rate that is too high, to see which experts die.

Command:  python experiments/home.py paper --config.data-dir DATA
Machine:  two CPU cores.    Minutes: about 40.
Expect:   HoME is 0.2 points of mean AUC ahead of MMoE, CGC and PLE; at the high rate
          an expert with ReLU says 0 three times of four, none with norm and Swish does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import mtjax
from experiments import home_models as models
from experiments.ranking_training import (
    Training,
    evaluate,
    fit,
    made_up,
    num_parameters,
    per_method,
)
from mtjax.analysis import ExpertUtilisation, expert_utilisation
from mtjax.analysis.expert_failures import expert_failures
from mtjax.analysis.plots import method_colors, plot_gates
from mtjax.data.ranking_census import census_ranking
from mtjax.systems.home import HoMEConfig
from mtjax.training import seed_table


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained."""

    data_dir: Path | None = None
    made_up: bool = False  # a few random numbers in place of the census
    home: HoMEConfig = field(
        default_factory=lambda: HoMEConfig(
            *(2, 2, 1, 1, 1), widths=(16,), rank=8, tower=(16,), dropout=0.0
        )
    )
    baselines: tuple[str, ...] = ("shared bottom", "MMoE", "MMoE*", "CGC", "PLE")
    ablations: tuple[str, ...] = (
        *(
            "no feature gate",
            "no self-gate",
            "no hierarchy",
            "no norm",
            "ReLU, no norm",
        ),
        *("no task experts", "own level-2 input", "uncertainty weighting"),
    )
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    high_rate: float = 1e-2  # at which experts are watched
    watched: tuple[str, ...] = ("MMoE", "MMoE*", "ReLU, no norm", "HoME")
    training: Training = field(default_factory=lambda: Training(epochs=5))
    seeds: int = 3


QUICK = Config(
    made_up=True,
    baselines=("MMoE*", "PLE"),
    ablations=("no self-gate",),
    learning_rates=(1e-2,),
    watched=("HoME",),
    training=Training(epochs=2, batch_size=64),
    seeds=1,
)


class Runs:
    """Trains methods on one problem."""

    def __init__(self, config: Config):
        """Remembers what to do; the data are loaded when they are first needed."""
        self.config = config

    @cached_property
    def problem(self):
        """The data."""
        if self.config.made_up:
            return made_up(tuple(models.CATEGORIES))
        return census_ranking("home", data_dir=self.config.data_dir)

    def train(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Scores on the test examples, and what the experts do there."""
        config, problem = self.config, self.problem
        make = models.home if name in models.ABLATIONS else models.baseline
        model = make(name, problem, config.home)
        training = replace(config.training, learning_rate=rate)
        balancer = None
        if name == "uncertainty weighting":
            balancer = mtjax.uw(len(problem.tasks), optimizer=optax.adam(rate))
        found = fit(model, problem, training, seed=seed, balancer=balancer)
        scores: dict[str, Any] = evaluate(model, found.variables, problem, "test")
        scores |= {"parameters": num_parameters(found.variables), "rate": rate}
        scores |= {"seconds": found.seconds, "validation": max(found.aucs)}
        if name == "shared bottom":
            return scores
        size = min(4096, len(problem.test["numeric"]))
        starts = range(0, len(problem.test["numeric"]) - size + 1, size)
        rows = lambda i: jax.tree.map(lambda x: x[i : i + size], problem.test)
        use = expert_utilisation(model, found.variables, map(rows, starts))
        return scores | self.look(name, use)

    def look(self, name: str, use: ExpertUtilisation) -> dict[str, Any]:
        """Numbers about the experts, of all levels and of those that tasks weigh."""
        short = lambda d: {path.removeprefix("body/"): x for path, x in d.items()}
        rates, variances = short(use.zero_rate), short(use.variance)
        # Of PLE's levels the last one is what towers read.
        gates = [w for k, w in sorted(use.weights.items()) if k.endswith("task_gates")][
            -1
        ]
        # Experts that a single gate may use; masked weights are exactly 0.
        own = (gates > 0) & ((gates > 0).sum(0) == 1)[None]
        zeros = np.concatenate(
            [rates[path] for path in models.weighed(name) if path in rates]
        )
        spread = [v.max() / max(v.min(), 1e-6) for v in variances.values()]
        found = {
            "largest zero rate": float(max(x.max() for x in rates.values())),
            "variance ratio": float(max(spread)),
            "zero rates": [float(x) for v in rates.values() for x in v],
            "gates": gates.tolist(),
            "failures": expert_failures(gates, zeros, own)._asdict(),
        }
        if own.any():
            share = np.where(own, gates, 0).sum(1)[self.problem.tasks.index("income")]
            found["own share, income"] = float(share)
        return found

    def tune(self, name: str, seed: int) -> dict[str, Any]:
        """The training with the learning rate of the best validation AUC."""
        tried = [self.train(name, rate, seed) for rate in self.config.learning_rates]
        return max(tried, key=lambda found: found["validation"])


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> str:
    """Numbers per method, AUC in per cent; differences are of paired seeds."""
    rows = {}
    for name, found in runs.items():
        rows[name] = []
        for row, base in zip(found, runs[reference]):
            line = {k: 100 * v for k, v in row.items() if k.endswith("AUC")}
            line[f"to {reference}"] = 100 * (row["mean AUC"] - base["mean AUC"])
            numbers = {k: v for k, v in row.items() if isinstance(v, float | int)}
            keep = ("largest zero rate", "variance ratio", "own share, income")
            keep += ("parameters", "rate", "seconds")
            rows[name].append(line | {k: numbers[k] for k in keep if k in numbers})
    return seed_table(rows)


def plot_zero_rates(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Every expert of every seed a point: how often it says 0."""
    figure = Figure(figsize=(7.2, 0.5 * len(runs) + 1.2), layout="constrained")
    ax, rng = figure.subplots(), np.random.default_rng(0)
    for i, (name, color) in enumerate(method_colors(list(runs)).items()):
        rates = np.concatenate([row["zero rates"] for row in runs[name]])
        noise = i + rng.uniform(-0.25, 0.25, len(rates))
        ax.scatter(rates, noise, s=14, alpha=0.6, color=color, linewidths=0)
    ax.axvline(0.9, color="0.6", linewidth=1)
    ax.set_yticks(range(len(runs)), list(runs))
    ax.set(xlabel="share of outputs that are 0", xlim=(-0.02, 1.02))
    ax.invert_yaxis()
    return figure


def main(config: Config, out: Path) -> dict[str, Any]:
    """Trains everything that is not there yet, writes tables and figures."""
    runs = Runs(config)
    run = partial(per_method, config, out)
    compared = (*config.baselines, "HoME")
    tuned = run({n: partial(runs.tune, n) for n in compared}, 1, prefix="tuned")
    rate = lambda name: tuned[name if name in compared else "HoME"][0]["rate"]

    def train(name: str, seed: int) -> dict[str, Any]:
        if seed == 0 and name in compared:
            return tuned[name][0]
        return runs.train(name, rate(name), seed)

    both = {n: partial(train, n) for n in (*compared, *config.ablations)}
    results = run(both, config.seeds)
    high = {n: partial(runs.train, n, config.high_rate) for n in config.watched}
    watched = run(high, config.seeds, prefix="high")
    texts = table(results, "HoME"), table(watched, "HoME")
    (out / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    mean = {
        name: np.mean([row["gates"] for row in found], axis=0)
        for name, found in results.items()
        if "gates" in found[0] and name in ("MMoE*", "CGC", "PLE", "HoME")
    }
    plot_gates(mean, gates=runs.problem.tasks).savefig(out / "home_gates.png", dpi=110)
    plot_zero_rates(watched).savefig(out / "home.png", dpi=110)
    return {"results": results, "watched": watched}


def quick(config: Config = QUICK, out: Path = Path("runs/home_quick")) -> None:
    """Seconds, without data: what the script does."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/home")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
