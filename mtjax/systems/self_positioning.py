r"""Self Positioning: the best encoder between several task vectors.

Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance
through Model Merging, 2024. An embedding model is fine-tuned on every task by itself;
a direction between the task vectors, along arcs, and one common factor are then learnt
on a small probe set, with a price on the factor.

New here: `direction`, differentiable in its weights, the probe loss with its price,
`fit`, and two diagnoses of unequal amounts of data, `norm_growth` and `angles`.

Uses: `mtjax.merging` (`merge`, `arc_chain`, `gramian`, `learn`),
`mtjax.losses.in_batch_contrastive_loss`, SciPy, any optimizer.

Needs: fine-tunings of one base; pairs of texts that belong together, of every task.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from scipy.stats import linregress

from mtjax.losses import in_batch_contrastive_loss
from mtjax.merging.learning import OnStep, learn
from mtjax.merging.slerp import arc_chain, gramian
from mtjax.merging.vectors import merge

Rule = Literal["slerp-mean", "slerp-sum", "average"]
"""How weights become a direction; see `direction`."""

EmbedFn = Callable[[PyTree, Any], Array]
"""`embed_fn(params, inputs)`: one vector per input, `(inputs, width)`."""

Position = Mapping[str, Float[Array | np.ndarray, "..."]]
"""Before the softplus: `"weights"`, one number per model, and `"scale"`, a number."""


@dataclass(frozen=True)
class SelfPositioningConfig:
    r"""What is searched.

    Attributes:
      rule: see `direction`.
      mu: :math:`\mu`, the price of the scale, at least 0. Probe pairs that the models
        were trained on call for a long vector; a price keeps it short. Below 0.05 was
        best as published.
      temperature: :math:`\tau > 0` of the loss, usually that of the training.
    """

    rule: Rule = "slerp-mean"
    mu: float = 0.05
    temperature: float = 0.05

    def __post_init__(self):
        """Checks the ranges."""
        if self.rule not in get_args(Rule):
            raise ValueError(
                f"`rule` must be one of {get_args(Rule)}, got {self.rule!r}."
            )
        if not self.mu >= 0:
            raise ValueError(
                f"`mu` must be at least 0, got {self.mu!r}: below, a longer vector "
                "would always be a better one."
            )
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive, got {self.temperature!r}."
            )


class Pairs(NamedTuple):
    """A batch of one task; inputs are whatever `embed_fn` takes.

    Attributes:
      queries: inputs.
      positives: as many inputs: what belongs to every query.
      negatives: any number of inputs, hard negatives of some of the queries; or None.
      mask: `(queries, positives + negatives)`, False where a candidate belongs to the
        query as well and is no negative; None if there is no such candidate.
    """

    queries: Any
    positives: Any
    negatives: Any = None
    mask: Bool[Array | np.ndarray, "queries candidates"] | None = None


def init_position(
    num_models: int, weights: Sequence[float | int] | None = None, scale: float = 1.0
) -> dict[str, Array]:
    """Where the search starts.

    Args:
      num_models: number of task vectors.
      weights: one positive number per model; 1 by default.
      scale: positive; 1 is the length of the vectors themselves.

    Returns:
      The numbers whose softplus these are.

    Raises:
      ValueError: if there is not one weight per model, or one is not positive.

    Example:
      >>> print(jax.nn.softplus(init_position(2)["weights"]))
      [1. 1.]
    """
    given = np.ones(num_models) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (num_models,) or not (given > 0).all() or not scale > 0:
        raise ValueError(
            f"`weights` and `scale` must be positive, one weight for each of "
            f"{num_models} models, got {weights} and {scale}."
        )
    # The inverse of softplus, also where the exponential would overflow.
    inverse = lambda x: jnp.float32(x + np.log(-np.expm1(-x)))
    return {"weights": inverse(given), "scale": inverse(np.float64(scale))}


def direction(
    products: Float[Array, "models models"],
    weights: Float[Array, " models"],
    rule: Rule = "slerp-mean",
) -> Float[Array, " models"]:
    r"""Coefficients of the task vectors at the place that the weights stand for.

    - `"slerp-mean"`, `"slerp-sum"`: arcs from the first to the next and so on, see
      `mtjax.merging.slerp.arc_chain`. The order of the vectors counts. Where two are
      nearly parallel, or one is zero, the arc is a straight line.
    - `"average"`: :math:`a_i / \sum_j a_j`.

    Args:
      products: of the task vectors over all parameters, `mtjax.merging.slerp.gramian`.
      weights: :math:`a`, positive; multiplying all by a number changes nothing.
      rule: as above.

    Returns:
      The effective coefficients: look at these, not at the weights. With the mean and
      equal weights, earlier vectors are diluted.

    Example:
      >>> print(direction(jnp.eye(2), jnp.ones(2)).round(4))
      [0.7071 0.7071]
      >>> print(direction(jnp.eye(2), jnp.array([1.0, 3.0]), "average"))
      [0.25 0.75]

    References:
      The public notes on the paper print the fractions of the two vectors swapped; the
      second form there and the code of third parties have them as here.
    """
    if rule == "average":
        return weights / jnp.sum(weights)
    return arc_chain(products, weights, "mean" if rule == "slerp-mean" else "sum")


def coefficients_of(
    position: Position, products: Float[Array, "models models"], rule: Rule
) -> Float[Array, " models"]:
    r"""What every task vector is multiplied with: :math:`\lambda c(a)`.

    Args:
      position: before the softplus, as from `init_position`.
      products: see `direction`.
      rule: see there.

    Returns:
      The coefficients, for `mtjax.merging.merge`.
    """
    weights, scale = (jax.nn.softplus(position[name]) for name in ("weights", "scale"))
    return scale * direction(products, weights, rule)


def self_positioning_loss(
    position: Position,
    base: PyTree,
    vectors: PyTree,
    products: Float[Array, "models models"],
    batch: Mapping[str, Pairs],
    embed_fn: EmbedFn,
    config: SelfPositioningConfig = SelfPositioningConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""The mean over tasks of the contrastive loss, plus the price of the scale.

    .. math:: \mathrm{mean}_k L_{CL}(B_k; \theta_0 + \lambda \sum_i c_i(a) V_i)
      + \mu \lambda

    Args:
      position: :math:`a` and :math:`\lambda` before the softplus.
      base: :math:`\theta_0`.
      vectors: :math:`V`, from `mtjax.merging.task_vectors`.
      products: their `mtjax.merging.slerp.gramian`.
      batch: :math:`B`, pairs by task. Negatives are of the same task, and every task
        counts the same, whatever the number of its pairs.
      embed_fn: `embed_fn(params, inputs)`, to `(inputs, width)`; cosines are taken.
      config: what is searched.

    Returns:
      The loss, and the contrastive loss by task. `jax.value_and_grad` of it is all that
      a loop of one's own needs.
    """
    params = merge(base, vectors, coefficients_of(position, products, config.rule))

    def of(pairs: Pairs):
        hard = pairs.negatives
        return in_batch_contrastive_loss(
            embed_fn(params, pairs.queries),
            embed_fn(params, pairs.positives),
            None if hard is None else embed_fn(params, hard),
            mask=pairs.mask,
            temperature=config.temperature,
        )

    losses = {task: of(pairs) for task, pairs in batch.items()}
    price = config.mu * jax.nn.softplus(position["scale"])
    return jnp.mean(jnp.stack([*losses.values()])) + price, losses


class Positioned(NamedTuple):
    """What `fit` found.

    Attributes:
      params: the merged model, an encoder like any other.
      weights: of the models, whose ratios give the direction.
      scale: factor of the merged vector.
      coefficients: effective ones, of the task vectors; see `direction`.
      losses: `(steps,)` by task, each before its step.
      trajectory: `"weights"`, `"scale"` and `"coefficients"`, `(steps + 1, ...)`.
    """

    params: PyTree
    weights: np.ndarray
    scale: float
    coefficients: np.ndarray
    losses: dict[str, np.ndarray]
    trajectory: dict[str, np.ndarray]


def fit(
    embed_fn: EmbedFn,
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Mapping[str, Pairs]],
    config: SelfPositioningConfig = SelfPositioningConfig(),
    *,
    steps: int = 1_000,
    optimizer: optax.GradientTransformation | None = None,
    start: Position | None = None,
    on_step: OnStep | None = None,
) -> Positioned:
    """Learns one weight per model and one scale; changes nothing in place.

    Args:
      embed_fn: see `self_positioning_loss`, like the next two.
      base: see there.
      vectors: see there.
      batches: at least one per step, with the same tasks and shapes in each.
      config: what is searched.
      steps: at least one.
      optimizer: by default Adam with a learning rate of 5e-3.
      start: from `init_position`; all ones by default.
      on_step: called with the number of the step and its losses by task.

    Returns:
      The merged model, where it lies, and the way there.

    Raises:
      ValueError: if there are fewer batches than steps, or none.
    """
    products = gramian(vectors)
    found = learn(
        lambda position, frozen, batch: self_positioning_loss(
            position, frozen[0], frozen[1], frozen[2], batch, embed_fn, config
        ),
        init_position(len(products)) if start is None else dict(start),
        (base, vectors, products),
        batches,
        steps=steps,
        optimizer=optax.adam(5e-3) if optimizer is None else optimizer,
        on_step=on_step,
    )
    rows = jax.tree.map(jnp.asarray, found.trajectory)
    path = jax.tree.map(jax.nn.softplus, rows) | {
        "coefficients": jax.vmap(lambda p: coefficients_of(p, products, config.rule))(
            rows
        )
    }
    path = {name: np.asarray(x) for name, x in path.items()}
    last = {name: x[-1] for name, x in path.items()}
    return Positioned(
        merge(base, vectors, jnp.asarray(last["coefficients"])),
        last["weights"],
        float(last["scale"]),
        last["coefficients"],
        found.reports,
        path,
    )


class NormGrowth(NamedTuple):
    """A straight line through the norms of task vectors.

    Attributes:
      norms: one per vector.
      slope: per example.
      intercept: where there would be no example.
      r_squared: share of the variance that the line explains, in [0, 1].
    """

    norms: np.ndarray
    slope: float
    intercept: float
    r_squared: float


def norm_growth(vectors: PyTree, amounts: Sequence[float | int]) -> NormGrowth:
    """How the length of a task vector grows with the amount of its training data.

    Args:
      vectors: what `mtjax.merging.task_vectors` returned, at least three models.
      amounts: examples that each was trained on, not all the same.

    Returns:
      The norms over all parameters, and the line of least squares through them.

    Raises:
      ValueError: if there is not one amount for each of at least three vectors.

    Example:
      >>> growth = norm_growth({"w": jnp.array([[1.0], [2.0], [3.0]])}, [10, 20, 30])
      >>> print(f"{growth.slope:.2f} {growth.r_squared:.2f}")
      0.10 1.00
    """
    squares = np.diagonal(np.asarray(gramian(vectors), np.float64))
    if len(amounts) != len(squares) or len(squares) < 3:
        raise ValueError(
            "`amounts` must hold one number for each of at least three vectors, got "
            f"{len(amounts)} for {len(squares)}."
        )
    norms = np.sqrt(squares)
    line = linregress(np.asarray(amounts, np.float64), norms)
    return NormGrowth(
        norms, float(line.slope), float(line.intercept), float(line.rvalue**2)
    )


def angles(vectors: PyTree) -> Float[np.ndarray, "models models"]:
    """Angles between task vectors over all parameters, in degrees.

    Next to the vectors of single tasks, that of a model trained on all of them shows
    what it leans to: the smaller angle is usually that to the task with more data.

    Args:
      vectors: what `mtjax.merging.task_vectors` returned.

    Returns:
      The angles, 0 to 180, 0 on the diagonal; 90 to a vector that is zero.

    Example:
      >>> vectors = {"w": jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])}
      >>> print(angles(vectors).round(4))
      [[ 0. 90. 45.]
       [90.  0. 45.]
       [45. 45.  0.]]
    """
    products = np.asarray(gramian(vectors), np.float64)
    norms = np.sqrt(np.diagonal(products))
    cosines = products / np.maximum(np.outer(norms, norms), 1e-300)
    np.fill_diagonal(cosines, 1.0)
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
