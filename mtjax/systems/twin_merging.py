r"""Twin-Merging: compressed experts, mixed anew for every input.

Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, NeurIPS 2024.
One merged model keeps what all tasks share, a small compressed vector what one task
knows beyond it. A router says how much of every vector an input needs.

New here: `twin_merge` and `exclusive_vector`; the router with `fit_router` and `route`;
`infer`, the whole way from inputs to outputs; `routed_classes`.

Uses: `mtjax.merging`: any `Merger` for the shared expert, `low_rank`, `sparse`, `trim`,
`dare`, and `Experts` for the result; `mtjax.nn.side_branches`, which runs a differently
merged model for every example of a batch without forming it.

Needs: fine-tuned models of one base; some inputs of every task, without labels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from mtjax import merging
from mtjax.merging import Merger
from mtjax.merging.compressed import task_vector
from mtjax.merging.experts import Change, Experts, smaller
from mtjax.merging.low_rank import low_rank, rank_of
from mtjax.merging.match import Where, by_name, named_leaves
from mtjax.merging.merger import leaf_key
from mtjax.merging.sparse import sparse
from mtjax.nn.side_branches import ApplyFn, apply_mixed

# One object: programs are compiled per object.
_SHARED = merging.task_arithmetic(0.3)


@dataclass(frozen=True)
class TwinMergingConfig:
    r"""How exclusive vectors are compressed, each leaf by itself.

    Attributes:
      rho: :math:`\rho`, mask rate in [0, 1): the share that is left out.
      method: `"svd"` keeps the first :math:`\lfloor (1 - \rho) \min(m, n) \rfloor`
        singular triplets, at least one; `"magnitude"` the largest elements;
        `"bernoulli"` random elements, divided by :math:`1 - \rho`.
      rank: of `"svd"`, in place of a share.
    """

    rho: float = 0.9
    method: Literal["svd", "magnitude", "bernoulli"] = "svd"
    rank: int | None = None

    def __post_init__(self):
        """Checks the ranges."""
        if not 0 <= self.rho < 1:
            raise ValueError(f"`rho` must be in [0, 1), got {self.rho!r}.")
        if self.method not in ("svd", "magnitude", "bernoulli"):
            methods = "'svd', 'magnitude' or 'bernoulli'"
            raise ValueError(f"`method` must be {methods}, got {self.method!r}.")
        if self.rank is not None and (self.method != "svd" or self.rank < 1):
            raise ValueError(
                f"`rank` must be at least 1 and is for 'svd' alone, got {self.rank!r}."
            )


@dataclass(frozen=True)
class RouterConfig:
    """How the router is trained.

    Attributes:
      epochs: at least 1; parameters of the best one are kept.
      batch_size: examples per step; an epoch leaves out what fills no batch.
      learning_rate: of Adam.
      dropout: rate after both hidden layers, in [0, 1).
      most: training examples per task, the first ones.
    """

    epochs: int = 50
    batch_size: int = 1024
    learning_rate: float = 5e-4
    dropout: float = 0.5
    most: int = 5500

    def __post_init__(self):
        """Checks the ranges."""
        if min(self.epochs, self.batch_size, self.most) < 1:
            raise ValueError(
                f"`epochs`, `batch_size` and `most` must be at least 1, got {self}."
            )


class Router(nn.Module):
    """Says how well every expert fits to an input, as logits.

    Attributes:
      num_tasks: number of experts.
      dropout: rate after both hidden layers.
    """

    num_tasks: int
    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch width"], *, train: bool = False
    ) -> Float[Array, "batch tasks"]:
        """Without `train`, an example does not depend on its batch."""
        x, width = features, features.shape[-1]
        for _ in range(2):
            x = nn.Dense(2 * width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.leaky_relu(x))
        return nn.Dense(self.num_tasks)(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaskRouter:
    """A trained router. A pytree.

    Attributes:
      variables: `params` and `batch_stats` of `Router`.
      accuracies: `(epochs,)`, on held-out features after each epoch.
      tasks: their names, in the order of the weights.
    """

    variables: PyTree
    accuracies: Array
    tasks: tuple[str, ...] = field(metadata={"static": True})


# --- Stage 1: what tasks share, and what is their own ---------------------------------


def twin_merge(
    base: PyTree,
    models: Mapping[str, PyTree] | Sequence[PyTree],
    config: TwinMergingConfig = TwinMergingConfig(),
    *,
    shared: Merger | PyTree = _SHARED,
    where: Where = None,
    key: Key[Array, ""] | None = None,
) -> Experts:
    r"""Splits fine-tuned models into a shared expert and compressed exclusive vectors.

    Args:
      base: :math:`\theta_0`, the model that all were fine-tuned from.
      models: :math:`\theta_t` by task, trees like the base.
      config: how vectors are compressed.
      shared: how to merge, by default task arithmetic with 0.3; or the merged model.
      where: which leaves to merge; leave out heads. Others are left as in the base.
      key: for `"bernoulli"`, and mergers that draw random numbers.

    Returns:
      The shared expert, and an exclusive vector per task.

    Raises:
      ValueError: if models do not match, or `key` is missing.

    Example:
      >>> base = {"w": jnp.zeros((2, 2))}
      >>> models = {"a": {"w": jnp.diag(jnp.array([4.0, 0.0]))}, "b": {"w": jnp.eye(2)}}
      >>> twin = twin_merge(base, models, TwinMergingConfig(rank=1))
      >>> print(twin.mixed(jnp.array([1.0, 0.0]))["w"].round(3))
      [[4.  0. ]
       [0.  0.3]]
    """
    if isinstance(shared, Merger):
        shared = shared(base, models, where=where, key=key)
    vector = partial(exclusive_vector, shared, config=config, where=where)
    named = by_name(models)
    return Experts(shared, {t: vector(named[t], key=leaf_key(key, t)) for t in named})


def exclusive_vector(
    shared: PyTree,
    model: PyTree,
    config: TwinMergingConfig = TwinMergingConfig(),
    *,
    where: Where = None,
    key: Key[Array, ""] | None = None,
) -> dict[str, Change]:
    r"""What a task knows beyond the shared expert, :math:`v_t = \theta_t - \theta^*`.

    Not :math:`\theta_t - \theta_0`, which would count twice what is shared. Leaves of
    one axis stay as they are, and so does a leaf whose compressed form is no smaller.

    Args:
      shared: :math:`\theta^*`.
      model: :math:`\theta_t`, a tree like it.
      config: how to compress.
      where: which leaves; see `twin_merge`.
      key: for `"bernoulli"`.

    Returns:
      By path the change, in float32, as in `Experts.changes`.

    Raises:
      ValueError: if the model does not match, or `key` is missing.
    """
    whole = named_leaves(task_vector(shared, model, where=where))
    wide = [path for path, leaf in whole.items() if leaf.ndim > 1]
    found: dict[str, Change] = dict(whole)
    if config.method == "svd":
        for path in wide:
            shape = whole[path].shape
            rank = config.rank or rank_of(shape, 1 - config.rho)
            if rank < rank_of(shape, 1.0):
                found[path] = smaller(low_rank(whole[path], rank))
    elif wide:
        pruner = _pruner(config.method, config.rho)
        pruned = pruner.vector(shared, [model], where=lambda p: p in wide, key=key)
        for path, leaf in named_leaves(pruned).items():
            found[path] = smaller(sparse(leaf))
    return found


@cache
def _pruner(method: str, rho: float) -> Merger:
    """What is left of one task vector; a single object per rate."""
    largest = merging.trim(round(1 - rho, 9), "tensor")
    step = largest if method == "magnitude" else merging.dare(rho)
    return merging.chain(step, merging.task_arithmetic(1.0))


# --- Stage 2: the router --------------------------------------------------------------


def fit_router(
    features: Mapping[str, Float[Array | np.ndarray, "_ width"]],
    held_out: Mapping[str, Float[Array | np.ndarray, "_ width"]],
    config: RouterConfig = RouterConfig(),
    *,
    key: Key[Array, ""],
) -> TaskRouter:
    """Trains a router to tell from features which task an input belongs to.

    Args:
      features: by task what the shared expert makes of training inputs: for a
        transformer the mean over tokens of its last hidden states. No labels.
      held_out: the same of other inputs; they choose the best epoch, the last of
        equally good ones, which is the most certain.
      config: how to train.
      key: of the initialisation, the order and dropout.

    Returns:
      The router.

    Raises:
      ValueError: if there are fewer than two tasks, or the names differ.
    """
    tasks = tuple(sorted(features))
    if len(tasks) < 2 or tasks != tuple(sorted(held_out)):
        raise ValueError(
            "`features` and `held_out` must have the same tasks, at least two, got "
            f"{sorted(features)} and {sorted(held_out)}; one expert needs no router."
        )
    shown = _joined([features[t][: config.most] for t in tasks])
    rest = _joined([held_out[t] for t in tasks])
    variables, accuracies = _train(config, len(tasks), shown, rest, key)
    return TaskRouter(variables, accuracies, tasks)


def route(
    router: TaskRouter, features: Float[Array, "batch width"]
) -> Float[Array, "batch tasks"]:
    """Weights of all experts for every input, which sum to 1.

    Args:
      router: see `fit_router`.
      features: what the shared expert makes of the inputs.

    Returns:
      The softmax of the router's logits.
    """
    return jax.nn.softmax(_logits(router.variables, len(router.tasks), features))


def _logits(variables: PyTree, num_tasks: int, features) -> Array:
    return jnp.asarray(Router(num_tasks).apply(variables, features))


def _joined(rows) -> tuple[Array, Array]:
    labels = [np.full(len(x), i, np.int32) for i, x in enumerate(rows)]
    return jnp.concatenate([*map(jnp.asarray, rows)]), jnp.concatenate(labels)


@partial(jax.jit, static_argnums=(0, 1))
def _train(config: RouterConfig, num_tasks: int, shown, held_out, key):
    """The variables of the best epoch, and the accuracies of all."""
    model, tx = Router(num_tasks, config.dropout), optax.adam(config.learning_rate)
    inputs, labels = shown
    size = min(config.batch_size, len(labels))
    batches = len(labels) // size

    def step(carry, now):
        (variables, state), (rows, key) = carry, now

        def loss(params):
            logits, changed = model.apply(
                {**variables, "params": params},
                inputs[rows],
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            entropy = optax.softmax_cross_entropy_with_integer_labels
            return entropy(logits, labels[rows]).mean(), changed

        slopes, changed = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(slopes, state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**changed, "params": params}, state), None

    def epoch(carry, key):
        now, best, most = carry
        order, dropout = jax.random.split(key)
        rows = jax.random.permutation(order, len(labels))[: batches * size]
        keys = jax.random.split(dropout, batches)
        now, _ = jax.lax.scan(step, now, (rows.reshape(batches, size), keys))
        guesses = _logits(now[0], num_tasks, held_out[0]).argmax(-1)
        accuracy = jnp.mean(guesses == held_out[1])
        better = accuracy >= most
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now[0], best)
        return (now, best, jnp.maximum(accuracy, most)), accuracy

    first_key, *keys = jax.random.split(key, 1 + config.epochs)
    first = model.init(first_key, inputs[:1])
    start = (first, tx.init(first["params"])), first, jnp.zeros(())
    (_, best, _), found = jax.lax.scan(epoch, start, jnp.stack(keys))
    return best, found


# --- Inference ------------------------------------------------------------------------


def infer(
    apply_fn: ApplyFn,
    experts: Experts,
    router: TaskRouter | None,
    inputs: PyTree,
    features_fn: ApplyFn | None = None,
) -> tuple[PyTree, Float[Array, "batch tasks"]]:
    """From inputs to what their own mixtures of the experts say. Pure; may be jitted.

    Args:
      apply_fn: see `apply_mixed`.
      experts: see there.
      router: trained for these experts; `None` with a single one, whose weight is 1.
      inputs: a batch; its examples may be of different tasks.
      features_fn: what makes the router's features, called as `apply_fn`, which is used
        by default.

    Returns:
      What `apply_fn` returns, and the weights.

    Raises:
      ValueError: if the router is for other tasks.
    """
    tasks = experts.tasks[:1] if router is None else router.tasks
    if tasks != experts.tasks:
        raise ValueError(
            f"`router` must be trained for {experts.tasks}, got "
            f"{router and tasks}; `Experts.subset` chooses experts by name."
        )
    if router is None:
        weights = jnp.ones((len(jax.tree.leaves(inputs)[0]), 1))
    else:
        weights = route(router, (features_fn or apply_fn)(experts.shared, inputs))
    return apply_mixed(apply_fn, experts, weights, inputs), weights


def routed_classes(
    logits: Mapping[str, Float[Array, "batch _"]], weights: Float[Array, "batch tasks"]
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Predictions where nobody says which task an input belongs to.

    Args:
      logits: of the heads of all experts, by task; numbers of classes may differ.
      weights: of the experts, in the order of the names.

    Returns:
      The task with the largest weight, as a place in that order, and the class that its
      head names. An input is right if both are.

    Example:
      >>> logits = {"a": jnp.array([[0.0, 1.0]]), "b": jnp.array([[0.0, 1.0, 2.0]])}
      >>> task, label = routed_classes(logits, jnp.array([[0.2, 0.8]]))
      >>> print(task, label)
      [1] [2]
    """
    classes = jnp.stack([logits[task].argmax(-1) for task in sorted(logits)], axis=1)
    chosen = weights.argmax(-1)
    return chosen, jnp.take_along_axis(classes, chosen[:, None], axis=1)[:, 0]
