"""The models of `experiments/home.py`: HoME, its ablations, baselines as large."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from experiments.ranking_training import embedded
from experiments.recsys_study import size_of
from mtjax import nn as blocks
from mtjax.data.ranking import RankingProblem
from mtjax.nn.gates import Gate, mix
from mtjax.nn.normalised_experts import NormalisedExperts
from mtjax.systems.home import HoME, HoMEConfig

CATEGORIES = {
    "income": "work",
    "full_year": "work",
    "never_married": "life",
    "degree": "life",
}
Tasks = tuple[str, ...]


ABLATIONS: dict[str, dict[str, Any]] = {
    "HoME": {},
    "no feature gate": {"feature_gate": "none"},
    "no self-gate": {"self_gate": False},
    "no hierarchy": {"hierarchy": False},
    "no norm": {"norm": False},
    "ReLU, no norm": {"norm": False, "activation": "relu"},
    "no task experts": {"level_2_task": 0},
    "own level-2 input": {"level_2_input": "own"},
    "uncertainty weighting": {},
}


class MMoEStar(nn.Module):
    """MMoE with the normalised experts of HoME, a baseline of its paper."""

    tasks: Tasks
    width: int
    tower: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """The logits of every task."""
        experts = NormalisedExperts(8, (self.width,), name="experts")
        weights = Gate(len(self.tasks), 8, name="task_gates")(x)
        h = mix(weights, experts(x, train=train))
        return blocks.Towers(self.tasks, self.tower, name="task_towers")(h, train=train)


class Architecture(NamedTuple):
    """A baseline, and the modules of the experts that its tasks weigh, in order."""

    make: Callable[[Tasks, int, tuple[int, ...]], nn.Module]
    experts: tuple[str, ...]


BASELINES = {
    "shared bottom": Architecture(
        lambda tasks, n, tower: blocks.SharedBottomRanker(tasks, (n,), tower), ()
    ),
    "MMoE": Architecture(
        lambda tasks, n, tower: blocks.MMoE(tasks, 8, ((n,),), tower), ("experts_0",)
    ),
    "MMoE*": Architecture(MMoEStar, ("experts",)),
    "CGC": Architecture(
        lambda tasks, n, tower: blocks.PLE(tasks, 1, 2, ((n,),), tower=tower),
        ("level_0/task_experts", "level_0/shared_experts"),
    ),
    "PLE": Architecture(
        lambda tasks, n, tower: blocks.PLE(tasks, 1, 2, ((n,), (n,)), tower=tower),
        ("level_1/task_experts", "level_1/shared_experts"),
    ),
}
LAST_LEVEL = ("shared", "category", "task_level", "level_2")  # of HoME, in order


def home(name: str, problem: RankingProblem, config: HoMEConfig) -> nn.Module:
    """HoME, or an ablation of it."""
    categories = tuple(CATEGORIES[task] for task in problem.tasks)
    config = replace(config, **ABLATIONS[name])
    return embedded(HoME(problem.tasks, categories, config), problem)


def baseline(name: str, problem: RankingProblem, config: HoMEConfig) -> nn.Module:
    """A baseline, of the width that is nearest to the parameters of HoME."""
    target = size_of(home("HoME", problem, config), problem)
    make = lambda n: embedded(
        BASELINES[name].make(problem.tasks, n, config.tower), problem
    )
    size = lambda n: size_of(make(n), problem)
    low, high = 1, 2
    while size(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return make(min((low, high), key=lambda n: abs(size(n) - target)))


def weighed(name: str) -> tuple[str, ...]:
    """The modules of the experts that the gates of tasks weigh, in order."""
    if name in BASELINES:
        return BASELINES[name].experts
    return tuple(f"{level}/experts" for level in LAST_LEVEL)
