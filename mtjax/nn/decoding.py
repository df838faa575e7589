"""Text from one language model or from several that decide together, with caches."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

# From the logits of all models, `(models, batch, vocab)`, to those of one distribution
# and notes, arrays whose last axis is the batch. Programs are compiled per function: it
# must be the same object, or equal and with the same hash.
Combine = Callable[[Float[Array, "models batch vocab"]], tuple[Array, Any]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["start", "advance"],
)
@dataclass(frozen=True)
class CachedModel:
    """A language model of any framework, as functions; a pytree.

    Give the same two functions each time: programs are compiled per function.

    Attributes:
      params: of the model.
      start: `start(batch, slots)` makes an empty cache for so many tokens.
      advance: `advance(params, cache, tokens, mask)` reads on and returns the logits
        after each token, `(batch, new, vocab)`, and the longer cache. Masked tokens
        must not be seen and must not count as positions.
    """

    params: PyTree
    start: Callable[[int, int], PyTree]
    advance: Callable[..., tuple[Array, PyTree]]


class Generated(NamedTuple):
    """What `generate` wrote.

    Attributes:
      tokens: 0 after the end.
      mask: True up to the end, the token that ends a sequence among them.
      notes: of `combine`, per new token in a further last axis; 0 after the end.
    """

    tokens: Int[Array, "batch new"]
    mask: Bool[Array, "batch new"]
    notes: PyTree


class Scores(NamedTuple):
    """What `score` found.

    Attributes:
      log_probs: of the tokens given; 0 at padding.
      greedy: whether each of them is the likeliest one; False at padding.
      notes: of `combine`, per token in a further last axis, also at padding.
    """

    log_probs: Float[Array, "batch new"]
    greedy: Bool[Array, "batch new"]
    notes: PyTree


def padded(
    sequences: Sequence[Sequence[int]], *, left: bool
) -> tuple[Int[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
    """Makes one array of sequences of unequal length.

    Args:
      sequences: at least one, none empty; `bytes` are sequences of numbers.
      left: padding before the beginning, which prompts need; otherwise after the end.

    Returns:
      Tokens, 0 at padding, and the mask, False there.

    Example:
      >>> print(padded([b"A", b"ABC"], left=True)[0])
      [[ 0  0 65]
       [65 66 67]]
    """
    lengths = [len(x) for x in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"`sequences` must be at least one, none empty, got lengths {lengths}; "
            "begin prompts with a token for the beginning."
        )
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(sequences):
        part = slice(-len(row), None) if left else slice(len(row))
        tokens[i, part], mask[i, part] = list(row), True
    return tokens, mask


def generate(
    models: Sequence[CachedModel],
    prompts: Int[Array | np.ndarray, "batch tokens"],
    mask: Bool[Array | np.ndarray, "batch tokens"],
    combine: Combine | None = None,
    *,
    steps: int,
    end: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> Generated:
    """Continues prompts: every model reads the token that all of them chose.

    One compiled program per shape, models, `combine` and options; it stops when all
    sequences have ended.

    Args:
      models: with one vocabulary.
      prompts: aligned at their ends; see `padded`.
      mask: False at the padding before a prompt.
      combine: see `Combine`; None for a single model.
      steps: number of new tokens, at most.
      end: the token that ends a sequence.
      temperature: of the combined distribution; 0 takes the likeliest token.
      top_p: draw among the likeliest tokens with so much probability in all, in (0, 1].
      key: to draw with; not needed with a temperature of 0.

    Returns:
      The new tokens and the notes of `combine`.

    Raises:
      ValueError: if an argument is out of range or vocabularies differ.
    """
    _check_prompts(mask)
    if steps < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "`steps` must be at least 1, `temperature` at least 0 and `top_p` in "
            f"(0, 1], got {steps!r}, {temperature!r} and {top_p!r}."
        )
    if key is None and temperature > 0:
        raise ValueError("`key` must be given to draw tokens, got None.")
    key = jax.random.key(0) if key is None else key
    given = jnp.asarray(prompts), jnp.asarray(mask), key
    static = combine, steps, end, float(temperature), float(top_p)
    return _generate(tuple(models), *given, *static)


@functools.partial(jax.jit, static_argnums=range(4, 9))
def _generate(models, prompts, mask, key, combine, steps, end, temperature, top_p):
    batch, width = prompts.shape
    caches = [model.start(batch, width + steps) for model in models]
    last, caches = _advance(models, caches, prompts, mask, combine)
    zero = lambda x: jnp.zeros((*x.shape, steps), x.dtype)
    notes = jax.tree.map(zero, last[1])
    tokens = jnp.zeros((batch, steps), prompts.dtype)
    empty = Generated(tokens, jnp.zeros((batch, steps), bool), notes)

    def unfinished(carry):
        i, _, done, *_ = carry
        return (i < steps) & ~jnp.all(done)

    def step(carry):
        i, found, done, (logits, notes), caches = carry
        if temperature > 0:
            kept = nucleus(logits / temperature, top_p)
            token = jax.random.categorical(jax.random.fold_in(key, i), kept)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = jnp.where(done, 0, token).astype(prompts.dtype)
        write = lambda old, x: old.at[..., i].set(jnp.where(done, 0, x).astype(x.dtype))
        found = Generated(
            found.tokens.at[:, i].set(token),
            found.mask.at[:, i].set(~done),
            jax.tree.map(write, found.notes, notes),
        )
        last, caches = _advance(models, caches, token[:, None], ~done[:, None], combine)
        done = done if end is None else done | (token == end)
        return i + 1, found, done, last, caches

    carry = 0, empty, jnp.zeros(batch, bool), last, caches
    return jax.lax.while_loop(unfinished, step, carry)[1]


def score(
    models: Sequence[CachedModel],
    prompts: Int[Array | np.ndarray, "batch tokens"],
    mask: Bool[Array | np.ndarray, "batch tokens"],
    answers: Int[Array | np.ndarray, "batch new"],
    answer_mask: Bool[Array | np.ndarray, "batch new"],
    combine: Combine | None = None,
) -> Scores:
    """How likely given continuations are; nothing that follows a token matters to it.

    The exponential of minus the mean of `log_probs` is the perplexity.

    Args:
      models: with one vocabulary.
      prompts: aligned at their ends; see `padded`. Not scored.
      mask: False at the padding before a prompt.
      answers: aligned at their beginnings.
      answer_mask: False at the padding after an answer.
      combine: see `Combine`; None for a single model.

    Returns:
      Log-probabilities of the answers' tokens and the notes of `combine`.

    Raises:
      ValueError: if prompts are not aligned or vocabularies differ.
    """
    _check_prompts(mask)
    given = map(jnp.asarray, (prompts, mask, answers, answer_mask))
    return _score(tuple(models), *given, combine)


@functools.partial(jax.jit, static_argnums=5)
def _score(models, prompts, mask, answers, answer_mask, combine):
    new = answers.shape[1]
    # The last token of an answer predicts nothing.
    tokens = jnp.concatenate([prompts, answers], axis=1)[:, :-1]
    both = jnp.concatenate([mask, answer_mask], axis=1)[:, :-1]
    read = lambda m: m.advance(m.params, m.start(*tokens.shape), tokens, both)[0]
    logits = _stacked([read(m)[:, -new:] for m in models])
    # One position at a time: `combine` may need many times this memory.
    together = functools.partial(_combined, combine)
    found, notes = jax.lax.map(together, jnp.moveaxis(logits, 2, 0))
    log_probs = jax.nn.log_softmax(jnp.moveaxis(found, 0, 1))
    taken = jnp.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]
    greedy = jnp.argmax(log_probs, axis=-1) == answers
    notes = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), notes)
    return Scores(jnp.where(answer_mask, taken, 0.0), greedy & answer_mask, notes)


def nucleus(
    logits: Float[Array, "*batch vocab"], top_p: float
) -> Float[Array, "*batch vocab"]:
    """Leaves the likeliest tokens that together have a given probability.

    Args:
      logits: of the tokens.
      top_p: the probability, in (0, 1]; at least one token stays.

    Returns:
      The logits, minus infinity for all other tokens.

    Example:
      >>> print(nucleus(jnp.log(jnp.array([0.5, 0.1, 0.4])), 0.6))
      [-0.69... -inf -0.91...]
    """
    if top_p == 1:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(falling)
    # A token stays while those before it have less than the probability.
    stays = jnp.cumsum(p, axis=-1) - p < top_p
    least = jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _advance(models, caches, tokens, mask, combine):
    """Logits and notes after the last of the tokens, and the caches."""
    read = [m.advance(m.params, c, tokens, mask) for m, c in zip(models, caches)]
    logits = _stacked([found[:, -1] for found, _ in read])
    return _combined(combine, logits), [cache for _, cache in read]


def _stacked(logits: list[Array]) -> Array:
    sizes = [x.shape[-1] for x in logits]
    if len({*sizes}) > 1:
        raise ValueError(
            f"`models` must share one vocabulary, got {sizes} tokens; cut the padding "
            "rows of their output layers off."
        )
    return jnp.stack([x.astype(jnp.float32) for x in logits])


def _combined(combine: Combine | None, logits: Array) -> tuple[Array, Any]:
    if combine is not None:
        return combine(logits)
    if len(logits) > 1:
        raise ValueError(
            f"`combine` must be given for several models, got None for {len(logits)}."
        )
    return logits[0], ()


def _check_prompts(mask: Array | np.ndarray) -> None:
    mask = np.asarray(mask)
    if not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError(
            "`mask` must be False only before the beginning of a prompt, got padding "
            "after it; use `padded(prompts, left=True)`."
        )
