r"""DTRN: every task gets its own bottom representation.

Deep Task-specific Bottom Representation Network for Multi-Task Recommendation, 2023.
Tasks disagree about what to read from a user's history. One transformer reads all
behaviour sequences, but its normalisations are generated for every pair of task and
behaviour; then every task weighs fields and interests for itself, before any ranker.

New here: `TaskInterests` (TIM), `TaskRefinement` (TRM) and `DTRN`, which puts both
before the towers or a ranker of `mtjax.nn.task_inputs`.

Uses: `mtjax.nn` (`Hypernetwork`, masked attention and pooling, any ranker, `add_task`);
`binary_losses`, of `labels_within` for conversions on clicks alone; any balancer.

Needs: embedded fields, candidate and behaviour sequences, with masks; binary labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mtjax.nn.bert import MaskedSelfAttention
from mtjax.nn.experts import kernel_init
from mtjax.nn.gates import masked_softmax
from mtjax.nn.hypernetwork import Hypernetwork
from mtjax.nn.pooling import mean_pool
from mtjax.nn.task_inputs import Bottom
from mtjax.nn.towers import check_tasks

Logits = dict[str, Float[Array, " batch"]]
Histories = Float[Array, "batch kinds length width"]
Mask = Bool[Array | np.ndarray, "batch kinds length"]
States = Float[Array, "users tasks kinds length width"]
Conditioning = Literal["hypernetwork", "shared", "separate", "none"]
Pooling = Literal["target", "mean"]
Squeeze = Literal["concat", "mean"]
Norms = Mapping[str, Float[Array, "_ _ width"]]


@dataclass(frozen=True)
class DTRNConfig:
    """Sizes, and what an ablation switches off.

    Attributes:
      conditioning: of the transformer: `"hypernetwork"` as published; `"shared"`, one
        normalisation for all; `"separate"`, a transformer for every task and behaviour;
        `"none"`, no transformer (TIM off): the mean of every sequence.
      refinement: whether tasks weigh fields and interests (TRM).
      width: d of items in sequences, and of interests.
      length: longest sequence.
      layers: of the transformer.
      heads: of its attention, a divisor of `width`.
      hidden: width of its feed-forward part.
      positions: learnt vectors for the last item, the one before, and so on. Summaries
        of the paper do not say whether it has positions.
      pooling: `"target"` attention of the candidate, or the `"mean"` of the states.
      task_width: of a task's embedding.
      kind_width: of a behaviour's embedding.
      hyper_hidden: widths of the hypernetwork's layers before its heads.
      reduction: TRM's hidden layer has one unit for so many fields and interests.
      squeeze: what TRM reads of a field: all of it (`"concat"`), or its `"mean"`.
    """

    conditioning: Conditioning = "hypernetwork"
    refinement: bool = True
    width: int = 32
    length: int = 20
    layers: int = 1
    heads: int = 2
    hidden: int = 128
    positions: bool = True
    pooling: Pooling = "target"
    task_width: int = 16
    kind_width: int = 16
    hyper_hidden: tuple[int, ...] = (32, 32)
    reduction: int = 3
    squeeze: Squeeze = "concat"

    def __post_init__(self):
        """Checks the ranges."""
        for name in ("width", "length", "layers", "heads", "hidden", "reduction"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        if self.width % self.heads:
            raise ValueError(
                f"`heads` must divide `width`, got {self.heads} and {self.width}."
            )
        choices = {"conditioning": Conditioning, "pooling": Pooling, "squeeze": Squeeze}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"`{name}` must be one of {get_args(kind)}, got "
                    f"{getattr(self, name)!r}."
                )


class Inputs(NamedTuple):
    """What a batch of impressions looks like after embedding.

    Attributes:
      fields: of user, item and context.
      histories: items of every behaviour, oldest first; see `mtjax.nn.histories`.
      mask: which of them are real.
      candidate: the item that is ranked.
    """

    fields: Float[Array, "batch fields field_width"]
    histories: Histories
    mask: Mask
    candidate: Float[Array, "batch width"]


def _norm_starts(config: DTRNConfig) -> dict[str, nn.initializers.Initializer]:
    """Of a scale and a shift for each of two places per layer, by name."""
    names = [f"{layer}_{place}" for layer in range(config.layers) for place in (0, 1)]
    # A scale near 0 would let no signal through.
    scales = {f"scale_{name}": nn.initializers.ones for name in names}
    return scales | {f"shift_{name}": nn.initializers.zeros for name in names}


class ConditionalTransformer(nn.Module):
    r"""A transformer whose LayerNorms have a scale and a shift per task and behaviour.

    .. math::
      X_1 = CLN^1_{ij}(X + Attention(X)), \quad X_2 = CLN^2_{ij}(X_1 + FFN(X_1)), \quad
      CLN_{ij}(x) = \gamma_{ij} \frac{x - \bar x}{\sqrt{var(x) + \epsilon}} + \beta_{ij}

    Tasks differ from the first normalisation on: until there the axis of tasks has one
    entry, and the first attention is computed once per sequence.
    """

    config: DTRNConfig

    def setup(self):
        """Makes everything but what `norms` may bring."""
        c = self.config
        each = range(c.layers)
        self.attention = [MaskedSelfAttention(c.heads) for _ in each]
        self.ffn_in = [nn.Dense(c.hidden) for _ in each]
        self.ffn_out = [nn.Dense(c.width) for _ in each]
        if c.positions:
            init = nn.initializers.normal(0.02)
            self.places = self.param("positions", init, (c.length, c.width))
        if c.pooling == "target":
            init = nn.initializers.lecun_normal()
            self.match = self.param("match", init, (c.width, c.width))
        if c.conditioning != "hypernetwork":
            starts = _norm_starts(c).items()
            self.own_norms = {k: self.param(k, v, (c.width,)) for k, v in starts}

    def encode(self, x: Histories, mask: Mask, norms: Norms | None = None) -> States:
        """The states of all items; those of padding mean nothing."""
        if norms is None:
            norms = {k: v[None, None] for k, v in self.own_norms.items()}
        if self.config.positions:
            # Counted from the newest: padding, and its side, do not matter.
            later = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] - mask
            x = x + self.places[later]
        x = x[:, None]
        for i in range(self.config.layers):
            real = jnp.broadcast_to(mask[:, None], x.shape[:-1])
            sequences = x.reshape(-1, *x.shape[-2:]), real.reshape(-1, x.shape[-2])
            heard = self.attention[i](*sequences).reshape(x.shape)
            x = _conditional_norm(x + heard, norms, f"{i}_0")
            h = self.ffn_out[i](nn.relu(self.ffn_in[i](x)))
            x = _conditional_norm(x + h, norms, f"{i}_1")
        return x

    def pool(
        self, states: States, mask: Mask, candidate: Float[Array, "batch width"]
    ) -> Float[Array, "batch tasks kinds width"]:
        """The interest in a candidate, 0 where a sequence is empty."""
        mask = jnp.broadcast_to(mask[:, None], states.shape[:-1])
        if self.config.pooling == "mean":
            return mean_pool(states, mask)
        query = candidate @ self.match * self.config.width**-0.5
        weights = masked_softmax(jnp.einsum("btrld,bd->btrl", states, query), mask)
        return jnp.einsum("btrl,btrld->btrd", weights, states)


def _conditional_norm(x: Array, norms: Norms, name: str) -> Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    per_pair = lambda v: v[None, :, :, None]
    return per_pair(norms[f"scale_{name}"]) * x + per_pair(norms[f"shift_{name}"])


class TaskInterests(nn.Module):
    """TIM: what every task makes of every behaviour sequence.

    Attributes:
      num_tasks: T, at least 1.
      num_kinds: R, number of behaviours, at least 1.
      config: sizes and switches.
    """

    num_tasks: int
    num_kinds: int
    config: DTRNConfig

    def setup(self):
        """Makes the transformer and what generates its normalisations."""
        c, normal = self.config, nn.initializers.normal(1.0)
        if c.conditioning == "separate":
            # One axis of pairs, tasks first: entries of a task stand together.
            self.task_encoders = nn.vmap(
                ConditionalTransformer,
                axis_size=self.num_tasks * self.num_kinds,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                methods=("encode", "pool"),
            )(c)
        elif c.conditioning != "none":
            self.encoder = ConditionalTransformer(c)
        if c.conditioning == "hypernetwork":
            sizes = (self.num_tasks, c.task_width), (self.num_kinds, c.kind_width)
            self.of_tasks = self.param("task_embeddings", normal, sizes[0])
            self.of_kinds = self.param("kind_embeddings", normal, sizes[1])
            starts = _norm_starts(c)
            shapes = dict.fromkeys(starts, (c.width,))
            self.hypernetwork = Hypernetwork(shapes, starts, c.hyper_hidden)

    def norms(self) -> dict[str, Float[Array, "tasks kinds width"]]:
        """The normalisations of all pairs, from the embeddings of task and kind."""
        of_task, of_kind = self.of_tasks[:, None], self.of_kinds[None]
        of_task = jnp.repeat(of_task, self.num_kinds, axis=1)
        of_kind = jnp.repeat(of_kind, self.num_tasks, axis=0)
        return self.hypernetwork(jnp.concatenate([of_task, of_kind], axis=-1))

    def encode(self, histories: Histories, mask: Mask) -> States:
        """The part that candidates play no role in; see `DTRN.encode`."""
        c, shape = self.config, histories.shape
        if shape[1] != self.num_kinds or shape[2] > c.length or shape[3] != c.width:
            raise ValueError(
                f"`histories` must hold {self.num_kinds} kinds with at most {c.length} "
                f"items of width {c.width}, got {shape[1:]}; "
                "`mtjax.nn.histories` fills in missing kinds."
            )
        mask = jnp.asarray(mask)
        # Not a product: infinities in padding would become NaN.
        x = jnp.where(mask[..., None], histories, 0.0)
        if c.conditioning == "none":
            return x[:, None]
        if c.conditioning == "separate":
            states = self.task_encoders.encode(self._pairs(x), self._pairs(mask))
            return self._by_task(states)
        norms = self.norms() if c.conditioning == "hypernetwork" else None
        return self.encoder.encode(x, mask, norms)

    def pool(
        self, states: States, mask: Mask, candidate: Float[Array, "batch width"]
    ) -> Float[Array, "batch tasks kinds width"]:
        """Interests in a candidate; one entry of tasks if all have the same."""
        mask = jnp.asarray(mask)
        if self.config.conditioning == "none":
            return mean_pool(states, mask[:, None])
        if self.config.conditioning != "separate":
            return self.encoder.pool(states, mask, candidate)
        flat = jnp.moveaxis(states, 0, 2)
        flat = flat.reshape(-1, *flat.shape[2:])[:, :, None, None]
        candidates = jnp.broadcast_to(candidate, (len(flat), *candidate.shape))
        return self._by_task(
            self.task_encoders.pool(flat, self._pairs(mask), candidates)
        )

    def _pairs(self, x: Array) -> Array:
        """The sequences of every pair of task and kind, each of a single kind."""
        kinds_first = jnp.moveaxis(x, 1, 0)[:, :, None]
        return jnp.concatenate([kinds_first] * self.num_tasks)

    def _by_task(self, x: Array) -> Array:
        x = x[:, :, 0, 0]
        x = x.reshape(self.num_tasks, self.num_kinds, *x.shape[1:])
        return jnp.moveaxis(x, 2, 0)


class TaskRefinement(nn.Module):
    r"""TRM: every task weighs whole fields and interests, with networks of its own.

    .. math:: w_j = 2 \sigma(W_{2j} \, ReLU(W_{1j} z_j))

    It is the identity where :math:`W_{2j} = 0`. Weights are sown as `"field_weights"`.
    """

    num_tasks: int
    reduction: int = 3
    squeeze: Squeeze = "concat"

    @nn.compact
    def __call__(
        self,
        fields: Float[Array, "batch fields field_width"],
        interests: Float[Array, "batch tasks kinds width"],
    ) -> Float[Array, "batch tasks features"]:
        """Weighted fields, then weighted interests, side by side."""
        shape = (len(fields), self.num_tasks)
        interests = jnp.broadcast_to(interests, (*shape, *interests.shape[2:]))
        fields = jnp.broadcast_to(fields[:, None], (*shape, *fields.shape[1:]))
        z = [x.mean(-1) if self.squeeze == "mean" else x for x in (fields, interests)]
        z = jnp.concatenate([x.reshape(*shape, -1) for x in z], axis=-1)
        first = fields.shape[2]
        count = first + interests.shape[2]
        hidden = max(1, count // self.reduction)
        down = self.param("down", kernel_init, (self.num_tasks, z.shape[-1], hidden))
        up = self.param("up", kernel_init, (self.num_tasks, hidden, count))
        h = nn.relu(jnp.einsum("btz,tzh->bth", z, down))
        weights = 2 * nn.sigmoid(jnp.einsum("bth,thf->btf", h, up))
        self.sow("intermediates", "field_weights", weights)
        parts = (
            fields * weights[..., :first, None],
            interests * weights[..., first:, None],
        )
        return jnp.concatenate([x.reshape(*shape, -1) for x in parts], axis=-1)


class DTRN(nn.Module):
    """TIM, then TRM, then a ranker; a ranker itself, of `Inputs`.

    Attributes:
      tasks: their names; at least one, all different.
      kinds: names of the behaviours, in the order of `Inputs.histories`.
      head: from `Bottom` to logits: `OwnTowers`, `EachTask` or `Extraction`.
      config: sizes and switches.
      averaged: over how many of the first tasks `Bottom.shared` averages; all if None.
        Give the old number when you add a task, so that old ones read what they did.
    """

    tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    head: nn.Module
    config: DTRNConfig = DTRNConfig()
    averaged: int | None = None

    def setup(self):
        """Makes both modules."""
        check_tasks(self.tasks)
        c, num_tasks = self.config, len(self.tasks)
        if not self.kinds:
            raise ValueError("`kinds` must name at least one behaviour, got ().")
        self.interests = TaskInterests(num_tasks, len(self.kinds), c)
        if c.refinement:
            self.task_refinement = TaskRefinement(num_tasks, c.reduction, c.squeeze)

    def __call__(self, inputs: Inputs, *, train: bool = False) -> Logits:
        """The logits of every task."""
        states = self.encode(inputs.histories, inputs.mask)
        return self.rank(states, inputs, train=train)

    def encode(self, histories: Histories, mask: Mask) -> States:
        """States of the sequences, without any candidate: to be kept per user."""
        return self.interests.encode(histories, mask)

    def rank(self, states: States, inputs: Inputs, *, train: bool = False) -> Logits:
        """The logits of candidates, from states of `encode`, of one user or one each.

        Of the histories in `inputs` the mask alone is read.
        """
        return self.head(self.bottom(states, inputs), train=train)

    def bottom(self, states: States, inputs: Inputs) -> Bottom:
        """What the ranker reads."""
        fields, batch = inputs.fields, len(inputs.fields)
        states = jnp.broadcast_to(states, (batch, *states.shape[1:]))
        mask = jnp.broadcast_to(inputs.mask, (batch, *inputs.mask.shape[1:]))
        interests = self.interests.pool(states, mask, inputs.candidate)
        plain = lambda x: jnp.concatenate(
            [fields.reshape(batch, -1), x.reshape(batch, -1)], axis=-1
        )
        if self.config.refinement:
            own = self.task_refinement(fields, interests)
        else:
            own = jnp.stack([plain(x) for x in interests.swapaxes(0, 1)], axis=1)
        return Bottom(own, plain(jnp.mean(interests[:, : self.averaged], axis=1)))


def scale_difference(
    interests: TaskInterests, params: Mapping[str, Any]
) -> Float[Array, "tasks tasks"]:
    r"""Mean :math:`|\gamma_{ij} - \gamma_{ij'}|` of tasks, over behaviours and scales.

    Args:
      interests: TIM of a model with a hypernetwork.
      params: its parameters, `params["interests"]` of a `DTRN`.

    Returns:
      0 on the diagonal, and everywhere before training.
    """
    norms: Any = interests.apply({"params": params}, method="norms")
    scales = jnp.stack([v for name, v in norms.items() if name.startswith("scale")])
    between = jnp.abs(scales[:, :, None] - scales[:, None])
    return jnp.mean(between, axis=(0, 3, 4))
