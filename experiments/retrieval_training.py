"""Training of retrieval models: what the experiments on next items share.

A model here gives a logit to every row of a catalogue. It is trained by losses of one
or several tasks and judged by full rankings: the target among all items.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import mtjax
from mtjax.analysis.plots import method_colors
from mtjax.data.sequences import Catalogue, SequenceProblem
from mtjax.training.ranking_metrics import full_ranks, top_k_metrics

BLOCK = 512  # rows that are scored at once
Split = Mapping[str, Any]
Results = dict[str, list[dict[str, Any]]]  # by method one per seed


class Fitted(NamedTuple):
    """A model at its best evaluation."""

    params: Any
    curve: list[tuple[int, float]]  # step, and what the evaluation said
    losses: list[dict[str, float]]  # mean since the evaluation before, by task


def fit(
    losses_fn: Callable[[Any, Any, Any, jax.Array], dict[str, jax.Array]],
    params: Any,
    data: Any,
    draws: Callable[[int], Any],
    tx: optax.GradientTransformationExtraArgs,
    *,
    epochs: int,
    evaluations: int,
    key: jax.Array,
    evaluate: Callable[[Any], float],
) -> Fitted:
    """Trains, evaluates several times per epoch and keeps what was best.

    Args:
      losses_fn: from parameters, `data`, a draw and a key to losses by task.
      params: where to start.
      data: arrays that all steps read.
      draws: from the number of an epoch to what its steps draw, a tree of arrays with a
        leading axis of steps.
      tx: a balancer and an optimizer.
      epochs: passes over the examples.
      evaluations: per epoch; steps that do not fill the last part are left out.
      key: of everything random in the losses.
      evaluate: from parameters to a number, the larger the better.

    Returns:
      The best parameters and the curves.
    """
    grad_fn = mtjax.value_and_task_grads(losses_fn)

    @jax.jit
    def run(params, opt_state, data, draws, key):
        def step(carry, xs):
            params, opt_state = carry
            losses, grads = grad_fn(params, data, *xs)
            updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
            return (optax.apply_updates(params, updates), opt_state), losses

        keys = jax.random.split(key, len(jax.tree.leaves(draws)[0]))
        carry, losses = jax.lax.scan(step, (params, opt_state), (draws, keys))
        return *carry, jax.tree.map(jnp.mean, losses)

    opt_state, data = tx.init(params), jax.tree.map(jnp.asarray, data)
    best, curve, means, done = params, [], [], 0
    for epoch in range(epochs):
        drawn = draws(epoch)
        steps = len(jax.tree.leaves(drawn)[0]) // evaluations
        parts = jax.tree.map(
            lambda x, n=steps: x[: n * evaluations].reshape(
                evaluations, n, *x.shape[1:]
            ),
            drawn,
        )
        for i in range(evaluations):
            part = jax.tree.map(lambda x, i=i: x[i], parts)
            folded = jax.random.fold_in(key, epoch * evaluations + i)
            params, opt_state, losses = run(params, opt_state, data, part, folded)
            done += steps
            curve.append((done, evaluate(params)))
            means.append({task: float(loss) for task, loss in losses.items()})
            if curve[-1][1] == max(value for _, value in curve):
                best = params
    return Fitted(best, curve, means)


def shortened(problem: SequenceProblem, limit: int | None) -> SequenceProblem:
    """The problem with so many targets of every split; with all if None."""
    cut = lambda split: {name: values[:limit] for name, values in split.items()}
    splits = {
        name: cut(problem.split(name)) for name in ("train", "validation", "test")
    }
    return replace(problem, **splits)


def shuffled(examples: int, size: int, seed: int) -> np.ndarray:
    """Rows of all examples, `(steps, size)`; what fills no batch is left out."""
    order = np.random.default_rng(seed).permutation(examples)
    return order[: examples // size * size].reshape(-1, size)


def target_ranks(
    score: Callable[[Split], jax.Array | np.ndarray],
    split: Split,
    items: int,
    seen: np.ndarray | None = None,
) -> np.ndarray:
    """Ranks every target among all items that its history does not hold.

    Args:
      score: from a block of the split, of always the same size, to logits of all rows.
      split: with `history` and `target`.
      items: rows of the catalogue; 0 and 1 are not ranked.
      seen: flags `(rows of the split, items)` of more that are not ranked.

    Returns:
      The ranks, from 1; equal scores share their mean rank.
    """
    found, number = [], len(split["target"])
    for start in range(0, number, BLOCK):
        rows = np.arange(start, start + BLOCK) % number  # the last block goes round
        block = {name: values[rows] for name, values in split.items()}
        scores = np.asarray(score(block))
        excluded = np.zeros((BLOCK, items), bool) if seen is None else seen[rows]
        excluded[np.arange(BLOCK)[:, None], block["history"]] = True
        excluded[:, :2] = True
        found.append(full_ranks(scores, block["target"], excluded=excluded))
    return np.concatenate(found)[:number]


def popularity_ranks(items: Catalogue, split: Split) -> np.ndarray:
    """Ranks of the targets where scores are how often training views an item."""
    counts = np.float32(items.train_counts)
    score = lambda block: np.tile(counts, (len(block["target"]), 1))
    return target_ranks(score, split, len(counts))


def slice_metrics(
    ranks: np.ndarray, slices: Mapping[str, np.ndarray], ks: tuple[int, ...]
) -> dict[str, float]:
    """Recall, MRR and NDCG in per cent, by slice of the targets, in a flat dict."""
    return {
        f"{name} {metric}": 100 * value
        for name, mask in slices.items()
        for metric, value in top_k_metrics(ranks[mask], ks).items()
    }


def item_rows(items: Catalogue) -> dict[str, Any]:
    """What a model reads of a catalogue: metadata only."""
    return {
        "categorical": items.categorical,
        "multi_hot": dict(items.multi_hot),
        "tokens": dict(items.tokens),
    }


def with_item_field(items: Catalogue, new: int = 1) -> np.ndarray:
    """The fields and the item's own id, `new` for items that training does not have."""
    ids = np.arange(len(items.item_ids))
    own = np.where(ids < items.num_warm, ids, new).astype(np.int32)
    return np.concatenate([items.categorical, own[:, None]], axis=1)


def plot_retrieval(results: Results, slices: tuple[str, ...], k: int) -> Figure:
    """Validation over steps, and test recall by slice with its spread over seeds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors, width = method_colors([*results]), 0.8 / len(results)
    for i, (name, runs) in enumerate(results.items()):
        if "curve" in runs[0]:
            steps, values = np.mean([run["curve"] for run in runs], axis=0).T
            left.plot(steps, values, color=colors[name])
        bars = [[run["metrics"][f"{x} recall@{k}"] for x in slices] for run in runs]
        right.bar(
            np.arange(len(slices)) + width * (i + 0.5) - 0.4,
            np.mean(bars, axis=0),
            width,
            yerr=np.std(bars, axis=0),
            color=colors[name],
            label=name,
        )
    left.set(xlabel="step", ylabel=f"validation Recall@{k}, %")
    right.set(xticks=range(len(slices)), ylabel=f"test Recall@{k}, %")
    right.set_xticklabels(slices)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def pairs_of_users(problem: SequenceProblem) -> dict[str, dict[str, np.ndarray]]:
    """Splits with `history`, `target` and the row of the `user`, 0 for a new one."""
    users = np.unique(problem.train["user"])
    found = {}
    for name in ("train", "validation", "test"):
        split = problem.split(name)
        place = np.searchsorted(users, split["user"]).clip(max=len(users) - 1)
        row = np.where(users[place] == split["user"], place + 1, 0).astype(np.int32)
        found[name] = {k: split[k] for k in ("history", "target")} | {"user": row}
    return found


def liked(
    splits: Mapping[str, Split], names: tuple[str, ...], rows: Split, items: int
) -> np.ndarray:
    """Flags `(rows, items)` of what users had before, in the splits of these names."""
    users = max(split["user"].max() for split in splits.values()) + 1
    flags = np.zeros((users, items), bool)
    for name in names:
        flags[splits[name]["user"], splits[name]["target"]] = True
    flags[0] = False
    return flags[rows["user"]]
