"""Sentences for an encoder: how similar are two, and which ask for the same?

- `sts`: scored pairs of STS benchmark and SICK. Texts under several licences, partly
  unclear; the two have official splits and are what encoders are compared by.
- `intent`: requests to a bank, Banking77 (CC BY 4.0), where those with the same one of
  77 intents are to be found. The largest set with a clear licence among the text pairs
  that we have, and one that the encoder was not trained on.

Prepared once, `mtjax data prepare NAME --from FOLDER --data-dir DATA`, for each of
stsbenchmark, sick and banking77. Without a folder the first lines of the docstrings of
NumPy serve: enough to see that everything runs.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from experiments.self_positioning_small import docstrings
from mtjax.data import as_arrays, tfds_source

SIMILAR = {"stsbenchmark": 4.0, "sick": 4.5}  # from here on a pair is a positive one


class Scored(NamedTuple):
    """Pairs of texts, by their numbers, and how similar people find them."""

    pairs: np.ndarray  # (pairs, 2)
    scores: np.ndarray  # (pairs,)


class Search(NamedTuple):
    """Texts that are asked with, texts that are looked through, and what they mean."""

    queries: np.ndarray  # numbers of texts
    corpus: np.ndarray
    groups: np.ndarray  # of every text


class Task(NamedTuple):
    """What a task is trained and measured on."""

    pairs: dict[str, np.ndarray]  # (pairs, 2) of texts that belong together, by split
    groups: np.ndarray  # (texts,): those of one group are no negatives; -1 elsewhere
    measured: Mapping[str, tuple[Scored | Search, ...]]  # by split


class Data(NamedTuple):
    """All texts, each once, and the tasks on them."""

    texts: list[str]
    tasks: dict[str, Task]

    def used(self, *splits: str) -> np.ndarray:
        """The numbers of texts in pairs and measurements of these splits."""
        found = []
        for task in self.tasks.values():
            found += [task.pairs[s] for s in splits if s in task.pairs]
            for part in (m for s in splits for m in task.measured.get(s, ())):
                own = (part.pairs,) if isinstance(part, Scored) else part[:2]
                found += own
        return np.unique(np.concatenate([np.ravel(x) for x in found]))


@dataclass(frozen=True)
class Sizes:
    """How much is taken, at most."""

    sts: int = 480  # pairs to train on
    intent: int = 4_800
    held_out: int = 400  # pairs per task that only the probe may see
    validation: int = 250  # scored pairs per data set
    test: int = 400
    queries: int = 3  # test texts per intent that are asked with
    corpus: int = 10  # and that are looked through


def load_data(sizes: Sizes, seed: int, data_dir: Path | None) -> Data:
    """Reads both tasks.

    Args:
      sizes: how much of them.
      seed: which part, in which order; test sets are always the same.
      data_dir: folder of prepared data; docstrings of NumPy if None.

    Returns:
      The texts and what belongs to what.
    """
    rng = np.random.default_rng(seed)
    scored, requests = docstrings() if data_dir is None else read(data_dir)
    every = [text for sets in scored.values() for rows in sets for text in rows[0].flat]
    every += [text for texts, _ in requests.values() for text in texts]
    texts, places = np.unique(np.array(every), return_inverse=True)
    numbers = iter(places)
    take = lambda shape: np.fromiter(numbers, int, np.prod(shape)).reshape(shape)
    numbered = {
        split: [(take(pairs.shape), *rest) for pairs, *rest in sets]
        for split, sets in scored.items()
    }
    intents = {s: (take(len(texts)), labels) for s, (texts, labels) in requests.items()}
    return Data(
        texts.tolist(),
        {
            "sts": _sts(numbered, len(texts), sizes, rng),
            "intent": _intent(intents, len(texts), sizes, rng),
        },
    )


def _sts(scored, number: int, sizes: Sizes, rng) -> Task:
    """Pairs above a score are positive, and what they connect is one group."""
    pairs = np.concatenate([p[scores >= least] for p, scores, least in scored["train"]])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]  # a sentence beside itself
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(number, number))
    groups = connected_components(links, directed=False)[1]
    # Whole groups are held out, so that the probe has nothing from the training.
    order = rng.permutation(groups.max() + 1)[groups[pairs[:, 0]]]
    apart = order < np.sort(order)[sizes.held_out]
    parts = {
        "held-out": rng.permutation(pairs[apart]),
        "train": rng.permutation(pairs[~apart])[: sizes.sts],
    }
    measured = {
        split: tuple(Scored(p[:most], scores[:most]) for p, scores, _ in scored[split])
        for split, most in (("validation", sizes.validation), ("test", sizes.test))
    }
    return Task(parts, groups, measured)


def _intent(requests, number: int, sizes: Sizes, rng) -> Task:
    """Two requests with one intent are a pair."""
    groups = np.full(number, -1)
    for rows, labels in requests.values():
        groups[rows] = labels
    rows = rng.permutation(np.unique(requests["train"][0]))
    # A fifth for the held-out probe, a fifth for validation.
    ends = np.array([0, len(rows) // 5, 2 * len(rows) // 5, len(rows)])
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    pairs = {
        "held-out": _same(parts[0], groups, sizes.held_out, rng),
        "train": _same(parts[2], groups, sizes.intent, rng),
    }
    few = max(sizes.queries // 2, 1), max(sizes.corpus // 2, 1)
    return Task(
        pairs,
        groups,
        {
            "validation": (_search(parts[1], groups, *few),),
            "test": (
                _search(requests["test"][0], groups, sizes.queries, sizes.corpus),
            ),
        },
    )


def _same(rows, groups, number: int, rng) -> np.ndarray:
    """Pairs of different texts of one group, as many as are needed."""
    found = []
    while len(found) < number:
        first, second = rng.choice(rows, (2, 4_096))
        fit = (groups[first] == groups[second]) & (first != second)
        found.extend(np.stack([first, second], axis=1)[fit])
    return np.array(found[:number])


def _search(rows, groups, queries: int, corpus: int) -> Search:
    """The first texts of every group ask, the next are looked through."""
    asked, looked = [], []
    for group in np.unique(groups[rows]):
        own = rows[groups[rows] == group]
        asked.append(own[:queries])
        looked.append(own[queries : queries + corpus])
    return Search(np.concatenate(asked), np.concatenate(looked), groups)


def measure(found: Scored | Search, vectors: np.ndarray) -> dict[str, float]:
    """In per cent: `rho` (Spearman), or `nDCG@10` and `accuracy@1`.

    Args:
      found: what is measured.
      vectors: `(texts, width)`, unit vectors of all texts; others are not looked at.

    Returns:
      The numbers.
    """
    if isinstance(found, Scored):
        first, second = vectors[found.pairs.T]
        rho = spearmanr(np.sum(first * second, axis=1), found.scores).statistic
        return {"rho": 100 * float(rho)}
    scores = vectors[found.queries] @ vectors[found.corpus].T
    fit = found.groups[found.queries][:, None] == found.groups[found.corpus]
    best = fit[np.arange(len(fit)), scores.argmax(axis=1)]
    return {
        "nDCG@10": 100 * float(ndcg_score(fit, scores, k=10)),
        "accuracy@1": 100 * float(best.mean()),
    }


def read(data_dir: Path) -> tuple[dict, dict]:
    """Scored pairs with the score of a positive one, and requests with their intent."""

    def arrays(name, split, *columns):
        part = as_arrays(tfds_source(name, split, data_dir=data_dir))
        return [part[column] for column in columns]

    names = {
        "stsbenchmark": ("sentence1", "sentence2", "label"),
        "sick": ("sentence_a", "sentence_b", "relatedness"),
    }
    scored = {split: [] for split in ("train", "validation", "test")}
    for name, columns in names.items():
        for split, sets in scored.items():
            first, second, scores = arrays(name, split, *columns)
            texts = np.char.decode(np.stack([first, second], axis=1), "utf-8")
            sets.append((texts, scores, SIMILAR[name]))
    requests = {}
    for split in ("train", "test"):
        texts, labels = arrays("banking77", split, "text", "intent")
        requests[split] = np.char.decode(texts, "utf-8"), labels
    return scored, requests
