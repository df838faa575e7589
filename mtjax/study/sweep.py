"""Training one method with several learning rates and seeds, as one program."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.study.lanes import in_lanes, lane_params, stack_lanes
from mtjax.study.methods import METHODS
from mtjax.study.setting import Setting, metric_of
from mtjax.study.step import make_step
from mtjax.training import TrainState


class Sweep:
    """Every pair of a learning rate and a seed is a lane of one `vmap`.

    The learning rate is a number in the state, so that one compilation serves a whole
    sweep: on small models compiling takes longer than training. For dense models only;
    convolutions become slow under `vmap` and inside a loop on a CPU.

    Attributes:
      lanes: the pairs of learning rate and seed.
    """

    def __init__(
        self,
        setting: Setting,
        method: str,
        *,
        learning_rates: tuple[float, ...],
        seeds: int,
        steps_per_epoch: int,
    ):
        """Builds balancer, optimizer and step; nothing is compiled yet."""
        self.lanes = list(itertools.product(learning_rates, range(seeds)))
        self._setting = setting
        chosen = METHODS[method]
        self._data = setting.data_for(chosen)
        optimizer = optax.inject_hyperparams(chosen.optimizer)(learning_rate=1.0)
        balancer = chosen.make(len(setting.tasks), steps_per_epoch)
        self._tx = optax.chain(balancer, optimizer)
        step = in_lanes(make_step(setting, chosen, self._tx))

        @jax.jit
        def advance(state, data, steps):
            return jax.lax.fori_loop(0, steps, lambda _, s: step(s, data)[0], state)

        self._advance = advance

    def fresh_state(self) -> TrainState:
        """All lanes before their first step; a seed starts the same in each."""
        states = []
        for rate, seed in self.lanes:
            init_key, key = jax.random.split(jax.random.key(seed))
            params = self._setting.init(init_key)
            state = TrainState.create(params, self._tx, key=key)
            state.opt_state[1].hyperparams["learning_rate"] = jnp.float32(rate)
            states.append(state)
        return stack_lanes(states)

    def advance(self, state: TrainState, steps: int) -> TrainState:
        """Takes so many steps in every lane; any number uses the same program."""
        return self._advance(state, self._data, steps)

    def results(self, steps: int) -> list[dict[str, Any]]:
        """Trains all lanes and measures them.

        Args:
          steps: number of steps.

        Returns:
          Per lane `learning_rate`, `seed`, `skipped` (steps whose update was not
          finite), `validation` and `test` as `Setting.evaluate` gives them, and what
          `Setting.conflict` gives. Metrics of a network that gives no numbers are NaN.
        """
        state = self.advance(self.fresh_state(), steps)
        params = lane_params(state, len(self.lanes))
        return [
            {
                "learning_rate": rate,
                "seed": seed,
                "skipped": int(state.skipped[i]),
                "validation": self._evaluate(params[i], "validation"),
                "test": self._evaluate(params[i], "test"),
                **self._setting.conflict(params[i]),
            }
            for i, (rate, seed) in enumerate(self.lanes)
        ]

    def _evaluate(self, params, split: str) -> dict[str, dict[str, float]]:
        try:
            return self._setting.evaluate(params, split)
        except ValueError:  # scikit-learn refuses NaN
            return {
                t.name: {metric_of(t).name: np.nan, "loss": np.nan}
                for t in self._setting.tasks
            }
