"""The models of the merge-bench: one encoder, fine-tuned once per task.

Other experiments call `prepare(config, seed, out)`, which trains or loads a `Bench`:

    from experiments.merge_bench_models import QUICK, Bench, Config, prepare

Stage 0 stands for CLIP: the encoder is trained on all tasks together, and then gets new
heads that know the classes only roughly, from very few images each. Stage 1 keeps these
heads, as CLIP's text encoder is kept, and fine-tunes the encoder for each task by
itself. Files in `out/seed_N` are safetensors: `mtjax merge` reads them too.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from experiments.merge_bench_data import SETS, TURNED, Splits, load_data, parts, taken
from experiments.merge_bench_training import (
    Params,
    features,
    finetune,
    outputs,
    pretrain,
)
from mtjax.nn import CNN, ViT


@dataclass(frozen=True)
class Config:
    """What the models are and how long they train."""

    tasks: tuple[str, ...] = tuple(SETS)
    data_dir: Path | None = None  # folder of prepared data
    images_per_task: int = 10_000  # at most, all splits together
    seeds: int = 3
    encoder: Literal["vit", "cnn"] = "vit"
    width: int = 64  # of the ViT; the last stage of the CNN is twice as wide
    depth: int = 4  # of the ViT
    batch_size: int = 64  # images per task
    pretrain_per_class: int = 400  # training images of stage 0, at most
    pretrain_steps: int = 2_000
    pretrain_learning_rate: float = 1e-3  # of AdamW
    shots: int = 1  # images per class that the heads are made of
    head_scale: float = 0.75  # length of a class's row, for fair confidence
    steps: int = 600  # of stage 1, per task
    learning_rate: float = 2e-4  # of AdamW, falls like a cosine

    @property
    def model(self) -> nn.Module:
        """The encoder."""
        w = self.width
        if self.encoder == "cnn":
            return CNN(widths=(w // 2, w, 2 * w))
        return ViT(width=w, depth=self.depth, heads=4, hidden=2 * w)


QUICK = Config(
    tasks=TURNED,
    images_per_task=400,
    seeds=1,
    width=16,
    depth=2,
    batch_size=16,
    pretrain_per_class=20,
    pretrain_steps=200,
    pretrain_learning_rate=5e-3,
    shots=2,
    steps=150,
    learning_rate=2e-3,
)


@dataclass(frozen=True)
class Bench:
    """A base, its fine-tuned models and the data to measure them on.

    Attributes:
      tasks: their names.
      base: parameters of the encoder after stage 0.
      models: of the fine-tuned encoders, by task.
      heads: `kernel` and `bias` of the frozen heads, by task.
      data: by task and split (`train`, `validation`, `stream`, `test`) the `images`,
        uint8 of shape `(n, 28, 28)`, and the `labels`, int32 of shape `(n,)`.
      model: the encoder.
    """

    tasks: tuple[str, ...]
    base: Params
    models: dict[str, Params]
    heads: dict[str, Params]
    data: dict[str, Splits]
    model: nn.Module

    def inputs(self, task: str, split: str) -> np.ndarray:
        """The images of a split."""
        return self.data[task][split]["images"]

    def encode(self, params: Params, images) -> jax.Array:
        """What an encoder makes of images in 0..255, `(batch, 28, 28)`."""
        return features(self.model, params, images)

    def logits(self, params: Params, task: str, images) -> jax.Array:
        """What an encoder and the task's head say; pure, may be jitted.

        Args:
          params: of the encoder.
          task: whose head.
          images: see `encode`.

        Returns:
          `(batch, classes)`.
        """
        return outputs(self.heads[task], self.encode(params, images))

    def accuracy(
        self, params: Params, task: str, split: str = "test", most: int | None = None
    ) -> float:
        """The fraction of a split's images that is classified correctly.

        Args:
          params: of the encoder.
          task: whose images and head.
          split: which images.
          most: only so many of them.

        Returns:
          A number from 0 to 1.
        """
        some, right = taken(self.data[task][split], slice(most)), 0
        for batch in parts(some):
            right += int(_right(self.model, params, self.heads[task], batch))
        return right / len(some["labels"])


def prepare(config: Config, seed: int, out: Path) -> Bench:
    """Trains the models, or loads those that an earlier call left in `out`.

    Args:
      config: the same in all calls with one `out`; see `mtjax.training.run_config`.
      seed: of the initialisation and the batches; the data are always the same.
      out: run folder. A model is written when it is complete: a call that follows an
        interrupted one trains only what is missing, with the same result.

    Returns:
      The bench.
    """
    data = load_data(config.tasks, config.images_per_task, config.data_dir)
    folder = out / f"seed_{seed}"
    key = jax.random.key(seed)

    def cached(name: str, make) -> Params:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            flat = flatten_dict(make(), sep="/")
            save_file({k: np.asarray(v) for k, v in flat.items()}, draft)
            draft.replace(path)
        return unflatten_dict(jax.device_put(load_file(path)), sep="/")

    both = cached("base", lambda: pretrain(config, data, key))
    base, heads = both["encoder"], both["heads"]
    models = {}
    for i, task in enumerate(config.tasks):
        own = base, heads[task], data[task]["train"], jax.random.fold_in(key, i + 1)
        models[task] = cached(task, functools.partial(finetune, config, *own))
    return Bench(config.tasks, base, models, heads, data, config.model)


@functools.partial(jax.jit, static_argnums=0)
def _right(model: nn.Module, params, head, batch):
    guesses = outputs(head, features(model, params, batch["images"])).argmax(-1)
    return jnp.sum(guesses == batch["labels"])
