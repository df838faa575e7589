"""Data for several tasks: sources, mixtures, prepared sets and ready problems."""

from mtjax.data.builders import DataFormatError as DataFormatError
from mtjax.data.builders import DatasetSummary as DatasetSummary
from mtjax.data.builders import available as available
from mtjax.data.builders import prepare as prepare
from mtjax.data.click_logs import ALI_CCP as ALI_CCP
from mtjax.data.click_logs import ALIEXPRESS as ALIEXPRESS
from mtjax.data.click_logs import CRITEO as CRITEO
from mtjax.data.click_logs import ClickLogFormat as ClickLogFormat
from mtjax.data.click_logs import encode_click_log as encode_click_log
from mtjax.data.click_logs import fit_click_log as fit_click_log
from mtjax.data.click_logs import read_click_log as read_click_log
from mtjax.data.diginetica import diginetica_sequences as diginetica_sequences
from mtjax.data.event_history import Past as Past
from mtjax.data.event_history import past_items as past_items
from mtjax.data.event_history import past_mean as past_mean
from mtjax.data.event_history import past_of as past_of
from mtjax.data.image_pairs import compose as compose
from mtjax.data.image_pairs import image_pairs as image_pairs
from mtjax.data.image_pairs import load_images as load_images
from mtjax.data.mixture import TaskMixture as TaskMixture
from mtjax.data.mixture import TaskMixtureIterator as TaskMixtureIterator
from mtjax.data.mixture import mixture as mixture
from mtjax.data.mixture_weights import mixture_weights as mixture_weights
from mtjax.data.movielens import movielens_ranking as movielens_ranking
from mtjax.data.movielens import movielens_sequences as movielens_sequences
from mtjax.data.multi_mnist import build_mnist_subset as build_mnist_subset
from mtjax.data.multi_mnist import mnist_subset as mnist_subset
from mtjax.data.multi_mnist import multi_mnist as multi_mnist
from mtjax.data.multi_mnist import sample_batch as sample_batch
from mtjax.data.negatives import negative_probabilities as negative_probabilities
from mtjax.data.negatives import sample_negatives as sample_negatives
from mtjax.data.problems import Problem as Problem
from mtjax.data.problems import Task as Task
from mtjax.data.problems import load_problem as load_problem
from mtjax.data.problems import problem_names as problem_names
from mtjax.data.ranking import RankingProblem as RankingProblem
from mtjax.data.ranking import ranking_problem as ranking_problem
from mtjax.data.ranking import rows_by_time as rows_by_time
from mtjax.data.ranking import time_cuts as time_cuts
from mtjax.data.ranking_census import census_ranking as census_ranking
from mtjax.data.sequences import Catalogue as Catalogue
from mtjax.data.sequences import SequenceProblem as SequenceProblem
from mtjax.data.sequences import sequence_problem as sequence_problem
from mtjax.data.sources import ArraySource as ArraySource
from mtjax.data.sources import DataNotFoundError as DataNotFoundError
from mtjax.data.sources import TfdsSource as TfdsSource
from mtjax.data.sources import array_source as array_source
from mtjax.data.sources import as_arrays as as_arrays
from mtjax.data.sources import default_data_dir as default_data_dir
from mtjax.data.sources import folder_source as folder_source
from mtjax.data.sources import tfds_source as tfds_source
from mtjax.data.synthetic_tasks import SinusoidTasks as SinusoidTasks
from mtjax.data.synthetic_tasks import sinusoid_tasks as sinusoid_tasks
from mtjax.data.table_encoder import TableEncoder as TableEncoder
from mtjax.data.table_encoder import fit_table_encoder as fit_table_encoder
from mtjax.data.table_encoder_files import load_table_encoder as load_table_encoder
from mtjax.data.table_encoder_files import save_table_encoder as save_table_encoder

__all__ = [
    "ALIEXPRESS",
    "ALI_CCP",
    "CRITEO",
    "ArraySource",
    "Catalogue",
    "ClickLogFormat",
    "DataFormatError",
    "DataNotFoundError",
    "DatasetSummary",
    "Past",
    "Problem",
    "RankingProblem",
    "SequenceProblem",
    "SinusoidTasks",
    "TableEncoder",
    "Task",
    "TaskMixture",
    "TaskMixtureIterator",
    "TfdsSource",
    "array_source",
    "as_arrays",
    "available",
    "build_mnist_subset",
    "census_ranking",
    "compose",
    "default_data_dir",
    "diginetica_sequences",
    "encode_click_log",
    "fit_click_log",
    "fit_table_encoder",
    "folder_source",
    "image_pairs",
    "load_images",
    "load_problem",
    "load_table_encoder",
    "mixture",
    "mixture_weights",
    "mnist_subset",
    "movielens_ranking",
    "movielens_sequences",
    "multi_mnist",
    "negative_probabilities",
    "past_items",
    "past_mean",
    "past_of",
    "prepare",
    "problem_names",
    "ranking_problem",
    "read_click_log",
    "rows_by_time",
    "sample_batch",
    "sample_negatives",
    "save_table_encoder",
    "sequence_problem",
    "sinusoid_tasks",
    "tfds_source",
    "time_cuts",
]
