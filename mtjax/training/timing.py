"""Step times of several methods, measured in turns so that all see the same machine."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from mtjax.training.state import TrainState

_ROUNDS, _STEPS = 7, 4


def step_milliseconds(
    methods: Mapping[str, tuple[Callable[[TrainState], TrainState], TrainState]],
) -> dict[str, float]:
    """Measures the time of one training step of each method.

    Only the ratios mean much: the methods take turns, a few steps each, so that other
    work on the machine hits all of them.

    Args:
      methods: per name ``(step, state)``, with ``step(state) -> state``; the state is
        donated if the step donates.

    Returns:
      Median milliseconds per step over seven rounds of four steps, compilation left
      out.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx, key = optax.sgd(0.1), jax.random.key(0)
      >>> state = TrainState.create({"w": jnp.ones(2)}, tx, key=key)
      >>> times = step_milliseconds({"idle": (lambda state: state, state)})
      >>> times["idle"] < 1.0
      True
    """
    states = {name: step(state) for name, (step, state) in methods.items()}
    times = {name: [] for name in methods}
    for _ in range(_ROUNDS):
        for name, (step, _) in methods.items():
            jax.block_until_ready(states[name].params)
            start = time.perf_counter()
            for _ in range(_STEPS):
                states[name] = step(states[name])
            jax.block_until_ready(states[name].params)
            times[name].append((time.perf_counter() - start) / _STEPS)
    return {name: 1e3 * float(np.median(t)) for name, t in times.items()}
