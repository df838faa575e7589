"""The models of the benchmarks in JAX: a shared trunk and one small head per task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Problem(NamedTuple):
    """A model with data to train it on.

    Attributes:
      params: the parameters.
      losses_fn: `losses_fn(params, *batch) -> {task: loss}`.
      batch: its further arguments.
    """

    params: Any
    losses_fn: Callable[..., dict[str, jax.Array]]
    batch: tuple[jax.Array, ...]


class MLP(nn.Module):
    """Three dense layers of the same width."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Maps `(examples, features)` to `(examples, width)`."""
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class Block(nn.Module):
    """Two 3x3 convolutions with group normalisation around a shortcut."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x):
        """Maps `(examples, height, width, channels)` to the same of a new size."""
        norm = lambda: nn.GroupNorm(num_groups=8)
        conv = lambda size, stride: nn.Conv(
            self.channels, (size, size), (stride, stride), use_bias=False
        )
        y = nn.relu(norm()(conv(3, self.stride)(x)))
        y = norm()(conv(3, 1)(y))
        if self.stride > 1 or x.shape[-1] != self.channels:
            x = norm()(conv(1, self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 for small images: a 3x3 stem, four stages of two blocks."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Maps `(examples, height, width, channels)` to `(examples, 8 width)`."""
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride)(x)
        return x.mean((1, 2))


class ViT(nn.Module):
    """A vision transformer that normalises before each block and averages tokens."""

    width: int
    depth: int = 4
    heads: int = 4
    patch: int = 4

    @nn.compact
    def __call__(self, x):
        """Maps `(examples, height, width, channels)` to `(examples, width)`."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        position = nn.initializers.normal(0.02)
        x = x + self.param("position", position, (1, *x.shape[1:]))
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.LayerNorm()(x).mean(1)


def make_problem(model: str, tasks: int, batch: int, width: int) -> Problem:
    """A model by name ("mlp", "resnet", "vit") and random regression data.

    Args:
      model: its name.
      tasks: number of tasks, each with a linear head of its own.
      batch: examples.
      width: units, or channels of the first stage.

    Returns:
      The problem; inputs are 512 features, or images of 32 x 32 x 3.
    """
    trunk = {"mlp": MLP, "resnet": ResNet, "vit": ViT}[model](width)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, 512) if model == "mlp" else (batch, 32, 32, 3)
    x = jax.random.normal(keys[0], shape)
    y = jax.random.normal(keys[1], (tasks, batch))
    variables = trunk.init(keys[2], x)
    units = jax.eval_shape(trunk.apply, variables, x).shape[-1]
    heads = jax.random.normal(keys[3], (tasks, units)) / units**0.5
    names = [f"task_{i:02}" for i in range(tasks)]

    def losses_fn(params, x, y):
        z = trunk.apply(params["trunk"], x)
        return {
            name: jnp.mean((z @ head - y[i]) ** 2)
            for i, (name, head) in enumerate(params["heads"].items())
        }

    return Problem(
        {"trunk": variables, "heads": dict(zip(names, heads))}, losses_fn, (x, y)
    )
