"""APEM on a chain of three steps of the census: do steps pick different patterns?

In the labour force, the full year, with more than 50,000 dollars of income. APEM,
rankers of its number of parameters with a learning rate tuned likewise (MMoE also in
its usual, larger size), APEM without one component, and labels that come late.

Command:  python experiments/apem.py paper --config.data-dir DATA
Machine:  two CPU cores.    Minutes: about 40.
Expect:   APEM is 0.1 points of mean AUC behind rankers of its size; all fields beside
          its patterns bring 0.3; steps pick different patterns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.core import FrozenDict
from matplotlib.figure import Figure

from experiments.ranking_training import (
    Training,
    fit,
    made_up,
    num_parameters,
    per_method,
    predict,
)
from experiments.recsys_study import matched, ranker, size_of
from mtjax.analysis.pattern_selection import pattern_selection
from mtjax.analysis.plots import plot_gates
from mtjax.data.ranking import RankingProblem
from mtjax.data.ranking_census import census_ranking
from mtjax.losses.delayed_feedback import mature_labels
from mtjax.systems.apem import APEMConfig, TableAPEM, apem_losses
from mtjax.training import AVERAGE_PRECISION, click_metrics, seed_table

# What differs from the configured APEM.
ABLATIONS: dict[str, dict[str, Any]] = {
    "MLP for groups": {"extractor": "mlp"},
    "no excitation": {"excite": "none"},
    "mean of patterns": {"selector": "mean"},
    "one selection": {"selector": "shared"},
    "fixed indicators": {"adaptive": False},
    "top 3 patterns": {"top_k": 3},
    "all fields beside": {"pooled": "flat"},
    "transfer": {"transfer": True},
    "product": {"product": True},
    "no penalty": {},
    "late are negative": {},
    "late are masked": {},
}


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained."""

    data_dir: Path | None = None
    made_up: bool = False  # a few random numbers in place of the census
    apem: APEMConfig = field(default_factory=lambda: APEMConfig(dropout=0.0))
    width: int = 8  # of embeddings, in all models
    penalty: float = 0.6
    baselines: tuple[str, ...] = ("shared bottom", "MMoE", "MMoE, 8 x 16", "AITM")
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    training: Training = field(default_factory=Training)
    seeds: int = 3


QUICK = Config(
    made_up=True,
    apem=APEMConfig(groups=3, blocks=1, tower=(8,), dropout=0.0),
    width=4,
    baselines=("MMoE",),
    ablations=("top 3 patterns", "late are masked"),
    learning_rates=(1e-2,),
    training=Training(epochs=2, batch_size=64),
    seeds=1,
)


def with_late_labels(problem: RankingProblem, masked: bool) -> RankingProblem:
    """A log where the last step takes up to one unit of time to be seen.

    Examples are up to two units old. What is not seen yet is 0, or masked with all
    others that are younger than one.
    """
    labels, last = problem.train["labels"], problem.tasks[-1]
    rng = np.random.default_rng(0)
    age = rng.uniform(0, 2, len(labels[last])).astype(np.float32)
    seen = np.where(rng.uniform(0, 1, len(age)) <= age, labels[last], 0)
    labels = jax.tree.map(jnp.asarray, labels | {last: seen.astype(np.float32)})
    if masked:
        labels = mature_labels(labels, jnp.asarray(age), {last: 1.0})
    return replace(problem, train={**problem.train, "labels": labels})


class Runs:
    """Trains methods on one problem."""

    def __init__(self, config: Config):
        """Remembers what to do; the data are loaded when they are first needed."""
        self.config = config

    @cached_property
    def problem(self) -> RankingProblem:
        """The data."""
        real = lambda: census_ranking("chain", data_dir=self.config.data_dir)
        return made_up(("start", "go on", "end")) if self.config.made_up else real()

    def apem(self, changes: Mapping[str, Any] = FrozenDict()) -> nn.Module:
        """APEM with all numbers as fields."""
        return TableAPEM(
            self.problem.tasks,
            FrozenDict(self.problem.vocabulary_sizes),
            len(self.problem.numbers),
            self.config.width,
            replace(self.config.apem, **changes),
        )

    def baseline(self, name: str) -> nn.Module:
        """A ranker of APEM's number of parameters beside embeddings, or MMoE's own."""
        (kind, _, own), problem = name.partition(", "), self.problem
        target, width = size_of(self.apem(), problem), self.config.width
        size = 16 if own else matched(kind, problem, problem.tasks, target, width)
        return ranker(kind, problem, problem.tasks, size, width)

    def train(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Scores on the test examples, and what is picked there."""
        config, problem = self.config, self.problem
        baseline = name in config.baselines
        model = self.baseline(name) if baseline else self.apem(ABLATIONS.get(name, {}))
        if name.startswith("late"):
            problem = with_late_labels(problem, name == "late are masked")
        without = name == "no penalty" or (baseline and name != "AITM")
        penalty = 0.0 if without else config.penalty
        losses = partial(apem_losses, chain=problem.tasks, penalty=penalty)
        training = replace(config.training, learning_rate=rate)
        found = fit(model, problem, training, seed=seed, losses_fn=losses)
        predicted = predict(model, found.variables, problem.test)
        scores: dict[str, Any] = measures(problem, predicted) | {"rate": rate}
        scores |= {"parameters": num_parameters(found.variables)}
        scores |= {"seconds": found.seconds, "validation": max(found.aucs)}
        if baseline or name == "MLP for groups":
            return scores
        size = min(4096, len(problem.test["numeric"]))
        starts = range(0, len(problem.test["numeric"]) - size + 1, size)
        rows = lambda i: jax.tree.map(lambda x: x[i : i + size], problem.test)
        picked = pattern_selection(model, found.variables, map(rows, starts))
        pairs = np.triu_indices(len(problem.tasks), 1)
        return scores | {
            "apart": float(picked.apart[pairs].mean()),
            "selection": picked.weights.tolist(),
            "fields": picked.fields.sum(0).tolist(),
        }

    def tune(self, name: str, seed: int) -> dict[str, Any]:
        """The training with the learning rate of the best validation AUC."""
        tried = [self.train(name, rate, seed) for rate in self.config.learning_rates]
        return max(tried, key=lambda found: found["validation"])


def measures(
    problem: RankingProblem, predicted: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Ranking and calibration of every step, and how often predictions rise."""
    found = click_metrics(problem.test["labels"], predicted)
    rows = {f"{task} AUC": m["roc_auc"] for task, m in found.items()}
    rows["mean AUC"] = float(np.mean([*rows.values()]))
    for task, m in found.items():
        y = problem.test["labels"][task].astype(int)
        rows[f"{task} PR-AUC"] = AVERAGE_PRECISION(y, predicted[task])
        rows[f"{task} log loss"] = m["log_loss"]
        rows[f"{task} ECE"] = m["ece"]
        rows[f"{task} predicted / real"] = m["calibration_ratio"]
    steps = np.stack([predicted[task] for task in problem.tasks])
    rows["rising"] = float((steps[1:] > steps[:-1]).any(axis=0).mean())
    return rows


def tables(runs: Mapping[str, Sequence[Mapping[str, Any]]], last: str) -> str:
    """What the page shows, in per cent; differences are of paired seeds."""
    ranking, chances = defaultdict(list), defaultdict(list)
    for name, found in runs.items():
        for row, base in zip(found, runs["APEM"]):
            line = {k: 100 * v for k, v in row.items() if k.endswith(" AUC")}
            for key in ("mean AUC", f"{last} AUC"):
                line[f"{key} to APEM"] = 100 * (row[key] - base[key])
            costs = {k: row[k] for k in ("parameters", "rate", "seconds")}
            ranking[name].append(line | costs)
            shares = {
                k: 100 * row[k] for k in (f"{last} PR-AUC", f"{last} ECE", "rising")
            }
            keep = (f"{last} log loss", f"{last} predicted / real", "apart")
            chances[name].append(shares | {k: row[k] for k in keep if k in row})
    return f"{seed_table(ranking)}\n\n{seed_table(chances)}\n"


def plot_fields(problem: RankingProblem, found: Sequence[Mapping[str, Any]]) -> Figure:
    """Which fields the selected patterns read, mean over seeds; the first are shown."""
    shares = np.mean([row["fields"] for row in found], axis=0)
    order = np.argsort(-shares.max(axis=0))[:15]
    names = np.array([*problem.fields, *problem.numbers])[order]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(100 * shares[:, order], cmap="Blues", vmin=0, aspect="auto")
    ax.set_yticks(range(len(shares)), problem.tasks)
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    figure.colorbar(image, ax=ax, label="share of reading, %")
    return figure


def main(config: Config, out: Path) -> dict[str, Any]:
    """Trains everything that is not there yet, writes tables and figures."""
    runs = Runs(config)
    compared = (*config.baselines, "APEM")
    tune = {name: partial(runs.tune, name) for name in compared}
    tuned = per_method(config, out, tune, 1, prefix="tuned")
    rate = lambda name: tuned[name if name in compared else "APEM"][0]["rate"]
    both = (*compared, *config.ablations)
    train = {name: partial(runs.train, name, rate(name)) for name in both}
    results = per_method(config, out, train, config.seeds)
    (out / "table.md").write_text(tables(results, runs.problem.tasks[-1]))
    first = np.array(results["APEM"][0]["selection"])
    selection = plot_gates({"seed 0": first}, gates=runs.problem.tasks)
    selection.savefig(out / "apem_selection.png", dpi=110)
    plot_fields(runs.problem, results["APEM"]).savefig(out / "apem.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/apem_quick")) -> None:
    """Seconds, without data: what the script does."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/apem")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
