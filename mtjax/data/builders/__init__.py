"""TFDS builders for sets that TFDS lacks or cannot prepare without TensorFlow."""

from mtjax.data.builders.prepare import DatasetSummary as DatasetSummary
from mtjax.data.builders.prepare import available as available
from mtjax.data.builders.prepare import prepare as prepare
from mtjax.data.builders.spec import DataFormatError as DataFormatError

__all__ = ["DataFormatError", "DatasetSummary", "available", "prepare"]
