"""Numbers and plots about multi-task training.

The plots are in `mtjax.analysis.plots`, apart from the rest because they import
matplotlib.
"""

from mtjax.analysis.conflict import ConflictStatistics, conflict_statistics
from mtjax.analysis.sharpness import Sharpness, task_sharpness

__all__ = [
    "ConflictStatistics",
    "Sharpness",
    "conflict_statistics",
    "task_sharpness",
]
