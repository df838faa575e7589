"""Runs that are trained side by side by `vmap`, as lanes of one training state."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtjax.training import TrainState
from mtjax.training.step import StepFn

# All lanes take their steps together, so that they share the counter.
LANE_AXES = TrainState(
    params=0, opt_state=0, model_state=None, key=0, step=None, skipped=0
)


def in_lanes(step: StepFn) -> StepFn:
    """A step of all lanes at once, on the same data."""
    return jax.vmap(step, in_axes=(LANE_AXES, None), out_axes=(LANE_AXES, 0))


def stack_lanes(states: Sequence[TrainState]) -> TrainState:
    """Joins fresh states of several runs."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return dataclasses.replace(stacked, step=states[0].step)


def lane_params(state: TrainState, count: int) -> list[Any]:
    """The parameters of each lane by itself."""
    leaves, structure = jax.tree.flatten(state.params)
    return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(count)]
