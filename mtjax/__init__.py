"""Train, balance and merge multi-task models in JAX with optax transforms."""

from mtjax.gradients import (
    ParameterSplit,
    TaskGradients,
    cost_report,
    parameter_split,
    value_and_task_grads,
)

__all__ = [
    "ParameterSplit",
    "TaskGradients",
    "cost_report",
    "parameter_split",
    "value_and_task_grads",
]
