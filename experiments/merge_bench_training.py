"""How the models of the merge-bench are trained; `config` is that of its models."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.merge_bench_data import Splits, small_slice

Params = Any
Stage = Literal["pretrain", "finetune"]


def features(model: nn.Module, params: Params, images) -> jax.Array:
    """What the encoder makes of images in 0..255."""
    pixels = jnp.asarray(images, jnp.float32)[..., None] / 255
    return model.apply({"params": params}, pixels)


def outputs(head: Params, z) -> jax.Array:
    """Logits of a linear head."""
    return z @ head["kernel"] + head["bias"][None]


def loss_of(model: nn.Module, size: int, encoder, heads, data, key) -> jax.Array:
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


def pretrain(config, data: dict[str, Splits], key) -> Params:
    """Stage 0: an `encoder` that knows all tasks, `heads` that know them roughly."""
    many, model = small_slice(data, config.pretrain_per_class), config.model
    init, key = jax.random.split(key)
    encoder = model.init(init, jnp.zeros((1, 28, 28, 1)))["params"]
    dense = jax.nn.initializers.lecun_normal()
    params = {"encoder": encoder, "heads": {}}
    for i, (task, part) in enumerate(many.items()):
        shape = width_of(model), int(part["labels"].max()) + 1
        kernel = dense(jax.random.fold_in(init, i), shape)
        params["heads"][task] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    learnt = descended(config, "pretrain", params, {}, many, key)
    few = small_slice(data, config.shots)
    encode = jax.jit(functools.partial(features, model, learnt["encoder"]))
    rough = lambda part: rough_head(
        encode(part["images"]), part["labels"], config.head_scale
    )
    heads = {task: rough(part) for task, part in few.items()}
    return {"encoder": learnt["encoder"], "heads": heads}


def finetune(config, base: Params, head: Params, data, key) -> Params:
    """Stage 1: the encoder alone, on one task."""
    start, heads = {"encoder": base}, {"heads": {"": head}}
    return descended(config, "finetune", start, heads, {"": data}, key)["encoder"]


def rough_head(z, labels, scale: float) -> Params:
    """Directions from the mean of all classes to that of each, all of one length."""
    means = jnp.stack([z[labels == c].mean(0) for c in range(labels.max() + 1)])
    middle = means.mean(0)
    rows = means - middle[None]
    rows = scale * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return {"kernel": rows.T, "bias": -rows @ middle}


def width_of(model: nn.Module) -> int:
    """Of the representation."""
    picture = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), picture)
    return out.shape[-1]


def descended(config, stage: Stage, params, frozen, data, key) -> Params:
    """Parameters after all steps of a stage."""
    steps = config.pretrain_steps if stage == "pretrain" else config.steps
    # A convolution in a scan is many times slower on CPUs.
    several = 1 if config.encoder == "cnn" else 10
    keys, state = jax.random.split(key, steps), optimizer(config, stage).init(params)
    for i in range(0, steps, several):
        some = keys[i : i + several]
        params, state = _some_steps(config, stage, params, state, frozen, data, some)
    return params


def optimizer(config, stage: Stage) -> optax.GradientTransformation:
    """AdamW, whose rate falls in stage 1."""
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    if stage == "pretrain":
        rate = config.pretrain_learning_rate
    return optax.adamw(rate, weight_decay=0.01)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _some_steps(config, stage, params, state, frozen, data, keys):
    tx = optimizer(config, stage)

    def loss(params, key):
        both = frozen | params
        encoder, heads = both["encoder"], both["heads"]
        return loss_of(config.model, config.batch_size, encoder, heads, data, key)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    if len(keys) == 1:
        return step((params, state), keys[0])[0]
    return jax.lax.scan(step, (params, state), keys)[0]
