"""The models of the text merge-bench: MiniLM, fine-tuned once per task, in two ways.

The text counterpart of `merge_bench_models`. The base is all-MiniLM-L6-v2 as it was
published. The head of a task is frozen, as the text encoder of CLIP is, and knows the
classes only roughly: it is made of the base's vectors of a few sentences per class. The
encoder is fine-tuned for each task by itself, either all weights of its layers
(`"full"`) or low-rank changes of some (`"lora"`), which are multiplied out before
anything is merged.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from experiments.merge_bench_data import small_slice, taken
from experiments.merge_bench_training import outputs, rough_head
from experiments.text_merge_bench_data import (
    DRAWN,
    SETS,
    VOCABULARY,
    Arrays,
    Splits,
    load_data,
    trimmed,
)
from experiments.text_merge_bench_training import (
    Kind,
    Parts,
    features,
    finetune,
    joined,
)
from mtjax.nn.bert import Bert
from mtjax.nn.bert_files import SentenceEncoder, load_minilm

Params = Any
KINDS: tuple[Kind, ...] = ("full", "lora")


@dataclass(frozen=True)
class Config:
    """What the models are and how long they train."""

    tasks: tuple[str, ...] = tuple(SETS)
    data_dir: Path | None = None  # folder of prepared data
    seeds: int = 1
    minilm: bool = True  # else a tiny encoder that is drawn
    train: int = 768  # sentences per task
    validation: int = 64
    test: int = 256
    tokens: int = 24  # per sentence, at most
    slice_per_class: int = 8  # training sentences that a head is made of
    head_scale: float = 10.0  # length of a class's row
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 2e-4  # of AdamW: rises for a tenth, falls like a cosine
    embeddings: bool = False  # whether they are fine-tuned too
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_modules: tuple[str, ...] = ("query", "value")
    lora_learning_rate: float = 2e-3


QUICK = Config(
    tasks=DRAWN,
    minilm=False,
    train=256,
    validation=64,
    test=128,
    epochs=4,
    batch_size=16,
    learning_rate=3e-3,
    lora_rank=2,
    lora_alpha=4.0,
    lora_learning_rate=1e-2,
)


@dataclass(frozen=True)
class TextBench:
    """A base, its fine-tuned models and the data to measure them on.

    What `merge_bench.measure` and `Measures` ask of a bench, this one has too.

    Attributes:
      tasks: their names.
      base: the parameters that are fine-tuned and merged, before fine-tuning.
      models: after it, by task.
      heads: `kernel` and `bias` of the frozen heads, by task.
      data: by task and split (`train`, `validation`, `test`) the `ids`, `mask` and
        `labels`.
      model: the encoder.
      frozen: its other parameters.
    """

    tasks: tuple[str, ...]
    base: Params
    models: dict[str, Params]
    heads: dict[str, Params]
    data: dict[str, Splits]
    model: Bert
    frozen: Params

    def inputs(self, task: str, split: str) -> Arrays:
        """The sentences of a split."""
        return {name: self.data[task][split][name] for name in ("ids", "mask")}

    def encode(self, params: Params, sentences: Arrays) -> jax.Array:
        """The vectors that an encoder makes of sentences."""
        return features(self.model, joined(self.frozen, params), sentences)

    def logits(self, params: Params, task: str, sentences: Arrays) -> jax.Array:
        """What an encoder and the task's head say; pure, may be jitted."""
        return outputs(self.heads[task], self.encode(params, sentences))

    def accuracy(
        self, params: Params, task: str, split: str = "test", most: int | None = None
    ) -> float:
        """The fraction of a split's sentences that is classified correctly.

        Args:
          params: as `base`.
          task: whose sentences and head.
          split: which sentences.
          most: only so many of them.

        Returns:
          A number from 0 to 1.
        """
        part = taken(self.data[task][split], slice(most))
        # Sentences of one length together: less padding, the same number.
        order = np.argsort(part["mask"].sum(1), kind="stable")
        whole, right = joined(self.frozen, params), 0
        for i in range(0, len(order), 32):
            batch = trimmed(taken(part, order[i : i + 32]))
            right += int(_right(self.model, whole, self.heads[task], batch))
        return right / len(order)


def prepare(config: Config, kind: Kind, seed: int, out: Path) -> TextBench:
    """Fine-tunes the models, or loads those that an earlier call left in `out`.

    Args:
      config: the same in all calls with one `out`; see `mtjax.training.run_config`.
      kind: how they are fine-tuned.
      seed: of the training and validation sentences, the heads and the batches.
      out: run folder. A model is written when it is complete: a call that follows an
        interrupted one trains only what is missing, with the same result.

    Returns:
      The bench.
    """
    model, params, tokenize = encoder(config)
    sizes = {name: getattr(config, name) for name in ("train", "validation", "test")}
    data = load_data(
        config.tasks, sizes, tokenize, config.tokens, config.data_dir, seed
    )
    few = small_slice(data, config.slice_per_class)
    encode = jax.jit(features, static_argnums=0)
    rough = lambda part: rough_head(
        encode(model, params, part), part["labels"], config.head_scale
    )
    heads = {task: rough(part) for task, part in few.items()}
    base, frozen = divided(config, kind, params)
    bench = TextBench(config.tasks, base, {}, heads, data, model, frozen)
    for i, task in enumerate(config.tasks):
        path = out / f"seed_{seed}" / kind / f"{task}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts, part = Parts(base, frozen, heads[task]), data[task]["train"]
            tuned = finetune(config, kind, model, parts, part, seed + 1_000 * i)
            draft = path.with_suffix(".tmp")
            flat = flatten_dict(tuned, sep="/")
            save_file({k: np.asarray(v) for k, v in flat.items()}, draft)
            draft.replace(path)
        stored = jax.device_put(load_file(path))
        bench.models[task] = unflatten_dict(stored, sep="/")
    return bench


@functools.cache
def encoder(config: Config) -> SentenceEncoder:
    """The base: the real encoder, or a tiny one."""
    if config.minilm:
        return load_minilm()
    tiny = {"vocabulary": VOCABULARY, "width": 16, "depth": 2, "heads": 2}
    model = Bert(**tiny, hidden=32, positions=32)
    ids = jnp.ones((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids > 0)["params"]
    return SentenceEncoder(model, params, None)


def divided(config: Config, kind: Kind, params: Params) -> tuple[Params, Params]:
    """The parameters that are fine-tuned, and the others."""

    def tuned(path: tuple[str, ...]) -> bool:
        if kind == "lora":
            return path[-2] in config.lora_modules and path[-1] == "kernel"
        return config.embeddings or path[0].startswith("layer_")

    flat = flatten_dict(params)
    parts = (
        {p: x for p, x in flat.items() if tuned(p) == own} for own in (True, False)
    )
    base, frozen = map(unflatten_dict, parts)
    return base, frozen


@functools.partial(jax.jit, static_argnums=0)
def _right(model: Bert, params, head, batch):
    guesses = outputs(head, features(model, params, batch)).argmax(-1)
    return jnp.sum(guesses == batch["labels"])
