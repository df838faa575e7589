"""What the experiment on DTRN compares: rankers of films on several histories."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

import mtjax
from experiments.ranking_training import Logits
from mtjax.analysis.field_weights import field_weights
from mtjax.data.ranking import RankingProblem, ranking_problem
from mtjax.losses.binary import binary_losses
from mtjax.nn import PLE, MMoE, SharedBottomRanker
from mtjax.nn.fields import FieldEmbeddings
from mtjax.nn.histories import stacked_histories
from mtjax.nn.task_inputs import EachTask, Extraction
from mtjax.systems.dtrn import DTRN, DTRNConfig, Inputs, TaskInterests, scale_difference

KINDS = ("rated", "liked", "disliked")
BASE = "shared bottom"
PLAIN = {"conditioning": "none", "refinement": False}
HEADS: dict[str, Callable[[tuple[str, ...], int, bool], nn.Module]] = {
    BASE: lambda tasks, n, _: EachTask(tasks, SharedBottomRanker(tasks, (4 * n, n))),
    "MMoE": lambda tasks, n, _: EachTask(tasks, MMoE(tasks, 4, ((n,),))),
    "PLE": lambda tasks, n, under: (
        Extraction(PLE(tasks, widths=((n,),)))
        if under
        else EachTask(tasks, PLE(tasks, widths=((n,),)))
    ),
}
# What stands below the towers, and how DTRN differs from the published one.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, PLAIN) for name in HEADS},
    **{f"DTRN, {name}": (name, {}) for name in HEADS},
    "without TIM": (BASE, {"conditioning": "none"}),
    "without TRM": (BASE, {"refinement": False}),
    "TRM without a bottleneck": (BASE, {"reduction": 1}),
    "one norm for all": (BASE, {"conditioning": "shared"}),
    "one norm, without TRM": (BASE, {"conditioning": "shared", "refinement": False}),
    "separate transformers": (BASE, {"conditioning": "separate"}),
}


class Recommender(nn.Module):
    """Embeddings of films, facts and histories, and what reads them."""

    body: DTRN
    vocabulary_sizes: Mapping[str, int]  # without users
    numbers: int

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> Logits:
        """The logits of every task."""
        sizes, width = self.vocabulary_sizes, self.body.config.width
        options = {"numbers": self.numbers, "number_width": width}
        embed = FieldEmbeddings(sizes, width, **options, name="fields")
        fields = embed.stack(batch["categorical"][:, 1:], batch["numeric"])
        genres = nn.Dense(width, use_bias=False, name="genre_fields")
        flags = batch["multi_hot"]["genres"]
        fields = jnp.concatenate([fields, genres(flags)[:, None]], axis=1)
        films = {k: batch["history"][k] for k in KINDS}
        sequences = {k: (embed.embed("movie", x), x > 0) for k, x in films.items()}
        candidate = embed.embed("movie", batch["categorical"][:, 1])
        inputs = Inputs(fields, *stacked_histories(sequences, KINDS), candidate)
        return self.body(inputs, train=train)


def recommender(
    name: str,
    problem: RankingProblem,
    tasks: tuple[str, ...],
    config: DTRNConfig,
    units: int,
) -> Recommender:
    """A method of the comparison, with a ranker of so many units."""
    head, changes = METHODS[name]
    ranker = HEADS[head](tasks, units, changes != PLAIN)
    body = DTRN(tasks, KINDS, ranker, replace(config, **changes))
    sizes = {k: n for k, n in problem.vocabulary_sizes.items() if k != "user"}
    return Recommender(body, FrozenDict(sizes), len(problem.numbers))


def made_up(length: int) -> RankingProblem:
    """A small problem that is drawn at random, with histories of a certain length."""
    rng, rows = np.random.default_rng(0), 400
    draw = lambda high: rng.integers(high, size=rows)
    table: dict[str, Any] = {k: draw(9) for k in ("user", "movie", "decade", "genre")}
    stars = 3 * rng.random(rows) + table["movie"] % 3
    labels = {"like": stars > 2.5, "love": stars > 3.5, "dislike": stars < 1.5}
    parts = np.split(np.arange(rows), (240, 320))
    film = lambda: rng.integers(9, size=(rows, length)).astype(np.int32)
    return ranking_problem(
        "made-up",
        {**table, "age": rng.random(rows), **labels},
        dict(zip(("train", "validation", "test"), parts)),
        tasks=tuple(labels),
        fields=tuple(table),
        numbers=("age",),
        extras={
            "history": {kind: film() for kind in KINDS},
            "multi_hot": {"genres": rng.integers(2, size=(rows, 3)).astype(np.float32)},
            "user": table["user"],
        },
    )


def insight(
    model: Recommender, variables: Any, batch: Mapping[str, Any]
) -> dict[str, Any]:
    """What tasks weigh, how far their norms are apart, and if like fights dislike."""
    config, tasks = model.body.config, model.body.tasks

    def losses(params, batch):
        logits: Any = model.apply({"params": params}, batch)
        return binary_losses(logits, batch["labels"])

    @jax.jit
    def gramian(params, batch):
        _, grads = mtjax.value_and_task_grads(losses)(params, batch)
        return grads.gramian()

    order, products = sorted(tasks), np.asarray(gramian(variables["params"], batch))
    i, j = order.index("like"), order.index("dislike")
    cosine = products[i, j] / np.sqrt(products[i, i] * products[j, j])
    found: dict[str, Any] = {"cosine": float(cosine)}
    if config.refinement:
        (weights,) = field_weights(model, variables, [batch]).values()
        found["weights"] = dict(zip(tasks, weights.tolist()))
    if config.conditioning == "hypernetwork":
        interests = TaskInterests(len(tasks), len(KINDS), config)
        apart = scale_difference(interests, variables["params"]["body"]["interests"])
        pairs = np.asarray(apart)[np.triu_indices(len(tasks), 1)]
        found["scale difference"] = float(pairs.mean())
    return found
