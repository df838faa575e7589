"""Linen blocks that more than one system uses."""

from mtjax.nn.cnn import CNN
from mtjax.nn.grams import dense_grams
from mtjax.nn.lenet import LeNet
from mtjax.nn.mlp import MLP
from mtjax.nn.shared_bottom import SharedBottom
from mtjax.nn.vit import ViT

__all__ = ["CNN", "MLP", "LeNet", "SharedBottom", "ViT", "dense_grams"]
