"""Numbers and plots about multi-task training.

The plots are in `mtjax.analysis.plots`, apart from the rest because they import
matplotlib.
"""

from mtjax.analysis.conflict import ConflictStatistics, conflict_statistics

__all__ = ["ConflictStatistics", "conflict_statistics"]
