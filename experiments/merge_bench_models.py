"""The models of the merge-bench: one encoder, fine-tuned once per task.

Other experiments call `prepare(config, seed, out)`, which trains or loads a `Bench`:

    from experiments.merge_bench_models import QUICK, Bench, Config, prepare

Stage 0 trains encoder and heads together on a small slice of all tasks, and stops while
they are still mediocre. Stage 1 freezes the heads, as the text encoder of CLIP is, and
fine-tunes the encoder for each task by itself. Files in `out/seed_N` are safetensors:
`mtjax merge` reads them too.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from experiments.merge_bench_data import SETS, TURNED, Splits, load_data, small_slice
from mtjax.nn import ViT

Params = Any


@dataclass(frozen=True)
class Config:
    """What the models are and how long they train."""

    tasks: tuple[str, ...] = tuple(SETS)
    data_dir: Path | None = None  # folder of prepared data
    images_per_task: int = 10_000  # at most, all splits together
    seeds: int = 3
    width: int = 64  # of the encoder
    depth: int = 4
    batch_size: int = 64
    slice_per_class: int = 100  # training images of stage 0
    slice_accuracy: float = 0.65  # mean on validation images that ends stage 0
    slice_steps: int = 2_000  # at most
    slice_learning_rate: float = 1e-3  # of AdamW
    steps: int = 600  # of stage 1, per task
    learning_rate: float = 5e-4  # of AdamW, falls like a cosine

    @property
    def model(self) -> ViT:
        """The encoder."""
        return ViT(width=self.width, depth=self.depth, heads=4, hidden=2 * self.width)


QUICK = Config(
    tasks=TURNED,
    images_per_task=400,
    seeds=1,
    width=16,
    depth=2,
    batch_size=16,
    slice_per_class=20,
    slice_accuracy=0.3,
    slice_steps=200,
    slice_learning_rate=5e-3,
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
    model: ViT

    def logits(self, params: Params, task: str, images) -> jax.Array:
        """What an encoder and the task's head say; pure, may be jitted.

        Args:
          params: of the encoder.
          task: whose head.
          images: `(batch, 28, 28)` in 0..255.

        Returns:
          `(batch, classes)`.
        """
        return outputs(self.heads[task], features(self.model, params, images))

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
        part = {name: x[:most] for name, x in self.data[task][split].items()}
        right = 0
        for i in range(0, len(part["labels"]), 500):
            batch = {name: x[i : i + 500] for name, x in part.items()}
            right += int(_right(self.model, params, self.heads[task], batch))
        return right / len(part["labels"])


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


def features(model: ViT, params: Params, images) -> jax.Array:
    """What the encoder makes of images in 0..255."""
    pixels = jnp.asarray(images, jnp.float32)[..., None] / 255
    return model.apply({"params": params}, pixels)


def outputs(head: Params, z) -> jax.Array:
    """Logits of a linear head."""
    return z @ head["kernel"] + head["bias"][None]


@functools.partial(jax.jit, static_argnums=0)
def _right(model: ViT, params, head, batch):
    guesses = outputs(head, features(model, params, batch["images"])).argmax(-1)
    return jnp.sum(guesses == batch["labels"])


def loss_of(model: ViT, size: int, encoder, heads, data, key) -> jax.Array:
    """Sum over tasks of the mean cross-entropy on `size` random images each."""
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def batch(task, key):
        rows = jax.random.randint(key, (size,), 0, len(data[task]["labels"]))
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], data[task])

    keys = jax.random.split(key, len(heads))
    batches = {task: batch(task, key) for task, key in zip(heads, keys)}
    images = jnp.concatenate([b["images"] for b in batches.values()])
    parts = jnp.split(features(model, encoder, images), len(heads))
    return sum(
        entropy(outputs(heads[t], z), batches[t]["labels"]).mean()
        for t, z in zip(heads, parts)
    )


def pretrain(config: Config, data: dict[str, Splits], key) -> Params:
    """Stage 0: `encoder` and `heads` that know a little of all tasks."""
    few, model = small_slice(data, config.slice_per_class), config.model
    init, key = jax.random.split(key)
    encoder = model.init(init, jnp.zeros((1, 28, 28, 1)))["params"]
    dense = jax.nn.initializers.lecun_normal()
    params = {"encoder": encoder, "heads": {}}
    for i, (task, part) in enumerate(few.items()):
        shape = config.width, int(part["labels"].max()) + 1
        kernel = dense(jax.random.fold_in(init, i), shape)
        params["heads"][task] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    tx = optax.adamw(config.slice_learning_rate, weight_decay=0.01)
    state, every = tx.init(params), 20

    @jax.jit
    def some_steps(params, state, key):
        def step(carry, key):
            size = config.batch_size
            loss = lambda p: loss_of(model, size, p["encoder"], p["heads"], few, key)
            return descended(tx, loss, *carry), None

        return jax.lax.scan(step, (params, state), jax.random.split(key, every))[0]

    for i in range(config.slice_steps // every):
        params, state = some_steps(params, state, jax.random.fold_in(key, i))
        bench = Bench(config.tasks, params["encoder"], {}, params["heads"], data, model)
        found = [bench.accuracy(bench.base, t, "validation") for t in config.tasks]
        if np.mean(found) >= config.slice_accuracy:
            break
    return params


@functools.partial(jax.jit, static_argnums=0)
def finetune(config: Config, base: Params, head: Params, data, key) -> Params:
    """Stage 1: the encoder alone, on one task."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    tx = optax.adamw(rate, weight_decay=0.01)

    def step(carry, key):
        heads, part = {"": head}, {"": data}
        loss = lambda p: loss_of(config.model, config.batch_size, p, heads, part, key)
        return descended(tx, loss, *carry), None

    # Nothing here convolves, so that a scan is fast on CPUs too.
    keys = jax.random.split(key, config.steps)
    return jax.lax.scan(step, (base, tx.init(base)), keys)[0][0]


def descended(tx, loss, params, state):
    """Parameters and state of the optimizer after one step."""
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
