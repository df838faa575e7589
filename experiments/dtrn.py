"""DTRN on MovieLens: do tasks that disagree want bottoms of their own?

What a user liked, disliked and rated before tells whether he will like, love or dislike
a film. Shared bottom, MMoE and PLE read the means of these sequences; under DTRN, what
its two modules make of them for every task. Rankers without DTRN are as large as those
with it, all have a tuned learning rate. Users are no field: most test users are new.

Command:  python experiments/dtrn.py paper --config.data-dir DATA
Machine:  one GPU.    Minutes: 40; on two CPU cores several hours.
Expect:   DTRN is behind a shared bottom by a point, for all transformers learn the few
          users by heart; conflict of like and dislike goes away (cosine -0.6 to 0).
"""

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import mtjax
from experiments.dtrn_models import (
    BASE,
    KINDS,
    METHODS,
    PLAIN,
    Recommender,
    insight,
    made_up,
    recommender,
)
from experiments.ranking_training import (
    Trained,
    Training,
    evaluate,
    fit,
    num_parameters,
    per_method,
    predict,
)
from mtjax.analysis.plots import method_colors
from mtjax.data.movielens import movielens_ranking
from mtjax.data.ranking import RankingProblem
from mtjax.nn.added_task import add_task, only
from mtjax.systems.dtrn import DTRNConfig
from mtjax.training import seed_table
from mtjax.training.click_metrics import gauc

FULL, ADDED = "DTRN, shared bottom", "DTRN, dislike added"


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained."""

    data_dir: Path | None = None
    data: str = "movielens"  # or "made-up", which needs none
    methods: tuple[str, ...] = (*METHODS, ADDED)
    dtrn: DTRNConfig = field(
        default_factory=lambda: DTRNConfig(width=16, hidden=64, length=20)
    )
    units: int = 32  # n of the rankers on DTRN; those without it get more
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    training: Training = field(default_factory=lambda: Training(epochs=5, patience=1))
    seeds: int = 3


QUICK = Config(
    data="made-up",
    methods=(BASE, FULL, "DTRN, PLE", ADDED),
    dtrn=DTRNConfig(width=4, hidden=8, length=4),
    units=4,
    learning_rates=(1e-2,),
    training=Training(epochs=2, batch_size=64),
    seeds=1,
)


class Started(NamedTuple):
    """A model that starts from given parameters."""

    apply: Callable[..., Any]
    init: Callable[..., Any]


def few(split: dict[str, Any], rows: int) -> dict[str, Any]:
    """The first examples of a split."""
    return jax.tree.map(lambda x: x[:rows], split)


class Runs:
    """Trains the methods on one problem."""

    def __init__(self, config: Config):
        """Remembers what to do; the data are loaded when they are first needed."""
        self.config = config

    @functools.cached_property
    def problem(self) -> RankingProblem:
        """The data."""
        config, length = self.config, self.config.dtrn.length
        if config.data == "made-up":
            return made_up(length)
        return movielens_ranking(data_dir=config.data_dir, length=length)

    def size(self, name: str, units: int) -> int:
        """How many parameters it has beside embeddings, found without making them."""
        problem, config = self.problem, self.config.dtrn
        model = recommender(name, problem, problem.tasks, config, units)
        init = functools.partial(model.init, jax.random.key(0))
        return num_parameters(jax.eval_shape(init, few(problem.train, 2)))

    @functools.cached_property
    def units(self) -> dict[str, int]:
        """By method; without DTRN as many as make it as large as with it."""
        units = dict.fromkeys(METHODS, self.config.units)
        for name, (_, changes) in METHODS.items():
            if changes == PLAIN:
                target = self.size(f"DTRN, {name}", units[name])
                size = functools.partial(self.size, name)
                tried = range(units[name], 16 * units[name])
                units[name] = tried[bisect.bisect_left(tried, target, key=size)]
        return units

    def model(self, name: str, tasks: tuple[str, ...]) -> Recommender:
        """A method for some tasks."""
        config, units = self.config.dtrn, self.units[name]
        return recommender(name, self.problem, tasks, config, units)

    def train(self, name: str, seed: int, rate: float) -> dict[str, Any]:
        """Scores of one training, and what can be seen in the model."""
        training = replace(self.config.training, learning_rate=rate)
        model = self.model(name, self.problem.tasks)
        found = fit(model, self.problem, training, seed=seed)
        batch = few(self.problem.test, 2048)
        return self.scores(model, found, rate) | insight(model, found.variables, batch)

    def add(self, seed: int, rate: float) -> dict[str, Any]:
        """The last task comes when the others are trained, and finds all frozen."""
        training = replace(self.config.training, learning_rate=rate)
        tasks, problem = self.problem.tasks, self.problem
        small, large = (self.model(FULL, some) for some in (tasks[:-1], tasks))
        old = fit(small, problem, training, seed=seed).variables["params"]
        fresh = jax.jit(large.init)(jax.random.key(seed), few(problem.train, 2))
        params, trainable = add_task(old, fresh["params"])
        started: Any = Started(large.apply, lambda *_: {"params": params})
        alone = optax.chain(mtjax.equal(), only(trainable))
        found = fit(started, problem, training, seed=seed, balancer=alone)
        before = evaluate(small, {"params": old}, problem, "test")
        scores = self.scores(large, found, rate)
        drift = [abs(scores[f"{t} AUC"] - before[f"{t} AUC"]) for t in tasks[:-1]]
        return scores | {"drift": max(drift)}

    def scores(self, model: nn.Module, found: Trained, rate: float) -> dict[str, Any]:
        """Test metrics, and what they cost."""
        test = self.problem.test
        chances = predict(model, found.variables, test)
        per_user = [
            gauc(test["labels"][t], p, test["user"]) for t, p in chances.items()
        ]
        return evaluate(model, found.variables, self.problem, "test") | {
            "mean GAUC": float(np.mean([x.value for x in per_user])),
            "parameters": num_parameters(found.variables),
            "seconds": found.seconds / len(found.aucs),
            "learning rate": rate,
            "validation": max(found.aucs),
        }


def main(config: Config, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Trains everything that is not there yet; writes a table and a figure."""
    runs = Runs(config)
    train = lambda name: functools.partial(runs.train, name)
    one = lambda name: runs.add if name == ADDED else train(name)

    def tune(name: str, seed: int) -> dict[str, Any]:
        tried = [one(name)(seed, rate) for rate in config.learning_rates]
        return max(tried, key=lambda found: found["validation"])

    trials = {name: functools.partial(tune, name) for name in config.methods}
    tuned = per_method(config, out, trials, 1, "tuned")

    def run(name: str, seed: int) -> dict[str, Any]:
        first = tuned[name][0]
        return first if seed == 0 else one(name)(seed, first["learning rate"])

    methods = {name: functools.partial(run, name) for name in config.methods}
    results = per_method(config, out, methods, config.seeds)
    text = table(results)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    plot(results, runs.problem).savefig(out / "dtrn.png", dpi=110)
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """AUC in per cent, paired differences to the shared bottom, and all else."""
    percent = lambda row: {k: 100 * v for k, v in row.items() if k.endswith("AUC")}
    parts: dict[str, dict[str, list]] = {"AUC, %": {}, "Gain, points": {}, "Other": {}}
    for name, found in results.items():
        scores, base = map(percent, found), map(percent, results[BASE])
        pairs = [*zip(scores, base)]
        parts["AUC, %"][name] = [row for row, _ in pairs]
        parts["Gain, points"][name] = [{k: x[k] - y[k] for k in x} for x, y in pairs]
        shown = [k for k in found[0] if not k.endswith(("AUC", "weights"))]
        parts["Other"][name] = [{k: row[k] for k in shown} for row in found]
    return "\n".join(f"{k}:\n\n{seed_table(rows)}\n" for k, rows in parts.items())


def plot(results: dict[str, list[dict[str, Any]]], problem: RankingProblem) -> Figure:
    """Gains over the shared bottom, and what every task weighs in the full model."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in results if name != BASE][::-1]
    for i, (name, color) in enumerate(method_colors(names).items()):
        pairs = zip(results[name], results[BASE])
        gains = [100 * (a["mean AUC"] - b["mean AUC"]) for a, b in pairs]
        left.plot(gains, [i] * len(gains), ".", color=color, alpha=0.5)
        left.plot(np.mean(gains), i, "D", color=color)
    left.axvline(0, color="0.7", zorder=0)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("mean test AUC over the shared bottom's, points")
    weights = [[row["weights"][t] for t in problem.tasks] for row in results[FULL]]
    picture = right.imshow(np.mean(weights, axis=0), aspect="auto", cmap="viridis")
    columns = [*problem.fields[1:], *problem.numbers, "genres", *KINDS]
    right.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    right.set_yticks(range(len(problem.tasks)), problem.tasks)
    figure.colorbar(picture, ax=right, label="mean weight of TRM")
    return figure


def quick(config: Config = QUICK, out: Path = Path("runs/dtrn_quick")) -> None:
    """A minute: a few methods on made-up data."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/dtrn")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
