"""Task losses that optax does not have."""

from mtjax.losses.masked import masked_mean

__all__ = ["masked_mean"]
