"""Train, balance and merge multi-task models in JAX with optax transforms."""

from mtjax.analysis import conflict_statistics
from mtjax.balancing import (
    cagrad,
    constant,
    dwa,
    equal,
    famo,
    graddrop,
    mgda,
    nash_mtl,
    pcgrad,
    upgrad,
    uw,
)
from mtjax.gradients import (
    ParameterSplit,
    TaskGradients,
    cost_report,
    parameter_split,
    value_and_task_grads,
)
from mtjax.transforms import (
    clip_per_task,
    freeze_absent,
    normalize_per_task,
    scale_by_weighting,
)

__all__ = [
    "ParameterSplit",
    "TaskGradients",
    "cagrad",
    "clip_per_task",
    "conflict_statistics",
    "constant",
    "cost_report",
    "dwa",
    "equal",
    "famo",
    "freeze_absent",
    "graddrop",
    "mgda",
    "nash_mtl",
    "normalize_per_task",
    "parameter_split",
    "pcgrad",
    "scale_by_weighting",
    "upgrad",
    "uw",
    "value_and_task_grads",
]
