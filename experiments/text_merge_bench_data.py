"""The sentences of the text merge-bench: five real sets, or drawn ones.

Real sets are prepared once, `mtjax data prepare NAME --from FOLDER --data-dir DATA`,
for each value of `SETS`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.merge_bench_data import taken
from mtjax.data import as_arrays, tfds_source

Arrays = dict[str, np.ndarray]
Splits = dict[str, Arrays]
Tokenize = Callable[..., tuple[np.ndarray, np.ndarray]]

# Prepared data by task, and the field of their labels.
SETS = {
    "trec": ("sentence_classification/trec", "coarse"),
    "subj": ("sentence_classification/subj", "label"),
    "sst2": ("sentence_classification/sst2", "label"),
    "cr": ("sentence_classification/cr", "label"),
    "mpqa": ("sentence_classification/mpqa", "label"),
}
DRAWN = ("drawn_0", "drawn_1", "drawn_2")
VOCABULARY = 60  # of drawn sentences
TOKENS, CLASSES = 8, 3  # of theirs


def load_data(
    tasks: Sequence[str],
    sizes: dict[str, int],
    tokenize: Tokenize | None,
    most: int,
    data_dir: Path | None,
    seed: int,
) -> dict[str, Splits]:
    """All splits of all tasks.

    Sentences that occur twice are taken once. Test sentences are the first of the
    official test part or, where there is none, of all in an order that is always the
    same; the others are drawn anew for every seed.

    Args:
      tasks: names in `SETS` or `DRAWN`.
      sizes: sentences per task of the splits `train`, `validation` and `test`, at most.
      tokenize: from texts and `most` to ids and mask; needed for real sets.
      most: tokens per sentence; others are cut.
      data_dir: folder of prepared data; `mtjax.data.default_data_dir` if None.
      seed: of what is drawn.

    Returns:
      By task and split the `ids`, int32 of shape `(n, tokens)`, their `mask` and the
      `labels`, int32 of shape `(n,)`.

    Raises:
      ValueError: if a task is unknown.
      DataNotFoundError: if data are not prepared; the message says how to.
    """
    if unknown := set(tasks) - {*SETS, *DRAWN}:
        known = [*SETS, *DRAWN]
        raise ValueError(f"`tasks` must be among {known}, got {sorted(unknown)}.")
    data = {}
    for task in tasks:
        if task in DRAWN:
            pool = drawn(sum(sizes.values()), DRAWN.index(task))
            test = None
        else:
            pool, test = read(task, tokenize, most, data_dir)
        if test is None:
            order = np.random.default_rng(0).permutation(len(pool["labels"]))
            test = taken(pool, order[: sizes["test"]])
            pool = taken(pool, order[sizes["test"] :])
        order = np.random.default_rng(seed).permutation(len(pool["labels"]))
        held = sizes["validation"]
        data[task] = {
            "train": taken(pool, order[held : held + sizes["train"]]),
            "validation": taken(pool, order[:held]),
            "test": {name: x[: sizes["test"]] for name, x in test.items()},
        }
    return data


def read(
    task: str, tokenize: Tokenize, most: int, data_dir: Path | None
) -> tuple[Arrays, Arrays | None]:
    """What a task has to train with, and its official test part if there is one."""
    name, field = SETS[task]
    source = tfds_source(name, "train", data_dir=data_dir)
    parts = [as_arrays(source)]
    if official := "test" in source.info.splits:
        found = as_arrays(tfds_source(name, "test", data_dir=data_dir))
        order = np.random.default_rng(0).permutation(len(found[field]))
        parts.append(taken(found, order))
    arrays, seen = [], set()
    for part in reversed(parts):  # the test part first: it keeps what both have
        new = [i for i, t in enumerate(part["text"]) if not (t in seen or seen.add(t))]
        ids, mask = tokenize([part["text"][i].decode() for i in new], most)
        labels = part[field][new].astype(np.int32)
        arrays.append({"ids": ids, "mask": mask, "labels": labels})
    return arrays[-1], arrays[0] if official else None


def drawn(number: int, seed: int) -> Arrays:
    """Sentences of drawn words, of which every class prefers some."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=number).astype(np.int32)
    prefers = rng.dirichlet(np.full(VOCABULARY - 1, 0.3), CLASSES)
    ids = [1 + rng.choice(VOCABULARY - 1, TOKENS, p=prefers[c]) for c in labels]
    ids = np.array(ids, np.int32)
    mask = np.arange(TOKENS) < rng.integers(TOKENS // 2, TOKENS + 1, (number, 1))
    return {"ids": np.where(mask, ids, 0), "mask": mask, "labels": labels}


def trimmed(arrays: Arrays, step: int = 8) -> Arrays:
    """Sentences without the columns that are padding in all of them.

    As many columns are left as a multiple of `step` has, so that few lengths occur.
    """
    longest = int(arrays["mask"].sum(1).max())
    end = -(-longest // step) * step
    return arrays | {name: arrays[name][:, :end] for name in ("ids", "mask")}
