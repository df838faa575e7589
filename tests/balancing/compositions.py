"""The rows of the catalogue that put a weighting of the losses before an aggregator."""

import functools

import optax

import mtjax
from tests.balancing.method import Method, claims


def of_logs(aggregator):
    """The aggregator of the gradients of the logarithms of the losses."""
    return optax.chain(mtjax.scale_by_weighting(mtjax.scale_invariant()), aggregator)


of_any_scale = functools.partial(
    claims, scale_all="0", scale_one="same update", own="weighted"
)

COMPOSITIONS = (
    Method(
        "chain(log, mgda())",
        mtjax.mgda,
        lambda k: of_logs(mtjax.mgda()),
        of_any_scale(conflict="yes", stationary="also where some tasks are"),
        losses=True,
    ),
    Method(
        "chain(log, cagrad())",
        mtjax.cagrad,
        lambda k: of_logs(mtjax.cagrad()),
        of_any_scale(),
        losses=True,
        one_task=1.2,
    ),
    Method(
        "chain(log, imtl_g())",
        mtjax.imtl_g,
        lambda k: of_logs(mtjax.imtl_g()),
        of_any_scale(conflict="of two tasks", stationary="also where some tasks are"),
        losses=True,
    ),
)
