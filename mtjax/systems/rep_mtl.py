r"""Rep-MTL: keeps task saliencies distinct, and aligned per sample.

Rep-MTL: Unleashing the Power of Representation-level Task Saliency for Multi-Task
Learning, 2025. The gradient of a task's loss at the shared representation says what the
task looks at, its saliency. Two regularisers shape the saliencies: one gives every
location to few tasks (low entropy over tasks), one makes the channel affinities of all
tasks of a sample look alike and unlike those of other samples.

New here: `representation_saliency`, `tsr_loss`, `csa_loss` and `rep_mtl_objective`,
which adds the two losses to any pair of encoder and heads, before any balancer.

Uses: `mtjax.losses.contrastive_loss`; the pair goes to `mtjax.value_and_task_grads` or
`mtjax.training.make_train_step`.

Needs: encoder and heads as two functions; batches of at least two examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.losses import contrastive_loss
from mtjax.losses.contrastive import PositiveReduction

Saliencies = Mapping[str, Float[Array, "_ ... _"]]
Pair = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class RepMTLConfig:
    r"""Weights and readings of the two regularisers.

    Attributes:
      lambda_tsr: weight of `tsr_loss`, at least 0; the paper searches 0.7 to 1.5.
      lambda_csa: weight of `csa_loss`, at least 0; the same.
      temperature: :math:`\tau > 0` of `csa_loss`; the paper does not print its own.
      log_loss: train on :math:`\log(L_t + 10^{-8})`, as in the paper's protocol.
        Balancers that divide by losses or take their logarithm want False.
      saliency: gradients of the ``"trained"`` losses, or of the ``"raw"`` ones also if
        their logarithms are trained. It matters for `tsr_loss` alone, which compares
        tasks: logarithms divide a task's saliency by its loss.
      positive_reduction: see `csa_loss`.
      include_positive_in_denominator: see `csa_loss`.
    """

    lambda_tsr: float = 0.9
    lambda_csa: float = 0.9
    temperature: float = 0.1
    log_loss: bool = True
    saliency: Literal["trained", "raw"] = "trained"
    positive_reduction: PositiveReduction = "mean"
    include_positive_in_denominator: bool = False

    def __post_init__(self):
        """Checks the ranges that nothing else checks."""
        for name in ("lambda_tsr", "lambda_csa"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"`{name}` must be at least 0, got {getattr(self, name)}."
                )
        if self.saliency not in ("trained", "raw"):
            raise ValueError(
                f"`saliency` must be 'trained' or 'raw', got {self.saliency!r}."
            )


def representation_saliency(
    losses_fn: Callable[[Any], Mapping[str, Array]], z: Any
) -> dict[str, Array]:
    r"""The gradient of every task's loss at the representation: what the task looks at.

    :math:`S_t = \partial L_t / \partial Z`. Differentiable: regularisers reach encoder
    and heads through it. The encoder is not differentiated here, nor run again.

    Args:
      losses_fn: ``losses_fn(z) -> {task: loss}``, the heads and losses as a function of
        the representation alone. It is traced once per task; a random key has to come
        from outside, so that it gives the same numbers each time.
      z: the representation, one array ``(batch, ..., channels)`` that all tasks share,
        or one per task as ``{task: array}`` if every task has inputs of its own.

    Returns:
      One array of the shape of the task's representation per task.

    Raises:
      ValueError: if `z` is a mapping whose keys are not the tasks.

    Example:
      >>> def heads(z):
      ...     return {"sum": jnp.sum(z), "square": jnp.sum(z**2)}
      >>> found = representation_saliency(heads, jnp.array([[1.0, 3.0]]))
      >>> print(found["square"], found["sum"])
      [[2. 6.]] [[1. 1.]]
    """
    tasks = sorted(jax.eval_shape(losses_fn, z))
    if not isinstance(z, Mapping):
        return {t: jax.grad(lambda z, t=t: losses_fn(z)[t])(z) for t in tasks}
    if sorted(z) != tasks:
        raise ValueError(
            f"`z` must be one array or have exactly the tasks {tasks}, got the keys "
            f"{sorted(z)}."
        )
    own = lambda t: jax.grad(lambda x: losses_fn({**z, t: x})[t])(z[t])
    return {t: own(t) for t in tasks}


def tsr_loss(saliencies: Saliencies, *, axis_name: str | None = None) -> Array:
    r"""Entropy over tasks of the saliency at a location: low if few tasks look there.

    .. math::
      \frac1n \sum_i \sum_t -P_{it} \log P_{it}, \quad
      P_{it} = \frac{|\hat S_{it}|}{\sum_k |\hat S_{ik}|}, \quad
      \hat S_{it} = \frac1C \sum_c S_{tic}

    over all :math:`n` locations :math:`i` of all samples. The mean over channels is
    signed: a task whose channels cancel does not look there.

    Args:
      saliencies: per task ``(batch, ..., channels)``, all of one shape; without axes in
        between a sample is a single location. See `representation_saliency`.
      axis_name: inside `shard_map`, the axis that the batch is split over: the mean of
        the results over devices is then the loss of the whole batch, even where
        devices have different numbers of dark locations.

    Returns:
      The mean entropy in nats, between 0 and :math:`\log T`. Locations where no task
      has a saliency do not count.

    Raises:
      ValueError: if there is no task or the shapes differ.

    Example:
      >>> one, none = jnp.ones((2, 4)), jnp.zeros((2, 4))
      >>> apart, together = {"a": one, "b": none}, {"a": one, "b": one}
      >>> print(f"{tsr_loss(apart):.4f} {tsr_loss(together):.4f}")
      0.0000 0.6931
    """
    _check_shapes(saliencies)
    s = jnp.stack([saliencies[task] for task in sorted(saliencies)])
    size = _unit_scale(jnp.abs(jnp.mean(s.astype(jnp.float32), axis=-1)), axes=None)
    total = jnp.sum(size, axis=0, keepdims=True)
    lit = total > jnp.finfo(jnp.float32).tiny
    share = size / jnp.where(lit, total, 1.0)
    # The slope of p log p is infinite at 0, which times a slope of 0 is NaN.
    logarithm = jnp.log(jnp.where(share > 0, share, 1.0))
    entropy = jnp.sum(jnp.where(lit, -share * logarithm, 0.0))
    count = jnp.sum(lit.astype(jnp.float32))
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return entropy / jnp.maximum(count, 1.0)


class AffinityCosines(NamedTuple):
    """What `csa_loss` compares.

    Attributes:
      positives: ``(batch, tasks)`` cosines in [0, 1] of each sample's anchor and the
        channel affinities of its tasks, in the order of the sorted names.
      negatives: ``(batch, others)`` cosines in [0, 1] of anchors of different samples.
      mask: ``(batch, others)`` False where a sample meets itself.
    """

    positives: Float[Array, "batch tasks"]
    negatives: Float[Array, "batch others"]
    mask: Bool[Array, "batch others"]


def affinity_cosines(
    saliencies: Saliencies, *, axis_name: str | None = None
) -> AffinityCosines:
    r"""Cosines of channel affinities, from matrices smaller than channels squared.

    With :math:`S_{tb} \in R^{C \times N}` at :math:`N` locations, the affinity of a
    task is :math:`S S^T`; the anchor of a sample is :math:`A A^T`, where the columns of
    :math:`A_b \in R^{C \times T}` are the tasks' saliencies averaged over locations.
    Their inner products come from small matrices:
    :math:`\langle A A^T, S S^T \rangle = \|A^T S\|^2` and
    :math:`\langle A_b A_b^T, A_k A_k^T \rangle = \|A_b^T A_k\|^2`.

    Args:
      saliencies: see `tsr_loss`.
      axis_name: see `csa_loss`.

    Returns:
      The cosines. Those of a saliency that is zero are 0.

    Raises:
      ValueError: if there is no task, the shapes differ, or there is a single sample.
    """
    batch = _check_shapes(saliencies)
    # (tasks, batch, locations, channels); in full, as squares of squares are ahead.
    s = jnp.stack([saliencies[task] for task in sorted(saliencies)])
    s = s.astype(jnp.float32).reshape(len(s), batch, -1, s.shape[-1])
    anchors = _unit_scale(jnp.moveaxis(jnp.mean(s, axis=2), 0, 1), axes=(1, 2))
    s = _unit_scale(s, axes=(2, 3))
    others, first = anchors, 0
    if axis_name is not None:
        others = jax.lax.all_gather(anchors, axis_name, tiled=True)
        first = batch * jax.lax.axis_index(axis_name)
    if len(others) < 2:
        raise ValueError(
            "`saliencies` must be of at least two samples, got one, which leaves no "
            "negatives; use larger batches, or gather them with `axis_name`."
        )
    norm, other_norm = _norm_of_affinity(anchors), _norm_of_affinity(others)
    product = partial(jnp.einsum, precision="highest")
    with_tasks = _square(product("bac,tbnc->btan", anchors, s))
    with_others = _square(product("bac,kdc->bkad", anchors, others))
    mask = first + jnp.arange(batch)[:, None] != jnp.arange(len(others))[None, :]
    return AffinityCosines(
        positives=_ratio(with_tasks, norm[:, None] * _norm_of_affinity(s).T),
        negatives=_ratio(with_others, norm[:, None] * other_norm[None, :]),
        mask=mask,
    )


def csa_loss(
    saliencies: Saliencies,
    *,
    temperature: float = 0.1,
    positive_reduction: PositiveReduction = "mean",
    include_positive_in_denominator: bool = False,
    axis_name: str | None = None,
) -> Array:
    r"""Contrasts a sample's task affinities with other samples: aligns its tasks.

    `mtjax.losses.contrastive_loss` of `affinity_cosines`: the anchor of a sample is
    pulled to the affinities of its tasks and pushed away from the other anchors.

    Args:
      saliencies: see `tsr_loss`; at least two samples.
      temperature: :math:`\tau > 0`.
      positive_reduction: over tasks: ``"mean"`` outside the logarithm or
        ``"sum_inside_log"``.
      include_positive_in_denominator: whether the positive is also there.
      axis_name: inside `shard_map`, the axis that the batch is split over: anchors of
        all devices are gathered as negatives, so that the mean of the results over
        devices is the loss of the whole batch. None: each device's own samples only.

    Returns:
      The loss in nats; it can be negative without the positive in the denominator.

    Raises:
      ValueError: as `affinity_cosines` and `contrastive_loss` state.

    References:
      Rep-MTL, 2025. The printed formula has no positive in the denominator and no sum
      over tasks; the mean over tasks outside the logarithm is our reading.
    """
    cosines = affinity_cosines(saliencies, axis_name=axis_name)
    return contrastive_loss(
        cosines.positives,
        cosines.negatives,
        mask=cosines.mask,
        temperature=temperature,
        positive_reduction=positive_reduction,
        include_positive_in_denominator=include_positive_in_denominator,
    )


def rep_mtl_objective(
    pair: Pair,
    config: RepMTLConfig = RepMTLConfig(),
    *,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Pair:
    r"""Adds the two regularisers to the losses of an encoder and its heads.

    :math:`\sum_t \ell_t + \lambda_{tsr} L_{tsr} + \lambda_{csa} L_{csa}` is the sum of
    the losses that come back, so that ``equal()`` trains the paper's objective. In
    value, each task carries an equal part of the regularisers. In gradient, it carries
    what flows through its own saliency: the parts add up to the whole, heads stay
    task-specific, and a balancer weighs a task together with what its saliency costs
    the others.

    Args:
      pair: ``(encode, losses_from_representation)``; the representation as in
        `representation_saliency`. Heads that are piecewise linear in it (ReLU and
        absolute error) have a saliency that hardly moves: prefer smooth activations.
      config: weights and readings. A regulariser of weight 0 is not computed; without
        both, gradients are bit for bit those of the losses.
      has_aux: whether `losses_from_representation` returns ``(losses, aux)``.
      axis_name: what `value_and_task_grads` gets. Losses are averaged over devices
        before the logarithm, and both regularisers are those of the whole batch. If
        None inside `shard_map`, everything is each device's own.

    Returns:
      The new pair. Its second function returns ``(losses, logs)``, or
      ``(losses, (aux, logs))``: pass ``has_aux=True`` on. `logs` hold the terms before
      weighting: ``"tsr"`` and ``"csa"``, those that are computed, and
      ``"task_losses"``, before the logarithm.

    Raises:
      ValueError: when traced, as `representation_saliency` and `csa_loss` state.

    Example:
      >>> import mtjax
      >>> def encode(params, x):
      ...     return jnp.tanh(x @ params["trunk"])
      >>> def heads(params, z, x):
      ...     return {t: jnp.mean((z @ params[t] - x[:, 0]) ** 2) for t in "ab"}
      >>> params = {"trunk": jnp.eye(2), "a": jnp.ones(2), "b": -jnp.ones(2)}
      >>> pair = rep_mtl_objective((encode, heads))
      >>> grad_fn = mtjax.value_and_task_grads(pair, has_aux=True)
      >>> (losses, logs), grads = grad_fn(params, jnp.array([[1.0, 2.0], [0.5, 0.1]]))
      >>> sorted(losses), sorted(logs), grads.shared["a"]
      (['a', 'b'], ['csa', 'task_losses', 'tsr'], False)
    """
    encode, losses_from_representation = pair

    def regularised(params, z, *args, **kwargs):
        def at(z):
            found = losses_from_representation(params, z, *args, **kwargs)
            raw, aux = found if has_aux else (found, None)
            if axis_name is not None:
                raw = jax.lax.pmean(raw, axis_name)
            log = lambda loss: jnp.log(loss + 1e-8) if config.log_loss else loss
            return jax.tree.map(log, dict(raw)), raw, aux

        def followed(z) -> Mapping[str, Array]:
            losses, raw, _ = at(z)
            return losses if config.saliency == "trained" else raw

        losses, raw, aux = at(z)
        logs = {"task_losses": raw}
        if config.lambda_tsr or config.lambda_csa:
            saliencies = representation_saliency(followed, z)
            fixed = jax.lax.stop_gradient(saliencies)
            regulariser = jax.value_and_grad(_regulariser, has_aux=True)
            (value, terms), slopes = regulariser(fixed, config, axis_name)
            losses = {
                task: loss
                + value / len(losses)
                # Zero in value: a first-order model of the regulariser.
                + jnp.vdot(slopes[task], saliencies[task] - fixed[task])
                for task, loss in losses.items()
            }
            if axis_name is not None:
                terms = jax.lax.pmean(terms, axis_name)
            logs |= terms
        return losses, (aux, logs) if has_aux else logs

    return encode, regularised


def _regulariser(saliencies, config: RepMTLConfig, axis_name: str | None):
    """The weighted sum of both, and each of them."""
    terms = {}
    if config.lambda_tsr:
        terms["tsr"] = tsr_loss(saliencies, axis_name=axis_name)
    if config.lambda_csa:
        terms["csa"] = csa_loss(
            saliencies,
            temperature=config.temperature,
            positive_reduction=config.positive_reduction,
            include_positive_in_denominator=config.include_positive_in_denominator,
            axis_name=axis_name,
        )
    weights = {"tsr": config.lambda_tsr, "csa": config.lambda_csa}
    return sum(weights[name] * term for name, term in terms.items()), terms


def _check_shapes(saliencies: Saliencies) -> int:
    """Returns the batch size; raises unless all saliencies have one shape."""
    shapes = {task: s.shape for task, s in saliencies.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) < 2:
        raise ValueError(
            "`saliencies` must have one shape (batch, ..., channels) for all tasks, "
            f"got {shapes}; give every task batches of the same size."
        )
    return next(iter(shapes.values()))[0]


def _unit_scale(x: Array, axes: tuple[int, ...] | None) -> Array:
    """Divides by the largest entry: no result depends on it, but squares underflow."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1.0)


def _norm_of_affinity(x: Float[Array, "*some rows channels"]) -> Float[Array, "*some"]:
    """Norm of :math:`X^T X`, from whichever Gram matrix of X is smaller."""
    rows, channels = x.shape[-2:]
    terms = "...ic,...jc->...ij" if rows < channels else "...nc,...nd->...cd"
    squares = _square(jnp.einsum(terms, x, x, precision="highest"))
    # The slope of a root is infinite at 0.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _square(x: Float[Array, "*some rows columns"]) -> Float[Array, "*some"]:
    return jnp.sum(x**2, axis=(-2, -1))


def _ratio(x: Array, y: Array) -> Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1.0), 0.0)
