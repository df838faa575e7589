"""Gradients that know their tasks."""

from mtjax.gradients.cost import CostReport, cost_report
from mtjax.gradients.split import ParameterSplit
from mtjax.gradients.task_gradients import TaskGradients
from mtjax.gradients.trace import parameter_split
from mtjax.gradients.value_and_task_grads import value_and_task_grads

__all__ = [
    "CostReport",
    "ParameterSplit",
    "TaskGradients",
    "cost_report",
    "parameter_split",
    "value_and_task_grads",
]
