"""One row of the catalogue of balancers, and what can be claimed in it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import optax

Factory = Callable[..., optax.GradientTransformationExtraArgs]


@dataclass(frozen=True, eq=False)
class Method:
    """One row.

    Attributes:
      label: the call, as in the documentation.
      factory: the function whose docstring describes it.
      make: the transform for a number of tasks.
      calls: views of `TaskGradients` per step: pull, Gramian, stack and inner.
      evaluations: how often it evaluates the losses again.
      losses: whether it needs `losses`.
      resampled: how many further batches it needs.
      held_out: passes over held-out data per step, if it needs any.
      one_task: what becomes of a single gradient of norm 2.
      claims: measured properties, see `properties.py`.
    """

    label: str
    factory: Factory
    make: Callable[[int], optax.GradientTransformationExtraArgs]
    claims: dict[str, str]
    calls: tuple[str, ...] = ("gramian", "pull")
    evaluations: int = 0
    losses: bool = False
    resampled: int = 0
    held_out: str = ""
    one_task: float = 1.0


def claims(
    conflict: str = "no",
    stationary: str = "no",
    scale_all: str = "1",
    scale_one: str = "changes",
    order: str = "no matter",
    random: str = "no",
    own: str = "own gradient",
    linear: str = "no",
    span: str = "yes",
) -> dict[str, str]:
    return {
        "conflict": conflict,
        "stationary": stationary,
        "scale_all": scale_all,
        "scale_one": scale_one,
        "order": order,
        "random": random,
        "own": own,
        "linear": linear,
        "span": span,
    }


weighted = functools.partial(claims, own="weighted", linear="yes")
