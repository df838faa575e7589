"""Training: state, step, loop, checkpoints, meshes, metrics and loggers."""

from mtjax.training.checkpoint import Checkpoints
from mtjax.training.click_metrics import (
    GroupedAuc,
    calibration_ratio,
    click_calibration_error,
    click_metrics,
    gauc,
)
from mtjax.training.comparison import (
    DeltaM,
    delta_m,
    mean_rank,
    mtl_gain,
    seed_table,
)
from mtjax.training.export import check_export, export_model
from mtjax.training.logging import (
    JsonlLogger,
    Logger,
    TensorBoardLogger,
    WandbLogger,
    combine_loggers,
)
from mtjax.training.loop import EarlyStop, fit
from mtjax.training.mesh import (
    data_mesh,
    fully_sharded,
    initialize_distributed,
    place,
    replicate,
    shard_batch,
)
from mtjax.training.metrics import (
    ACCURACY,
    AVERAGE_PRECISION,
    BRIER,
    CALIBRATION_ERROR,
    F1,
    F1_MACRO,
    LOG_LOSS,
    MAE,
    PEARSON,
    R2,
    RMSE,
    ROC_AUC,
    Metric,
    predictive_entropy,
    score,
)
from mtjax.training.ranking_metrics import (
    full_ranks,
    full_ranks_in_blocks,
    top_k_metrics,
)
from mtjax.training.retrieval import target_ranks, top_k_items
from mtjax.training.run_config import ConfigMismatchError
from mtjax.training.state import TrainState
from mtjax.training.step import make_train_step
from mtjax.training.timing import step_milliseconds
from mtjax.training.unmixed import make_unmixed_step

__all__ = [
    "ACCURACY",
    "AVERAGE_PRECISION",
    "BRIER",
    "CALIBRATION_ERROR",
    "F1",
    "F1_MACRO",
    "LOG_LOSS",
    "MAE",
    "PEARSON",
    "R2",
    "RMSE",
    "ROC_AUC",
    "Checkpoints",
    "ConfigMismatchError",
    "DeltaM",
    "EarlyStop",
    "GroupedAuc",
    "JsonlLogger",
    "Logger",
    "Metric",
    "TensorBoardLogger",
    "TrainState",
    "WandbLogger",
    "calibration_ratio",
    "check_export",
    "click_calibration_error",
    "click_metrics",
    "combine_loggers",
    "data_mesh",
    "delta_m",
    "export_model",
    "fit",
    "full_ranks",
    "full_ranks_in_blocks",
    "fully_sharded",
    "gauc",
    "initialize_distributed",
    "make_train_step",
    "make_unmixed_step",
    "mean_rank",
    "mtl_gain",
    "place",
    "predictive_entropy",
    "replicate",
    "score",
    "seed_table",
    "shard_batch",
    "step_milliseconds",
    "target_ranks",
    "top_k_items",
    "top_k_metrics",
]
