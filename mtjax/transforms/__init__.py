"""Optax transforms for task gradients that do not combine them."""

from mtjax.transforms.clip_per_task import clip_per_task
from mtjax.transforms.freeze_absent import freeze_absent
from mtjax.transforms.normalize_per_task import normalize_per_task
from mtjax.transforms.sam import sam
from mtjax.transforms.samo import SAMOState, samo
from mtjax.transforms.scale_by_weighting import scale_by_weighting
from mtjax.transforms.task_sam import TaskSAMState, task_sam

__all__ = [
    "SAMOState",
    "TaskSAMState",
    "clip_per_task",
    "freeze_absent",
    "normalize_per_task",
    "sam",
    "samo",
    "scale_by_weighting",
    "task_sam",
]
