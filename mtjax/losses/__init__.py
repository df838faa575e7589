"""Task losses that optax does not have."""

from mtjax.losses.binary import binary_losses
from mtjax.losses.chained_logits import chained_logits
from mtjax.losses.contrastive import contrastive_loss, in_batch_contrastive_loss
from mtjax.losses.delayed_feedback import mature_labels
from mtjax.losses.entire_space import (
    EntireSpaceLosses,
    LogProbabilities,
    doubly_robust_loss,
    entire_space_losses,
    imputation_loss,
    inverse_propensity_loss,
    product_of_chances,
)
from mtjax.losses.entropy import entropy_loss, summed_entropies
from mtjax.losses.label_chain import label_chain_penalty
from mtjax.losses.masked import masked_mean
from mtjax.losses.sampled_softmax import (
    in_batch_softmax_loss,
    log_frequencies,
    sampled_softmax_loss,
)
from mtjax.losses.unit_vectors import unit_vectors

__all__ = [
    "EntireSpaceLosses",
    "LogProbabilities",
    "binary_losses",
    "chained_logits",
    "contrastive_loss",
    "doubly_robust_loss",
    "entire_space_losses",
    "entropy_loss",
    "imputation_loss",
    "in_batch_contrastive_loss",
    "in_batch_softmax_loss",
    "inverse_propensity_loss",
    "label_chain_penalty",
    "log_frequencies",
    "masked_mean",
    "mature_labels",
    "product_of_chances",
    "sampled_softmax_loss",
    "summed_entropies",
    "unit_vectors",
]
