r"""APEM: conversion steps pick their patterns of fields.

Adaptive Pattern Extraction Multi-Task Learning for Multi-Step Conversion Estimations,
2023. Learned group vectors attend to the fields of an example and so form patterns, at
every depth; an indicator vector per task then picks, example by example, which of all
patterns the task uses.

New here: `DeepAutoGroups`, `PatternSelector`, and `APEM` with the options of its heads.

Uses: `mtjax.nn` (`FieldEmbeddings`, `SetAttention`, `SENet`, `sparse_softmax`,
`InformationTransfer`, `Towers`), losses of chains (`label_chain_penalty`,
`chained_logits`, `mature_labels`), any balancer; `pattern_selection` explains.

Needs: categorical fields and numbers per example; labels of steps in their order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtjax.losses.binary import binary_losses
from mtjax.losses.chained_logits import chained_logits
from mtjax.losses.label_chain import label_chain_penalty
from mtjax.nn.aitm import InformationTransfer
from mtjax.nn.fields import MISSING, FieldEmbeddings
from mtjax.nn.gates import mix
from mtjax.nn.pooling import mean_pool
from mtjax.nn.senet import SENet
from mtjax.nn.set_attention import SetAttention
from mtjax.nn.sparse_softmax import sparse_softmax
from mtjax.nn.towers import Towers, check_tasks


@dataclass(frozen=True)
class APEMConfig:
    """Sizes, and a switch for each component.

    The paper's code is not public. What its abstract leaves open is an option here; the
    defaults are our reading.

    Attributes:
      groups: G, learned group vectors of every block, at least 1.
      blocks: L, blocks whose patterns are collected, at least 1.
      heads: of all attention, a divisor of the fields' width.
      extractor: where patterns come from: learned `"groups"`, or the `"mlp"` of one
        hidden layer on all fields side by side, which stands in for an ablation.
      carry: what the next block reads: the `"fields"` after they have read the groups,
        or the `"patterns"`.
      excite: squeeze and excitation of `"patterns"`, of `"both"` patterns and fields,
        or of `"none"`. On fields it ties weights to their order.
      excite_gate: see `SENet`. With `"sigmoid"` weights start near 0.5, with
        `"double_sigmoid"` near 1.
      excite_reduction: r, see `SENet`.
      selector: a selection per `"task"`, one that all tasks share (`"shared"`), or the
        `"mean"` of all patterns.
      adaptive: whether indicators depend on the example.
      top_k: K, patterns that a task may use; all if None.
      pooled: what towers read besides patterns: the `"mean"` of the embedded fields, or
        all of them side by side (`"flat"`).
      transfer: whether a step's representation is weighed against the one before, as
        in AITM.
      product: whether the logits of a tower are of a step given the one before, and
        those returned of all steps so far. Predictions then never rise.
      tower: widths of the towers' hidden layers.
      dropout: rate in the towers, in [0, 1); needs `rngs={"dropout": key}` in training.
    """

    groups: int = 6
    blocks: int = 2
    heads: int = 2
    extractor: Literal["groups", "mlp"] = "groups"
    carry: Literal["fields", "patterns"] = "fields"
    excite: Literal["patterns", "both", "none"] = "patterns"
    excite_gate: str = "sigmoid"
    excite_reduction: int = 2
    selector: Literal["task", "shared", "mean"] = "task"
    adaptive: bool = True
    top_k: int | None = None
    pooled: Literal["mean", "flat"] = "mean"
    transfer: bool = False
    product: bool = False
    tower: tuple[int, ...] = (64, 32)
    dropout: float = 0.1

    def __post_init__(self):
        """Checks what no module checks."""
        for name in ("extractor", "carry", "excite", "selector", "pooled"):
            allowed = get_args(get_type_hints(APEMConfig)[name])
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}."
                )
        if min(self.groups, self.blocks) < 1:
            raise ValueError(
                "`groups` and `blocks` must be at least 1, got "
                f"{self.groups!r} and {self.blocks!r}."
            )
        if self.top_k is not None and not 1 <= self.top_k <= self.groups * self.blocks:
            raise ValueError(
                "`top_k` must be from 1 to the number of patterns, `groups` times "
                f"`blocks` = {self.groups * self.blocks}, got {self.top_k!r}."
            )


class DeepAutoGroups(nn.Module):
    r"""Blocks of attention between learned groups and fields (DAGT).

    .. math:: P = SE(MAB(I, E)), \quad E' = MAB(E, P), \quad
        U = [P^1; \dots; P^L]

    The patterns U do not depend on the order of the fields, and E' follows it. Missing
    fields are read by nothing. The last block has no E', which nothing would read.

    Attributes:
      config: sizes and switches.
    """

    config: APEMConfig

    @nn.compact
    def __call__(
        self,
        fields: Float[Array, "batch fields width"],
        present: Bool[Array, "batch fields"],
    ) -> tuple[
        Float[Array, "batch patterns width"], Float[Array, "batch entries width"]
    ]:
        """The patterns of all blocks, and what the last block hands on.

        Args:
          fields: E, one vector per field.
          present: False where a field is missing.

        Returns:
          U, first block first, and the E' of the block before the last (P if that is
          carried).
        """
        config, width, patterns = self.config, fields.shape[-1], []
        excite = lambda name: SENet(
            config.excite_gate, config.excite_reduction, name=name
        )
        for i in range(config.blocks):
            start = nn.initializers.normal(1.0)
            groups = self.param(f"groups_{i}", start, (config.groups, width))
            read = SetAttention(config.heads, name=f"groups_read_{i}")
            found = read(groups, fields, present)
            if config.excite != "none":
                found = excite(f"excite_patterns_{i}")(found)
            patterns.append(found)
            if config.carry == "patterns":
                fields, present = found, jnp.ones(found.shape[:2], bool)
            elif i < config.blocks - 1:
                write = SetAttention(config.heads, name=f"fields_read_{i}")
                fields = jnp.where(present[..., None], write(fields, found), 0.0)
                if config.excite == "both":
                    fields = excite(f"excite_fields_{i}")(fields)
        return jnp.concatenate(patterns, axis=1), fields


class PatternSelector(nn.Module):
    r"""Lets indicator vectors of the tasks pick patterns.

    .. math::
      p_t = \sum_g \alpha_{tg} W_o U_g, \quad \alpha_t = softmax_g
      \frac{\langle W_q v_t(x), W_k U_g \rangle}{\sqrt d}, \quad
      v_t(x) = v_t \odot 2 \sigma(W_v \bar e)

    with the mean :math:`\bar e` of the embedded fields. The weights :math:`\alpha` are
    sown as `"gates"` in `"intermediates"`, see `mtjax.analysis.expert_utilisation`.

    Attributes:
      num_tasks: T.
      config: with the kind of the selector.
    """

    num_tasks: int
    config: APEMConfig

    @nn.compact
    def __call__(
        self,
        patterns: Float[Array, "batch patterns width"],
        pooled: Float[Array, "batch width"],
    ) -> Float[Array, "batch tasks width"]:
        r"""The choice of every task.

        Args:
          patterns: U.
          pooled: :math:`\bar e`.

        Returns:
          :math:`p_t`.
        """
        config, (batch, count, width) = self.config, patterns.shape
        dense = lambda name: nn.Dense(width, use_bias=False, name=name)
        if config.selector == "mean":
            alpha = jnp.full((batch, 1, count), 1 / count)
        else:
            # What `mtjax.nn.is_shared` says belongs to single tasks begins with task_.
            one = config.selector == "shared"
            name, rows = (
                ("indicator", 1) if one else ("task_indicators", self.num_tasks)
            )
            v = self.param(name, nn.initializers.normal(1.0), (rows, width))[None]
            if config.adaptive:
                v = v * (2 * nn.sigmoid(dense("adapt")(pooled)))[:, None]
            query, key = dense("query")(v), dense("key")(patterns)
            query = jnp.broadcast_to(query, (batch, rows, width))
            logits = jnp.einsum("btd,bpd->btp", query, key) / width**0.5
            if config.top_k is None:
                alpha = nn.softmax(logits)
            else:
                alpha = sparse_softmax(logits, config.top_k)
        alpha = jnp.broadcast_to(alpha, (batch, self.num_tasks, count))
        self.sow("intermediates", "gates", alpha)
        return mix(alpha, dense("value")(patterns))


class APEM(nn.Module):
    r"""The ranker on embedded fields: patterns, their selection, towers.

    .. math:: \hat y_t = \sigma(h_t([p_t; \bar e]))

    estimates :math:`P(z_t)`, :math:`z_t = y_1 \cdots y_t`, on all examples.

    Attributes:
      tasks: the steps in the order of the chain; at least one, all different.
      config: sizes and switches.

    Raises:
      ValueError: if tasks are missing or heads do not divide the width.

    Example:
      >>> import jax
      >>> model, fields = APEM(("click", "buy")), jnp.ones((3, 5, 8))
      >>> present = jnp.array([[True] * 4 + [False]] * 3)
      >>> variables = model.init(jax.random.key(0), fields, present)
      >>> {t: z.shape for t, z in model.apply(variables, fields, present).items()}
      {'click': (3,), 'buy': (3,)}

    References:
      APEM, 2023; modified set attention after Set Transformer, ICML 2019, equation 10.
      Names and aims are those of the abstract, formulas our reading of it.
    """

    tasks: tuple[str, ...]
    config: APEMConfig = APEMConfig()

    @nn.compact
    def __call__(
        self,
        fields: Float[Array, "batch fields width"],
        present: Bool[Array, "batch fields"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every step.

        Args:
          fields: one vector per field, also per number: `FieldEmbeddings.stack`.
          present: False where a field is missing; what stands there is not read. All
            are present if None.
          train: whether to drop.

        Returns:
          One logit per example, by task.
        """
        check_tasks(self.tasks)
        config, count = self.config, len(self.tasks)
        if present is None:
            present = jnp.ones(fields.shape[:2], bool)
        fields = jnp.where(present[..., None], fields, 0.0)
        flat, pooled = fields.reshape(len(fields), -1), mean_pool(fields, present)
        if config.extractor == "groups":
            patterns, _ = DeepAutoGroups(config, name="extractor")(fields, present)
        else:
            size = (config.groups * config.blocks, fields.shape[-1])
            h = nn.relu(nn.Dense(size[0] * size[1], name="extractor_hidden")(flat))
            h = nn.Dense(size[0] * size[1], name="extractor_out")(h)
            patterns = h.reshape(-1, *size)
        p = PatternSelector(count, config, name="selector")(patterns, pooled)
        side = pooled if config.pooled == "mean" else flat
        side = jnp.broadcast_to(side[:, None], (len(side), count, side.shape[-1]))
        r = jnp.concatenate([p, side], axis=-1)
        if config.transfer:
            r = self._transferred(r)
        towers = Towers(self.tasks, config.tower, config.dropout, name="task_towers")
        logits = towers(r, train=train)
        return chained_logits(logits, self.tasks) if config.product else logits

    def _transferred(self, r: Array) -> Array:
        """What each step hears from the one before, weighed against its own."""
        q = [r[:, 0]]
        for i, task in enumerate(self.tasks[1:], 1):
            prefix = "task_" if i == len(self.tasks) - 1 else ""
            info = nn.Dense(r.shape[-1], name=f"{prefix}info_{task}")
            transfer = InformationTransfer(r.shape[-1], name=f"{prefix}transfer_{task}")
            q.append(transfer(nn.relu(info(q[-1])), r[:, i]))
        return jnp.stack(q, axis=1)


class TableAPEM(nn.Module):
    """APEM on ids and numbers; a number is a field: its value times a learned vector.

    Attributes:
      tasks: see `APEM`.
      vocabulary_sizes: see `FieldEmbeddings`.
      numbers: how many there are.
      width: d, of all embeddings.
      config: sizes and switches.
      init_scale: standard deviation of embeddings at the start. Attention starts out
        uniform where it is small.
    """

    tasks: tuple[str, ...]
    vocabulary_sizes: Mapping[str, int]
    numbers: int = 0
    width: int = 8
    config: APEMConfig = APEMConfig()
    init_scale: float = 0.3

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], *, train: bool = False
    ) -> dict[str, Float[Array, " batch"]]:
        """The logits of every step.

        Args:
          batch: `"categorical"` ids `(batch, columns)`, where 0 is a missing value, and
            `"numeric"` `(batch, numbers)`, where NaN is one.
          train: whether to drop.

        Returns:
          One logit per example, by task.
        """
        ids, numeric = jnp.asarray(batch["categorical"]), jnp.asarray(batch["numeric"])
        start = nn.initializers.normal(self.init_scale)
        embeddings = FieldEmbeddings(
            self.vocabulary_sizes,
            self.width,
            numbers=self.numbers,
            number_width=self.width,
            embedding_init=start,
            name="fields",
        )
        known = ~jnp.isnan(numeric)
        fields = embeddings.stack(ids, jnp.where(known, numeric, 0.0))
        present = jnp.concatenate([ids != MISSING, known], axis=1)
        return APEM(self.tasks, self.config, name="body")(fields, present, train=train)


def apem_losses(
    logits: Mapping[str, Float[Array, " batch"]],
    labels: Mapping[str, Float[Array, " batch"]],
    chain: tuple[str, ...],
    penalty: float = 0.6,
) -> dict[str, Float[Array, ""]]:
    r"""The one stage of training: every step's cross-entropy, and the chain's penalty.

    .. math:: L = \sum_t BCE(z_t, \hat y_t)
        + a \sum_{t \ge 2} mean(\max(\hat y_t - \hat y_{t-1}, 0))

    Args:
      logits: by task.
      labels: of the entire space: a step that needs one that did not happen is 0. NaN
        where a label is not final, see `mature_labels`.
      chain: the tasks in order.
      penalty: a, not negative; 0 leaves independent heads. 0.6 is AITM's.

    Returns:
      The losses by task, and the penalty as `"chain"`, for any balancer: their sum
      is L.

    Raises:
      ValueError: if `penalty` is negative or a task is named `"chain"`.

    Example:
      >>> logits = {"click": jnp.zeros(2), "buy": jnp.zeros(2)}
      >>> labels = {"click": jnp.array([1.0, 0.0]), "buy": jnp.zeros(2)}
      >>> losses = apem_losses(logits, labels, ("click", "buy"))
      >>> {name: round(float(loss), 3) for name, loss in losses.items()}
      {'click': 0.693, 'buy': 0.693, 'chain': 0.0}
    """
    if not penalty >= 0:
        raise ValueError(f"`penalty` must not be negative, got {penalty!r}.")
    if "chain" in logits:
        raise ValueError("`logits` must not have a task named 'chain'; rename it.")
    losses = binary_losses(logits, labels)
    if penalty:
        losses["chain"] = penalty * label_chain_penalty(logits, chain)
    return losses
