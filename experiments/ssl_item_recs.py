"""SSL for item recommendation on MovieLens: do two views of a film help rare films?

Two towers of users (id, last films) and films (id, genres, decade, title) recommend the
next film with four stars or more. Beside the plain towers: contrasts of views that are
masked by correlation (CFM) or at random (RFM), have values dropped only, or show films
of the log; feature dropout and spread-out; some also with a tenth of the pairs. A tenth
of the films is held out.

Command:  python experiments/ssl_item_recs.py paper --config.data-dir DATA
Machine:  one GPU.    Minutes: 20; on two CPU cores about 60 (estimated).
Expect:   CFM gains 2 points of Recall@50 on cold films, loses 1 to 2 on films with few
          pairs; two views of a film come together, different films apart.
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
    liked,
    pairs_of_users,
    plot_retrieval,
    popularity_ranks,
    shuffled,
    slice_metrics,
    target_ranks,
    with_item_field,
)
from experiments.ssl_item_recs_report import chosen, label, report
from mtjax.data import SequenceProblem, movielens_sequences
from mtjax.losses.sampled_softmax import log_frequencies
from mtjax.nn.feature_information import mutual_information
from mtjax.nn.item_features import ItemFeatures, take_items
from mtjax.systems.ssl_item_recs import (
    SSLItemRecsConfig,
    TwoTower,
    alignment_and_uniformity,
    ssl_item_losses,
    views,
)

ID = "film"  # the field with a film's own number
PLAIN = "two towers"
SLICES = ("all", "head", "tail", "cold")
# The second loss, the masks, whether its films are uniform; those with one have alphas.
METHODS: dict[str, tuple[str, str, bool]] = {
    PLAIN: ("none", "none", True),
    "feature dropout": ("feature_dropout", "none", True),
    "spread-out": ("spread_out", "none", True),
    "dropped values": ("ssl", "none", True),
    "RFM": ("ssl", "random", True),
    "CFM": ("ssl", "correlated", True),
    "CFM, films of the log": ("ssl", "correlated", False),
}


@dataclass(frozen=True)
class Config:
    """What is trained, and for how long."""

    data_dir: Path | None = None  # folder of prepared data
    seeds: int = 5  # of cold films, initial values and draws
    cold_share: float = 0.1  # of films that training does not see
    length: int = 10  # last films of a user that are read
    embedding: int = 32  # width of a feature
    model: SSLItemRecsConfig = field(
        default_factory=lambda: SSLItemRecsConfig(
            (64, 32), temperature=0.1, ssl_temperature=0.1
        )
    )
    alphas: tuple[float, ...] = (0.3, 1.0)  # chosen on validation
    few: float = 0.1  # share of pairs in the second comparison
    batch_size: int = 512  # pairs, and films of the second loss
    epochs: int = 8
    epochs_few: int = 16
    evaluations: int = 1  # per epoch
    learning_rate: float = 2e-3
    tail: int = 20  # most training pairs of a film of the tail
    ks: tuple[int, ...] = (10, 50)


QUICK = Config(seeds=1, epochs=1, epochs_few=2, alphas=(0.3,))


@lru_cache(maxsize=1)  # all methods of a seed follow each other
def load(config: Config, seed: int) -> SequenceProblem:
    """Films that a user likes, in order, with other cold films for every seed."""
    form = {"data_dir": config.data_dir, "length": config.length, "seed": seed}
    return movielens_sequences("users", **form, cold_share=config.cold_share)


def slices(problem: SequenceProblem, config: Config) -> dict[str, np.ndarray]:
    """Test targets: all, cold films, films with few training pairs, the others."""
    targets = problem.test["target"]
    cold = targets >= problem.items.num_warm
    tail = ~cold & (problem.items.train_counts[targets] <= config.tail)
    every = np.ones(len(targets), bool)
    return {"all": every, "cold": cold, "tail": tail, "head": ~cold & ~tail}


def train(
    config: Config, seed: int, name: str, alpha: float, share: float
) -> dict[str, Any]:
    """Trains a method and measures it on every user's last film."""
    problem = load(config, seed)
    items, splits = problem.items, pairs_of_users(problem)
    number, warm = len(items.item_ids), items.num_warm
    rows = item_rows(items) | {"categorical": with_item_field(items, new=0)}
    features = ItemFeatures(
        {**items.vocabulary_sizes, ID: warm},
        (*items.fields, ID),
        multi_hot={key: x.shape[1] for key, x in items.multi_hot.items()},
        texts=tuple(items.tokens),
        width=config.embedding,
    )
    regulariser, masking, uniform = METHODS[name]
    form: Any = {"regulariser": regulariser, "masking": masking}
    users = int(splits["train"]["user"].max()) + 1
    model = TwoTower(features, users, replace(config.model, **form))
    ours = jax.tree.map(lambda x: x[:warm], rows)
    known = jax.tree.map(lambda x: x[2:warm], rows)
    information = mutual_information(features, known)

    rng = np.random.default_rng(seed)
    kept = rng.permutation(len(splits["train"]["target"]))
    kept = kept[: int(share * len(kept))]
    some = {key: x[kept] for key, x in splits["train"].items()}
    counts = np.bincount(some["target"], minlength=warm)[:warm]
    chances = None if uniform else counts[2:] / counts[2:].sum()
    size = min(config.batch_size, int(np.count_nonzero(counts[2:])))

    def draws(epoch):
        order = shuffled(len(kept), config.batch_size, 1000 * seed + epoch)
        rng = np.random.default_rng([seed, epoch])
        draw = lambda: 2 + rng.choice(warm - 2, size, replace=False, p=chances)
        return {"pairs": order, "films": np.int32([draw() for _ in order])}

    def losses_fn(params, data, drawn, key):
        catalogue, split, log_q = data
        batch = jax.tree.map(lambda x: x[drawn["pairs"]], split)
        form = (catalogue, batch, drawn["films"], log_q, information, (ID,))
        return ssl_item_losses(model, {"params": params}, *form, key=key)

    key = jax.random.key(seed)
    start = jax.tree.map(lambda x: x[:2], some)
    start = (ours, start["user"], start["history"])
    params = jax.jit(model.init)(key, *start)["params"]
    scores = jax.jit(lambda p, rows, *query: model.apply({"params": p}, rows, *query))
    rows = jax.tree.map(jnp.asarray, rows)

    def ranks(params, name, before):
        score = lambda block: scores(params, rows, block["user"], block["history"])
        seen = liked(splits, before, splits[name], number)
        return target_ranks(score, splits[name], number, seen)

    two = regulariser in ("ssl", "spread_out")
    weights = {"retrieval": 1.0, "ssl": alpha} if two else {"retrieval": 1.0}
    last = config.ks[-1]
    fitted = fit(
        losses_fn,
        params,
        (ours, some, log_frequencies(counts)),
        draws,
        optax.chain(mtjax.constant(weights), optax.adam(config.learning_rate)),
        epochs=config.epochs if share == 1 else config.epochs_few,
        evaluations=config.evaluations,
        key=key,
        evaluate=lambda p: (
            100 * float(np.mean(ranks(p, "validation", ("train",)) <= last))
        ),
    )
    found = ranks(fitted.params, "test", ("train", "validation"))

    # All methods are looked at through the same views.
    looked = model.clone(config=replace(config.model, masking="correlated"))
    sample = take_items(known, np.random.default_rng(0).permutation(warm - 2)[:512])

    @jax.jit
    def views_of(params):
        pair = views(looked, {"params": params}, sample, information, (ID,), key=key)
        return alignment_and_uniformity(pair)

    near = {key: float(value) for key, value in views_of(fitted.params).items()}
    return {
        "metrics": slice_metrics(found, slices(problem, config), config.ks),
        "views": near,
        "validation": max(value for _, value in fitted.curve),
        "parameters": optax.tree.size(fitted.params),
        "curve": fitted.curve,
        "losses": fitted.losses,
    }


def popularity(config: Config, seed: int) -> dict[str, Any]:
    """Recommends what training has most."""
    problem = load(config, seed)
    ranks = popularity_ranks(problem.items, problem.test)
    return {"metrics": slice_metrics(ranks, slices(problem, config), config.ks)}


def main(config: Config, out: Path) -> Results:
    """Trains all methods with all seeds; writes tables and a figure."""
    methods = {}
    for name, (regulariser, *_) in METHODS.items():
        two = regulariser in ("ssl", "spread_out")
        for alpha in config.alphas if two else (0.0,):
            run = partial(train, config, name=name, alpha=alpha)
            methods[label(name, alpha)] = partial(run, share=1.0)
            if name in (PLAIN, "CFM"):
                few = partial(run, share=config.few)
                methods[label(name, alpha, few=True)] = few
    methods["popularity"] = partial(popularity, config)
    results = per_method(config, out, methods, config.seeds)
    names = [*METHODS]
    text = report(results, names, SLICES, config.ks)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    best, _ = chosen(results, names)
    plot_retrieval(best, SLICES, config.ks[-1]).savefig(out / "ssl_item_recs.png")
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/ssl_item_recs_quick")) -> None:
    """A minute: an epoch of everything."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/ssl_item_recs")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
