"""Numbers and plots about multi-task training.

The plots are in `mtjax.analysis.plots`, apart from the rest because they import
matplotlib.
"""

from mtjax.analysis.conflict import ConflictStatistics, conflict_statistics
from mtjax.analysis.expert_failures import ExpertFailures, expert_failures
from mtjax.analysis.gates import ExpertUtilisation, expert_utilisation
from mtjax.analysis.pattern_selection import PatternSelection, pattern_selection
from mtjax.analysis.power_law import (
    PowerLaw,
    mean_power_law_alpha,
    power_law_alpha,
    power_law_fit,
)
from mtjax.analysis.sharpness import Sharpness, task_sharpness

__all__ = [
    "ConflictStatistics",
    "ExpertFailures",
    "ExpertUtilisation",
    "PatternSelection",
    "PowerLaw",
    "Sharpness",
    "conflict_statistics",
    "expert_failures",
    "expert_utilisation",
    "mean_power_law_alpha",
    "pattern_selection",
    "power_law_alpha",
    "power_law_fit",
    "task_sharpness",
]
