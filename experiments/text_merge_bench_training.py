"""How the models of the text merge-bench are fine-tuned.

`config` is that of `text_merge_bench_models`.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.merge_bench_data import taken
from experiments.merge_bench_training import outputs
from experiments.text_merge_bench_data import Arrays, trimmed
from mtjax.merging import lora_task_vector
from mtjax.nn.bert import Bert, sentence_vectors

Params = Any
Kind = Literal["full", "lora"]


class Parts(NamedTuple):
    """What a model is made of, before fine-tuning."""

    base: Params  # that are fine-tuned
    frozen: Params  # others of the encoder
    head: Params  # frozen too


def features(model: Bert, params: Params, batch) -> jax.Array:
    """The sentence vectors of a batch."""
    states = model.apply({"params": params}, batch["ids"], batch["mask"])
    return sentence_vectors(states, batch["mask"])


def joined(frozen: Params, tuned: Params) -> Params:
    """The parameters of the whole encoder."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(tuned))


def finetune(
    config, kind: Kind, model: Bert, parts: Parts, data: Arrays, seed: int
) -> Params:
    """The base of `parts`, fine-tuned on the training sentences of one task."""
    params = start(config, kind, parts.base, jax.random.key(seed))
    state = optimizer(config, kind).init(params)
    for batch in batches(config, data, seed):
        params, state = _step(config, kind, model, parts, batch, params, state)
    return changed(config, kind, parts.base, params)


def start(config, kind: Kind, base: Params, key) -> Params:
    """What is trained: a copy of the base, or adapters that change nothing yet."""
    if kind == "full":
        return jax.tree.map(jnp.copy, base)
    adapter = {}
    for i, (path, x) in enumerate(flatten_dict(base, sep="/").items()):
        rows, columns = x.shape
        draw = jax.random.normal(jax.random.fold_in(key, i), (config.lora_rank, rows))
        adapter[f"{path}.lora_A.weight"] = draw / np.sqrt(rows)
        adapter[f"{path}.lora_B.weight"] = jnp.zeros((columns, config.lora_rank))
    return adapter


def changed(config, kind: Kind, base: Params, params: Params) -> Params:
    """The fine-tuned parameters, from what is trained."""
    if kind == "full":
        return params
    vector = lora_task_vector(params, alpha=config.lora_alpha)
    flat = flatten_dict(base, sep="/")
    new = {path: x + vector[f"{path}.weight"].T for path, x in flat.items()}
    return unflatten_dict(new, sep="/")


def optimizer(config, kind: Kind) -> optax.GradientTransformation:
    """AdamW."""
    steps = config.epochs * (config.train // config.batch_size)
    peak = config.lora_learning_rate if kind == "lora" else config.learning_rate
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return optax.adamw(rate, weight_decay=0.01)


def batches(config, part: Arrays, seed: int) -> Iterator[Arrays]:
    """Training sentences in random order, without the padding that a batch shares."""
    size, rng = config.batch_size, np.random.default_rng(seed)
    for _ in range(config.epochs):
        order = rng.permutation(len(part["labels"]))
        for i in range(0, len(order) - size + 1, size):
            yield trimmed(taken(part, order[i : i + size]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _step(config, kind, model, parts, batch, params, state):
    def loss(params):
        whole = joined(parts.frozen, changed(config, kind, parts.base, params))
        logits = outputs(parts.head, features(model, whole, batch))
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(logits, batch["labels"]).mean()

    updates, state = optimizer(config, kind).update(
        jax.grad(loss)(params), state, params
    )
    return optax.apply_updates(params, updates), state
