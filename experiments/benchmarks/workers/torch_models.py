"""The models of jax_models.py in PyTorch: same layers, shapes and numbers of units."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Problem(NamedTuple):
    """A model with data to train it on.

    Attributes:
      trunk: the shared part.
      heads: one linear layer per task.
      x: the inputs.
      y: the targets, `(tasks, examples, 1)`.
    """

    trunk: nn.Module
    heads: nn.ModuleList
    x: Tensor
    y: Tensor

    def losses(self) -> tuple[Tensor, list[Tensor]]:
        """The shared representation and the losses."""
        z = self.trunk(self.x)
        losses = [((head(z) - y) ** 2).mean() for head, y in zip(self.heads, self.y)]
        return z, losses

    def parameters(self) -> list[nn.Parameter]:
        """Of the trunk and of the heads."""
        return [*self.trunk.parameters(), *self.heads.parameters()]


def mlp(width: int) -> nn.Module:
    """Three dense layers of the same width."""
    layers = []
    for inputs in (512, width, width):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """Two 3x3 convolutions with group normalisation around a shortcut."""

    def __init__(self, inputs: int, channels: int, stride: int):
        """Makes the layers; the shortcut has one where the shape changes."""
        super().__init__()
        norm = lambda: nn.GroupNorm(8, channels)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != channels:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, norm())

    def forward(self, x: Tensor) -> Tensor:
        """Adds the two and cuts off below zero."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Mean(nn.Module):
    """Average over the given axes."""

    def __init__(self, *axes: int):
        """Keeps the axes."""
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Averages."""
        return x.mean(self.axes)


def resnet(width: int) -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem, four stages of two blocks."""
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers = [stem, nn.GroupNorm(8, width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(inputs, width * 2**stage, stride))
            inputs = width * 2**stage
    return nn.Sequential(*layers, Mean(2, 3))


class Attention(nn.Module):
    """Self-attention of several heads, written out so that `vmap` can batch it."""

    def __init__(self, width: int, heads: int):
        """Makes the four projections."""
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over the second axis."""
        apart = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = (apart(layer(x)) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Adds what layers make of an input to it."""

    def __init__(self, *layers: nn.Module):
        """Keeps the layers."""
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Adds."""
        return x + self.layers(x)


class Position(nn.Module):
    """A learnt vector per token; torchjd is fast if a module owns it alone."""

    def __init__(self, tokens: int, width: int):
        """Starts small."""
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the vectors."""
        return x + self.vectors


def vit(width: int, depth: int = 4, heads: int = 4, patch: int = 4) -> nn.Module:
    """A vision transformer that normalises before each block and averages tokens."""
    patches = nn.Conv2d(3, width, patch, patch)
    layers = [patches, nn.Flatten(2), Transpose(), Position((32 // patch) ** 2, width)]
    norm = lambda: nn.LayerNorm(width, eps=1e-6)
    for _ in range(depth):
        layers += [
            Residual(norm(), Attention(width, heads)),
            Residual(
                norm(),
                nn.Linear(width, 4 * width),
                nn.GELU("tanh"),
                nn.Linear(4 * width, width),
            ),
        ]
    return nn.Sequential(*layers, norm(), Mean(1))


class Transpose(nn.Module):
    """From channels first to channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Swaps the last two axes."""
        return x.mT


def make_problem(model: str, tasks: int, batch: int, width: int) -> Problem:
    """A model by name ("mlp", "resnet", "vit") and random regression data."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On GPUs JAX rounds the inputs of products to 19 bits, and PyTorch may too.
    torch.backends.cuda.matmul.allow_tf32 = True
    trunk = {"mlp": mlp, "resnet": resnet, "vit": vit}[model](width).to(device)
    shape = (batch, 512) if model == "mlp" else (batch, 3, 32, 32)
    x, y = (
        torch.randn(shape, device=device),
        torch.randn(tasks, batch, 1, device=device),
    )
    with torch.no_grad():
        units = trunk(x).shape[-1]
    heads = nn.ModuleList(nn.Linear(units, 1, bias=False) for _ in range(tasks))
    return Problem(trunk, heads.to(device), x, y)
