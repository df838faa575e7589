"""Comparisons of methods: what `mtjax quickstart` and `mtjax train` run."""

from mtjax.study.config import Config
from mtjax.study.methods import METHODS, Method
from mtjax.study.report import write_report
from mtjax.study.study import run_study
from mtjax.study.summary import Summary

__all__ = ["METHODS", "Config", "Method", "Summary", "run_study", "write_report"]
