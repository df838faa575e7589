"""WEMoE: merged transformers whose MLPs are mixed anew for every input."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from mtjax.losses import summed_entropies
from mtjax.merging import task_arithmetic
from mtjax.merging.compressed import task_vector
from mtjax.merging.experts import Change, Experts
from mtjax.merging.learning import OnStep, repeat_step
from mtjax.merging.match import Where, by_name, named_leaves, selected
from mtjax.nn.side_branches import ApplyFn, dense_kernels, with_side_branches

Routers = dict[str, dict[str, Array]]
"""By block: `hidden` and `output` kernels with their biases."""

HeadFn = Callable[[str, Any], Array]
"""`head_fn(task, outputs)`: the logits of a task's frozen head."""


@dataclass(frozen=True)
class WEMoEConfig:
    r"""What is merged how.

    Attributes:
      scale: $\lambda$ of task arithmetic, and the routers' weights at the start.
      mlps: a regular expression, searched in paths: leaves of dense layers that are
        mixed. Layers with the same text in its group `block` share a router, which
        looks at what the first of them sees.
      std: standard deviation of the routers' kernels at the start.
    """

    scale: float = 0.3
    mlps: str = r"(?P<block>.*block_\d+)/mlp"
    std: float = 0.01

    def __post_init__(self):
        """Checks the expression."""
        if "block" not in re.compile(self.mlps).groupindex:
            raise ValueError(
                f"`mlps` must have a group `(?P<block>...)`, got {self.mlps!r}."
            )

    def block_of(self, path: str) -> str | None:
        """The block of a leaf that is mixed, None for all others."""
        found = re.search(self.mlps, path)
        return None if found is None else found["block"]


def upscale(
    base: PyTree,
    models: Mapping[str, PyTree] | Sequence[PyTree],
    config: WEMoEConfig = WEMoEConfig(),
    *,
    where: Where = None,
) -> Experts:
    r"""Merges all leaves but those of MLPs, of which all task vectors are kept.

    $$\theta_{mlp}(x) = \theta_{mlp, 0} + \sum_t r_t(x) \, \tau_{mlp, t}$$

    with weights $r(x)$ of one router per MLP, `router_weights`; everything else is
    merged by task arithmetic.

    Args:
      base: $\theta_0$.
      models: $\theta_t$ by task, trees like the base.
      config: which leaves are MLPs.
      where: which leaves to touch at all; see `mtjax.merging.Merger`.

    Returns:
      The base's MLPs in the merged model, and what every task adds to them.

    Raises:
      ValueError: if models do not match, or no leaf is one of an MLP.

    References:
      Tang et al., "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts",
      ICML, 2024.
    """
    mixed = lambda p: selected(p, where) and config.block_of(p) is not None
    merged = lambda p: selected(p, where) and config.block_of(p) is None
    shared = task_arithmetic(config.scale)(base, models, where=merged)
    changes: dict[str, dict[str, Change]] = {}
    for task, model in by_name(models).items():
        changes[task] = dict(named_leaves(task_vector(base, model, where=mixed)))
    return Experts(shared, changes)


def init_routers(
    apply_fn: ApplyFn,
    experts: Experts,
    inputs: PyTree,
    config: WEMoEConfig = WEMoEConfig(),
    *,
    key: Key[Array, ""],
) -> Routers:
    """Routers whose weights are about `config.scale` for every input.

    Args:
      apply_fn: applies a Linen model to a batch, as `mtjax.nn.side_branches` needs it.
      experts: from `upscale`.
      inputs: a batch, of which only the shapes matter.
      config: as for `upscale`.
      key: of the kernels.

    Returns:
      One router per block. With kernels of zeros the model is that of task arithmetic.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    kernels = dense_kernels(lambda: apply_fn(experts.shared, inputs))
    leaves, number = named_leaves(experts.shared), len(experts.tasks)
    found: Routers = {}
    for path in kernels:
        block = config.block_of(path)
        if block is None or block in found or path not in experts.paths:
            continue
        width = leaves[path].shape[0]
        key, first, second = jax.random.split(key, 3)
        found[block] = {
            "hidden": config.std * jax.random.normal(first, (width, width)),
            "hidden_bias": jnp.zeros(width),
            "output": config.std * jax.random.normal(second, (width, number)),
            "output_bias": jnp.full(number, config.scale),
        }
    return found


def router_weights(
    router: Mapping[str, Array], x: Float[Array, "*batch inputs"]
) -> Float[Array, " tasks"]:
    r"""The mean over tokens of $W_2 \max(0, W_1 x + b_1) + b_2$.

    Args:
      router: of one block.
      x: what the first layer of the MLP sees of one example.

    Returns:
      A weight per task, of any sign and size.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    hidden = jnp.maximum(flat @ router["hidden"] + router["hidden_bias"][None], 0)
    # The output is linear: the mean may be taken before it.
    return jnp.mean(hidden, axis=0) @ router["output"] + router["output_bias"]


def apply_routed(
    apply_fn: ApplyFn,
    experts: Experts,
    routers: Routers,
    inputs: PyTree,
    config: WEMoEConfig = WEMoEConfig(),
) -> tuple[PyTree, dict[str, Float[Array, "batch tasks"]]]:
    """Runs the model, whose MLPs are mixed for every example of a batch.

    Args:
      apply_fn: see `init_routers`.
      experts: see there.
      routers: see there.
      inputs: a batch; its examples may be of different tasks.
      config: as for `upscale`.

    Returns:
      What `apply_fn` returns, and the weights by block.
    """
    branches = {path: experts.factors(path) for path in experts.paths}

    def one(example):
        made: dict[str, Array] = {}

        def weights(path, x):
            block = config.block_of(path) or ""
            if block not in made:
                made[block] = router_weights(routers[block], x)
            return made[block]

        single = jax.tree.map(lambda x: x[None], example)
        run = lambda: apply_fn(experts.shared, single)
        found = with_side_branches(run, branches, weights)
        return jax.tree.map(lambda x: x[0], found), made

    return jax.vmap(one)(inputs)


def wemoe_loss(
    routers: Routers,
    experts: Experts,
    batch: Mapping[str, Any],
    apply_fn: ApplyFn,
    head_fn: HeadFn,
    config: WEMoEConfig = WEMoEConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the entropies of all tasks' predictions.

    Args:
      routers: what is learnt.
      experts: see `upscale`.
      batch: inputs by task.
      apply_fn: see `init_routers`.
      head_fn: frozen heads.
      config: as for `upscale`.

    Returns:
      The loss, and the entropy by task.
    """

    def logits(task):
        outputs, _ = apply_routed(apply_fn, experts, routers, batch[task], config)
        return head_fn(task, outputs)

    return summed_entropies({task: logits(task) for task in batch})


class Fitted(NamedTuple):
    """What `fit_routers` found.

    Attributes:
      routers: for `apply_routed`.
      entropies: `(steps,)` by task, each before its step.
    """

    routers: Routers
    entropies: dict[str, np.ndarray]


def fit_routers(
    apply_fn: ApplyFn,
    head_fn: HeadFn,
    experts: Experts,
    routers: Routers,
    batches: Iterable[Mapping[str, Any]],
    config: WEMoEConfig = WEMoEConfig(),
    *,
    steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> Fitted:
    """Trains the routers on unlabelled inputs; all else stays as it is.

    Args:
      apply_fn: see `init_routers`.
      head_fn: see `wemoe_loss`.
      experts: see `upscale`.
      routers: from `init_routers`.
      batches: inputs by task, at least one batch per step.
      config: as for `upscale`.
      steps: at least one.
      optimizer: by default Adam with a learning rate of 1e-4, as published.
      on_step: see `mtjax.merging.learning.repeat_step`.

    Returns:
      The routers, and the entropies on the way.

    Raises:
      ValueError: if there are fewer batches than steps.
    """
    tx = optax.adam(1e-4) if optimizer is None else optimizer
    slopes_of = jax.grad(wemoe_loss, has_aux=True)

    def step(state, experts, batch):
        now, opt_state = state
        slopes, entropies = slopes_of(now, experts, batch, apply_fn, head_fn, config)
        updates, opt_state = tx.update(slopes, opt_state, now)
        return (optax.apply_updates(now, updates), opt_state), entropies

    (found, _), entropies = repeat_step(
        step,
        (routers, tx.init(routers)),
        experts,
        map(dict, batches),
        steps=steps,
        on_step=on_step,
    )
    return Fitted(found, dict(entropies))
