"""Every balancer, with what is claimed of it. The one list that tests run over."""

import functools

import jax
import jax.numpy as jnp

import mtjax
from tests.balancing.compositions import COMPOSITIONS
from tests.balancing.loss_weightings import LOSS_WEIGHTINGS
from tests.balancing.method import Method, claims, weighted

METHODS = (
    *LOSS_WEIGHTINGS,
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
        "imgrad()",
        mtjax.imgrad,
        lambda k: mtjax.imgrad(),
        claims(),
        one_task=1.2,
    ),
    Method(
        "pcd(K, primary)",
        mtjax.pcd,
        # The loss that is multiplied is the primary task's; of those of the others the
        # update itself does not depend.
        lambda k: mtjax.pcd(k, min(k, 2) - 1),
        claims(conflict="yes", scale_one="same direction", order="matters"),
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
        claims(conflict="yes", scale_all="other"),
        one_task=0.25 ** (2 / 3),
    ),
    Method(
        "dualproj()",
        mtjax.dualproj,
        lambda k: mtjax.dualproj(),
        claims(stationary="yes"),
    ),
    Method(
        "dualproj(reg_eps=1e-7)",
        mtjax.dualproj,
        lambda k: mtjax.dualproj(reg_eps=1e-7),
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
        "auto_lambda(K)",
        mtjax.auto_lambda,
        lambda k: mtjax.auto_lambda(k),
        weighted(),
        ("pull", "inner", "pull"),
        held_out="1 backward",
        one_task=0.1001,
    ),
    Method(
        "moml(K)",
        mtjax.moml,
        lambda k: mtjax.moml(k),
        weighted(),
        ("pull", "inner", "inner", "pull"),
        held_out="K backward",
    ),
    Method(
        "forum(K)",
        mtjax.forum,
        lambda k: mtjax.forum(k),
        claims(own="weighted", scale_all="other"),
        ("pull", "pull"),
        evaluations=5,
        losses=True,
        held_out="K + 1 backward",
        one_task=0.5,
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
    Method(
        "mtadam(K)",
        mtjax.mtadam,
        lambda k: mtjax.mtadam(k),
        claims(
            conflict="of two tasks",
            scale_all="0",
            scale_one="same update",
            own="weighted",
            span="no",
        ),
        ("stack",),
        one_task=0.5,
    ),
    *COMPOSITIONS,
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
