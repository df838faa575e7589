"""Primitives of a backward pass whose results may be kept as products."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.gradients._axis import zeros_beside
from mtjax.gradients._products import Term
from mtjax.gradients._rows import Rows


def term_of(eqn: Any, values: list[Any]) -> Term | None:
    """The result of an equation as a product, None if it is not known how.

    Args:
      eqn: the equation.
      values: its inputs: arrays that all tasks share, and `Rows`.
    """
    make = _TERMS.get(eqn.primitive.name)
    one_row = sum(isinstance(value, Rows) for value in values) == 1
    return make(eqn, values) if make is not None and one_row else None


def _dot_general(eqn, values) -> Term:
    is_known = [not isinstance(value, Rows) for value in values]
    known, row = (0, 1) if is_known[0] else (1, 0)
    contracted, batched = eqn.params["dimension_numbers"]
    free = [
        [i for i in range(v.aval.ndim) if i not in (*contracted[side], *batched[side])]
        for side, v in enumerate(eqn.invars)
    ]
    first = len(batched[0])
    axes = [
        first + np.arange(len(free[0])),
        first + len(free[0]) + np.arange(len(free[1])),
    ]
    shapes = [v.aval.shape for v in eqn.invars]
    size = lambda side, dims: math.prod(shapes[side][i] for i in dims)

    def matrix(side):
        b, n = size(side, batched[side]), size(side, contracted[side])
        rest = [shapes[side][i] for i in free[side]]

        def turn(x):
            x = x.transpose(*batched[side], *contracted[side], *free[side])
            return x.reshape(b, n, *rest)

        return turn

    def carry_out(shared, delta):
        both = (shared, delta) if known == 0 else (delta, shared)
        return eqn.primitive.bind(*both, **eqn.params)

    return Term(
        carry_out=carry_out,
        shared=values[known],
        rows=values[row],
        known=matrix(known),
        delta=matrix(row),
        known_axes=tuple(axes[known].tolist()),
        row_axes=tuple(axes[row].tolist()),
        sizes=(
            size(0, batched[0]),
            size(0, contracted[0]),
            size(known, free[known]),
            size(row, free[row]),
        ),
    )


def _convolution(eqn, values) -> Term | None:
    # In a weight gradient what came back is the kernel that slides over what went in.
    p = eqn.params
    if (
        isinstance(values[0], Rows)
        or p["feature_group_count"] * p["batch_group_count"] > 1
    ):
        return None
    spec = p["dimension_numbers"]
    shared, rows = values
    out_shape = eqn.outvars[0].aval.shape
    taps = [out_shape[i] for i in spec.out_spec[2:]]
    kernel = eqn.invars[1].aval.shape
    places = [kernel[i] for i in spec.rhs_spec[2:]]
    channels, examples = (shared.shape[i] for i in spec.lhs_spec[:2])
    n = examples * math.prod(places)

    def patches(x):
        x = x.transpose(*spec.lhs_spec)
        dilation = [
            (low, high, d - 1)
            for (low, high), d in zip(p["padding"], p["lhs_dilation"])
        ]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *dilation])
        found = []
        for tap in itertools.product(*map(range, taps)):
            start = [t * stride for t, stride in zip(tap, p["window_strides"])]
            step = p["rhs_dilation"]
            stop = [s + (size - 1) * d + 1 for s, size, d in zip(start, places, step)]
            found.append(
                jax.lax.slice(
                    x,
                    (0, 0, *start),
                    (channels, examples, *stop),
                    (1, 1, *step),
                ).reshape(channels, n)
            )
        # (taps, channels, n) to (n, channels, taps), the order of the known axes
        return jnp.stack(found).transpose(2, 1, 0).reshape(1, n, channels, *taps)

    def delta(x):
        out, inputs, *space = spec.rhs_spec
        return x.transpose(inputs, *space, out).reshape(1, n, -1)

    return Term(
        carry_out=lambda a, d: eqn.primitive.bind(a, d, **p),
        shared=shared,
        rows=rows,
        known=patches,
        delta=delta,
        known_axes=(spec.out_spec[0], *spec.out_spec[2:]),
        row_axes=(spec.out_spec[1],),
        sizes=(1, n, channels * math.prod(taps), kernel[spec.rhs_spec[0]]),
    )


def _scatter_add(eqn, values) -> Term | None:
    # The gradient of a look-up in a table: rows added to zeros at indices.
    _, indices, rows = values
    numbers = eqn.params["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    window = eqn.invars[2].aval.ndim - (len(shape) - 1)
    if (
        not isinstance(rows, Rows)
        or indices.shape[-1] != 1
        or numbers.inserted_window_dims != (0,)
        or numbers.scatter_dims_to_operand_dims != (0,)
        or numbers.operand_batching_dims
        or numbers.update_window_dims != tuple(range(window, eqn.invars[2].aval.ndim))
    ):
        return None
    n = math.prod(indices.shape[:-1])
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def carry_out(i, delta):
        zeros = zeros_beside(delta, shape, eqn.outvars[0].aval.dtype)
        return eqn.primitive.bind(zeros, i, delta, **eqn.params)

    return Term(
        carry_out=carry_out,
        shared=indices,
        rows=rows,
        known=lambda i: (jnp.clip(i, 0, shape[0] - 1) if clips else i).reshape(1, n, 1),
        delta=lambda x: x.reshape(1, n, *shape[1:]),
        known_axes=(0,),
        row_axes=tuple(range(1, len(shape))),
        sizes=(1, n, shape[0], math.prod(shape[1:])),
        is_lookup=True,
    )


_TERMS = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "scatter-add": _scatter_add,
}
