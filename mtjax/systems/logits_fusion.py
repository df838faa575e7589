r"""Dynamic Logits Fusion: small experts steer a large model per token.

On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion, NeurIPS 2024.
What fine-tuning did to small language models, a difference of logits, is added to the
logits of a large one that nobody trains. The weight is found anew at every token: the
one that shifts the large model as far, in two KL divergences, as the small one.

New here: `dynamic_logits_fusion` (weights searched), `static_logits_fusion` (weights
given: proxy tuning), for decoders `DynamicFusion` and `StaticFusion`; `routing`, which
says which expert was listened to.

Uses: `generate` and `score` of `mtjax.nn.decoding`, with caches of all models (such as
`mtjax.nn.decoder.Decoder`); `next_token_loss` to train experts, on answers only.

Needs: large model, small model and small experts with one vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from mtjax.losses import masked_mean

# Stands for minus infinity, whose differences are NaN; its exponential is 0 as well.
_MASKED = -1e30


@dataclass(frozen=True)
class DynamicFusion:
    r"""How weights are searched.

    Attributes:
      search: `"grid"` tries every expert by itself, all others at 0, on a grid, and
        takes the best, as published; `"bisect"` halves the interval of a single expert;
        `"coordinate"` lets experts add up: it begins with the best single expert and
        searches one weight after the other on its grid.
      low: smallest weight, at least 0, of all experts or of each.
      high: largest weight.
      points: of the grid: 21 from 0 to 2 are steps of 0.1.
      rounds: over all experts, of the coordinate search.
      halvings: of the interval, by bisection.
    """

    search: Literal["grid", "bisect", "coordinate"] = "grid"
    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = 2.0
    points: int = 21
    rounds: int = 2
    halvings: int = 12

    def __post_init__(self):
        """Checks the ranges."""
        if self.search not in ("grid", "bisect", "coordinate"):
            raise ValueError(
                "`search` must be 'grid', 'bisect' or 'coordinate', got "
                f"{self.search!r}."
            )
        low, high = np.atleast_1d(self.low), np.atleast_1d(self.high)
        if low.min() < 0 or (high < low).any():
            raise ValueError(
                "`low` must be at least 0 and at most `high`, got "
                f"{self.low!r} and {self.high!r}."
            )
        if self.points < 2 or min(self.rounds, self.halvings) < 1:
            raise ValueError(
                "`points` must be at least 2, `rounds` and `halvings` at least 1, got "
                f"{self.points!r}, {self.rounds!r} and {self.halvings!r}."
            )

    def __call__(self, logits: Float[Array, "models batch vocab"]) -> "Fused":
        """Combines large model, small model and experts, in this order."""
        return dynamic_logits_fusion(logits[0], logits[1], logits[2:], self)


@dataclass(frozen=True)
class StaticFusion:
    """The same weights at every token.

    Attributes:
      alpha: one per expert; 1 is proxy tuning.
    """

    alpha: tuple[float, ...]

    def __call__(self, logits: Float[Array, "models batch vocab"]) -> "Fused":
        """Combines large model, small model and experts, in this order."""
        return static_logits_fusion(logits[0], logits[1], logits[2:], self.alpha)


class Trace(NamedTuple):
    """How distributions came about.

    Attributes:
      alpha: weights of the experts.
      objective: what is left of the mismatch; 0 is perfect.
    """

    alpha: Float[Array, " experts *batch"]
    objective: Float[Array, "*batch"]


class Fused(NamedTuple):
    """Distributions over the next token.

    Attributes:
      logits: logarithms of probabilities.
      trace: how they came about.
    """

    logits: Float[Array, "*batch vocab"]
    trace: Trace


# --- Fusion ---------------------------------------------------------------------------


class Shifts(NamedTuple):
    r"""What fine-tuning did to the small models.

    Attributes:
      large: :math:`\log P`.
      differences: :math:`\log Q_t - \log Q`.
      forward: :math:`KL(Q_t \| Q)`.
      backward: :math:`KL(Q \| Q_t)`.
      valid: tokens that no model masks.
    """

    large: Float[Array, "*batch vocab"]
    differences: Float[Array, "experts *batch vocab"]
    forward: Float[Array, " experts *batch"]
    backward: Float[Array, " experts *batch"]
    valid: Bool[Array, "*batch vocab"]


def _kl(log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def shifts_of(
    large: Float[Array, "*batch vocab"],
    small: Float[Array, "*batch vocab"],
    experts: Float[Array, "experts *batch vocab"],
) -> Shifts:
    """Normalises logits, in float32, and measures the shifts of the experts.

    Args:
      large: logits of the large model.
      small: logits of the small model that all experts were fine-tuned from.
      experts: logits of the experts.

    Returns:
      What all searches need. A token with minus infinity in one model is masked in all.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if small.shape != large.shape or experts.shape[1:] != large.shape:
        raise ValueError(
            "`small` and every one of `experts` must have the shape of `large`, "
            f"{large.shape}, got {small.shape} and {experts.shape[1:]}; models must "
            "share one vocabulary: cut padding rows off."
        )
    together = jnp.concatenate([large[None], small[None], experts])
    # NaN is no mask and stays visible.
    valid = ~jnp.any(jnp.isneginf(together), axis=0)
    masked = jnp.where(valid[None], together.astype(jnp.float32), _MASKED)
    log_p, log_q, *log_experts = jax.nn.log_softmax(masked)
    log_t = jnp.stack(log_experts) if log_experts else masked[2:]
    base = jnp.broadcast_to(log_q[None], log_t.shape)
    return Shifts(log_p, log_t - base, _kl(log_t, base), _kl(base, log_t), valid)


def fuse(
    alpha: Float[Array, " experts *batch"], shifts: Shifts
) -> Float[Array, "*batch vocab"]:
    r"""The steered distribution.

    .. math:: \tilde P = softmax(M^L + \sum_t \alpha_t (M^S_t - M^S))

    Args:
      alpha: :math:`\alpha`.
      shifts: of the models.

    Returns:
      :math:`\log \tilde P`; a large negative number at masked tokens.
    """
    added = jnp.sum(alpha[..., None] * shifts.differences, axis=0)
    return jax.nn.log_softmax(shifts.large + added)


def kl_objective(
    alpha: Float[Array, " experts *batch"], shifts: Shifts
) -> Float[Array, "*batch"]:
    r"""How differently the large model and the small ones are shifted.

    .. math:: J(\alpha) = \sum_t (KL(\tilde P \| P) - KL(Q_t \| Q))^2
        + (KL(P \| \tilde P) - KL(Q \| Q_t))^2

    The paper's pseudo-code; its appendix once has the arguments of a divergence the
    other way round.

    Args:
      alpha: :math:`\alpha`.
      shifts: of the models.

    Returns:
      :math:`J`, at least 0.
    """
    log_f = fuse(alpha, shifts)
    forward, backward = _kl(log_f, shifts.large), _kl(shifts.large, log_f)
    gaps = (forward[None] - shifts.forward) ** 2
    return jnp.sum(gaps + (backward[None] - shifts.backward) ** 2, axis=0)


def static_logits_fusion(
    large: Float[Array, "*batch vocab"],
    small: Float[Array, "*batch vocab"],
    experts: Float[Array, "experts *batch vocab"],
    alpha: Sequence[float],
) -> Fused:
    """Adds differences of logits with given weights.

    Args:
      large: logits of the large model; minus infinity masks a token.
      small: logits of the small model.
      experts: logits of the experts; may be none.
      alpha: one weight per expert; 1 is proxy tuning.

    Returns:
      The fused distribution, and what the objective of the search would be.

    Raises:
      ValueError: if shapes or the number of weights do not fit.

    Example:
      >>> large, small = jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.0]])
      >>> expert = jnp.array([[[2.0, 0.0]]])
      >>> fused = static_logits_fusion(large, small, expert, [0.5])
      >>> print(jnp.exp(fused.logits))
      [[0.5 0.5]]
    """
    if len(alpha) != len(experts):
        raise ValueError(
            f"`alpha` must hold one weight for each of {len(experts)} experts, got "
            f"{tuple(alpha)!r}."
        )
    shifts = shifts_of(large, small, experts)
    weights = jnp.asarray(alpha, jnp.float32).reshape(-1, *(1,) * (large.ndim - 1))
    return _fused(jnp.broadcast_to(weights, shifts.forward.shape), shifts)


def dynamic_logits_fusion(
    large: Float[Array, "*batch vocab"],
    small: Float[Array, "*batch vocab"],
    experts: Float[Array, "experts *batch vocab"],
    config: DynamicFusion = DynamicFusion(),
) -> Fused:
    r"""Steers the large model as far as fine-tuning has shifted the small ones.

    .. math:: \alpha^* = argmin_\alpha J(\alpha)

    for every position by itself; see `kl_objective`. Pure, may be jitted with a static
    `config`. Temperature and top-p come after it, not before.

    Args:
      large: logits of the large model; minus infinity masks a token (in all models).
      small: logits of the small model that the experts were fine-tuned from.
      experts: logits of at least one expert.
      config: how weights are searched.

    Returns:
      The fused distributions, weights and what is left of the mismatch. Of equally good
      weights the first on the grid: 0 if the experts are no different.

    Raises:
      ValueError: if shapes or the number of experts do not fit.

    Example:
      >>> small = jnp.array([[0.0, 0.0, 0.0]])
      >>> expert = jnp.array([[[3.0, 0.0, 1.0]]])
      >>> fused = dynamic_logits_fusion(small, small, expert)  # large = small
      >>> print(fused.trace.alpha)
      [[1.]]
    """
    shifts = shifts_of(large, small, experts)
    number = len(experts)
    if number == 0 or (config.search == "bisect" and number > 1):
        raise ValueError(
            "`experts` must hold at least one expert, and just one where `search` is "
            f"'bisect', got {number}; 'grid' and 'coordinate' take several."
        )
    bounds = (_each("low", config.low, number), _each("high", config.high, number))
    if config.search == "bisect":
        return _fused(_bisect(shifts, *bounds, config.halvings), shifts)
    # Steps are exact: 10 of 0.1 are 1.
    grid = jnp.asarray(np.linspace(*bounds, config.points, axis=1), jnp.float32)
    alpha = _best_single(shifts, grid)
    if config.search == "coordinate":
        alpha = _descend(shifts, grid, alpha, config.rounds)
    return _fused(alpha, shifts)


def _each(name: str, value: float | tuple[float, ...], number: int) -> np.ndarray:
    values = np.asarray(value, np.float64)
    if values.ndim and len(values) != number:
        raise ValueError(
            f"`{name}` must be a number or one for each of {number} experts, got "
            f"{value!r}."
        )
    return np.broadcast_to(values, (number,))


def _fused(alpha: Float[Array, " experts *batch"], shifts: Shifts) -> Fused:
    logits = jnp.where(shifts.valid, fuse(alpha, shifts), -jnp.inf)
    return Fused(logits, Trace(alpha, kl_objective(alpha, shifts)))


def _along(alpha, shifts: Shifts, expert, values: Float[Array, " points"]):
    """The objective with one expert's weight replaced by each of the values."""
    at = lambda value: kl_objective(alpha.at[expert].set(value), shifts)
    return jax.vmap(at)(values)


def _best_single(shifts: Shifts, grid: Float[Array, "experts points"]):
    """The best expert at its best weight, all others at 0."""
    zero = jnp.zeros_like(shifts.forward)
    # Expert by expert: all at once would take T times the memory.
    found = lambda row: _along(zero, shifts, row[0], row[1])
    scores = jax.lax.map(found, (jnp.arange(len(grid)), grid))
    best = jnp.argmin(scores.reshape(grid.size, *zero.shape[1:]), axis=0)
    chosen = jax.nn.one_hot(best // grid.shape[1], len(grid), axis=0)
    return chosen * grid.ravel()[best][None]


def _descend(shifts: Shifts, grid: Float[Array, "experts points"], alpha, rounds: int):
    """One weight after the other, the others held, never to a worse objective."""
    low = grid[:, 0].reshape(-1, *(1,) * (alpha.ndim - 1))
    alpha = jnp.maximum(alpha, low)

    def better(alpha, row):
        expert, values = row
        scores = _along(alpha, shifts, expert, values)
        return alpha.at[expert].set(values[jnp.argmin(scores, axis=0)]), None

    one_round = lambda _, alpha: jax.lax.scan(
        better, alpha, (jnp.arange(len(grid)), grid)
    )[0]
    return jax.lax.fori_loop(0, rounds, one_round, alpha)


def _bisect(shifts: Shifts, low, high, halvings: int):
    """Halves towards where the slope of the objective changes its sign.

    Both divergences grow with the weight: left of both of their targets the slope is
    negative, right of both it is positive.
    """
    shape = shifts.forward.shape
    ends = tuple(jnp.full(shape, x.item(), jnp.float32) for x in (low, high))
    objective = lambda alpha: kl_objective(alpha, shifts)

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) / 2
        slope = jax.jvp(objective, (middle,), (jnp.ones(shape),))[1][None]
        return jnp.where(slope < 0, middle, left), jnp.where(slope < 0, right, middle)

    left, right = jax.lax.fori_loop(0, halvings, halve, ends)
    candidates = jnp.stack([ends[0], (left + right) / 2, ends[1]])
    best = jnp.argmin(jax.vmap(objective)(candidates), axis=0)
    return jnp.take_along_axis(candidates, best[None, None], axis=0)[0]


def routing(
    alpha: Float[Array, " experts *tokens"], mask: Bool[Array, "*tokens"]
) -> Float[Array, " experts"]:
    """How often each expert was listened to most.

    Args:
      alpha: weights, of `Trace`.
      mask: which tokens count.

    Returns:
      Fractions of these tokens; tokens where all weights are 0 count for no expert.

    Example:
      >>> alpha = jnp.array([[0.5, 0.0, 0.0, 9.0], [0.1, 2.0, 0.0, 0.0]])
      >>> print(routing(alpha, jnp.array([True, True, True, False])))
      [0.333... 0.333...]
    """
    most = jax.nn.one_hot(jnp.argmax(alpha, axis=0), len(alpha), axis=0)
    heard = most * (alpha > 0)
    return jnp.stack([masked_mean(x, mask) for x in heard])
