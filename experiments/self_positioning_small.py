"""What the quick start runs on: docstrings of NumPy and an untrained encoder of words.

Enough to see that everything runs, and at hand everywhere.
"""

import inspect
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from mtjax.nn.bert import Bert
from mtjax.nn.bert_files import SentenceEncoder

MODULES = ("", "linalg", "random", "fft", "ma", "polynomial.polynomial", "char")


def docstrings() -> tuple[dict, dict]:
    """Lines beside themselves with words left out, and lines by their module.

    As `self_positioning_data.read`, with the share of words as the score.
    """
    lines: dict[str, int] = {}
    for label, name in enumerate(MODULES):
        module = np
        for part in filter(None, name.split(".")):
            module = getattr(module, part)
        for member in dir(module):
            text = inspect.getdoc(getattr(module, member)) or ""
            line = next((x for x in text.split("\n") if len(x.split()) > 3), None)
            if line is not None and not member.startswith("_"):
                lines.setdefault(line, label)
    rng = np.random.default_rng(0)
    texts, labels = np.array([*lines]), np.array([*lines.values()])
    order = rng.permutation(len(texts))
    texts, labels = texts[order], labels[order]
    kept = rng.uniform(0.2, 1.0, len(texts))
    shorter = [_shortened(text, share, rng) for text, share in zip(texts, kept)]
    pairs = np.stack([texts, np.array(shorter)], axis=1)
    thirds = {
        s: slice(i, None, 3) for i, s in enumerate(("train", "validation", "test"))
    }
    scored = {s: [(pairs[rows], kept[rows], 0.7)] for s, rows in thirds.items()}
    halves = {"train": slice(0, None, 2), "test": slice(1, None, 2)}
    return scored, {s: (texts[rows], labels[rows]) for s, rows in halves.items()}


def _shortened(text: str, share: float, rng: np.random.Generator) -> str:
    words: Sequence[str] = text.split()
    number = max(round(share * len(words)), 1)
    return " ".join(words[i] for i in sorted(rng.permutation(len(words))[:number]))


def small_encoder(seed: int) -> SentenceEncoder:
    """An untrained encoder of words, for trying out."""
    model = Bert(600, width=32, depth=2, heads=2, hidden=64, positions=24)

    def tokenize(texts: Sequence[str], most: int):
        found = [
            [1 + zlib.crc32(word.encode()) % 599 for word in text.lower().split()][
                :most
            ]
            for text in texts
        ]
        lengths = np.array([len(row) for row in found])
        mask = np.arange(lengths.max())[None] < lengths[:, None]
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = np.concatenate(found)
        return ids, mask

    ids, mask = tokenize(["one text"], 2)
    params = model.init(jax.random.key(seed), ids, mask)["params"]
    return SentenceEncoder(model, dict(params), tokenize)
