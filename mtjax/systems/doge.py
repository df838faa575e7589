r"""DOGE: data-free merging by projective gradient descent.

Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, ICML 2025. A
correction of every matrix is learnt from the task vectors alone, so that the merged
model loses least on every task, and only outside the subspace that all tasks share.

New here: `doge` and its parts; a solver without steps, `solver="exact"`.

Uses: `mtjax.merging` (`Merger`, `task_vectors`), `mtjax.transforms.project_orthogonal`.

Needs: fine-tunings of one base; neither data nor heads.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from mtjax.merging.match import Where, named_leaves, selected
from mtjax.merging.matrices import from_matrices, one_by_one, thin_svd, to_matrices
from mtjax.merging.merger import Leaf, Merger, add_up, chain, combined, per_model, step
from mtjax.merging.order_statistics import threshold
from mtjax.transforms import project_orthogonal

Matrices = Float[Array, "models out in"]


@dataclass(frozen=True)
class DogeConfig:
    r"""How matrices are corrected and summed.

    Attributes:
      scale: $\eta$ of the coefficients, > 0; 0.07 for CLIP's encoders. The size of the
        merged vector is about $T \eta$ per matrix whatever the model, so that others
        want their own value, or `coefficients="relative"`. In `jax.jit` it may be
        traced, so that many are tried by one program.
      coefficients: of the sum over tasks, per matrix. `"norm"`: $\eta / \|\tau_i\|_F$;
        `"relative"`: that times the mean of all $\|\tau_i\|_F$; `"constant"`: $\eta$.
      density: fraction of every task vector that is kept, the largest elements of all
        matrices together, in (0, 1].
      divisor: $s \ge 1$; the shared subspace has $\lfloor r/s \rfloor$ dimensions,
        $r$ the smaller side of the matrix.
      project: keep the gradient out of the shared subspace.
      project_update: keep the step out of it too, which Adam's scaling brings back;
        False as published.
      per_task: one correction for every task instead of one for all, as before
        AdaMerging.
      inner: whether a gap is taken per `"row"` (output), as in the official code, or
        per `"layer"`, as the paper's formula reads.
      solver: `"adam"` as published, or `"exact"`: the smallest correction among those
        that minimise the gaps, only for `inner="row"` and without `per_task`.
      steps: of Adam; 0 for no correction.
      learning_rate: of Adam. The correction grows to about `steps` times it.
      out_axis: of the parameters; -1: outputs of Flax's kernels, 0: of PyTorch's.
    """

    scale: float | Float[Array, ""] = 0.07
    coefficients: Literal["norm", "relative", "constant"] = "norm"
    density: float = 0.3
    divisor: float | int = 6
    project: bool = True
    project_update: bool = False
    per_task: bool = False
    inner: Literal["row", "layer"] = "row"
    solver: Literal["adam", "exact"] = "adam"
    steps: int = 400
    learning_rate: float = 1e-4
    out_axis: int = -1

    def __post_init__(self):
        """Checks the ranges."""
        rules = {
            "scale": (
                isinstance(self.scale, jax.core.Tracer) or self.scale > 0,
                "positive",
            ),
            "density": (0 < self.density <= 1, "in (0, 1]"),
            "divisor": (self.divisor >= 1, "at least 1"),
            "steps": (self.steps >= 0, "at least 0"),
            "coefficients": (
                self.coefficients in ("norm", "relative", "constant"),
                "'norm', 'relative' or 'constant'",
            ),
            "inner": (self.inner in ("row", "layer"), "'row' or 'layer'"),
            "solver": (self.solver in ("adam", "exact"), "'adam' or 'exact'"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)}.")
        if self.solver == "exact" and (self.inner != "row" or self.per_task):
            raise ValueError(
                "`solver` must be 'adam' for corrections per task and gaps per layer: "
                "'exact' is known for one correction and gaps per row."
            )


def doge(config: DogeConfig = DogeConfig()) -> Merger:
    r"""The method; call it through `doge_merge`, or with `where` choosing matrices.

    $$\theta = \theta_0 + \sum_i \lambda_i \, m_i \odot (\tau_i + \Delta)$$

    for every matrix, with $\lambda_i$ of `coefficients`, $\Delta$ of `correction` and
    $m_i$ the mask of the largest elements of $\tau_i$.

    Args:
      config: how.

    Returns:
      The method, which knows matrices only: parameters of more axes are folded to
      matrices with a row per output, those of fewer are an error.
    """

    def add(leaf: Leaf):
        original = to_matrices(leaf.task_vectors, config.out_axis)
        return combined(coefficients(original, config), leaf.vectors)

    return chain(corrected(config), step(add, elementwise=False))


def doge_merge(
    base: PyTree,
    models: PyTree,
    config: DogeConfig = DogeConfig(),
    *,
    where: Where = None,
) -> PyTree:
    """Merges the matrices of the models; all else stays that of the base.

    Args:
      base: the model that all were fine-tuned from.
      models: trees like it, by name or in a sequence.
      config: how.
      where: which matrices, by path. Large embeddings are better left out: they would
        dominate the mask.

    Returns:
      A tree like the base, in its dtypes.

    Raises:
      ValueError: if models do not match the base, or no matrix is chosen.

    Example:
      >>> base = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
      >>> models = [{"w": jnp.ones((3, 2)), "b": jnp.ones(2)}] * 2
      >>> config = DogeConfig(0.5, "constant", density=1.0, steps=0)
      >>> doge_merge(base, models, config)["b"]
      Array([0., 0.], dtype=float32)
    """
    return doge(config)(base, models, where=matrices(base, where))


def matrices(base: PyTree, where: Where = None):
    """A predicate that chooses parameters with at least two axes.

    Args:
      base: the model.
      where: a choice among them, by path.

    Returns:
      The predicate, for `where` of mergers and `task_vectors`.

    Raises:
      ValueError: if it chooses nothing.
    """
    paths = {
        path
        for path, x in named_leaves(base).items()
        if jnp.ndim(x) >= 2 and selected(path, where)
    }
    if not paths:
        raise ValueError(
            "`where` must choose at least one parameter with two or more axes, got "
            f"none of {len(named_leaves(base))} for {where!r}."
        )
    return paths.__contains__


def corrected(config: DogeConfig = DogeConfig()) -> Merger:
    r"""The step from $\tau_i$ to $m_i \odot (\tau_i + \Delta)$, tasks still apart.

    Args:
      config: how.

    Returns:
      A step for `chain`, or for `Merger.changed` of task vectors before AdaMerging.
    """

    def apply(leaf: Leaf, _, smallest):
        if leaf.base.ndim < 2:
            raise ValueError(
                "`where` must choose parameters with at least two axes, got one of "
                f"shape {leaf.base.shape}; `mtjax.systems.doge.matrices` does."
            )
        vectors = to_matrices(leaf.vectors, config.out_axis)
        delta, _ = correction(vectors, config)
        wide = jnp.broadcast_to(delta, vectors.shape)
        shifted = leaf.vectors + from_matrices(wide, leaf.base.shape, config.out_axis)
        size = jnp.abs(leaf.vectors)
        return jnp.where(size >= per_model(smallest, size), shifted, 0)

    largest = threshold(lambda leaf, *_: jnp.abs(leaf.vectors), config.density)
    return step(apply, *largest, elementwise=False)


def coefficients(vectors: Matrices, config: DogeConfig) -> Float[Array, " models"]:
    r"""The weight of every task in one matrix, without training.

    Args:
      vectors: $\tau_i$.
      config: which.

    Returns:
      $\lambda_i$; 0 for tasks that left the matrix alone.
    """
    if config.coefficients == "constant":
        return jnp.full(len(vectors), config.scale, jnp.float32)
    sizes = jnp.sqrt(jnp.sum(jnp.square(vectors), axis=(1, 2)))
    inverse = jnp.where(sizes > 0, 1 / jnp.where(sizes > 0, sizes, 1), 0)
    relative = config.coefficients == "relative"
    return config.scale * inverse * (jnp.mean(sizes) if relative else 1.0)


def shared_subspace(
    vectors: Matrices, each: int, shared: int
) -> Float[Array, "out shared"]:
    r"""What the outputs of all tasks have in common.

    The leading left singular vectors of every $\tau_i$ side by side, and of these
    again the leading ones.

    Args:
      vectors: $\tau_i$.
      each: how many of every task.
      shared: how many in the end.

    Returns:
      $B$, with orthonormal columns; zero columns where tasks do not span so many.
    """
    u, s, _ = one_by_one(thin_svd, vectors)
    # A direction of no strength is arbitrary.
    there = s > 1e-6 * jnp.max(s, axis=1, keepdims=True)
    kept = jnp.where(there[:, None, :each], u[:, :, :each], 0)
    both, strength, _ = thin_svd(jnp.concatenate(jnp.unstack(kept), axis=1))
    return jnp.where((strength > 1e-6)[None], both, 0)[:, :shared]


def objective(
    delta: Float[Array, "corrections out in"],
    vectors: Matrices,
    weights: Float[Array, " models"],
    inner: Literal["row", "layer"] = "row",
) -> Float[Array, ""]:
    r"""How far the merged matrix falls behind every task's own, to first order.

    $$J(\Delta) = \sum_j \sum_r \Big( \tau_{j,r} \cdot \big( \tau_{j,r}
    - \sum_i \lambda_i (\tau_{i,r} + \Delta_r) \big) \Big)^2$$

    A task vector stands for the gradient of its loss, whose descent it is the sum of.

    Args:
      delta: $\Delta$, one for all tasks or one per task.
      vectors: $\tau_i$, rows $r$ are outputs.
      weights: $\lambda_i$.
      inner: `"layer"` sums over rows before the square.

    Returns:
      $J$, zero where every task is served.
    """
    merged = combined(weights, vectors + delta)
    gaps = jnp.sum(vectors * (vectors - merged[None]), axis=-1)
    if inner == "layer":
        gaps = jnp.sum(gaps, axis=-1)
    return jnp.sum(jnp.square(gaps))


def correction(
    vectors: Matrices, config: DogeConfig = DogeConfig()
) -> tuple[Float[Array, "corrections out in"], Float[Array, " steps"]]:
    r"""Learns $\Delta$ of one matrix.

    Args:
      vectors: $\tau_i$.
      config: how.

    Returns:
      $\Delta$, one for all tasks or one per task, and `objective` before every step
      (before and after for the exact solver).
    """
    weights, tasks = coefficients(vectors, config), len(vectors)
    start = jnp.zeros((tasks if config.per_task else 1, *vectors.shape[1:]))
    basis = None
    if config.project or config.project_update:
        rank = min(vectors.shape[1:])
        shared = rank / tasks if config.per_task else rank / config.divisor
        basis = shared_subspace(vectors, max(1, rank // tasks), int(shared))
    loss = lambda delta: objective(delta, vectors, weights, config.inner)
    if config.solver == "exact":
        delta = _smallest_minimiser(vectors, weights, basis)[None]
        return delta, jnp.stack([loss(start), loss(delta)])
    projection = project_orthogonal(basis, axis=1)
    optimizer = optax.chain(
        projection if config.project else optax.identity(),
        optax.adam(config.learning_rate),
        projection if config.project_update else optax.identity(),
    )

    def descend(carry, _):
        delta, state = carry
        now, slope = jax.value_and_grad(loss)(delta)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(delta, updates), state), now

    carry = start, optimizer.init(start)
    (delta, _), losses = jax.lax.scan(descend, carry, length=config.steps)
    return delta, losses


def _smallest_minimiser(vectors, weights, basis):
    r"""Every gap is one linear equation, $c \, \tau_{j,r} \cdot \Delta_r = e_{j,r}$."""
    total = jnp.sum(weights)
    total = jnp.where(total == 0, 1.0, total)
    merged = combined(weights, vectors)
    missing = jnp.sum(vectors * (vectors - merged[None]), axis=-1) / total
    if basis is None:
        rows = jnp.swapaxes(vectors, 0, 1)  # (out, models, in)
        inverses = one_by_one(partial(jnp.linalg.pinv, rtol=1e-6), rows)
        return jnp.einsum("omt,to->om", inverses, missing, precision="highest")

    # The projection ties the rows: conjugate gradients from zero stay in the span of
    # the equations, and end at their smallest solution.
    outside = lambda x: x - basis @ (basis.T @ x)
    to_rows = lambda x: jnp.sum(vectors * outside(x)[None], axis=-1)
    back = lambda y: outside(add_up(y[..., None] * vectors))
    with jax.default_matmul_precision("highest"):
        return outside(_least_squares(to_rows, back, missing))


def _least_squares(apply, transposed, target, most: int = 500):
    """Conjugate gradients on the normal equations, from zero."""
    slope = transposed(target)
    size = jnp.sum(jnp.square(slope))
    start = jnp.zeros_like(slope), target, slope, size, 0

    def descend(carry):
        x, rest, direction, now, i = carry
        image = apply(direction)
        length = now / jnp.maximum(jnp.sum(jnp.square(image)), 1e-30)
        x, rest = x + length * direction, rest - length * image
        slope = transposed(rest)
        new = jnp.sum(jnp.square(slope))
        return x, rest, slope + new / now * direction, new, i + 1

    unfinished = lambda c: (c[3] > 1e-12 * size) & (c[3] > 0) & (c[4] < most)
    return jax.lax.while_loop(unfinished, descend, start)[0]
