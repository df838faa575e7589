"""Every data-free merger with the arguments of its tests."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtjax import merging
from mtjax.merging import Merger


class Method(NamedTuple):
    factory: Callable[..., Merger]
    label: str
    merger: Merger
    models: tuple[int, ...] = (1, 3)  # numbers of models that it takes


def _method(factory, label="", merger=None, **rest):
    return Method(factory, label or factory.__name__, merger or factory(), **rest)


METHODS = [
    _method(merging.average),
    _method(merging.task_arithmetic),
    _method(merging.ties),
    _method(
        merging.ties,
        "ties per tensor, sum",
        merging.ties(0.2, 0.3, reduction="sum", scope="tensor"),
    ),
    _method(
        merging.dare,
        "dare, task_arithmetic",
        merging.chain(merging.dare(0.5), merging.task_arithmetic()),
    ),
    _method(
        merging.dare, "dare, ties", merging.chain(merging.dare(0.5), merging.ties())
    ),
    _method(merging.della),
    _method(merging.breadcrumbs),
    _method(merging.pcb),
    _method(merging.magmax),
    _method(merging.consensus),
    _method(
        merging.consensus,
        "ties, consensus",
        merging.chain(merging.ties(0.5, 1.0, reduction="sum"), merging.consensus()),
    ),
    _method(merging.model_stock),
    _method(merging.delta_guided),
    _method(merging.slerp, models=(2,)),
    _method(
        merging.slerp,
        "slerp of task vectors",
        merging.slerp(on="task_vectors"),
        models=(2,),
    ),
    _method(merging.karcher),
    _method(
        merging.lines,
        "task_arithmetic, lines",
        merging.chain(merging.task_arithmetic(1.0), merging.lines(0.5)),
    ),
    _method(merging.tsv_m),
    _method(merging.iso_c),
    _method(merging.iso_cts),
    _method(merging.knots, "knots of ties", merging.knots(merging.ties())),
    _method(merging.wudi),
]
KEY = jax.random.key(7)


def models_like(shapes, number, seed=0, size=0.3):
    """A base and models that went away from it, partly in a common direction."""
    rng = np.random.default_rng(seed)

    def tree(scale):
        return {p: scale * rng.standard_normal(s) for p, s in shapes.items()}

    base, common = tree(1.0), tree(size)

    def model():
        return jax.tree.map(lambda *parts: sum(parts), base, common, tree(size))

    models = [model() for _ in range(number)]
    return float32(base), [float32(m) for m in models]


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


SHAPES = {"embed": (6, 8), "layers_0/kernel": (6, 8), "layers_1/bias": (8,)}


def merged(method, base, models):
    """The merged tree, from any base."""
    return method.merger(base, models, key=KEY)
