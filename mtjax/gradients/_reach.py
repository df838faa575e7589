"""Which inputs of a jaxpr reach which of its outputs: one pass over the graph."""

from collections.abc import Iterable, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# A set of input indices, as the bits of one integer: unions are a single `|`.
InputSet = int


def reaching_inputs(jaxpr: Jaxpr, inputs: Sequence[InputSet]) -> list[InputSet]:
    """Finds, per output, the inputs that it is computed from.

    Args:
      jaxpr: the program.
      inputs: for each input variable the set that it stands for.

    Returns:
      One set per output, a superset of the truth: a primitive that is not known is
      taken to let every input reach every output.
    """
    reached = dict.fromkeys(jaxpr.constvars, 0)
    reached.update(zip(jaxpr.invars, inputs))

    def read(atom) -> InputSet:
        return 0 if isinstance(atom, Literal) else reached[atom]

    for eqn in jaxpr.eqns:
        reached.update(zip(eqn.outvars, _through(eqn, [read(v) for v in eqn.invars])))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn, inputs: list[InputSet]) -> list[InputSet]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        body = _open(params["jaxpr"])
        return settle(body, inputs, slice(*scan_parts(eqn, body)))
    if name == "while":
        # The condition only decides when to stop.
        inputs = inputs[params["cond_nconsts"] :]
        carry = slice(params["body_nconsts"], len(inputs))
        return settle(_open(params["body_jaxpr"]), inputs, carry)
    if name == "cond":
        branches = [reaching_inputs(_open(b), inputs[1:]) for b in params["branches"]]
        return [_union(sets) for sets in zip(*branches)]
    body = _only_body(eqn)
    if body is not None:
        return reaching_inputs(body, inputs)
    return [_union(inputs)] * len(eqn.outvars)


def scan_parts(eqn, body: Jaxpr) -> tuple[int, int]:
    """Where among the inputs of a `scan` its carry begins and ends."""
    # Only what is scanned over loses an axis on its way into the body, and only what
    # is stacked gains one on its way out; how the parameters of the primitive state
    # this differs between versions of JAX.
    scanned = sum(_rank(v) != _rank(b) for v, b in zip(eqn.invars, body.invars))
    carried = sum(_rank(v) == _rank(b) for v, b in zip(eqn.outvars, body.outvars))
    stop = len(eqn.invars) - scanned
    return stop - carried, stop


def settle(body: Jaxpr, inputs: list[InputSet], carry: slice) -> list[InputSet]:
    """Repeats the body of a loop until what reaches its carry no longer grows.

    Args:
      body: maps constants, carry and further inputs to the carry and further outputs.
      inputs: for each input the set that it stands for.
      carry: which inputs are the carry.

    Returns:
      One set per output.
    """
    inputs = list(inputs)
    while True:
        outputs = reaching_inputs(body, inputs)
        grown = [old | new for old, new in zip(inputs[carry], outputs)]
        if grown == inputs[carry]:
            return grown + outputs[len(grown) :]
        inputs[carry] = grown


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


def _rank(atom) -> int:
    return len(atom.aval.shape)


def _union(sets: Iterable[InputSet]) -> InputSet:
    union = 0
    for s in sets:
        union |= s
    return union
