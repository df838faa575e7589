"""Linen blocks that more than one system uses."""

from mtjax.nn.lenet import LeNet
from mtjax.nn.mlp import MLP
from mtjax.nn.shared_bottom import SharedBottom

__all__ = ["MLP", "LeNet", "SharedBottom"]
