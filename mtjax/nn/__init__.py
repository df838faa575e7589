"""Linen blocks that more than one system uses."""

from mtjax.nn.adatt import AdaTT
from mtjax.nn.aitm import AITM, InformationTransfer
from mtjax.nn.cnn import CNN
from mtjax.nn.cross_stitch import CrossStitch
from mtjax.nn.dselect_k import DSelectK
from mtjax.nn.esmm import ESMM
from mtjax.nn.experts import Experts
from mtjax.nn.feature_gates import FeatureGates
from mtjax.nn.fields import FieldEmbeddings, embedding_width, hash_ids
from mtjax.nn.gates import Gate
from mtjax.nn.grams import dense_grams
from mtjax.nn.hypernetwork import HyperDense, Hypernetwork
from mtjax.nn.lenet import LeNet
from mtjax.nn.mlp import MLP
from mtjax.nn.mmoe import MMoE
from mtjax.nn.normalised_experts import NormalisedExperts
from mtjax.nn.ple import CGC, PLE
from mtjax.nn.pooling import (
    SelfAttentionPooling,
    TargetAttention,
    TargetMultiHeadAttention,
    mean_pool,
)
from mtjax.nn.senet import SENet
from mtjax.nn.set_attention import SetAttention
from mtjax.nn.sharded_embedding import row_sharding, take_sharded
from mtjax.nn.shared_bottom import SharedBottom
from mtjax.nn.shared_bottom_ranker import SharedBottomRanker
from mtjax.nn.snr import SNR
from mtjax.nn.sparse_softmax import sparse_softmax
from mtjax.nn.stem import STEM
from mtjax.nn.task_fields import TaskFieldEmbeddings
from mtjax.nn.task_leaves import is_shared
from mtjax.nn.towers import Tower, Towers
from mtjax.nn.vit import ViT

__all__ = [
    "AITM",
    "CGC",
    "CNN",
    "ESMM",
    "MLP",
    "PLE",
    "SNR",
    "STEM",
    "AdaTT",
    "CrossStitch",
    "DSelectK",
    "Experts",
    "FeatureGates",
    "FieldEmbeddings",
    "Gate",
    "HyperDense",
    "Hypernetwork",
    "InformationTransfer",
    "LeNet",
    "MMoE",
    "NormalisedExperts",
    "SENet",
    "SelfAttentionPooling",
    "SetAttention",
    "SharedBottom",
    "SharedBottomRanker",
    "TargetAttention",
    "TargetMultiHeadAttention",
    "TaskFieldEmbeddings",
    "Tower",
    "Towers",
    "ViT",
    "dense_grams",
    "embedding_width",
    "hash_ids",
    "is_shared",
    "mean_pool",
    "row_sharding",
    "sparse_softmax",
    "take_sharded",
]
