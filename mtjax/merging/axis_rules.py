"""What each operation of a program does to the order of the axes that it meets.

Operations tie axes of operands and results to each other or pin them, as inference does
with types: in the end every factor of an axis that is not pinned may be permuted, with
all that are tied to it, and the program still computes the same.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mtjax.merging.axes import Axes, new_axis, pin, tie


def infer(jaxpr: ClosedJaxpr | Jaxpr, args: Sequence[Axes]) -> list[Axes]:
    """Ties and pins the axes of a program.

    Args:
      jaxpr: the program.
      args: the axes of its arguments, which are changed in place.

    Returns:
      The axes of its results.
    """
    jaxpr = _open(jaxpr)
    known = {v: _constant(v) for v in jaxpr.constvars}
    known.update(zip(jaxpr.invars, args))

    def read(atom) -> Axes:
        return _constant(atom) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        rule = _RULES.get(eqn.primitive.name, _unknown)
        known.update(zip(eqn.outvars, rule(eqn, inputs)))
    return [read(v) for v in jaxpr.outvars]


def used_inputs(
    jaxpr: ClosedJaxpr | Jaxpr, wanted: Sequence[bool] | None = None
) -> list[bool]:
    """Which inputs of a program its results depend on; those of loops all do.

    Args:
      jaxpr: the program.
      wanted: which results count; all by default.
    """
    jaxpr = _open(jaxpr)
    pairs = zip(jaxpr.outvars, wanted or [True] * len(jaxpr.outvars))
    live = set(_variables(v for v, is_wanted in pairs if is_wanted))
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars):
            continue
        inputs = eqn.invars
        if eqn.primitive.name in _CALLS:
            used = used_inputs(_body(eqn), [v in live for v in eqn.outvars])
            inputs = [v for v, is_used in zip(inputs, used) if is_used]
        live.update(_variables(inputs))
    return [v in live for v in jaxpr.invars]


Rule = Callable[[Any, list[Axes]], Sequence[Axes]]


def _unknown(eqn, inputs) -> list[Axes]:
    reason = f"`{eqn.primitive.name}`, which has no rule"
    for axis in (axis for axes in inputs for axis in axes):
        pin(axis, reason)
    return [_fresh(v, reason) for v in eqn.outvars]


def _elementwise(eqn, inputs) -> list[Axes]:
    # An operand has the shape of the result but for sizes of 1, or no axes at all.
    out = _fresh(eqn.outvars[0])
    for i in range(len(out)):
        first, *others = [axes[i] for axes in inputs if axes and axes[i]] or [out[i]]
        for other in others:
            tie(first, other, _along(eqn))
        out[i] = first
    return [out] * len(eqn.outvars)


def _reduce(eqn, inputs) -> list[Axes]:
    # What does not depend on the order of the elements needs no order.
    gone = eqn.params["axes"]
    return [[axis for i, axis in enumerate(x) if i not in gone] for x in inputs]


def _arg(eqn, inputs) -> list[Axes]:
    for i in eqn.params["axes"]:
        pin(inputs[0][i], _along(eqn))
    return _reduce(eqn, inputs)


def _in_place(moved: Callable[[Any], Iterable[int]]) -> Rule:
    """Of an operation that keeps the number of axes and the order along most."""

    def rule(eqn, inputs):
        places = set(moved(eqn))
        first = inputs[0]
        for axes in (x for x in inputs if len(x) == len(first)):
            for i, axis in enumerate(axes):
                if i in places:
                    pin(axis, _along(eqn))
                else:
                    tie(first[i], axis, _along(eqn))

        def out(var):
            fresh = _fresh(var, _along(eqn))
            return [fresh[i] if i in places else x for i, x in enumerate(first)]

        return [out(var) for var in eqn.outvars]

    return rule


def _parameter(name: str) -> Callable[[Any], Iterable[int]]:
    def moved(eqn):
        value = eqn.params[name]
        return value if isinstance(value, tuple) else [value]

    return moved


def _resized(eqn) -> list[int]:
    update = eqn.primitive.name == "dynamic_update_slice"
    part = eqn.invars[1] if update else eqn.outvars[0]
    pairs = zip(eqn.invars[0].aval.shape, part.aval.shape)
    return [i for i, (whole, taken) in enumerate(pairs) if whole != taken]


def _padded(eqn) -> list[int]:
    return [i for i, p in enumerate(eqn.params["padding_config"]) if any(p)]


def _windowed(eqn) -> list[int]:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation")
    each = zip(*(eqn.params[name] for name in names))
    return [i for i, one in enumerate(each) if one != (1, 1, (0, 0), 1)]


def _dot_general(eqn, inputs) -> list[Axes]:
    (contracted, batched), (left, right) = eqn.params["dimension_numbers"], inputs
    for i, j in [*zip(*contracted), *zip(*batched)]:
        tie(left[i], right[j], _along(eqn))
    used = [{*contracted[side], *batched[side]} for side in (0, 1)]
    free = [
        axis
        for side, axes in enumerate(inputs)
        for i, axis in enumerate(axes)
        if i not in used[side]
    ]
    return [[left[i] for i in batched[0]] + free]


def _convolution(eqn, inputs) -> list[Axes]:
    spec = eqn.params["dimension_numbers"]
    if eqn.params["batch_group_count"] > 1:
        return _unknown(eqn, inputs)
    (images, kernel), (out,) = inputs, [_fresh(v) for v in eqn.outvars]
    sides = zip((spec.lhs_spec, spec.rhs_spec, spec.out_spec), (images, kernel, out))
    for places, axes in sides:
        for i in places[2:]:
            pin(axes[i], _along(eqn))
    # Kernels of a group lie side by side: channels are groups x channels of a group.
    number = eqn.params["feature_group_count"]
    groups = new_axis(number)
    (batch, channels), (features, within) = spec.lhs_spec[:2], spec.rhs_spec[:2]
    tie(groups + kernel[within], images[channels], _along(eqn))
    each = new_axis(eqn.invars[1].aval.shape[features] // number)
    tie(groups + each, kernel[features], _along(eqn))
    out[spec.out_spec[0]], out[spec.out_spec[1]] = images[batch], kernel[features]
    return [out]


def _reshape(eqn, inputs) -> list[Axes]:
    out = _fresh(eqn.outvars[0])
    old, new = (v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
    joined = [list(chain.from_iterable(axes)) for axes in (inputs[0], out)]
    tie(joined[0], joined[1], f"a reshape from {old} to {new}")
    return [out]


def _broadcast(eqn, inputs) -> list[Axes]:
    out = _fresh(eqn.outvars[0])  # copies may be permuted
    for axis, i in zip(inputs[0], eqn.params["broadcast_dimensions"]):
        out[i] = axis or out[i]
    return [out]


def _transpose(eqn, inputs) -> list[Axes]:
    return [[inputs[0][i] for i in eqn.params["permutation"]]]


def _tile(eqn, inputs) -> list[Axes]:
    pairs = zip(eqn.params["reps"], inputs[0])
    return [[[*new_axis(copies), *axis] for copies, axis in pairs]]


def _stack(eqn, inputs) -> list[Axes]:
    place, first = eqn.params["axis"], list(inputs[0])
    for other in inputs[1:]:
        _tie_all(eqn, first, other)
    first.insert(place, _fresh(eqn.outvars[0], _along(eqn))[place])
    return [first]


def _unstack(eqn, inputs) -> list[Axes]:
    place = eqn.params["axis"]
    pin(inputs[0][place], _along(eqn))
    rest = [axis for i, axis in enumerate(inputs[0]) if i != place]
    return [rest] * len(eqn.outvars)


def _squeeze(eqn, inputs) -> list[Axes]:
    gone = eqn.params["dimensions"]
    return [[axis for i, axis in enumerate(inputs[0]) if i not in gone]]


def _iota(eqn, inputs) -> list[Axes]:
    out, place = _fresh(eqn.outvars[0]), eqn.params["dimension"]
    pin(out[place], _along(eqn))
    return [out]


def _gather(eqn, inputs) -> list[Axes]:
    # Such as rows of a table: their features keep what ties them.
    (operand, indices), numbers = inputs, eqn.params["dimension_numbers"]
    whole = [
        taken == size
        for taken, size in zip(eqn.params["slice_sizes"], eqn.invars[0].aval.shape)
    ]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    for i, j in pairs:
        tie(operand[i], indices[j], _along(eqn))
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for i, axis in enumerate(operand):
        if not whole[i] and i not in numbers.operand_batching_dims:
            pin(axis, _along(eqn))
    pin(indices[-1], _along(eqn))
    out = _fresh(eqn.outvars[0], _along(eqn))
    seen = [i for i in range(len(operand)) if i not in hidden]
    for place, i in zip(numbers.offset_dims, seen):
        out[place] = operand[i] if whole[i] else out[place]
    rest = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for place, axis in zip(rest, indices[:-1]):
        out[place] = axis
    return [out]


def _call(eqn, inputs) -> list[Axes]:
    return infer(_body(eqn), inputs)


def _scan(eqn, inputs) -> list[Axes]:
    first = eqn.params["num_consts"]
    stop = first + eqn.params["num_carry"]
    carry, scanned = inputs[first:stop], inputs[stop:]
    for axes in scanned:
        pin(axes[0], _along(eqn))
    parts = [axes[1:] for axes in scanned]
    out = infer(eqn.params["jaxpr"], [*inputs[:first], *carry, *parts])
    for old, new in zip(carry, out):
        _tie_all(eqn, old, new)
    stacked = zip(eqn.outvars[len(carry) :], out[len(carry) :])
    ends = [[_fresh(var, _along(eqn))[0], *axes] for var, axes in stacked]
    return carry + ends


def _while(eqn, inputs) -> list[Axes]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = inputs[first + second :]
    infer(eqn.params["cond_jaxpr"], inputs[:first] + carry)
    for old, new in zip(carry, infer(eqn.params["body_jaxpr"], inputs[first:])):
        _tie_all(eqn, old, new)
    return carry


def _cond(eqn, inputs) -> list[Axes]:
    first, *others = (infer(b, inputs[1:]) for b in eqn.params["branches"])
    for out in others:
        for old, new in zip(first, out):
            _tie_all(eqn, old, new)
    return first


def _tie_all(eqn, first: Axes, second: Axes) -> None:
    for a, b in zip(first, second):
        tie(a, b, _along(eqn))


def _body(eqn) -> ClosedJaxpr | Jaxpr:
    return next(p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr))


def _open(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _variables(atoms) -> list:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _along(eqn) -> str:
    return f"`{eqn.primitive.name}` along it"


def _fresh(var, reason: str | None = None) -> Axes:
    return [new_axis(size, reason) for size in getattr(var.aval, "shape", ())]


def _constant(var) -> Axes:
    return _fresh(var, "a constant of the function")


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq
eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg
nextafter not or polygamma population_count pow pvary real reduce_precision rem round
rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""

_CALLS = ("call", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
_CALLS += ("jit", "pjit", "remat", "remat2")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(
        (
            f"reduce_{name}"
            for name in ("sum", "max", "min", "prod", "and", "or", "xor")
        ),
        _reduce,
    ),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    **dict.fromkeys(
        ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "split"),
        _in_place(_parameter("axis")),
    ),
    **dict.fromkeys(("concatenate", "sort"), _in_place(_parameter("dimension"))),
    "rev": _in_place(_parameter("dimensions")),
    **dict.fromkeys(
        ("dynamic_slice", "dynamic_update_slice", "slice"), _in_place(_resized)
    ),
    "pad": _in_place(_padded),
    **dict.fromkeys(
        ("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
        _in_place(_windowed),
    ),
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": lambda eqn, inputs: inputs,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    **dict.fromkeys(_CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
