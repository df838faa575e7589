"""Training one method with several seeds."""

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from mtjax.study.config import Config
from mtjax.study.lanes import in_lanes, lane_params, stack_lanes
from mtjax.study.methods import METHODS
from mtjax.study.setting import Setting
from mtjax.study.step import make_step
from mtjax.training import Checkpoints, JsonlLogger, TrainState, fit
from mtjax.training.commit import write_atomically


class Runs:
    """All seeds of one method in one setting.

    Seeds are trained at once by `vmap` where that is faster: always but for
    convolutions on a CPU, which become slow grouped convolutions.
    """

    def __init__(self, setting: Setting, method: str, config: Config):
        """Builds balancer, optimizer and step; nothing is compiled yet."""
        self._config = config
        self._setting = setting
        steps_per_epoch = max(1, setting.size // config.batch_size)
        chosen = METHODS[method]
        self._data = setting.data_for(chosen)
        balancer = chosen.make(len(setting.tasks), steps_per_epoch)
        self._tx = optax.chain(balancer, chosen.optimizer(config.learning_rate))
        self._step = make_step(setting, chosen, self._tx)
        on_cpu = jax.default_backend() == "cpu"
        self._vmapped = config.seeds > 1 and not (on_cpu and setting.convolves)
        if self._vmapped:
            self._step = jax.jit(in_lanes(self._step), donate_argnums=0)

    def results(
        self, folder: Path, on_progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """Trains all seeds, or reads what an earlier start has finished.

        Args:
          folder: where the results and the checkpoints of these runs are kept.
          on_progress: called with the number of steps since the last call.

        Returns:
          Per seed `{"history": [...], "test": {task: {metric: value}}}`. The history
          holds the validation metrics and the conflict at every evaluation.
        """
        path = folder / "results.json"
        if path.exists():
            on_progress(self._config.seeds * self._config.steps)
            return json.loads(path.read_text())
        results = []
        for seeds in self._groups():
            results += self._train(seeds, folder, on_progress)
        write_atomically(path, json.dumps(results))
        return results

    def fresh_state(self) -> TrainState:
        """An initial state as `step` takes it."""
        return self._initial(self._groups()[0])

    def step(self, state: TrainState) -> TrainState:
        """One training step, for timing; the state is donated."""
        return self._step(state, self._data)[0]

    def _groups(self) -> list[list[int]]:
        seeds = list(range(self._config.seeds))
        return [seeds] if self._vmapped else [[seed] for seed in seeds]

    def _initial(self, seeds: list[int]) -> TrainState:
        def one(seed):
            init_key, key = jax.random.split(jax.random.key(seed))
            return TrainState.create(self._setting.init(init_key), self._tx, key=key)

        states = [one(seed) for seed in seeds]
        return stack_lanes(states) if self._vmapped else states[0]

    def _train(self, seeds, folder, on_progress) -> list[dict[str, Any]]:
        config, setting = self._config, self._setting
        reported = 0

        def evaluate(state):
            nonlocal reported
            done = int(state.step)
            on_progress((done - reported) * len(seeds))
            reported = done
            return {
                f"seed_{seed}": {
                    **setting.evaluate(params, "validation"),
                    **setting.conflict(params),
                }
                for seed, params in self._params(state, seeds)
            }

        name = "all_seeds" if self._vmapped else f"seed_{seeds[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            logger = JsonlLogger(folder / f"{name}.jsonl")
            stack.callback(logger.close)
            checkpoints = None
            if config.save_every is not None:
                checkpoints = stack.enter_context(
                    Checkpoints(folder / name, config=config)
                )
            state, history = fit(
                self._initial(seeds),
                self._step,
                itertools.repeat(self._data),
                num_steps=config.steps,
                evaluate=evaluate,
                eval_every=config.evaluation_period,
                checkpoints=checkpoints,
                save_every=config.save_every,
                logger=logger,
                log_every=config.evaluation_period,
                progress=False,
            )
        on_progress((config.steps - reported) * len(seeds))
        return [
            {
                "history": _of_seed(history, seed),
                "test": setting.evaluate(params, "test"),
            }
            for seed, params in self._params(state, seeds)
        ]

    def _params(self, state: TrainState, seeds: list[int]):
        """Pairs of seed and its parameters."""
        if not self._vmapped:
            return [(seeds[0], state.params)]
        return list(zip(seeds, lane_params(state, len(seeds)), strict=True))


def _of_seed(history: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    prefix = f"seed_{seed}/"
    rows = []
    for row in history:
        own = {k.removeprefix(prefix): v for k, v in row.items() if prefix in k}
        rows.append({"step": row["step"], **own})
    return rows
