"""Task losses that optax does not have."""

from mtjax.losses.contrastive import contrastive_loss, in_batch_contrastive_loss
from mtjax.losses.entropy import entropy_loss, summed_entropies
from mtjax.losses.masked import masked_mean

__all__ = [
    "contrastive_loss",
    "entropy_loss",
    "in_batch_contrastive_loss",
    "masked_mean",
    "summed_entropies",
]
