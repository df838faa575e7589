"""Which inputs of a jaxpr can move which of its outputs: one pass over the graph."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# A set of input indices, as the bits of one integer: unions are a single `|`.
InputSet = int

_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def reaching_inputs(
    jaxpr: Jaxpr, inputs: Sequence[InputSet], *, differentiable: bool = True
) -> list[InputSet]:
    """Finds, per output, the inputs whose gradient can be other than zero.

    Unlike dead-code elimination it looks inside functions with custom derivatives, and
    it knows that no gradient flows through `stop_gradient` or through integers.

    Args:
      jaxpr: the program.
      inputs: for each input variable the set that it stands for.
      differentiable: False counts every dependency, as is right inside a function whose
        derivative is defined by hand.

    Returns:
      One set per output, a superset of the truth: a primitive that is not known is
      taken to let every input reach every output.
    """
    reached = dict.fromkeys(jaxpr.constvars, 0)
    reached.update(zip(jaxpr.invars, inputs))

    def read(atom) -> InputSet:
        return 0 if isinstance(atom, Literal) else reached[atom]

    for eqn in jaxpr.eqns:
        outputs = _through(eqn, [read(v) for v in eqn.invars], differentiable)
        for var, sources in zip(eqn.outvars, outputs):
            reached[var] = 0 if differentiable and _is_discrete(var) else sources
    return [read(v) for v in jaxpr.outvars]


def _through(eqn, inputs: list[InputSet], differentiable: bool) -> list[InputSet]:
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient" and differentiable:
        return [0]
    if name == "scan":
        start = params["num_consts"]
        stop = start + params["num_carry"]
        return _loop(params["jaxpr"], inputs, start, stop, differentiable)
    if name == "while":
        # The condition only decides when to stop: no gradient flows through it.
        inputs = inputs[params["cond_nconsts"] :]
        start = params["body_nconsts"]
        return _loop(params["body_jaxpr"], inputs, start, len(inputs), differentiable)
    if name == "cond":
        branches = [
            reaching_inputs(_open(b), inputs[1:], differentiable=differentiable)
            for b in params["branches"]
        ]
        return [_union(sets) for sets in zip(*branches)]
    body = _only_body(eqn)
    if body is not None:
        inside = differentiable and name not in _CUSTOM_RULES
        return reaching_inputs(body, inputs, differentiable=inside)
    return [_union(inputs)] * len(eqn.outvars)


def _loop(body, inputs, start: int, stop: int, differentiable: bool) -> list[InputSet]:
    """Repeats the body until what reaches the carry no longer grows."""
    inputs = list(inputs)
    while True:
        outputs = reaching_inputs(_open(body), inputs, differentiable=differentiable)
        carry = [old | new for old, new in zip(inputs[start:stop], outputs)]
        if carry == inputs[start:stop]:
            return carry + outputs[stop - start :]
        inputs[start:stop] = carry


def _is_discrete(var) -> bool:
    dtype = getattr(var.aval, "dtype", None)  # tokens have none
    return dtype is None or not jnp.issubdtype(dtype, jnp.inexact)


def _only_body(eqn) -> Jaxpr | None:
    """The body of a call (jit, remat, shard_map, custom rule), None for the rest."""
    bodies = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if len(bodies) != 1:
        return None
    body = _open(bodies[0])
    same_inputs = len(body.invars) == len(eqn.invars)
    return body if same_inputs and len(body.outvars) == len(eqn.outvars) else None


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _union(sets) -> InputSet:
    union = 0
    for s in sets:
        union |= s
    return union
