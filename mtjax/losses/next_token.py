"""The loss of language models."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mtjax.losses.masked import masked_mean


def next_token_loss(
    logits: Float[Array, "batch tokens vocab"],
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, ""]:
    """Mean cross-entropy of tokens, each predicted from those before it.

    Args:
      logits: of the next token, at every token.
      tokens: prompts with their answers, or plain text.
      mask: True at tokens to learn: those of answers, with the token that ends them, or
        all that are not padding. The first token of a sequence is never predicted.

    Returns:
      The loss, in nats per token; 0 if nothing is to be learnt.

    Example:
      >>> tokens = jnp.array([[7, 1, 0]])
      >>> logits = jnp.zeros((1, 3, 8))
      >>> print(f"{next_token_loss(logits, tokens, tokens == 1):.3f}")  # log 8
      2.079
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return masked_mean(losses, mask[:, 1:])
