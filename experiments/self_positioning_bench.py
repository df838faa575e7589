"""A sentence encoder whose last layers learn, the texts of one seed, and batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from experiments.self_positioning_data import Sizes, load_data, measure
from experiments.self_positioning_small import small_encoder
from mtjax import merging
from mtjax.losses import in_batch_contrastive_loss
from mtjax.nn.bert import Layer, sentence_vectors
from mtjax.nn.bert_files import load_minilm
from mtjax.nn.grams import dense_grams
from mtjax.systems.self_positioning import Pairs

TASKS = ("intent", "sts")
SPLITS = ("train", "held-out", "validation", "test")


@dataclass(frozen=True)
class Config:
    """What is encoded, by what."""

    data_dir: Path | None = None  # None: docstrings of NumPy, and a tiny encoder
    sizes: Sizes = field(default_factory=Sizes)
    layers: int = 1  # that are trained, the last ones
    tokens: int = 24  # of a text, at most
    batch_size: int = 24  # pairs
    learning_rate: float = 1e-4  # of Adam, constant
    temperature: float = 0.05
    fisher_examples: int = 64


class Bench:
    """An encoder whose first layers, which never change, have run on all texts.

    Attributes:
      base: parameters of the layers that learn.
      embed: from these and (states, mask) to sentence vectors.
      layer: the module of each of them.
    """

    def __init__(self, config: Config, seed: int):
        """Loads the texts and encodes them as far as the layers stay as they are."""
        self.config, self.rng = config, np.random.default_rng(seed)
        self.data = load_data(config.sizes, seed, config.data_dir)
        found = load_minilm() if config.data_dir else small_encoder(seed)
        model, params, tokenize = found
        names = [f"layer_{i}" for i in range(model.depth)][-config.layers :]
        self.base = {name: params[name] for name in names}
        layer = Layer(model.heads, model.hidden, model.eps, model.activation)
        self.layer = layer

        def embed(params, inputs):
            x, mask = inputs
            x = x.astype(jnp.float32)
            for name in names:
                x = jnp.asarray(layer.apply({"params": params[name]}, x, mask))
            return sentence_vectors(x, mask)

        self.embed, self._embed = embed, jax.jit(embed)
        used = self.data.used(*SPLITS)
        self._place = np.zeros(len(self.data.texts), int)
        self._place[used] = np.arange(len(used))
        texts = [self.data.texts[i] for i in used]
        ids, mask = (_wide(x, config.tokens) for x in tokenize(texts, config.tokens))
        lower = model.clone(depth=model.depth - config.layers)
        below = jax.jit(lambda ids, mask: lower.apply({"params": params}, ids, mask))
        self._mask = mask
        self._states = np.zeros((*mask.shape, model.width), np.float16)
        for rows, length in track([*self._chunks(used)], f"lower layers, seed {seed}"):
            self._states[rows, :length] = below(ids[rows, :length], mask[rows, :length])
        self._start = self.vectors(self.base, used)
        self._hard = {}

    def _chunks(self, texts: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Places of 128 texts of about one length, so that there is little padding."""
        rows = self._place[texts]
        rows = rows[np.argsort(self._mask[rows].sum(axis=1), kind="stable")]
        for start in range(0, len(rows), 128):
            part = rows[np.arange(start, start + 128).clip(max=len(rows) - 1)]
            longest = int(self._mask[part].sum(axis=1).max())
            # Of few lengths: each of them is compiled.
            yield part, min(8 * -(-longest // 8), self.config.tokens)

    def inputs(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `embed` takes."""
        rows = self._place[texts]
        return self._states[rows], self._mask[rows]

    def vectors(self, params: Any, texts: np.ndarray) -> np.ndarray:
        """Sentence vectors of these texts in their rows, zeros for all others."""
        found = np.zeros((len(self._states), self._states.shape[-1]), np.float32)
        for rows, length in self._chunks(texts):
            inputs = self._states[rows, :length], self._mask[rows, :length]
            found[rows] = self._embed(params, inputs)
        return found[self._place]

    def scores(self, params: Any, split: str) -> dict[str, float]:
        """All measures; `mean` is that of Spearman's rho and nDCG, in per cent."""
        vectors = self.vectors(params, self.data.used(split))
        of = lambda task: [
            measure(part, vectors) for part in self.data.tasks[task].measured[split]
        ]
        (intent,) = of("intent")
        rho = float(np.mean([part["rho"] for part in of("sts")]))
        return {"sts rho": rho, **intent, "mean": (rho + intent["nDCG@10"]) / 2}

    def batch(self, task: str, split: str, rows: np.ndarray, hard: bool = False):
        """Pairs of a task, with a hard negative for each if wanted."""
        pairs = self.data.tasks[task].pairs[split][rows]
        groups = self.data.tasks[task].groups
        others = [self.hard(task, split)[rows]] if hard else []
        candidates = np.concatenate([pairs[:, 1], *others])
        return Pairs(
            self.inputs(pairs[:, 0]),
            self.inputs(pairs[:, 1]),
            self.inputs(others[0]) if hard else None,
            groups[pairs[:, 0]][:, None] != groups[candidates][None],
        )

    def hard(self, task: str, split: str) -> np.ndarray:
        """For every pair of texts one that is similar to the first, of another group.

        Of those that the base finds clearly less similar than the second the most
        similar: texts closer than that often belong together without being marked.
        """
        if (task, split) not in self._hard:
            pairs = self.data.tasks[task].pairs[split]
            groups, vectors = self.data.tasks[task].groups, self._start
            pool = np.unique(pairs)
            found = []
            for query, positive in pairs:
                similar = vectors[pool] @ vectors[query]
                limit = 0.95 * (vectors[positive] @ vectors[query])
                fit = (groups[pool] != groups[query]) & (similar < limit)
                fit |= (groups[pool] != groups[query]) & ~fit.any()
                found.append(pool[np.where(fit, similar, -np.inf).argmax()])
            self._hard[task, split] = np.array(found)
        return self._hard[task, split]

    def rows(self, task: str, split: str) -> Iterator[np.ndarray]:
        """Full batches of rows of pairs, without end, each pass in another order."""
        number, size = len(self.data.tasks[task].pairs[split]), self.config.batch_size
        while True:
            order = self.rng.permutation(number)
            yield from order[: number // size * size].reshape(-1, size)

    def passes(self, task: str) -> int:
        """Batches of one pass through the training pairs."""
        return len(self.data.tasks[task].pairs["train"]) // self.config.batch_size


def trained(bench: Bench, batches: Iterable[Pairs]) -> Iterator[Any]:
    """Fine-tunes the base; yields the parameters after every batch."""
    optimizer = optax.adam(bench.config.learning_rate)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            embedded = (bench.embed(params, x) for x in batch[:2])
            return in_batch_contrastive_loss(
                *embedded, mask=batch.mask, temperature=bench.config.temperature
            )

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = bench.base, optimizer.init(bench.base)
    for batch in batches:
        params, state = step(params, state, batch)
        yield params


def mixed(bench: Bench, number: dict[str, int]) -> Iterator[Pairs]:
    """So many batches of every task, each of one task, in random order."""
    endless = {task: bench.rows(task, "train") for task in TASKS}
    order = np.repeat([*number], [*number.values()])
    for task in bench.rng.permutation(order):
        yield bench.batch(task, "train", next(endless[task]))


def fisher(bench: Bench, params: Any, task: str) -> Any:
    """Of the contrastive loss of training pairs, each with three hard negatives."""
    pairs, hard = bench.data.tasks[task].pairs["train"], bench.hard(task, "train")
    rows = bench.rng.permutation(len(pairs))[: bench.config.fisher_examples]
    others = [np.roll(hard[rows], i) for i in range(3)]
    texts = np.stack([*pairs[rows].T, *others], axis=1)

    def logits(params, inputs):
        vectors = jax.vmap(lambda own: bench.embed(params, own))(inputs)
        similar = jnp.einsum("bw,bcw->bc", vectors[:, 0], vectors[:, 1:])
        return similar / bench.config.temperature

    batches = (
        (bench.inputs(part), np.zeros(4, int)) for part in texts.reshape(-1, 4, 5)
    )
    return merging.fisher_information(logits, params, batches, labels="given")


def input_grams(bench: Bench, params: Any, task: str) -> dict[str, jax.Array]:
    """Mean inner products of what the kernels see on training texts, for RegMean."""

    @jax.jit
    def of(params, x, mask):
        grams, states = {}, [x.astype(jnp.float32)]
        for name, own in params.items():

            def run(own=own):
                states.append(bench.layer.apply({"params": own}, states[-1], mask))

            found = dense_grams(run, mask)
            grams |= {f"{name}/{path}": gram for path, gram in found.items()}
        return grams

    states, mask = bench.inputs(np.unique(bench.data.tasks[task].pairs["train"]))
    pieces = [slice(i, i + 128) for i in range(0, len(mask), 128)]
    found = [of(params, states[part], mask[part]) for part in track(pieces, task)]
    return jax.tree.map(lambda *grams: sum(grams) / mask.sum(), *found)


def _wide(x: np.ndarray, tokens: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, max(tokens - x.shape[1], 0))))
