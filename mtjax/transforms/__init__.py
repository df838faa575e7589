"""Optax transforms for task gradients that do not combine them."""

from mtjax.transforms.clip_per_task import clip_per_task
from mtjax.transforms.freeze_absent import freeze_absent
from mtjax.transforms.mt_adamw import mt_adamw
from mtjax.transforms.normalize_by_task_norm import normalize_by_task_norm
from mtjax.transforms.normalize_per_task import normalize_per_task
from mtjax.transforms.project_orthogonal import project_orthogonal
from mtjax.transforms.sam import sam
from mtjax.transforms.samo import SAMOState, samo
from mtjax.transforms.scale_by_mt_adam import MTAdamWState, scale_by_mt_adam
from mtjax.transforms.scale_by_weighting import scale_by_weighting
from mtjax.transforms.sparse_rows import (
    RowOptimizer,
    UniqueRows,
    on_shards,
    sparse_rows,
    take_rows,
    unique_rows,
)
from mtjax.transforms.task_sam import TaskSAMState, task_sam

__all__ = [
    "MTAdamWState",
    "RowOptimizer",
    "SAMOState",
    "TaskSAMState",
    "UniqueRows",
    "clip_per_task",
    "freeze_absent",
    "mt_adamw",
    "normalize_by_task_norm",
    "normalize_per_task",
    "on_shards",
    "project_orthogonal",
    "sam",
    "samo",
    "scale_by_mt_adam",
    "scale_by_weighting",
    "sparse_rows",
    "take_rows",
    "task_sam",
    "unique_rows",
]
