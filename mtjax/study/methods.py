"""The methods that can be named on the command line."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import optax

import mtjax.balancing as balancing
from mtjax.transforms import sam, samo, scale_by_weighting, task_sam


class Method(NamedTuple):
    """A balancer by name.

    Attributes:
      make: `make(num_tasks, steps_per_epoch) -> balancer`.
      kind: what it looks at: "losses", "losses nearby", "held-out losses", "Gramian" or
        "gradients".
      idea: one line.
      further: how many further batches it needs in every step.
      held_out: whether it needs data that are held out from training.
      optimizer: what stands behind it, made of a learning rate.
    """

    make: Callable[[int, int], optax.GradientTransformationExtraArgs]
    kind: str
    idea: str
    further: int = 0
    held_out: bool = False
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam

    @property
    def needs(self) -> str:
        """What it needs beside a batch, in words; mostly nothing."""
        if self.held_out:
            return "held-out data"
        return f"{self.further} further batches" if self.further else ""


def _method(factory: Callable[..., object], kind: str, make, **needs) -> Method:
    idea = (factory.__doc__ or "").strip().splitlines()[0]
    return Method(make, kind, idea, **needs)


def _of_logs(factory: Callable[[], optax.GradientTransformation], name: str) -> Method:
    def make(num_tasks, steps_per_epoch):
        del num_tasks, steps_per_epoch
        logs = scale_by_weighting(balancing.scale_invariant())
        return optax.chain(logs, factory())

    return Method(make, "Gramian", f"{name} of the logarithms of the losses.")


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
    "rotograd": _method(
        balancing.rotograd, "Gramian", lambda k, n: balancing.rotograd(k)
    ),
    "excess_mtl": _method(
        balancing.excess_mtl, "gradients", lambda k, n: balancing.excess_mtl(k)
    ),
    "pcgrad": _method(balancing.pcgrad, "Gramian", lambda k, n: balancing.pcgrad()),
    "mgda": _method(balancing.mgda, "Gramian", lambda k, n: balancing.mgda()),
    "log_mgda": _of_logs(balancing.mgda, "MGDA"),
    "cr_mogm": _method(
        balancing.cr_mogm,
        "Gramian",
        lambda k, n: balancing.cr_mogm(balancing.mgda(), k),
    ),
    "cagrad": _method(balancing.cagrad, "Gramian", lambda k, n: balancing.cagrad()),
    "log_cagrad": _of_logs(balancing.cagrad, "CAGrad"),
    "imgrad": _method(balancing.imgrad, "Gramian", lambda k, n: balancing.imgrad()),
    "nash_mtl": _method(
        balancing.nash_mtl, "Gramian", lambda k, n: balancing.nash_mtl(k)
    ),
    "upgrad": _method(balancing.upgrad, "Gramian", lambda k, n: balancing.upgrad()),
    "dualproj": _method(
        balancing.dualproj, "Gramian", lambda k, n: balancing.dualproj()
    ),
    "pcd": _method(balancing.pcd, "Gramian", lambda k, n: balancing.pcd(k, 0)),
    "fair_grad": _method(
        balancing.fair_grad, "Gramian", lambda k, n: balancing.fair_grad(k)
    ),
    "gradvac": _method(balancing.gradvac, "Gramian", lambda k, n: balancing.gradvac(k)),
    "imtl_g": _method(balancing.imtl_g, "Gramian", lambda k, n: balancing.imtl_g()),
    "log_imtl_g": _of_logs(balancing.imtl_g, "IMTL-G"),
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
    "metabalance": _method(
        balancing.metabalance, "gradients", lambda k, n: balancing.metabalance(k, 0)
    ),
    "mtadam": _method(
        balancing.mtadam,
        "gradients",
        lambda k, n: balancing.mtadam(k),
        optimizer=optax.sgd,
    ),
    "modo": _method(
        balancing.modo, "Gramian", lambda k, n: balancing.modo(k), further=2
    ),
    "sdmgrad": _method(
        balancing.sdmgrad, "Gramian", lambda k, n: balancing.sdmgrad(k), further=2
    ),
    "auto_lambda": _method(
        balancing.auto_lambda,
        "held-out losses",
        lambda k, n: balancing.auto_lambda(k),
        held_out=True,
    ),
    "moml": _method(
        balancing.moml,
        "held-out losses",
        lambda k, n: balancing.moml(k),
        held_out=True,
    ),
    "forum": _method(
        balancing.forum,
        "held-out losses",
        lambda k, n: balancing.forum(k),
        held_out=True,
    ),
    "sam": _method(
        sam, "losses nearby", lambda k, n: optax.chain(sam(), balancing.equal())
    ),
    "samo": _method(
        samo, "losses nearby", lambda k, n: optax.chain(samo(), balancing.equal())
    ),
    "task_sam": _method(
        task_sam, "losses nearby", lambda k, n: task_sam(balancing.equal())
    ),
}
"""All balancers with their published defaults, in the order of their cost.

`metabalance` and `pcd` serve the first task, `cr_mogm` stands around MGDA, `rotograd`
does without rotations, and the sharpness-aware ones stand before the plain sum.
"""


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
