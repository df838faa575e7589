"""Training of click rankers: what the experiments on recommender systems share.

A ranker here is a Linen module from a batch (the arrays of a `RankingProblem`'s split)
to a logit per task and example; `Embedded` makes one of a module that takes vectors.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from rich.progress import Progress

import mtjax
from experiments.kept import kept
from mtjax.data.ranking import RankingProblem, ranking_problem
from mtjax.losses.binary import binary_losses
from mtjax.nn.fields import FieldEmbeddings
from mtjax.nn.task_leaves import is_shared
from mtjax.training.click_metrics import click_metrics
from mtjax.training.run_config import open_run_folder

Logits = dict[str, jax.Array]
Losses = dict[str, jax.Array]
BLOCK = 8192  # examples that are predicted at once
SOWN = "losses"  # the collection of what a model adds to its losses


def made_up(tasks: Sequence[str] = ("click", "buy"), rows: int = 400) -> RankingProblem:
    """A small problem of numbers drawn at random, for trying a script without data."""
    rng = np.random.default_rng(0)
    table: dict[str, np.ndarray] = {
        "shop": rng.integers(9, size=rows),
        "brand": rng.integers(5, size=rows),
        "price": rng.normal(size=rows),
        "age": rng.normal(size=rows),
    }
    for place, task in enumerate(tasks):
        score = table["price"] - (-1) ** place * table["age"] + (table["shop"] == 1)
        table[task] = (score > rng.logistic(size=rows)).astype(np.float32)
    cuts = {"train": 0.6, "validation": 0.8, "test": 1.0}.items()
    ends = {split: int(share * rows) for split, share in cuts}
    starts = dict(zip(ends, (0, *ends.values())))
    return ranking_problem(
        "made-up",
        table,
        {split: np.arange(starts[split], end) for split, end in ends.items()},
        tasks=tasks,
        fields=("shop", "brand"),
        numbers=("price", "age"),
    )


@dataclass(frozen=True)
class Training:
    """How a ranker is trained: Adam, the epoch with the best validation AUC."""

    epochs: int = 8
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    patience: int = 2  # epochs without a better one, after which training stops


class Trained(NamedTuple):
    """A ranker after its best epoch."""

    variables: Any  # `params` and other collections, for `model.apply`
    aucs: list[float]  # mean over tasks on validation, by epoch
    losses: list[dict[str, float]]  # mean over the epoch, by task
    seconds: float  # of training, without compiling and evaluating


class Embedded(nn.Module):
    """Embeddings of all fields and the numbers, put in front of a ranker of vectors."""

    body: nn.Module
    vocabulary_sizes: Mapping[str, int]
    numbers: int
    width: int = 4  # of an embedding
    groups: tuple[str, ...] = ()  # with tables of their own, for STEM

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], *, train: bool = False) -> Logits:
        """The logits of every task."""

        def embed(name: str) -> jax.Array:
            fields = FieldEmbeddings(
                self.vocabulary_sizes, self.width, numbers=self.numbers, name=name
            )
            return fields(batch["categorical"], batch["numeric"])

        groups = {group: embed(f"{group}_fields") for group in self.groups}
        return self.body(groups or embed("fields"), train=train)


def embedded(
    body: nn.Module, problem: RankingProblem, width: int = 4, groups: Sequence[str] = ()
) -> Embedded:
    """The ranker of a problem's fields and numbers."""
    sizes, numbers = FrozenDict(problem.vocabulary_sizes), len(problem.numbers)
    return Embedded(body, sizes, numbers, width, tuple(groups))


def fit(
    model: nn.Module,
    problem: RankingProblem,
    training: Training,
    *,
    seed: int,
    balancer: optax.GradientTransformationExtraArgs | None = None,
    losses_fn: Callable[[Logits, Mapping[str, jax.Array]], Losses] = binary_losses,
    penalty: float = 0.0,
    on_epoch: Callable[[int, float], None] = lambda epoch, auc: None,
) -> Trained:
    """Trains a ranker and keeps its best epoch.

    Args:
      model: from a batch to logits; takes `train` and, for dropout, a key of that name.
      problem: whose training and validation examples are used.
      training: how.
      seed: of the initial values, of the order of examples and of dropout. The order is
        the same for all models, so that seeds are paired.
      balancer: puts the tasks' gradients together; None adds them up.
      losses_fn: from logits and labels to losses by task.
      penalty: weight of what the model sows as "losses"; tasks share it evenly.
      on_epoch: called with the number of the epoch and the mean validation AUC.

    Returns:
      The ranker of the best epoch, and the curves.

    Raises:
      ValueError: if there are fewer training examples than one batch.
    """
    data = jax.tree.map(jnp.asarray, problem.train)
    examples, size = len(problem.train["categorical"]), training.batch_size
    if examples < size:
        raise ValueError(
            f"`batch_size` must be at most the {examples} training examples, got {size}"
        )
    key = jax.random.key(seed)
    # A rate in the state is no constant of the program: JAX's cache on disk, if it is
    # on, compiles once for all rates.
    adamw = optax.inject_hyperparams(optax.adamw, static_args="weight_decay")
    tx = optax.chain(
        balancer or mtjax.equal(),
        adamw(training.learning_rate, weight_decay=training.weight_decay),
    )

    @jax.jit
    def start():
        found = model.init(key, jax.tree.map(lambda x: x[:2], data))
        return {k: v for k, v in found.items() if k != SOWN}

    @jax.jit
    def epoch(variables, opt_state, data, rows, key):
        def losses_of(params, state, batch, key):
            logits, state = model.apply(
                {"params": params, **state},
                batch,
                train=True,
                rngs={"dropout": key},
                mutable=[*state, SOWN],
            )
            sown = sum(jax.tree.leaves(state.get(SOWN, {})))
            state = {k: v for k, v in state.items() if k != SOWN}
            losses = losses_fn(logits, batch["labels"])
            return {
                t: x + penalty * sown / len(losses) for t, x in losses.items()
            }, state

        grad_fn: Any = mtjax.value_and_task_grads(
            losses_of, has_aux=True, shared=is_shared
        )

        def step(carry, xs):
            (params, state), opt_state = carry
            rows, key = xs
            batch = jax.tree.map(lambda x: x[rows], data)
            (losses, state), grads = grad_fn(params, state, batch, key)
            fresh = lambda p: losses_of(p, state, batch, key)[0]
            updates, opt_state = tx.update(
                grads, opt_state, params, losses=losses, losses_fn=fresh
            )
            return ((optax.apply_updates(params, updates), state), opt_state), losses

        keys = jax.random.split(key, len(rows))
        state = {k: v for k, v in variables.items() if k != "params"}
        carry = (variables["params"], state), opt_state
        ((params, state), opt_state), losses = jax.lax.scan(step, carry, (rows, keys))
        return {"params": params, **state}, opt_state, jax.tree.map(jnp.mean, losses)

    variables = start()
    opt_state = tx.init(variables["params"])
    rng = np.random.default_rng(seed)
    best, aucs, curve, seconds, compiled = variables, [], [], 0.0, None
    for number in range(training.epochs):
        order = rng.permutation(examples)[: examples // size * size]
        rows = jnp.asarray(order.reshape(-1, size))
        arguments = variables, opt_state, data, rows, jax.random.fold_in(key, number)
        compiled = compiled or epoch.lower(*arguments).compile()
        begin = time.perf_counter()
        variables, opt_state, losses = jax.block_until_ready(compiled(*arguments))
        seconds += time.perf_counter() - begin
        curve.append({task: float(loss) for task, loss in losses.items()})
        aucs.append(evaluate(model, variables, problem, "validation")["mean AUC"])
        on_epoch(number, aucs[-1])
        if aucs[-1] == max(aucs):
            best = variables
        elif number - int(np.argmax(aucs)) >= training.patience:
            break
    return Trained(best, aucs, curve, seconds)


@partial(jax.jit, static_argnums=0)
def _probabilities(model, variables, batch):
    return jax.tree.map(jax.nn.sigmoid, model.apply(variables, batch))


def predict(
    model: nn.Module, variables: Any, split: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Probabilities by task for all examples of a split."""
    rows = range(0, len(split["categorical"]), BLOCK)
    part = lambda i: jax.tree.map(lambda x: x[i : i + BLOCK], dict(split))
    blocks = [_probabilities(model, variables, part(i)) for i in rows]
    return {t: np.concatenate([np.asarray(b[t]) for b in blocks]) for t in blocks[0]}


def evaluate(
    model: nn.Module, variables: Any, problem: RankingProblem, split: str
) -> dict[str, float]:
    """AUC and log loss of every task, in a flat dict; "mean AUC" is over tasks.

    Tasks are those of the model. One that has one class only in the split is left out
    of the mean.
    """
    part = problem.split(split)
    predicted = predict(model, variables, part)
    found = click_metrics({t: part["labels"][t] for t in predicted}, predicted)
    aucs = {f"{task} AUC": m["roc_auc"] for task, m in found.items()}
    losses = {f"{task} log loss": m["log_loss"] for task, m in found.items()}
    return {**aucs, "mean AUC": float(np.nanmean([*aucs.values()])), **losses}


def num_parameters(variables: Any, *, without: str = "fields") -> int:
    """How many numbers are trained, tables of embeddings left out."""
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    return sum(x.size for path, x in paths if without not in jax.tree_util.keystr(path))


def per_method(
    config: Any,
    out: Path,
    methods: Mapping[str, Callable[[int], dict[str, Any]]],
    seeds: int,
    prefix: str = "",
) -> dict[str, list[dict[str, Any]]]:
    """Runs every method with every seed that is not finished.

    Args:
      config: of the experiment; another one in the same folder is refused.
      out: run folder; holds one file per method and seed.
      methods: from a seed to results in JSON types, by name.
      seeds: their number.
      prefix: of the files' names, where a script calls this more than once.

    Returns:
      The results, by method one per seed.
    """
    open_run_folder(out, config)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with Progress() as progress:
        bar = progress.add_task("", total=seeds * len(methods))
        for seed, name in _pairs(seeds, methods):
            title = f"{prefix} {name}, seed {seed}".strip()
            progress.update(bar, description=title)
            path = out / "results" / f"{title.replace('/', '-')}.json"
            results[name].append(kept(path, partial(_cleared, methods[name], seed)))
            progress.advance(bar)
    return results


def _cleared(method: Callable[[int], dict[str, Any]], seed: int) -> dict[str, Any]:
    found = method(seed)
    jax.clear_caches()  # memory maps of programs are limited
    return found


def _pairs(seeds: int, methods: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    # Seed by seed: what is there when a run is stopped can be compared.
    for seed in range(seeds):
        for name in methods:
            yield seed, name
