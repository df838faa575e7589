"""What all methods of a study have in common: model, losses, data, evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.analysis import conflict_statistics
from mtjax.data import Problem, Task
from mtjax.gradients import value_and_task_grads
from mtjax.losses import masked_mean
from mtjax.nn import MLP, LeNet, SharedBottom
from mtjax.study.methods import Method
from mtjax.training import ACCURACY, RMSE, ROC_AUC, Metric, score

_METRICS = {"classification": ACCURACY, "binary": ROC_AUC, "regression": RMSE}
_CHUNK = 4096  # examples per evaluation call: bounds memory on large sets
_PROBES = 4  # batches on which conflict is measured, the same for all methods
_HELD_OUT = 5  # every fifth training example, for methods that need held-out data


def metric_of(task: Task) -> Metric:
    """The metric that a task is judged by."""
    return _METRICS[task.kind]


def task_loss(task: Task, outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss per example, shape `(batch,)`: cross-entropy in nats or squared error."""
    if task.kind == "classification":
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    if task.kind == "binary":
        return optax.sigmoid_binary_cross_entropy(outputs[:, 0], targets)
    return (outputs[:, 0] - targets) ** 2


class Setting:
    """A model for some of a problem's tasks, with all that is compiled once for it.

    Attributes:
      tasks: the tasks that are trained.
      convolves: whether the encoder has convolutions.
      data: the training arrays on the device, `{"inputs", "targets", "mask"}`.
      losses_fn: `losses_fn(params, data, *, key) -> {task: loss}`, on a batch that is
        drawn from all of `data` with the key, with replacement.
    """

    def __init__(self, problem: Problem, tasks: tuple[Task, ...], batch_size: int):
        """Moves the data to the device; nothing is compiled yet."""
        self.tasks = tasks
        self.convolves = problem.train["inputs"].ndim == 4
        self.size = len(problem.train["inputs"])
        outputs = {t.name: _num_outputs(t) for t in tasks}
        self._model = SharedBottom(LeNet() if self.convolves else MLP(), outputs)
        self._splits = {
            split: _arrays(getattr(problem, split), tasks)
            for split in ("validation", "test")
        }
        self.data = jax.device_put(_arrays(problem.train, tasks))
        self._forward = jax.jit(lambda params, x: self._model.apply(params, x))

        def losses_fn(params, data, *, key):
            rows = jax.random.randint(key, (batch_size,), 0, len(data["inputs"]))
            return self.losses(params, jax.tree.map(lambda x: x[rows], data))

        @jax.jit
        def conflict(params, data, key):
            _, grads = value_and_task_grads(losses_fn)(params, data, key=key)
            statistics = conflict_statistics(grads)
            return statistics.mean_cosine, statistics.conflict_rate

        self.losses_fn: Callable[..., dict[str, jax.Array]] = losses_fn
        self._conflict = conflict
        self.init = jax.jit(lambda key: self._model.init(key, self.data["inputs"][:1]))

    def data_for(self, method: Method) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a method trains on, and what is held out from it if it needs that.

        Held-out data are every fifth training example. The validation part will not do:
        it chooses learning rates, so nothing may be learnt on it.
        """
        if not method.held_out:
            return self.data, None
        if self.size < 2:
            raise ValueError(
                "Held-out data need at least 2 training examples, got "
                f"{self.size}; use more `examples` or another method."
            )
        chosen = np.arange(self.size) % _HELD_OUT == 0
        take = lambda rows: jax.tree.map(lambda x: x[rows], self.data)
        return take(~chosen), take(chosen)

    def losses(self, params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Mean loss of each task over the examples that have its label."""
        outputs: Any = self._model.apply(params, batch["inputs"])
        return {
            t.name: masked_mean(
                task_loss(t, outputs[t.name], batch["targets"][t.name]),
                batch["mask"][t.name],
            )
            for t in self.tasks
        }

    def evaluate(self, params: Any, split: str) -> dict[str, dict[str, float]]:
        """Metric and loss of every task on a whole split.

        Args:
          params: the parameters.
          split: "validation" or "test".

        Returns:
          `{task: {metric name: value, "loss": value}}`.
        """
        data = self._splits[split]
        inputs = data["inputs"]
        parts = [
            jax.device_get(self._forward(params, inputs[i : i + _CHUNK]))
            for i in range(0, len(inputs), _CHUNK)
        ]
        outputs = {
            t.name: np.concatenate([part[t.name] for part in parts]) for t in self.tasks
        }
        scores = score(
            {t.name: [metric_of(t)] for t in self.tasks},
            data["targets"],
            {t.name: _decide(t, outputs[t.name]) for t in self.tasks},
            data["mask"],
        )
        for t in self.tasks:
            losses = task_loss(
                t, jnp.asarray(outputs[t.name]), jnp.asarray(data["targets"][t.name])
            )
            scores[t.name]["loss"] = float(
                masked_mean(losses, jnp.asarray(data["mask"][t.name]))
            )
        return scores

    def conflict(self, params: Any) -> dict[str, float]:
        """Mean cosine and conflict rate on probe batches; empty for a single task."""
        if len(self.tasks) < 2:
            return {}
        keys = jax.random.split(jax.random.key(0), _PROBES)
        found = np.mean(
            [self._conflict(params, self.data, key) for key in keys], axis=0
        )
        return {"cosine": float(found[0]), "conflict_rate": float(found[1])}


def _num_outputs(task: Task) -> int:
    if task.kind != "classification":
        return 1
    if task.num_classes is None:
        raise ValueError(f"`num_classes` of task '{task.name}' must be given.")
    return task.num_classes


def _decide(task: Task, outputs: np.ndarray) -> np.ndarray:
    return outputs.argmax(-1) if task.kind == "classification" else outputs[:, 0]


def _arrays(split: Mapping[str, Any], tasks: tuple[Task, ...]) -> dict[str, Any]:
    everyone = np.ones(len(split["inputs"]), bool)
    mask = split.get("mask") or {}
    return {
        "inputs": split["inputs"],
        "targets": {t.name: split["targets"][t.name] for t in tasks},
        "mask": {t.name: mask.get(t.name, everyone) for t in tasks},
    }
