"""Merging: from fine-tuned models to one, on any pytrees."""

from mtjax.merging.align import Aligned, align, align_many, permute
from mtjax.merging.average import average
from mtjax.merging.breadcrumbs import breadcrumbs
from mtjax.merging.coefficients import (
    effective_coefficients,
    init_coefficients,
    merge_with_coefficients,
)
from mtjax.merging.compressed import CompressedTasks, apply_vector
from mtjax.merging.consensus import consensus
from mtjax.merging.dare import dare
from mtjax.merging.della import della, magprune
from mtjax.merging.delta_guided import delta_guided
from mtjax.merging.depth import depth_of_blocks
from mtjax.merging.emr import emr
from mtjax.merging.experts import Experts
from mtjax.merging.fisher import fisher_average, fisher_information
from mtjax.merging.iso import iso_c, iso_cts
from mtjax.merging.karcher import karcher
from mtjax.merging.knots import knots
from mtjax.merging.learning import Learned, learn, repeat_step
from mtjax.merging.lines import lines
from mtjax.merging.lora import lora_task_vector
from mtjax.merging.magmax import magmax
from mtjax.merging.masks import magnitude_mask
from mtjax.merging.match import Mismatch, mismatches
from mtjax.merging.merger import Leaf, Merger, Step, Total, chain
from mtjax.merging.model_stock import model_stock
from mtjax.merging.pcb import pcb
from mtjax.merging.permutation_groups import PermutationGroups, permutation_groups
from mtjax.merging.regmean import regmean, regmean_plus_plus
from mtjax.merging.selection import MergedModel, select_coefficient
from mtjax.merging.slerp import slerp
from mtjax.merging.soups import greedy_soup
from mtjax.merging.stream import Plan, merge_checkpoints
from mtjax.merging.task_arithmetic import scale, task_arithmetic
from mtjax.merging.ties import disjoint_mean, elect_sign, ties
from mtjax.merging.trim import trim
from mtjax.merging.tsv import tsv_m
from mtjax.merging.vectors import merge, task_vectors
from mtjax.merging.wudi import wudi

__all__ = [
    "Aligned",
    "CompressedTasks",
    "Experts",
    "Leaf",
    "Learned",
    "MergedModel",
    "Merger",
    "Mismatch",
    "PermutationGroups",
    "Plan",
    "Step",
    "Total",
    "align",
    "align_many",
    "apply_vector",
    "average",
    "breadcrumbs",
    "chain",
    "consensus",
    "dare",
    "della",
    "delta_guided",
    "depth_of_blocks",
    "disjoint_mean",
    "effective_coefficients",
    "elect_sign",
    "emr",
    "fisher_average",
    "fisher_information",
    "greedy_soup",
    "init_coefficients",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "learn",
    "lines",
    "lora_task_vector",
    "magmax",
    "magnitude_mask",
    "magprune",
    "merge",
    "merge_checkpoints",
    "merge_with_coefficients",
    "mismatches",
    "model_stock",
    "pcb",
    "permutation_groups",
    "permute",
    "regmean",
    "regmean_plus_plus",
    "repeat_step",
    "scale",
    "select_coefficient",
    "slerp",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "trim",
    "tsv_m",
    "wudi",
]
