"""M2TRec on MovieLens: films that nobody has rated yet, and films with few ratings.

The next film of a session, its genre and its decade and genre, from titles, genres and
decades alone. Beside it: the same without the category tasks, a twin of ids, one of ids
and metadata, a linear output, and popularity; a tenth of the films is held out.

Command:  python experiments/m2trec.py paper --config.data-dir DATA
Machine:  one GPU.    Minutes: 15; on two CPU cores about 60 (estimated).
Expect:   Recall@20 of 1.5 % on cold films, where ids have 0; on the head ids are ahead,
          12 to 8 %; category tasks are learnt, and do not help the items here.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import mtjax
from experiments.ranking_training import per_method
from experiments.retrieval_training import (
    Results,
    fit,
    item_rows,
    plot_retrieval,
    popularity_ranks,
    shortened,
    shuffled,
    slice_metrics,
    target_ranks,
    with_item_field,
)
from mtjax.data import SequenceProblem, movielens_sequences
from mtjax.nn.item_features import ItemFeatures
from mtjax.systems.m2trec import M2TRec, M2TRecConfig, m2trec_losses
from mtjax.training import seed_table

ID = "film"  # the field with a film's own number
# What items are made of, whether categories are tasks, and the output.
METHODS: dict[str, tuple[str, bool, str]] = {
    "M2TRec": ("metadata", True, "tied"),
    "M2TRec, item only": ("metadata", False, "tied"),
    "ids": ("ids", False, "tied"),
    "ids and metadata": ("both", True, "tied"),
    "linear output": ("metadata", True, "linear"),
}
SLICES = ("all", "cold", "sparse", "middle", "head")
MULTI = [name for name, (_, multi, _) in METHODS.items() if multi]


@dataclass(frozen=True)
class Config:
    """What is trained, and for how long."""

    data_dir: Path | None = None  # folder of prepared data
    seeds: int = 5  # of cold films, initial values and order
    cold_share: float = 0.1  # of films that training does not see
    length: int = 10  # last films of a session that are read
    embedding: int = 32  # width of a feature
    model: M2TRecConfig = field(
        default_factory=lambda: M2TRecConfig(width=64, layers=1, hidden=128)
    )
    level_weight: float = 1.0  # lambda
    batch_size: int = 512
    epochs: int = 4
    evaluations: int = 2  # per epoch
    curve_size: int = 2_000  # validation targets of an evaluation
    learning_rate: float = 4e-3
    limit: int | None = None  # targets of each split that are used
    ks: tuple[int, ...] = (10, 20)


QUICK = Config(seeds=1, epochs=1, evaluations=2, curve_size=500, limit=4_000)


@lru_cache(maxsize=1)  # all methods of a seed follow each other
def load(config: Config, seed: int) -> SequenceProblem:
    """Sessions, with other cold films for every seed."""
    form = {x: getattr(config, x) for x in ("data_dir", "length", "cold_share")}
    return shortened(movielens_sequences("sessions", **form, seed=seed), config.limit)


def slices(problem: SequenceProblem) -> dict[str, np.ndarray]:
    """Test targets: all; cold; the others by thirds of films, by views in training."""
    targets, warm = problem.test["target"], problem.items.num_warm
    third = np.zeros(len(problem.items.item_ids), int)
    order = np.argsort(problem.items.train_counts[2:warm], kind="stable")
    third[2:warm][order] = np.arange(warm - 2) * 3 // (warm - 2)
    cold = targets >= warm
    thirds = {x: ~cold & (third[targets] == i) for i, x in enumerate(SLICES[2:])}
    return {"all": np.ones(len(targets), bool), "cold": cold, **thirds}


def make(
    problem: SequenceProblem, config: Config, parts: str, multi: bool, output: Any
) -> tuple[M2TRec, dict[str, Any]]:
    """The model of a method, and the catalogue as it sees it."""
    items = problem.items
    rows, levels = item_rows(items), items.levels if multi else ()
    sizes, fields = dict(items.vocabulary_sizes), items.fields
    flags = {name: x.shape[1] for name, x in items.multi_hot.items()}
    texts = tuple(items.tokens)
    if parts != "metadata":
        rows["categorical"] = with_item_field(items)
        sizes[ID], fields = items.num_warm, (*fields, ID)
    if parts == "ids":
        rows = {"categorical": rows["categorical"][:, -1:]}
        fields, flags, texts = (ID,), {}, ()
    lists = {"multi_hot": flags, "texts": texts}
    features = ItemFeatures(sizes, fields, **lists, width=config.embedding)
    model = replace(config.model, output=output, max_length=config.length)
    known = {"num_items": items.num_warm} if output == "linear" else {}
    return M2TRec(features, levels, model, **known), rows


def train(config: Config, seed: int, name: str) -> dict[str, Any]:
    """Trains a method and measures it on the test sessions."""
    problem = load(config, seed)
    model, rows = make(problem, config, *METHODS[name])
    number, warm = len(problem.items.item_ids), problem.items.num_warm
    key = jax.random.key(seed)
    # Training encodes its own films only: they stand first.
    ours, candidates = jax.tree.map(lambda x: x[:warm], rows), np.arange(warm) >= 2
    params = jax.jit(model.init)(key, ours, problem.train["history"][:2])["params"]

    def losses_fn(params, data, batch, key):
        items, split = data
        history, targets = split["history"][batch], split["target"][batch]
        rngs = {"dropout": key}
        scores = model.apply({"params": params}, items, history, train=True, rngs=rngs)
        return m2trec_losses(model, scores, items, targets, candidates)

    scores = jax.jit(lambda p, rows, history: model.apply({"params": p}, rows, history))
    rows = jax.tree.map(jnp.asarray, rows)

    def ranks(params, split):
        score = lambda block: scores(params, rows, block["history"]).items
        return target_ranks(score, split, number)

    def label_accuracy(params):
        """Of each level, beside that of its most frequent value in training."""
        blocks = np.array_split(problem.test["history"], 20)
        logits = [jax.device_get(scores(params, rows, x).levels) for x in blocks]
        found = {}
        for level in model.levels:
            column = model.features.fields.index(level)
            labels = np.asarray(rows["categorical"][:, column])
            train, test = (labels[s["target"]] for s in (problem.train, problem.test))
            guess = np.concatenate([x[level].argmax(axis=1) for x in logits]) + 2
            known = test >= 2
            frequent = np.bincount(train[train >= 2]).argmax()
            found[level] = 100 * np.mean(guess[known] == test[known])
            found[f"{level}, most frequent"] = 100 * np.mean(test[known] == frequent)
        return found

    order = np.random.default_rng(seed).permutation(len(problem.validation["target"]))
    part = {k: v[order[: config.curve_size]] for k, v in problem.validation.items()}
    weights = {"item": 1.0, **dict.fromkeys(model.levels, config.level_weight)}
    fitted = fit(
        losses_fn,
        params,
        (ours, {k: problem.train[k] for k in ("history", "target")}),
        lambda epoch: shuffled(
            len(problem.train["target"]), config.batch_size, 1000 * seed + epoch
        ),
        optax.chain(mtjax.constant(weights), optax.adam(config.learning_rate)),
        epochs=config.epochs,
        evaluations=config.evaluations,
        key=key,
        evaluate=lambda params: 100 * float(np.mean(ranks(params, part) <= 20)),
    )
    found = ranks(fitted.params, problem.test)
    return {
        "metrics": slice_metrics(found, slices(problem), config.ks),
        "levels": label_accuracy(fitted.params),
        "parameters": optax.tree.size(fitted.params),
        "curve": fitted.curve,
        "losses": fitted.losses,
    }


def popularity(config: Config, seed: int) -> dict[str, Any]:
    """Recommends what training views most."""
    problem = load(config, seed)
    found = popularity_ranks(problem.items, problem.test)
    return {"metrics": slice_metrics(found, slices(problem), config.ks)}


def steps_to(curve: list[list[float]], value: float) -> float:
    """The first step of a curve that reaches a value."""
    return next((step for step, y in curve if y >= value), np.nan)


def report(results: Results) -> str:
    """The tables, in Markdown."""
    rows, alone = {}, results["M2TRec, item only"]
    goals = [0.9 * max(y for _, y in run["curve"]) for run in alone]
    for name, runs in results.items():
        rows[name] = []
        for run, goal in zip(runs, goals, strict=True):
            row = {f"{x} R@20": run["metrics"][f"{x} recall@20"] for x in SLICES}
            row["all MRR@20"] = run["metrics"]["all mrr@20"]
            if "curve" in run:
                row["steps"] = steps_to(run["curve"], goal)
                row["parameters"] = run["parameters"]
            rows[name].append(row)
    levels = {name: [run["levels"] for run in results[name]] for name in MULTI}
    change = [
        run["metrics"]["all recall@20"] - one["metrics"]["all recall@20"]
        for run, one in zip(results["M2TRec"], alone, strict=True)
    ]
    return "\n".join(
        [
            "Test, per cent; steps to 90 % of the best validation Recall@20 of",
            '"item only":',
            *("", seed_table(rows), "", "Accuracy of the categories, per cent:"),
            *("", seed_table(levels), ""),
            f"M2TRec minus item only, Recall@20 by seed: {np.round(change, 2)}.",
        ]
    )


def main(config: Config, out: Path) -> Results:
    """Trains all methods with all seeds; writes tables and a figure."""
    methods = {name: partial(train, config, name=name) for name in METHODS}
    methods["popularity"] = partial(popularity, config)
    results = per_method(config, out, methods, config.seeds)
    (out / "table.md").write_text(report(results) + "\n", encoding="utf-8")
    figure = plot_retrieval(results, SLICES[1:], 20)
    figure.savefig(out / "m2trec.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/m2trec_quick")) -> None:
    """A minute: one epoch on few targets."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/m2trec")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
