"""The methods that can be named on the command line."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import optax

import mtjax.balancing as balancing


class Method(NamedTuple):
    """A balancer by name.

    Attributes:
      make: `make(num_tasks, steps_per_epoch) -> balancer`.
      kind: what it looks at: "losses", "Gramian" or "gradients".
      idea: one line.
    """

    make: Callable[[int, int], optax.GradientTransformationExtraArgs]
    kind: str
    idea: str


def _idea(factory: Callable[..., object]) -> str:
    return (factory.__doc__ or "").strip().splitlines()[0]


def _method(factory, kind, make) -> Method:
    return Method(make, kind, _idea(factory))


METHODS: dict[str, Method] = {
    "equal": _method(balancing.equal, "losses", lambda k, n: balancing.equal()),
    "uw": _method(balancing.uw, "losses", lambda k, n: balancing.uw(k)),
    "dwa": _method(balancing.dwa, "losses", lambda k, n: balancing.dwa(k, n)),
    "famo": _method(balancing.famo, "losses", lambda k, n: balancing.famo(k)),
    "scale_invariant": _method(
        balancing.scale_invariant, "losses", lambda k, n: balancing.scale_invariant()
    ),
    "gls": _method(balancing.gls, "losses", lambda k, n: balancing.gls()),
    "rlw": _method(balancing.rlw, "losses", lambda k, n: balancing.rlw()),
    "imtl_l": _method(balancing.imtl_l, "losses", lambda k, n: balancing.imtl_l(k)),
    "stch": _method(
        balancing.stch, "losses", lambda k, n: balancing.stch(k, warmup_steps=4 * n)
    ),
    "uw_so": _method(balancing.uw_so, "losses", lambda k, n: balancing.uw_so()),
    "cosmos": _method(balancing.cosmos, "losses", lambda k, n: balancing.cosmos()),
    "pbi": _method(balancing.pbi, "losses", lambda k, n: balancing.pbi()),
    "go4align": _method(
        balancing.go4align, "losses", lambda k, n: balancing.go4align(k, min(k, 2))
    ),
    "gradnorm": _method(
        balancing.gradnorm, "Gramian", lambda k, n: balancing.gradnorm(k)
    ),
    "grad_norm_weights": _method(
        balancing.grad_norm_weights,
        "Gramian",
        lambda k, n: balancing.grad_norm_weights(k),
    ),
    "excess_mtl": _method(
        balancing.excess_mtl, "gradients", lambda k, n: balancing.excess_mtl(k)
    ),
    "pcgrad": _method(balancing.pcgrad, "Gramian", lambda k, n: balancing.pcgrad()),
    "mgda": _method(balancing.mgda, "Gramian", lambda k, n: balancing.mgda()),
    "cagrad": _method(balancing.cagrad, "Gramian", lambda k, n: balancing.cagrad()),
    "nash_mtl": _method(
        balancing.nash_mtl, "Gramian", lambda k, n: balancing.nash_mtl(k)
    ),
    "upgrad": _method(balancing.upgrad, "Gramian", lambda k, n: balancing.upgrad()),
    "dualproj": _method(
        balancing.dualproj, "Gramian", lambda k, n: balancing.dualproj()
    ),
    "fair_grad": _method(
        balancing.fair_grad, "Gramian", lambda k, n: balancing.fair_grad(k)
    ),
    "gradvac": _method(balancing.gradvac, "Gramian", lambda k, n: balancing.gradvac(k)),
    "imtl_g": _method(balancing.imtl_g, "Gramian", lambda k, n: balancing.imtl_g()),
    "config": _method(balancing.config, "Gramian", lambda k, n: balancing.config()),
    "aligned_mtl": _method(
        balancing.aligned_mtl, "Gramian", lambda k, n: balancing.aligned_mtl()
    ),
    "krum": _method(balancing.krum, "Gramian", lambda k, n: balancing.krum()),
    "moco": _method(balancing.moco, "gradients", lambda k, n: balancing.moco(k)),
    "imtl": _method(balancing.imtl, "Gramian", lambda k, n: balancing.imtl(k)),
    "conic_grad": _method(
        balancing.conic_grad, "Gramian", lambda k, n: balancing.conic_grad()
    ),
    "graddrop": _method(
        balancing.graddrop, "gradients", lambda k, n: balancing.graddrop()
    ),
    "trimmed_mean": _method(
        balancing.trimmed_mean, "gradients", lambda k, n: balancing.trimmed_mean()
    ),
    "db_mtl": _method(balancing.db_mtl, "gradients", lambda k, n: balancing.db_mtl(k)),
}
"""All balancers with their published defaults, in the order of their cost."""


def check_methods(names: tuple[str, ...]) -> None:
    """Checks names of methods.

    Raises:
      ValueError: if there is none, one is unknown, or one is named twice.
    """
    if not names:
        raise ValueError(f"`methods` must name at least one of {', '.join(METHODS)}.")
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"`methods` must be among {', '.join(METHODS)}, got {name!r}; "
                f"{hint}`mtjax list` explains them."
            )
        if names.count(name) > 1:
            raise ValueError(
                f"`methods` must name each method once, got {name!r} twice."
            )
