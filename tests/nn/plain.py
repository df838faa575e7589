"""The blocks of rankers in NumPy float64, one expert and one task at a time."""

import jax
import numpy as np


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def relu(z):
    return np.maximum(z, 0.0)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def expert(params, i, x):
    for layer in range(len(params) // 2):
        x = relu(x @ params[f"kernel_{layer}"][i] + params[f"bias_{layer}"][i])
    return x


def experts(params, x):
    """Outputs of all experts on one input, in a list."""
    return [expert(params, i, x) for i in range(len(params["kernel_0"]))]


def mixed(weights, outputs):
    return sum(w[:, None] * h for w, h in zip(weights.T, outputs, strict=True))


def tower(params, x):
    for layer in range(len(params) - 1):
        dense = params[f"hidden_{layer}"]
        x = relu(x @ dense["kernel"] + dense["bias"])
    return (x @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]
