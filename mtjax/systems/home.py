r"""HoME: two levels of experts that stay alive.

HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, KDD 2025.
Tasks are grouped into categories; two levels of shared, category and task experts are
normalised alike, read inputs that are gated for their group, and reach what is above
them also past the softmax gates, so that they neither die nor leave rare tasks alone.

New here: `SelfGates`, the two levels of `HoME`, and `home_losses`.

Uses: `mtjax.nn` (`NormalisedExperts`, `FeatureGates`, `Gate`, `mix`, `Towers`),
`binary_losses`, any balancer; `expert_utilisation` and `expert_failures` look inside.

Needs: one vector per example (embeddings and pooled histories) and a category per task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mtjax.losses.binary import binary_losses
from mtjax.nn.feature_gates import FeatureGates
from mtjax.nn.gates import Gate, masked_softmax, mix
from mtjax.nn.normalised_experts import NormalisedExperts
from mtjax.nn.towers import Towers, check_tasks

SHARED = "shared"


@dataclass(frozen=True)
class HoMEConfig:
    """Sizes, and a switch for each component.

    Attributes:
      level_1_shared: experts of the first level that all categories use.
      level_1_category: experts of the first level of each category, at least 1.
      level_2_shared: experts of the second level that all tasks use.
      level_2_category: experts of the second level of each category.
      level_2_task: experts of the second level of each task. One kind of the second
        level must be there.
      widths: widths of an expert's layers; ReLU between them.
      norm: batch normalisation of an expert's output, with statistics per expert.
      activation: of an expert's output, behind the norm.
      feature_gate: how every group of experts weighs its input, see `FeatureGates`.
      rank: r of the feature gates.
      adapters: L of the feature gates.
      self_gate: whether the own experts of a group are also added past its gate.
      hierarchy: False lets every gate of a level use every expert of the level.
      level_2_input: ``"joined"`` gives category and task experts the category's and the
        shared representation, as published; ``"own"`` the category's alone, which a
        public re-implementation does; gates read both.
      tower: widths of the towers' hidden layers.
      dropout: rate in the towers, in [0, 1).
      momentum: of running statistics, see `NormalisedExperts`.
      eps: added to variances.
      axis_name: see there; needed in `shard_map` only.
    """

    level_1_shared: int = 4
    level_1_category: int = 2
    level_2_shared: int = 2
    level_2_category: int = 2
    level_2_task: int = 1
    widths: tuple[int, ...] = (256,)
    norm: bool = True
    activation: Literal["swish", "relu"] = "swish"
    feature_gate: Literal["low_rank", "full", "none"] = "low_rank"
    rank: int = 64
    adapters: int = 2
    self_gate: bool = True
    hierarchy: bool = True
    level_2_input: Literal["joined", "own"] = "joined"
    tower: tuple[int, ...] = (128, 64)
    dropout: float = 0.1
    momentum: float = 0.9
    eps: float = 1e-3
    axis_name: str | None = None

    def __post_init__(self):
        """Checks the ranges that nothing else checks."""
        kinds = (self.level_2_shared, self.level_2_category, self.level_2_task)
        if min(self.level_1_shared, *kinds) < 0 or self.level_1_category < 1:
            raise ValueError(
                "`level_1_category` must be at least 1 and no number of experts "
                f"negative, got {self.level_1_category!r} and "
                f"{(self.level_1_shared, *kinds)!r}."
            )
        if not sum(kinds):
            raise ValueError(
                "`level_2_shared`, `level_2_category` and `level_2_task` must not all "
                "be 0: the second level needs an expert."
            )
        choices = {
            "activation": ("swish", "relu"),
            "feature_gate": ("low_rank", "full", "none"),
            "level_2_input": ("joined", "own"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}."
                )
        if min(self.rank, self.adapters) < 1:
            raise ValueError(
                "`rank` and `adapters` must be at least 1, got "
                f"{self.rank!r} and {self.adapters!r}; `feature_gate='none'` has none."
            )


class SelfGates(nn.Module):
    """Weights of each group's own experts: a path that its main gate cannot close.

    Softmax over the experts of a group; sigmoid if it has one, for which softmax would
    be constant. They weigh a sum that is added, not the experts that others read.

    Attributes:
      counts: number of experts by group.
    """

    counts: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch experts features"]
    ) -> Float[Array, "batch groups experts"]:
        """The weight of every expert in its group, 0 elsewhere.

        Args:
          x: for each expert the input of its group.

        Returns:
          Non-negative weights, each group's as above.
        """
        lecun = nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        kernel = self.param("kernel", lecun, x.shape[1:])
        logits = jnp.einsum("bnd,nd->bn", x, kernel)[:, None]
        groups = len(self.counts)
        owner = np.repeat(np.arange(groups), self.counts)
        own = owner[None] == np.arange(groups)[:, None]
        alone = jnp.asarray(own & (own.sum(1, keepdims=True) == 1))[None]
        logits = jnp.broadcast_to(logits, (x.shape[0], *own.shape))
        weights = jnp.where(alone, nn.sigmoid(logits), masked_softmax(logits, own))
        self.sow("intermediates", "self_gates", weights)
        return weights


class GroupOutputs(NamedTuple):
    """What `ExpertGroups` hands on.

    Attributes:
      inputs: `(batch, groups, features)` behind the feature gates.
      experts: `(batch, experts, width)`, group by group.
      residual: `(batch, groups, width)` sums that the self-gates ask for.
    """

    inputs: Float[Array, "batch groups features"]
    experts: Float[Array, "batch experts width"]
    residual: Float[Array, "batch groups width"]


class ExpertGroups(nn.Module):
    """Groups of experts: each has an input, a feature gate and, if asked, a self-gate.

    Attributes:
      counts: number of experts by group; groups without any hand on their input.
      config: see `HoMEConfig`.
      self_gate: whether the groups have self-gates.
    """

    counts: tuple[int, ...]
    config: HoMEConfig
    self_gate: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch groups features"], *, train: bool = False
    ) -> GroupOutputs:
        """All experts of all groups."""
        config, groups, total = self.config, len(self.counts), sum(self.counts)
        if config.feature_gate != "none":
            rank = config.rank if config.feature_gate == "low_rank" else None
            x = FeatureGates(groups, rank, config.adapters, name="feature_gates")(x)
        residual = jnp.zeros((x.shape[0], groups, config.widths[-1]), x.dtype)
        if not total:
            return GroupOutputs(x, residual[:, :0], residual)
        # Slices and broadcasts: a gather would scatter on the way back.
        rows = [jnp.repeat(x[:, g, None], n, 1) for g, n in enumerate(self.counts)]
        rows = jnp.concatenate(rows, axis=1)
        experts = NormalisedExperts(
            total,
            config.widths,
            nn.swish if config.activation == "swish" else nn.relu,
            config.norm,
            config.momentum,
            config.eps,
            config.axis_name,
            name="experts",
        )(rows, train=train)
        if self.self_gate:
            weights = SelfGates(self.counts, name="self_gates")(rows)
            residual = mix(weights, experts)
        return GroupOutputs(x, experts, residual)


def expert_groups(
    tasks: Sequence[str], categories: Sequence[str], config: HoMEConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whose the experts are, in the order of the columns of the gates.

    Args:
      tasks: their names.
      categories: the category of each task.
      config: with the numbers of experts.

    Returns:
      For both levels, per expert ``"shared"``, its category or its task.

    Raises:
      ValueError: if there is not one category per task, or names coincide.

    Example:
      >>> config = HoMEConfig(level_2_shared=1, level_2_category=1)
      >>> expert_groups(("click", "stay"), ("interact", "watch"), config)[1]
      ('shared', 'interact', 'watch', 'click', 'stay')
    """
    check_tasks(tasks)
    if len(categories) != len(tasks):
        raise ValueError(
            f"`categories` must name one category for each of the {len(tasks)} "
            f"`tasks`, got {tuple(categories)!r}."
        )
    both = sorted({*tasks, SHARED} & {*categories} | {*tasks} & {SHARED})
    if both:
        raise ValueError(
            f"`categories`, `tasks` and {SHARED!r} must be different names, got {both} "
            "twice; rename them."
        )
    repeat = lambda names, n: tuple(name for name in names for _ in range(n))
    names = tuple(dict.fromkeys(categories))
    first = repeat((SHARED,), config.level_1_shared)
    second = repeat((SHARED,), config.level_2_shared)
    first += repeat(names, config.level_1_category)
    second += repeat(names, config.level_2_category) + repeat(
        tuple(tasks), config.level_2_task
    )
    return first, second


class HoME(nn.Module):
    r"""The ranker: a level of categories, a level of tasks, towers.

    .. math::
      z_c &= G_c(v_c) \cdot [E_{shared}, E_c] + selfgate_c, \quad
      z_{sh} = G_{sh}(v_{sh}) \cdot [E_{shared}, E_1, \dots, E_C] + selfgate_{sh} \\
      h_t &= G_t(u_t) \cdot [E'_{shared}, E'_{c(t)}, E'_t] + selfgate_t, \quad
      u_t = FG_t([z_{c(t)}; z_{sh}])

    where v and u are inputs behind the group's feature gate, read by its experts, its
    gate and its self-gate. Gates are linear, and softmax over the listed experts only.
    Only `task_...` modules reach a single task: see `mtjax.nn.is_shared`.

    Attributes:
      tasks: their names; at least one, all different.
      categories: the category of each task, in the order of `tasks`.
      config: sizes and switches.

    Raises:
      ValueError: if tasks are missing or categories do not fit.

    Example:
      >>> import jax
      >>> model = HoME(("click", "like", "stay"), ("interact", "interact", "watch"))
      >>> x = jnp.ones((2, 10))
      >>> variables = model.init(jax.random.key(0), x)
      >>> sorted(variables), model.apply(variables, x)["stay"].shape
      (['batch_stats', 'params'], (2,))
      >>> variables["params"]["task_gates"]["kernel"].shape  # 2 + 2 + 1 experts each
      (3, 512, 5)

    References:
      HoME, KDD 2025. Where the paper leaves open what a self-gate and a gate of the
      second level read, it is their group's gated input, as in the first level.
    """

    tasks: tuple[str, ...]
    categories: tuple[str, ...]
    config: HoMEConfig = HoMEConfig()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch features"], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every task.

        Args:
          x: embeddings, numbers and pooled histories of every example, side by side.
          train: whether to normalise with the statistics of this batch, of which the
            running averages in `"batch_stats"` take note, and to drop in the towers.

        Returns:
          One logit per example, by task.
        """
        config = self.config
        first, second = expert_groups(self.tasks, self.categories, config)
        names = tuple(dict.fromkeys(self.categories))
        groups = (SHARED, *names)
        may_use = lambda experts, *own: tuple(
            not config.hierarchy or expert in own for expert in experts
        )
        gate = lambda name, experts, mask: Gate(
            len(mask), len(experts), tuple(mask), name=name
        )

        mask = [may_use(first, *first), *(may_use(first, SHARED, c) for c in names)]
        counts = tuple(first.count(group) for group in groups)
        level = ExpertGroups(counts, config, config.self_gate, name="level_1")
        inputs = jnp.broadcast_to(x[:, None], (x.shape[0], len(groups), x.shape[-1]))
        found = level(inputs, train=train)
        weights = gate("gates", first, mask)(found.inputs)
        z = mix(weights, found.experts) + found.residual

        shared, of_category = z[:, :1], z[:, 1:]
        joined = lambda z: jnp.concatenate(
            [z, jnp.broadcast_to(shared, (*z.shape[:2], shared.shape[-1]))], axis=-1
        )
        if config.level_2_input == "joined":
            of_category = joined(of_category)
        of_task = [of_category[:, names.index(c)] for c in self.categories]
        of_task = jnp.stack(of_task, axis=1)
        outputs = []
        for name, own, inputs in (
            ("shared", (SHARED,), shared),
            ("category", names, of_category),
        ):
            counts = tuple(second.count(group) for group in own)
            if sum(counts):
                level = ExpertGroups(counts, config, self_gate=False, name=name)
                outputs.append(level(inputs, train=train).experts)
        level = ExpertGroups(
            (config.level_2_task,) * len(self.tasks),
            config,
            config.self_gate,
            name="task_level" if config.hierarchy else "level_2",
        )
        found = level(of_task, train=train)
        outputs = jnp.concatenate([*outputs, found.experts], axis=1)
        read = found.inputs
        if config.level_2_input == "own":
            read = joined(read)
        pairs = zip(self.tasks, self.categories)
        mask = [may_use(second, SHARED, c, t) for t, c in pairs]
        weights = gate("task_gates", second, mask)(read)
        h = mix(weights, outputs) + found.residual
        towers = Towers(self.tasks, config.tower, config.dropout, name="task_towers")
        return towers(h, train=train)


def home_losses(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    model: nn.Module,
    x: Any,
    labels: Mapping[str, Float[Array, " batch"]],
    *,
    key: Key[Array, ""],
) -> tuple[dict[str, Float[Array, ""]], Mapping[str, Any]]:
    """The one stage of training: every task's cross-entropy, with equal weights.

    Args:
      params: of the model; the argument that is differentiated.
      state: its other collections, `{"batch_stats": ...}`.
      model: `HoME`, or embeddings with it inside; takes `train`.
      x: what the model reads.
      labels: by task, NaN where there is none; see `binary_losses`.
      key: of the dropout.

    Returns:
      The losses, for `mtjax.value_and_task_grads(home_losses, has_aux=True)`, and the
      next state.
    """
    logits, state = model.apply(
        {"params": params, **state},
        x,
        train=True,
        rngs={"dropout": key},
        mutable=list(state),
    )
    return binary_losses(logits, labels), state
