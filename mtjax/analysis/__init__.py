"""Numbers and plots about multi-task training."""

from mtjax.analysis.conflict import ConflictStatistics, conflict_statistics

__all__ = ["ConflictStatistics", "conflict_statistics"]
