"""The texts and models of `experiments/logits_fusion.py`: two bases, small experts.

A large and a small language model of bytes read the same mixture of texts. Each task
has prompts with short answers, which a line break ends. The small base is fine-tuned on
each of them; the large one too, for comparison.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from mtjax import data
from mtjax.losses.next_token import next_token_loss
from mtjax.nn.decoder import Decoder
from mtjax.nn.decoding import padded

Params = Any
Texts = dict[str, np.ndarray]  # bytes
TASKS = ("calculate", "complete", "intent")
# Where texts come from; "test" of wikitext2 is the larger of two splits.
TEXTS = {"wikitext2": "test"}
TEXTS |= dict.fromkeys(("gsm8k", "tiny_shakespeare", "snips"), "train")
EQUATION = re.compile(rb"<<(\d{1,2}[-+*]\d{1,2})=(\d+)>>")
WORD = re.compile(rb"(?<= )[A-Za-z][a-z]{5,11}(?= )")


@dataclass(frozen=True)
class Config:
    """What the models are and how long they train."""

    data_dir: Path | None = None  # folder of prepared data
    large_size: tuple[int, int] = (128, 4)  # width and depth
    small_size: tuple[int, int] = (48, 2)
    window: int = 96  # bytes of a training text
    batch_size: int = 32
    large_steps: int = 1_200
    small_steps: int = 1_200
    large_rate: float = 2e-3  # of AdamW, rises and falls
    small_rate: float = 4e-3
    large_tune_steps: int = 300  # per task
    small_tune_steps: int = 800
    tune_batch_size: int = 64
    large_tune_rate: float = 5e-4
    small_tune_rate: float = 4e-3
    replay: int = 16  # windows of text in a batch of an expert's training
    context: int = 48  # bytes of a prompt, at most
    examples: int = 250  # test prompts per task

    def model(self, size: str) -> Decoder:
        """The `"large"` or the `"small"` model."""
        width, depth = getattr(self, f"{size}_size")
        return Decoder(width=width, depth=depth, heads=4)


class Examples(NamedTuple):
    """Prompts aligned at their ends, answers at their beginnings."""

    prompts: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    answer_mask: np.ndarray


@dataclass(frozen=True)
class Models:
    """What `prepare` trained."""

    large: Params
    small: Params
    experts: dict[str, Params]  # the small base after fine-tuning, by task
    tuned: dict[str, Params]  # the large base after fine-tuning


def rows(name: str, split: str, config: Config) -> list[dict[str, Any]]:
    """All examples of a split."""
    source = data.tfds_source(name, split, data_dir=config.data_dir)
    return source.__getitems__(range(len(source)))


def texts(config: Config) -> Texts:
    """What is read before fine-tuning, by source."""
    found = {}
    for name, split in TEXTS.items():
        parts = rows(name, split, config)
        if name == "gsm8k":
            text = [row["question"] + b"\n" + row["answer"] for row in parts]
        else:
            text = [row["text"] for row in parts]
        joined = b"\n".join(part.strip() for part in text if part.strip())
        found[name] = np.frombuffer(joined, np.uint8)
    return found


def pairs(task: str, split: str, config: Config) -> list[tuple[bytes, bytes]]:
    """Prompts and answers of a task's split, `"train"` or `"test"`, in random order."""
    train, found = split == "train", []
    if task == "calculate":
        answers = lambda split: [r["answer"] for r in rows("gsm8k", split, config)]
        equations = lambda split: {*EQUATION.findall(b"\n".join(answers(split)))}
        known = equations("train")
        # Equations of the test split that no model has seen.
        kept = known if train else equations("test") - known
        found = [(b"<<" + left + b"=", right) for left, right in kept]
    elif task == "complete":
        for row in rows("wikitext2", "test" if train else "validation", config):
            for word in WORD.finditer(row["text"]):
                cut = word.start() + 3
                found.append((row["text"][:cut], word[0][3:]))
    else:
        parts = data.tfds_source(
            "snips", "train" if train else "validation", data_dir=config.data_dir
        )
        names = parts.info.features["intent"].names
        for row in parts.__getitems__(range(len(parts))):
            name = names[int(row["intent"])].encode()
            found.append((row["text"].strip() + b" => ", name))
    order = np.random.default_rng(0).permutation(len(found))
    found = sorted(found)
    return [(found[i][0][-config.context :], found[i][1] + b"\n") for i in order]


def encoded(
    chosen: list[tuple[bytes, bytes]], width: int = 0, longest: int = 0
) -> Examples:
    """Arrays of prompts and answers, at least as wide and as long as that."""
    prompts, answers = zip(*chosen)
    left, right = padded(prompts, left=True), padded(answers, left=False)
    more = max(0, width - left[0].shape[1]), max(0, longest - right[0].shape[1])
    add = lambda x, before, after: np.pad(x, ((0, 0), (before, after)))
    return Examples(
        *(add(x, more[0], 0) for x in left), *(add(x, 0, more[1]) for x in right)
    )


def windows(corpus: Texts, number: int, length: int, key: jax.Array) -> jax.Array:
    """Pieces of texts; each source gives as many."""
    starts = np.cumsum([0, *(len(x) for x in corpus.values())])
    repeat = lambda x: jnp.repeat(jnp.asarray(x), number // len(corpus))
    low, high = repeat(starts[:-1]), repeat(starts[1:] - length)
    first = jax.random.randint(key, low.shape, low, high)
    joined = jnp.asarray(np.concatenate([*corpus.values()]))
    return joined[first[:, None] + jnp.arange(length)[None]].astype(jnp.int32)


def pretrain(
    model: Decoder, steps: int, rate: float, config: Config, corpus: Texts, key
) -> Params:
    """A language model of all texts."""

    def loss(params, key):
        tokens = windows(corpus, config.batch_size, config.window, key)
        return text_loss(model, params, tokens)

    init, key = jax.random.split(key)
    params = jax.jit(model.init)(init, jnp.zeros((1, 1), jnp.int32))["params"]
    return descend(loss, params, steps, rate, key)


def finetune(
    model: Decoder, steps, rate, base: Params, task, replay, config, corpus, key
) -> Params:
    """A base that learns the answers of a task, beside as many windows of texts."""
    part = encoded(pairs(task, "train", config))
    width = part.prompts.shape[1]
    join = lambda x, y: jnp.asarray(np.concatenate([x, y], axis=1))
    tokens = join(part.prompts, part.answers)
    mask = join(part.mask, part.answer_mask)

    def loss(params, key):
        chosen = jax.random.randint(key, (config.tune_batch_size,), 0, len(tokens))
        batch, seen = tokens[chosen], mask[chosen]
        logits = model.apply({"params": params}, batch, seen)
        total = next_token_loss(logits, batch, seen.at[:, :width].set(False))
        if replay:
            text = windows(corpus, replay, config.window, jax.random.fold_in(key, 0))
            total += text_loss(model, params, text)
        return total

    return descend(loss, base, steps, rate, key)


def text_loss(model: Decoder, params: Params, tokens: jax.Array) -> jax.Array:
    """Of plain text, all of it."""
    logits = model.apply({"params": params}, tokens)
    return next_token_loss(logits, tokens, jnp.ones(tokens.shape, bool))


def descend(
    loss: Callable, params: Params, steps: int, rate: float, key: jax.Array
) -> Params:
    """AdamW whose learning rate rises for a tenth of the steps and falls to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, -(-steps // 10), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def run(params, key):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return run(params, key)


def prepare(config: Config, seed: int, folder: Path) -> Models:
    """Trains all models, or loads those that an earlier call left in the folder."""
    corpus = texts(config)
    key = jax.random.key(seed)

    def cached(name: str, number: int, make: Callable) -> Params:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            flat = flatten_dict(make(jax.random.fold_in(key, number)), sep="/")
            save_file({k: np.asarray(v) for k, v in flat.items()}, draft)
            draft.replace(path)
        return unflatten_dict(jax.device_put(load_file(path)), sep="/")

    bases, tuned = {}, {"large": {}, "small": {}}
    for i, size in enumerate(tuned):
        model = config.model(size)
        of = lambda what, size=size: getattr(config, f"{size}_{what}")
        own = of("steps"), of("rate"), config, corpus
        base = cached(size, i, functools.partial(pretrain, model, *own))
        for j, task in enumerate(TASKS):
            own = of("tune_steps"), of("tune_rate"), base, task
            replay = config.replay if size == "small" else 0
            make = functools.partial(finetune, model, *own, replay, config, corpus)
            tuned[size][task] = cached(f"{size}_{task}", 2 + 2 * j + i, make)
        bases[size] = base
    return Models(bases["large"], bases["small"], tuned["small"], tuned["large"])
