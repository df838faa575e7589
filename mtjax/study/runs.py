"""Training one method with several seeds."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.analysis import conflict_statistics
from mtjax.data import Problem, Task
from mtjax.gradients import value_and_task_grads
from mtjax.study.config import Config
from mtjax.study.methods import METHODS
from mtjax.study.model import (
    device_data,
    has_convolutions,
    make_evaluate,
    make_losses_fn,
    model_for,
)
from mtjax.training import Checkpoints, TrainState, fit, make_train_step
from mtjax.training.commit import write_atomically

_PROBES = 4  # batches on which conflict is measured, the same for all methods
_SEED_AXES = TrainState(
    params=0, opt_state=0, model_state=None, key=0, step=None, skipped=0
)


class Runs:
    """All seeds of one method on some of a problem's tasks.

    Seeds are trained at once by `vmap` where that is faster: always but for
    convolutions on a CPU, which become slow grouped convolutions.
    """

    def __init__(
        self, problem: Problem, tasks: tuple[Task, ...], method: str, config: Config
    ):
        """Builds model, losses and optimizer; nothing is compiled yet."""
        self._config = config
        self._tasks = tasks
        self._problem = problem
        self._model = model_for(problem, tasks)
        self._losses_fn = make_losses_fn(self._model, tasks, config.batch_size)
        steps_per_epoch = max(1, len(problem.train["inputs"]) // config.batch_size)
        balancer = METHODS[method].make(len(tasks), steps_per_epoch)
        self._tx = optax.chain(balancer, optax.adam(config.learning_rate))
        self._step = make_train_step(self._losses_fn, self._tx, with_key=True)
        on_cpu = jax.default_backend() == "cpu"
        self.vmapped = config.seeds > 1 and not (on_cpu and has_convolutions(problem))
        if self.vmapped:
            self._step = jax.jit(
                jax.vmap(
                    self._step, in_axes=(_SEED_AXES, None), out_axes=(_SEED_AXES, 0)
                ),
                donate_argnums=0,
            )
        self.data = device_data(problem, "train", tasks)

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
        seeds = range(self._config.seeds)
        if path.exists():
            on_progress(self._config.seeds * self._config.steps)
            return json.loads(path.read_text())
        groups = [list(seeds)] if self.vmapped else [[seed] for seed in seeds]
        results = []
        for group in groups:
            results += self._train(group, folder, on_progress)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(results))
        return results

    def fresh_state(self) -> TrainState:
        """An initial state as the step takes it."""
        seeds = range(self._config.seeds) if self.vmapped else [0]
        return self._initial(list(seeds))

    def step(self, state: TrainState) -> TrainState:
        """One training step, for timing."""
        return self._step(state, self.data)[0]

    def _initial(self, seeds: list[int]) -> TrainState:
        def one(seed):
            init_key, key = jax.random.split(jax.random.key(seed))
            params = self._model.init(init_key, self.data["inputs"][:1])
            return TrainState.create(params, self._tx, key=key)

        states = [one(seed) for seed in seeds]
        if not self.vmapped:
            return states[0]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return dataclasses.replace(stacked, step=states[0].step)

    def _train(self, seeds, folder, on_progress) -> list[dict[str, Any]]:
        config = self._config
        validate, probe = self._evaluator("validation"), self._conflict_probe()
        reported = 0

        def evaluate(state):
            nonlocal reported
            rows = {}
            for seed, params in zip(seeds, self._params_per_seed(state, seeds)):
                rows[f"seed_{seed}"] = {**validate(params), **probe(params)}
            done = int(state.step)
            on_progress((done - reported) * len(seeds))
            reported = done
            return rows

        checkpoints = None
        if config.save_every is not None:
            name = "seeds" if self.vmapped else f"seed_{seeds[0]}"
            checkpoints = Checkpoints(folder / name, config=None)
        state, history = fit(
            self._initial(seeds),
            self._step,
            _repeat(self.data),
            num_steps=config.steps,
            evaluate=evaluate,
            eval_every=config.evaluation_period,
            checkpoints=checkpoints,
            save_every=config.save_every,
            progress=False,
        )
        if checkpoints is not None:
            checkpoints.close()
        on_progress((config.steps - reported) * len(seeds))
        test = self._evaluator("test")
        return [
            {"history": _of_seed(history, seed), "test": test(params)}
            for seed, params in zip(seeds, self._params_per_seed(state, seeds))
        ]

    def _params_per_seed(self, state, seeds):
        if not self.vmapped:
            return [state.params]
        per_leaf = jax.tree.map(list, state.params)
        structure = jax.tree.structure(state.params)
        return jax.tree.transpose(
            structure, jax.tree.structure([0] * len(seeds)), per_leaf
        )

    def _evaluator(self, split):
        data = device_data(self._problem, split, self._tasks)
        return make_evaluate(self._model, self._tasks, data)

    def _conflict_probe(self):
        if len(self._tasks) < 2:
            return lambda params: {}
        grad_fn = value_and_task_grads(self._losses_fn)

        @jax.jit
        def conflict(params, data, key):
            statistics = conflict_statistics(grad_fn(params, data, key=key)[1])
            return statistics.mean_cosine, statistics.conflict_rate

        keys = jax.random.split(jax.random.key(0), _PROBES)

        def probe(params):
            found = np.mean([conflict(params, self.data, key) for key in keys], axis=0)
            return {"cosine": float(found[0]), "conflict_rate": float(found[1])}

        return probe


def _repeat(data):
    while True:
        yield data


def _of_seed(history, seed):
    prefix = f"seed_{seed}/"
    return [
        {
            "step": row["step"],
            **{
                k.removeprefix(prefix): v
                for k, v in row.items()
                if k.startswith(prefix)
            },
        }
        for row in history
    ]
