r"""AdaMerging: merging coefficients learnt from unlabelled inputs.

AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024. Task arithmetic
needs one coefficient per task; AdaMerging learns it, per task or per layer and task, as
what makes the merged model most certain (lowest entropy) on inputs without labels.

New here: `fit` and what it is made of, `ties_vectors` for the "++" variants, and
`collapsed` and `clamped_share`, which say whether to trust the result.

Uses: `mtjax.merging` (`task_vectors`, `merge`, `trim`, `elect_sign`), any optimizer.

Needs: fine-tunings of one base with their heads; unlabelled inputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from mtjax import merging
from mtjax.merging.match import named_leaves

Granularity = Literal["task", "layer"] | Callable[[str], str]
Coefficients = Mapping[str, Float[Array | np.ndarray, " models"]]
LogitsFn = Callable[[PyTree, str, Any], Array]


@dataclass(frozen=True)
class AdaMergingConfig:
    """What is learnt.

    Attributes:
      granularity: one coefficient per `"task"`, or per `"layer"` (every array of the
        base) and task; or a function from paths like `"block_0/mlp/kernel"` to names of
        groups of leaves, which share their coefficients.
      value: of every coefficient at the start, in [0, 1] if clamped.
      clamp: use coefficients clipped to [0, 1], which do not learn while outside. True
        as in the official code; a second public implementation does not clamp.
      normalise: see `entropy_loss`; False as published.
    """

    granularity: Granularity = "layer"
    value: float = 0.3
    clamp: bool = True
    normalise: bool = False

    def __post_init__(self):
        """Checks the ranges."""
        _group_of(self.granularity)
        if self.clamp and not 0 <= self.value <= 1:
            raise ValueError(
                "`value` must be in [0, 1] where coefficients are clamped, got "
                f"{self.value!r}: nothing outside ever learns."
            )


def _group_of(granularity: Granularity) -> Callable[[str], str]:
    if callable(granularity):
        return granularity
    if granularity not in ("task", "layer"):
        raise ValueError(
            "`granularity` must be 'task', 'layer' or a function from a path to the "
            f"name of its group, got {granularity!r}."
        )
    return lambda path: "all" if granularity == "task" else path


def init_coefficients(
    base: PyTree,
    vectors: PyTree,
    granularity: Granularity = "task",
    value: float = 0.3,
) -> dict[str, Float[Array, " models"]]:
    """Equal coefficients for all groups of leaves and all models: task arithmetic.

    Args:
      base: the model that all were fine-tuned from.
      vectors: what `mtjax.merging.task_vectors` returned.
      granularity: see `AdaMergingConfig`.
      value: of all coefficients.

    Returns:
      By name of the group: `"all"` for `"task"`, the path for `"layer"`.

    Raises:
      ValueError: if the vectors do not fit to the base; the message names the path.

    Example:
      >>> base = {"block": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}}
      >>> vectors = jax.tree.map(lambda x: jnp.stack([x, -x]), base)
      >>> list(init_coefficients(base, vectors, "layer"))
      ['block/b', 'block/w']
      >>> print(init_coefficients(base, vectors, lambda path: path.split("/")[0]))
      {'block': Array([0.3, 0.3], dtype=float32)}
    """
    rows, leaves = named_leaves(vectors), named_leaves(base)
    models = len(next(iter(rows.values())))
    for path, row in rows.items():
        if path not in leaves or row.shape != (models, *jnp.shape(leaves[path])):
            found = jnp.shape(leaves[path]) if path in leaves else "nothing"
            raise ValueError(
                f"`vectors` must be like the base with a leading axis of {models} "
                f"models, got {row.shape} at {path!r}, where the base has {found}; "
                "make them with `mtjax.merging.task_vectors`."
            )
    start = jnp.full(models, value, jnp.float32)
    return {_group_of(granularity)(path): start for path in rows}


def effective_coefficients(
    coefficients: Coefficients,
    vectors: PyTree,
    granularity: Granularity = "layer",
    *,
    clamp: bool = False,
) -> dict[str, Float[Array, " models"]]:
    """The coefficients that every leaf is merged with: what to save and to look at.

    Args:
      coefficients: by group, as from `init_coefficients`.
      vectors: what is merged.
      granularity: what the coefficients were made with.
      clamp: clip to [0, 1]. The slope is 1 inside, limits included, and 0 outside.

    Returns:
      By path: coefficients of granularity `"layer"` that need no clamp any more.

    Raises:
      ValueError: if there is not exactly one array, with a number per model, per group.
    """
    rows, group = named_leaves(vectors), _group_of(granularity)
    models, groups = len(next(iter(rows.values()))), set(map(group, rows))
    shapes = {name: jnp.shape(x) for name, x in coefficients.items()}
    if shapes != dict.fromkeys(groups, (models,)):
        raise ValueError(
            f"`coefficients` must hold {models} numbers for every group of leaves, got "
            f"none for {sorted(groups - shapes.keys())}, unknown groups "
            f"{sorted(shapes.keys() - groups)}, shapes {sorted({*shapes.values()})}. "
            "Use the granularity and the task vectors that they were made with."
        )
    read = _clip if clamp else lambda x: x
    return {p: read(jnp.asarray(coefficients[group(p)], jnp.float32)) for p in rows}


def merge_with_coefficients(
    base: PyTree,
    vectors: PyTree,
    coefficients: Coefficients,
    granularity: Granularity = "layer",
    *,
    clamp: bool = False,
) -> PyTree:
    r"""The merged model, differentiable in its coefficients.

    .. math:: \theta^\ell = \theta_0^\ell + \sum_k \lambda_k^\ell \tau_k^\ell

    Args:
      base: :math:`\theta_0`.
      vectors: :math:`\tau`, from `mtjax.merging.task_vectors` or `ties_vectors`; may be
        bfloat16, sums are float32.
      coefficients: :math:`\lambda`, as in `effective_coefficients`.
      granularity: as there.
      clamp: as there.

    Returns:
      A tree like the base, in its dtypes.

    Raises:
      ValueError: as `effective_coefficients` states.

    Example:
      >>> base, vectors = {"w": jnp.ones(2)}, {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> print(merge_with_coefficients(base, vectors, {"w": jnp.array([0.5, 0.25])}))
      {'w': Array([1.5, 1.5], dtype=float32)}
    """
    by_path = effective_coefficients(coefficients, vectors, granularity, clamp=clamp)
    # Leaves without task vectors, such as counters, stay whatever stands here.
    leaves = [by_path.get(path, 0.0) for path in named_leaves(base)]
    tree = jax.tree.unflatten(jax.tree.structure(base), leaves)
    return merging.merge(base, vectors, tree)


def ties_vectors(vectors: PyTree, density: float = 0.2) -> PyTree:
    """Task vectors that do not contradict each other, for the "++" variants.

    TIES without its last step: the largest elements of every task vector stay, and of
    those the ones that agree with the sign of their sum over tasks.

    Args:
      vectors: what `mtjax.merging.task_vectors` returned.
      density: fraction of the whole vector that the first step keeps, in (0, 1].

    Returns:
      Vectors like these, still one per task.

    Example:
      >>> vectors = {"w": jnp.array([[4.0, 2.0, 0.1, 0.2], [-3.0, 1.0, 0.3, 0.1]])}
      >>> print(ties_vectors(vectors, density=0.5)["w"])
      [[4. 2. 0. 0.]
       [0. 1. 0. 0.]]
    """
    merger = merging.chain(merging.trim(density), merging.elect_sign())
    return merger.changed(vectors)


def entropy_loss(
    logits: Float[Array, "*examples classes"], *, normalise: bool = False
) -> Float[Array, ""]:
    r"""Mean entropy of predictions, in nats.

    .. math:: \frac1n \sum_i -\sum_c p_{ic} \log p_{ic}, \quad p_i = softmax(z_i)

    Args:
      logits: :math:`z`; minus infinity masks a class.
      normalise: divide by the logarithm of the number of classes (at least two), so
        that tasks with many classes weigh no more than others.

    Returns:
      Between 0 and :math:`\log C`, or 1 if normalised.

    Example:
      >>> print(f"{entropy_loss(jnp.array([[0.0, 0.0], [1e4, -1e4]])):.4f}")
      0.3466
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    p = jnp.exp(log_p)
    # A masked class has p = 0, and 0 times infinity is NaN.
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
    return jnp.mean(entropy) / (np.log(logits.shape[-1]) if normalise else 1.0)


def adamerging_loss(
    coefficients: Coefficients,
    base: PyTree,
    vectors: PyTree,
    batch: Mapping[str, Any],
    logits_fn: LogitsFn,
    config: AdaMergingConfig = AdaMergingConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""The sum of the entropies of all tasks: one merge, one forward pass per task.

    .. math:: \sum_k \mathrm{mean}_{x \in B_k} H(softmax(h_k(f_{\theta(\lambda)}(x))))

    Args:
      coefficients: :math:`\lambda` by group, before the clamp.
      base: see `merge_with_coefficients`.
      vectors: see there.
      batch: :math:`B`, inputs by task; they need not be all tasks that are merged.
      logits_fn: `logits_fn(params, task, inputs)`, with the frozen head of the task.
      config: what is learnt.

    Returns:
      The loss, and the entropy by task. `jax.value_and_grad` of it is all that a loop
      of one's own needs, in `jax.lax.scan` for dense models.
    """
    params = merge_with_coefficients(
        base, vectors, coefficients, config.granularity, clamp=config.clamp
    )
    of = lambda task: entropy_loss(
        logits_fn(params, task, batch[task]), normalise=config.normalise
    )
    entropies = {task: of(task) for task in batch}
    return jnp.sum(jnp.stack([*entropies.values()])), entropies


class Adapted(NamedTuple):
    """What `fit` found.

    Attributes:
      params: the merged model.
      effective: its coefficients by path, to be saved; see `effective_coefficients`.
      entropies: `(steps,)` by task, each before its step.
      trajectory: `(steps + 1, models)` by group, coefficients before the clamp from the
        start to the end.
    """

    params: PyTree
    effective: dict[str, Array]
    entropies: dict[str, np.ndarray]
    trajectory: dict[str, np.ndarray]


def fit(
    logits_fn: LogitsFn,
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Mapping[str, Any]],
    config: AdaMergingConfig = AdaMergingConfig(),
    *,
    steps: int = 500,
    optimizer: optax.GradientTransformation | None = None,
    on_step: Callable[[int, dict[str, Array]], None] | None = None,
) -> Adapted:
    """Learns merging coefficients from unlabelled inputs; changes nothing in place.

    Args:
      logits_fn: see `adamerging_loss`, like the next two.
      base: see there.
      vectors: see there.
      batches: at least one per step, with the same tasks in each.
      config: what is learnt.
      steps: at least one.
      optimizer: by default Adam with a learning rate of 1e-3, as published. Weight
        decay would pull the merged model to the base.
      on_step: called with the number of the step and its entropies by task.

    Returns:
      The merged model, its coefficients, and how they came about.

    Raises:
      ValueError: if there are fewer batches than steps, or none.
    """
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    slopes_of = jax.grad(adamerging_loss, has_aux=True)

    @jax.jit
    def step(coefficients, opt_state, base, vectors, batch):
        slopes, entropies = slopes_of(
            coefficients, base, vectors, batch, logits_fn, config
        )
        updates, opt_state = optimizer.update(slopes, opt_state, coefficients)
        return optax.apply_updates(coefficients, updates), opt_state, entropies

    found = init_coefficients(base, vectors, config.granularity, config.value)
    opt_state = optimizer.init(found)
    trajectory, entropies = [found], []
    for i, batch in zip(range(steps), batches):
        found, opt_state, now = step(found, opt_state, base, vectors, dict(batch))
        trajectory.append(found)
        entropies.append(now)
        if on_step is not None:
            on_step(i, now)
    if len(entropies) < max(steps, 1):
        raise ValueError(
            f"`batches` must yield one batch for each of {steps} steps, at least one, "
            f"got {len(entropies)}; give an endless iterator."
        )
    stacked = lambda rows: jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
    by_path = effective_coefficients(
        found, vectors, config.granularity, clamp=config.clamp
    )
    params = merge_with_coefficients(base, vectors, by_path)
    return Adapted(params, by_path, stacked(entropies), stacked(trajectory))


def collapsed(
    logits: Float[Array | np.ndarray, "examples classes"], limit: float = 0.9
) -> bool:
    """Whether a task names one class nearly always, which has a low entropy as well.

    Args:
      logits: of one task, for many inputs.
      limit: the largest share of predictions that a single class may have.

    Returns:
      The verdict; it means nothing if most inputs are of one class.
    """
    counts = np.bincount(np.argmax(np.asarray(logits), axis=-1))
    return bool(counts.max() > limit * counts.sum())


def clamped_share(coefficients: Coefficients) -> float:
    """The share of coefficients outside [0, 1], where a clamp keeps them from learning.

    Args:
      coefficients: before the clamp.

    Returns:
      From 0 to 1; a large one calls for a smaller learning rate, or no clamp.
    """
    values = np.concatenate([np.ravel(x) for x in coefficients.values()])
    return float(np.mean((values < 0) | (values > 1)))


def _clip(x: Array) -> Array:
    # `jnp.clip` has half the slope at the limits, where learning may start.
    return jnp.where(x < 0, 0.0, jnp.where(x > 1, 1.0, x))
