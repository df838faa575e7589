"""Model, losses and metrics that fit a problem."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtjax.data import Problem, Task
from mtjax.losses import masked_mean
from mtjax.nn import MLP, LeNet, SharedBottom
from mtjax.training import ACCURACY, RMSE, ROC_AUC, Metric

_METRICS = {"classification": ACCURACY, "binary": ROC_AUC, "regression": RMSE}
_CHUNK = 4096  # examples per evaluation call: bounds memory on large sets


def metric_of(task: Task) -> Metric:
    """The metric that a task is judged by."""
    return _METRICS[task.kind]


def model_for(problem: Problem, tasks: tuple[Task, ...]) -> SharedBottom:
    """A shared encoder that fits the inputs, with one head for each of the tasks."""
    images = problem.train["inputs"].ndim == 4
    outputs = {t.name: t.num_classes if _is_multiclass(t) else 1 for t in tasks}
    return SharedBottom(LeNet() if images else MLP(), outputs)


def has_convolutions(problem: Problem) -> bool:
    """Whether the model for this problem convolves."""
    return problem.train["inputs"].ndim == 4


def task_loss(task: Task, outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss per example, shape `(batch,)`: cross-entropy in nats or squared error."""
    if _is_multiclass(task):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    if task.kind == "binary":
        return optax.sigmoid_binary_cross_entropy(outputs[:, 0], targets)
    return (outputs[:, 0] - targets) ** 2


def make_losses_fn(
    model: SharedBottom, tasks: tuple[Task, ...], batch_size: int
) -> Callable[..., dict[str, jax.Array]]:
    """Losses on a batch that is drawn from the whole training set with the step's key.

    Args:
      model: as made by `model_for`.
      tasks: its tasks.
      batch_size: number of examples, drawn with replacement.

    Returns:
      `losses_fn(params, data, *, key)`, with `data` as made by `device_data`.
    """

    def losses_fn(params, data, *, key):
        rows = jax.random.randint(key, (batch_size,), 0, len(data["inputs"]))
        return batch_losses(model, tasks, params, jax.tree.map(lambda x: x[rows], data))

    return losses_fn


def batch_losses(
    model: SharedBottom, tasks: tuple[Task, ...], params: Any, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Mean loss of each task over the examples that have its label."""
    outputs = model.apply(params, batch["inputs"])
    return {
        task.name: masked_mean(
            task_loss(task, outputs[task.name], batch["targets"][task.name]),
            batch["mask"][task.name],
        )
        for task in tasks
    }


def device_data(
    problem: Problem, split: str, tasks: tuple[Task, ...]
) -> dict[str, Any]:
    """The arrays of a split on the device, with masks for every task."""
    arrays = getattr(problem, split)
    mask = arrays.get("mask") or {}
    everyone = np.ones(len(arrays["inputs"]), bool)
    return jax.device_put(
        {
            "inputs": arrays["inputs"],
            "targets": {t.name: _targets(t, arrays["targets"][t.name]) for t in tasks},
            "mask": {t.name: mask.get(t.name, everyone) for t in tasks},
        }
    )


def make_evaluate(
    model: SharedBottom, tasks: tuple[Task, ...], data: Mapping[str, Any]
) -> Callable[[Any], dict[str, dict[str, float]]]:
    """Metric and loss of every task on a whole split.

    Returns:
      `evaluate(params) -> {task: {metric name: value, "loss": value}}`.
    """
    host = jax.device_get({"targets": data["targets"], "mask": data["mask"]})
    size = len(data["inputs"])
    forward = jax.jit(
        lambda params, inputs: model.apply(params, inputs),
    )

    def evaluate(params):
        parts = [
            jax.device_get(forward(params, data["inputs"][i : i + _CHUNK]))
            for i in range(0, size, _CHUNK)
        ]
        scores = {}
        for task in tasks:
            outputs = np.concatenate([part[task.name] for part in parts])
            labelled = host["mask"][task.name]
            outputs, targets = outputs[labelled], host["targets"][task.name][labelled]
            metric = metric_of(task)
            loss = np.mean(task_loss(task, jnp.asarray(outputs), jnp.asarray(targets)))
            decided = outputs.argmax(-1) if _is_multiclass(task) else outputs[:, 0]
            scores[task.name] = {
                metric.name: metric(targets, decided),
                "loss": float(loss),
            }
        return scores

    return evaluate


def _is_multiclass(task: Task) -> bool:
    return task.kind == "classification"


def _targets(task: Task, targets: np.ndarray) -> np.ndarray:
    return targets.astype(np.int32 if _is_multiclass(task) else np.float32)
