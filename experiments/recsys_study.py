"""Which architecture shares best? All multi-task rankers, equally large, equally tuned.

Every architecture gets the width that brings it nearest to the parameters of MMoE, and
the learning rate of its best validation AUC with the first seed. Then all are trained
from the same seeds, with the tasks' losses summed, on Census-Income (two pairs of
tasks) and on MovieLens (what a user will think of a film, split by time).

Command:  python experiments/recsys_study.py paper --config.data-dir DATA
Machine:  two CPU cores.    Minutes: 60.
Expect:   on the census PLE, AdaTT and DSelect-k gates gain a tenth of a point, on
          MovieLens SNR half a point: docs/studies/recsys.md.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.ranking_training import (
    Training,
    embedded,
    evaluate,
    fit,
    made_up,
    num_parameters,
    per_method,
)
from mtjax import nn as blocks
from mtjax.analysis.plots import method_colors
from mtjax.data.movielens import movielens_ranking
from mtjax.data.ranking import RankingProblem
from mtjax.data.ranking_census import census_ranking
from mtjax.losses import binary_losses, label_chain_penalty
from mtjax.training import seed_table

Tasks = tuple[str, ...]
Architecture = Callable[[Tasks, int], nn.Module]
SINGLE = "single task"

# From tasks and a width to a ranker. Towers have one hidden layer of 8 everywhere.
ARCHITECTURES: dict[str, Architecture] = {
    SINGLE: lambda tasks, n: blocks.SharedBottomRanker(tasks, (n,)),
    "shared bottom": lambda tasks, n: blocks.SharedBottomRanker(tasks, (n,)),
    "cross-stitch": lambda tasks, n: blocks.CrossStitch(tasks, (n,)),
    "OMoE": lambda tasks, n: blocks.MMoE(tasks, 8, ((n,),), single_gate=True),
    "MMoE": lambda tasks, n: blocks.MMoE(tasks, 8, ((n,),)),
    "MMoE, DSelect-k": lambda tasks, n: blocks.MMoE(
        tasks, 8, ((n,),), gate=functools.partial(blocks.DSelectK, k=2)
    ),
    "ML-MMoE": lambda tasks, n: blocks.MMoE(tasks, 4, ((n,), (n,))),
    "SNR": lambda tasks, n: blocks.SNR(tasks, 4, ((n,), (n,))),
    "CGC": lambda tasks, n: blocks.PLE(tasks, 2, 1, ((n,),)),
    "PLE": lambda tasks, n: blocks.PLE(tasks, 2, 1, ((n,), (n,))),
    "AITM": lambda tasks, n: blocks.AITM(tasks, (n,), (8,)),
    "AdaTT": lambda tasks, n: blocks.AdaTT(tasks, 2, 1, ((n,), (n,))),
    "STEM": lambda tasks, n: blocks.STEM(
        tasks, 1, 4, ((n,),), gate_hidden=(8,), tower=(8,)
    ),
}
# Weights of what these sow as losses.
PENALTIES = {"MMoE, DSelect-k": 1e-6, "SNR": 1e-4}


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained."""

    data_dir: Path | None = None
    problems: tuple[str, ...] = ("income", "education", "movielens")
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    experts: int = 16  # width of MMoE's experts, whose parameters all others match
    embedding: int = 4
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    training: Training = field(default_factory=Training)
    seeds: int = 5


QUICK = Config(
    problems=("made-up",),
    architectures=(SINGLE, "shared bottom", "MMoE", "STEM"),
    learning_rates=(3e-3,),
    training=Training(epochs=2, batch_size=64),
    seeds=1,
)


def load(name: str, data_dir: Path | None) -> RankingProblem:
    """The fields, numbers and tasks of a data set; "made-up" needs no data."""
    if name == "made-up":
        return made_up()
    if name == "movielens":
        return movielens_ranking(data_dir=data_dir)
    return census_ranking(name, data_dir=data_dir)


def ranker(name: str, problem: RankingProblem, tasks: Tasks, size: int, width: int):
    """An architecture of a certain size for some tasks."""
    groups = (*tasks, "shared") if name == "STEM" else ()
    return embedded(ARCHITECTURES[name](tasks, size), problem, width, groups)


def size_of(model: nn.Module, problem: RankingProblem) -> int:
    """How many parameters it has beside embeddings, found without making them."""
    batch = jax.tree.map(lambda x: x[:2], problem.train)
    init = functools.partial(model.init, jax.random.key(0))
    return num_parameters(jax.eval_shape(init, batch))


def matched(
    name: str, problem: RankingProblem, tasks: Tasks, target: int, width: int
) -> int:
    """The width of layers that comes nearest to so many parameters."""
    # Layers of width n between layers of width n: the number is a square function of n.
    few = [1, 2, 3]
    sizes = [size_of(ranker(name, problem, tasks, n, width), problem) for n in few]
    widths = np.arange(1, target)
    found = np.polyval(np.polyfit(few, sizes, 2), widths)
    return int(widths[np.abs(found - target).argmin()])


class Runs:
    """Trains the architectures on one problem."""

    def __init__(self, config: Config, name: str):
        """Remembers what to do; the data are loaded when they are first needed."""
        self.config, self.name = config, name

    @functools.cached_property
    def problem(self) -> RankingProblem:
        """The data."""
        return load(self.name, self.config.data_dir)

    @functools.cached_property
    def target(self) -> int:
        """The parameters of MMoE with experts of the configured width."""
        tasks, config = self.problem.tasks, self.config
        model = ranker("MMoE", self.problem, tasks, config.experts, config.embedding)
        return size_of(model, self.problem)

    def train(self, name: str, seed: int, rate: float) -> dict[str, Any]:
        """Scores of one training, and what it cost."""
        problem, config = self.problem, self.config
        parts = [(t,) for t in problem.tasks] if name == SINGLE else [problem.tasks]
        training = replace(config.training, learning_rate=rate)
        chain = name == "AITM" and "love" in problem.tasks
        scores: dict[str, Any] = {"parameters": 0, "seconds": 0.0, "validation": 0.0}
        for tasks in parts:
            target = self.target // len(parts)
            size = matched(name, problem, tasks, target, config.embedding)
            model = ranker(name, problem, tasks, size, config.embedding)
            found = fit(
                model,
                problem,
                training,
                seed=seed,
                losses_fn=chained if chain else binary_losses,
                penalty=PENALTIES.get(name, 0.0),
            )
            scores |= evaluate(model, found.variables, problem, "test")
            scores["parameters"] += num_parameters(found.variables)
            scores["seconds"] += found.seconds
            scores["validation"] += max(found.aucs) / len(parts)
        aucs = [scores[f"{task} AUC"] for task in problem.tasks]
        return scores | {"mean AUC": float(np.mean(aucs)), "learning rate": rate}

    def tune(self, name: str, seed: int) -> dict[str, Any]:
        """The training with the learning rate of the best validation AUC."""
        tried = [self.train(name, seed, rate) for rate in self.config.learning_rates]
        return max(tried, key=lambda found: found["validation"])


def chained(logits, labels):
    """The losses of AITM where liking comes before loving."""
    losses = binary_losses(logits, labels)
    penalty = 0.6 * label_chain_penalty(logits, ("like", "love"))
    return losses | {"love": losses["love"] + penalty}


def main(config: Config, out: Path) -> dict[str, Any]:
    """Trains everything that is not there yet, writes tables and figures."""
    results = {}
    for problem in config.problems:
        runs = Runs(config, problem)
        tune = {n: functools.partial(runs.tune, n) for n in config.architectures}
        tuned = per_method(config, out, tune, 1, prefix=f"{problem} tuned")

        def run(name: str, seed: int, runs=runs, tuned=tuned) -> dict[str, Any]:
            best = tuned[name][0]
            return best if seed == 0 else runs.train(name, seed, best["learning rate"])

        methods = {n: functools.partial(run, n) for n in config.architectures}
        results[problem] = per_method(config, out, methods, config.seeds, problem)
        text = table(results[problem])
        (out / f"{problem}.md").write_text(text)
        print(f"\n{problem}:\n\n{text}")
    figure = differences(results)
    figure.savefig(out / "recsys_study.png", dpi=110)
    return results


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Scores in per cent, and the paired difference to the shared bottom."""
    scores = lambda row: {k: 100 * v for k, v in row.items() if k.endswith("AUC")}
    costs = lambda row: {k: row[k] for k in ("parameters", "learning rate", "seconds")}
    rows = {n: [scores(r) | costs(r) for r in runs] for n, runs in found.items()}
    return seed_table(rows) + "\n"


def differences(results: dict[str, Any]) -> Figure:
    """Mean AUC over the shared bottom's with the same seed: every seed a point."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), squeeze=False, sharey=True
    )
    for ax, (problem, found) in zip(axes[0], results.items()):
        names = [*found][::-1]
        colors = method_colors(names)
        reference = np.array([r["mean AUC"] for r in found["shared bottom"]])
        for place, name in enumerate(names):
            gains = 100 * (np.array([r["mean AUC"] for r in found[name]]) - reference)
            ax.plot(gains, [place] * len(gains), ".", color=colors[name], alpha=0.5)
            ax.plot(gains.mean(), place, "D", color=colors[name])
        ax.set_yticks(range(len(names)), names)
        ax.axvline(0, color="0.7", zorder=0)
        ax.set(title=problem, xlabel="mean test AUC over the shared bottom's, points")
    figure.tight_layout()
    return figure


def quick(config: Config = QUICK, out: Path = Path("runs/recsys_study_quick")) -> None:
    """A minute: four architectures on made-up data."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/recsys_study")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
