"""Every balancer, with what is claimed of it. The one list that tests run over."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

import mtjax

Factory = Callable[..., optax.GradientTransformationExtraArgs]


@dataclass(frozen=True, eq=False)
class Method:
    """One row.

    Attributes:
      label: the call, as in the documentation.
      factory: the function whose docstring describes it.
      make: the transform for a number of tasks.
      calls: views of `TaskGradients` per step: pull, Gramian, stack and inner.
      evaluations: how often it evaluates the losses again.
      losses: whether it needs `losses`.
      resampled: how many further batches it needs.
      held_out: passes over held-out data per step, if it needs any.
      one_task: what becomes of a single gradient of norm 2.
      claims: measured properties, see `properties.py`.
    """

    label: str
    factory: Factory
    make: Callable[[int], optax.GradientTransformationExtraArgs]
    claims: dict[str, str]
    calls: tuple[str, ...] = ("gramian", "pull")
    evaluations: int = 0
    losses: bool = False
    resampled: int = 0
    held_out: str = ""
    one_task: float = 1.0


def claims(
    conflict: str = "no",
    stationary: str = "no",
    scale_all: str = "1",
    scale_one: str = "changes",
    order: str = "no matter",
    random: str = "no",
    own: str = "own gradient",
    linear: str = "no",
    span: str = "yes",
) -> dict[str, str]:
    return {
        "conflict": conflict,
        "stationary": stationary,
        "scale_all": scale_all,
        "scale_one": scale_one,
        "order": order,
        "random": random,
        "own": own,
        "linear": linear,
        "span": span,
    }


weighted = functools.partial(claims, own="weighted", linear="yes")

METHODS = (
    Method(
        "equal()",
        mtjax.equal,
        lambda k: mtjax.equal(),
        claims(linear="yes"),
        ("pull",),
    ),
    Method(
        'equal(reduction="mean")',
        mtjax.equal,
        lambda k: mtjax.equal(reduction="mean"),
        weighted(),
        ("pull",),
    ),
    Method(
        "constant([0.5, 1, …])",
        mtjax.constant,
        lambda k: mtjax.constant([0.5 * (i + 1) for i in range(k)]),
        weighted(order="matters"),
        ("pull",),
        one_task=0.5,
    ),
    Method(
        "uw(K)",
        mtjax.uw,
        lambda k: mtjax.uw(k, optimizer=optax.adam(0.1)),
        weighted(scale_all="other"),
        ("pull",),
        losses=True,
        one_task=0.5,
    ),
    Method(
        "dwa(K, n)",
        mtjax.dwa,
        lambda k: mtjax.dwa(k, 1),
        weighted(),
        ("pull",),
        losses=True,
    ),
    Method(
        "famo(K)",
        mtjax.famo,
        lambda k: mtjax.famo(k),
        weighted(scale_one="same direction"),
        ("pull",),
        losses=True,
    ),
    Method(
        "famo(K, optimizer=…)",
        mtjax.famo,
        lambda k: mtjax.famo(k, optimizer=optax.identity()),
        weighted(scale_one="same direction"),
        ("pull",),
        evaluations=1,
        losses=True,
    ),
    Method(
        "scale_invariant()",
        mtjax.scale_invariant,
        lambda k: mtjax.scale_invariant(),
        weighted(scale_all="0", scale_one="same update"),
        ("pull",),
        losses=True,
    ),
    Method(
        "gls()",
        mtjax.gls,
        lambda k: mtjax.gls(),
        weighted(scale_one="same direction"),
        ("pull",),
        losses=True,
    ),
    Method(
        "rlw()",
        mtjax.rlw,
        lambda k: mtjax.rlw(),
        weighted(order="matters", random="yes"),
        ("pull",),
    ),
    Method(
        "imtl_l(K)",
        mtjax.imtl_l,
        lambda k: mtjax.imtl_l(k, optimizer=optax.adam(0.1)),
        weighted(scale_all="other"),
        ("pull",),
        losses=True,
    ),
    Method(
        "stch(K, warmup_steps=n)",
        mtjax.stch,
        lambda k: mtjax.stch(k, warmup_steps=1),
        weighted(scale_all="0", scale_one="same update"),
        ("pull",),
        losses=True,
    ),
    Method(
        "uw_so()",
        mtjax.uw_so,
        lambda k: mtjax.uw_so(),
        weighted(scale_all="other"),
        ("pull",),
        losses=True,
    ),
    Method(
        "cosmos()",
        mtjax.cosmos,
        lambda k: mtjax.cosmos(),
        weighted(scale_all="other"),
        ("pull",),
        losses=True,
    ),
    Method(
        "pbi()",
        mtjax.pbi,
        lambda k: mtjax.pbi(),
        weighted(),
        ("pull",),
        losses=True,
    ),
    Method(
        "gradnorm(K)",
        mtjax.gradnorm,
        lambda k: mtjax.gradnorm(k),
        weighted(),
        losses=True,
    ),
    Method(
        "metabalance(K, target)",
        mtjax.metabalance,
        lambda k: mtjax.metabalance(k, 0),
        claims(order="matters", span="no"),
        ("stack",),
    ),
    Method(
        "excess_mtl(K)",
        mtjax.excess_mtl,
        lambda k: mtjax.excess_mtl(k),
        claims(own="weighted"),
        ("stack",),
    ),
    Method(
        "go4align(K, 2)",
        mtjax.go4align,
        lambda k: mtjax.go4align(k, min(k, 2)),
        weighted(scale_all="other"),
        ("pull",),
        losses=True,
    ),
    Method(
        "grad_norm_weights(K, update_every=2)",
        mtjax.grad_norm_weights,
        lambda k: mtjax.grad_norm_weights(k, update_every=2),
        claims(own="weighted"),
    ),
    Method(
        "ntk_weights(K, traces_fn)",
        mtjax.ntk_weights,
        lambda k: mtjax.ntk_weights(k, lambda params: jnp.arange(1.0, k + 1)),
        weighted(order="matters"),
        ("pull",),
    ),
    Method(
        "pcgrad()",
        mtjax.pcgrad,
        lambda k: mtjax.pcgrad(),
        claims(conflict="of two tasks", order="matters", random="yes"),
    ),
    Method(
        "graddrop()",
        mtjax.graddrop,
        lambda k: mtjax.graddrop(),
        claims(span="no", random="yes"),
        ("stack",),
    ),
    Method(
        "mgda()",
        mtjax.mgda,
        lambda k: mtjax.mgda(),
        claims(conflict="yes", stationary="also where some tasks are"),
    ),
    Method(
        'mgda(normalize="l2")',
        mtjax.mgda,
        lambda k: mtjax.mgda(normalize="l2"),
        claims(),
    ),
    Method(
        "cagrad()",
        mtjax.cagrad,
        lambda k: mtjax.cagrad(),
        claims(),
        one_task=1.2,
    ),
    Method(
        "nash_mtl(K)",
        mtjax.nash_mtl,
        lambda k: mtjax.nash_mtl(k),
        claims(
            conflict="yes", stationary="yes", scale_all="0", scale_one="same update"
        ),
        one_task=0.5,
    ),
    Method(
        "fair_grad(K)",
        mtjax.fair_grad,
        lambda k: mtjax.fair_grad(k),
        claims(
            conflict="yes", stationary="yes", scale_all="0", scale_one="same update"
        ),
        one_task=0.5,
    ),
    Method(
        "fair_grad(K, alpha=2)",
        mtjax.fair_grad,
        lambda k: mtjax.fair_grad(k, alpha=2.0),
        claims(conflict="yes", stationary="yes", scale_all="other"),
        one_task=0.25 ** (2 / 3),
    ),
    Method(
        "dualproj()",
        mtjax.dualproj,
        lambda k: mtjax.dualproj(),
        claims(conflict="yes", stationary="yes"),
    ),
    Method(
        "upgrad()",
        mtjax.upgrad,
        lambda k: mtjax.upgrad(),
        claims(conflict="yes", stationary="yes"),
    ),
    Method(
        "gradvac(K)",
        mtjax.gradvac,
        lambda k: mtjax.gradvac(k),
        claims(conflict="of two tasks", order="matters", random="yes"),
    ),
    Method(
        "imtl_g()",
        mtjax.imtl_g,
        lambda k: mtjax.imtl_g(),
        claims(
            conflict="yes",
            stationary="also where some tasks are",
            scale_one="same direction",
        ),
    ),
    Method(
        "config()",
        mtjax.config,
        lambda k: mtjax.config(),
        claims(conflict="yes", scale_one="same direction"),
    ),
    Method(
        "aligned_mtl()",
        mtjax.aligned_mtl,
        lambda k: mtjax.aligned_mtl(),
        claims(),
    ),
    Method(
        'aligned_mtl(scale_mode="rmse")',
        mtjax.aligned_mtl,
        lambda k: mtjax.aligned_mtl(scale_mode="rmse"),
        claims(),
    ),
    Method(
        "krum()",
        mtjax.krum,
        lambda k: mtjax.krum(),
        claims(scale_one="same update"),
    ),
    Method(
        "trimmed_mean()",
        mtjax.trimmed_mean,
        lambda k: mtjax.trimmed_mean(),
        claims(span="no"),
        ("stack",),
    ),
    Method(
        "db_mtl(K)",
        mtjax.db_mtl,
        lambda k: mtjax.db_mtl(k),
        claims(
            conflict="of two tasks",
            scale_all="0",
            scale_one="same update",
            own="weighted",
        ),
        ("stack",),
        losses=True,
        one_task=0.1,
    ),
    Method(
        "imtl(K)",
        mtjax.imtl,
        lambda k: mtjax.imtl(k),
        claims(
            conflict="yes",
            stationary="also where some tasks are",
            scale_all="other",
            scale_one="same direction",
            own="weighted",
        ),
        losses=True,
    ),
    Method(
        "cr_mogm(mgda(), K)",
        mtjax.cr_mogm,
        lambda k: mtjax.cr_mogm(mtjax.mgda(), k),
        claims(conflict="yes", stationary="also where some tasks are"),
    ),
    Method(
        "moco(K)",
        mtjax.moco,
        lambda k: mtjax.moco(k),
        claims(scale_all="other"),
        ("stack",),
        one_task=0.5,
    ),
    Method(
        "modo(K)",
        mtjax.modo,
        lambda k: mtjax.modo(k),
        claims(scale_all="other"),
        ("pull", "inner", "pull"),
        resampled=2,
    ),
    Method(
        "sdmgrad(K)",
        mtjax.sdmgrad,
        lambda k: mtjax.sdmgrad(k),
        claims(),
        ("pull", "inner", "pull", "inner", "pull"),
        resampled=2,
    ),
    Method(
        "conic_grad()",
        mtjax.conic_grad,
        lambda k: mtjax.conic_grad(),
        claims(conflict="of two tasks"),
    ),
    Method(
        "rotograd(K)",
        mtjax.rotograd,
        lambda k: mtjax.rotograd(k),
        claims(conflict="of two tasks", scale_one="same direction"),
    ),
)

TASKS = tuple("abcdefghijklmnopqrstuvwxyz")


def task_names(num_tasks):
    return TASKS[:num_tasks]


@functools.cache
def jitted(method: Method, num_tasks: int):
    """The update as one compiled function of everything that it may depend on.

    Where losses are evaluated again they come out one tenth lower, with the gradients
    that were given; further batches have these gradients too.
    """
    tx = method.make(num_tasks)

    @jax.jit
    def update(grads, state, losses, present, key, after):
        names = task_names(num_tasks)
        slopes = mtjax.TaskGradients.from_stacked(grads, names)

        def losses_fn(params):
            steep = slopes.inner(params)
            values = after + (steep - jax.lax.stop_gradient(steep))
            return dict(zip(names, values, strict=True))

        return tx.update(
            grads,
            state,
            jax.tree.map(lambda g: g[0], grads),
            losses=dict(zip(names, losses, strict=True)),
            present=present,
            key=key,
            losses_fn=losses_fn,
            validation_losses_fn=losses_fn,
            resampled=[slopes, slopes],
        )

    def call(grads, state=None, losses=None, present=None, key=None, after=None):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        if state is None:
            state = tx.init(jax.tree.map(lambda g: g[0], grads))
        losses = jnp.ones(num_tasks) if losses is None else jnp.asarray(losses)
        losses = losses.astype(jnp.float32)
        present = jnp.ones(num_tasks, bool) if present is None else present
        key = jax.random.key(0) if key is None else key
        after = 0.9 * losses if after is None else jnp.asarray(after, jnp.float32)
        return update(grads, state, losses, jnp.asarray(present), key, after)

    return call
