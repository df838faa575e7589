"""Data for several tasks: sources, mixtures, prepared sets and ready problems."""

from mtjax.data.builders import DataFormatError as DataFormatError
from mtjax.data.builders import DatasetSummary as DatasetSummary
from mtjax.data.builders import available as available
from mtjax.data.builders import prepare as prepare
from mtjax.data.image_pairs import compose as compose
from mtjax.data.image_pairs import image_pairs as image_pairs
from mtjax.data.image_pairs import load_images as load_images
from mtjax.data.mixture import TaskMixture as TaskMixture
from mtjax.data.mixture import TaskMixtureIterator as TaskMixtureIterator
from mtjax.data.mixture import mixture as mixture
from mtjax.data.mixture_weights import mixture_weights as mixture_weights
from mtjax.data.multi_mnist import build_mnist_subset as build_mnist_subset
from mtjax.data.multi_mnist import mnist_subset as mnist_subset
from mtjax.data.multi_mnist import multi_mnist as multi_mnist
from mtjax.data.multi_mnist import sample_batch as sample_batch
from mtjax.data.problems import Problem as Problem
from mtjax.data.problems import Task as Task
from mtjax.data.problems import load_problem as load_problem
from mtjax.data.problems import problem_names as problem_names
from mtjax.data.sources import ArraySource as ArraySource
from mtjax.data.sources import DataNotFoundError as DataNotFoundError
from mtjax.data.sources import TfdsSource as TfdsSource
from mtjax.data.sources import array_source as array_source
from mtjax.data.sources import as_arrays as as_arrays
from mtjax.data.sources import default_data_dir as default_data_dir
from mtjax.data.sources import folder_source as folder_source
from mtjax.data.sources import tfds_source as tfds_source

__all__ = [
    "ArraySource",
    "DataFormatError",
    "DataNotFoundError",
    "DatasetSummary",
    "Problem",
    "Task",
    "TaskMixture",
    "TaskMixtureIterator",
    "TfdsSource",
    "array_source",
    "as_arrays",
    "available",
    "build_mnist_subset",
    "compose",
    "default_data_dir",
    "folder_source",
    "image_pairs",
    "load_images",
    "load_problem",
    "mixture",
    "mixture_weights",
    "mnist_subset",
    "multi_mnist",
    "prepare",
    "problem_names",
    "sample_batch",
    "tfds_source",
]
