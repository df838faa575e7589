"""Every message names the argument, the rule, what was found and what to do."""

import jax.numpy as jnp
import optax
import pytest

import mtjax
from mtjax.balancing.balancer import check_choice, check_preference

BAD_HYPERPARAMETERS = [
    (lambda: mtjax.constant([1.0, -2.0]), "`weights` must be", "-2.0"),
    (lambda: mtjax.constant({"a": float("nan")}), "`weights` must be", "nan"),
    (lambda: mtjax.constant([]), "`weights` must be", r"\[\]"),
    (lambda: mtjax.uw(0), "`num_tasks` of `uw` must be at least 1", "0"),
    (lambda: mtjax.dwa(2, 0), "`steps_per_epoch` must be at least 1", "0"),
    (lambda: mtjax.dwa(2, 1, temperature=0.0), "`temperature` must be positive", "0"),
    (lambda: mtjax.famo(2, learning_rate=0.0), "`learning_rate` must be positive", "0"),
    (lambda: mtjax.famo(2, eps=-1.0), "`eps` must be positive", "-1"),
    (lambda: mtjax.famo(2, weight_decay=-1.0), "`weight_decay` must not be", "-1"),
    (lambda: mtjax.graddrop(leak=[0.5, 2.0]), r"`leak` must be in \[0, 1\]", "2.0"),
    (lambda: mtjax.cagrad(c=-0.5), "`c` must not be negative", "-0.5"),
    (lambda: mtjax.cagrad(rescale=3), "`rescale` must be 0, 1 or 2", "3"),
    (lambda: mtjax.imgrad(c=-0.5), "`c` must not be negative", "-0.5"),
    (lambda: mtjax.imgrad(rescale=4), "`rescale` must be 0, 1 or 2", "4"),
    (lambda: mtjax.pcd(2, 2), "`primary` must be a task's name or a place", "2"),
    (lambda: mtjax.pcd(2, 0, tau=1.5), r"`tau` must be in \[0, 1\]", "1.5"),
    (lambda: mtjax.pcd(2, 0, tau=[0.1, 0.2]), "`tau` must be a number or.*1 sec", "2,"),
    (lambda: mtjax.pcd(2, 0, beta=1.0), r"`beta` must be in \[0, 1\)", "1.0"),
    (lambda: mtjax.pcd(2, 0, eps=-1.0), "`eps` must not be negative", "-1"),
    (lambda: mtjax.nash_mtl(2, max_norm=0.0), "`max_norm` must be positive", "0"),
    (lambda: mtjax.nash_mtl(2, update_every=0), "`update_every` must be at", "0"),
    (lambda: mtjax.upgrad(reg_eps=0.0), "`reg_eps` must be positive", "0"),
    (lambda: mtjax.upgrad(preference=[-1.0]), "`preference` must not be nega", "-1"),
    (lambda: mtjax.dualproj(preference=[1.0, -2.0]), "`preference` must not be", "-2"),
    (lambda: mtjax.cosmos(preference=[-3.0, 1.0]), "`preference` must not be", "-3"),
    (lambda: mtjax.pbi(preference=[-4.0, 1.0]), "`preference` must not be neg", "-4"),
    (lambda: check_preference([1.0, float("inf")]), "`preference` must be fi", "inf"),
    (lambda: check_preference([0.0, 0.0]), "`preference` must have a positive", "0.0"),
    (lambda: check_preference(1.0), "`preference` must have one entry", r"\(\)"),
    (lambda: check_choice("form", "l1", ("l2", "none")), "`form` must be one of", "l1"),
    (lambda: mtjax.clip_per_task(0.0), "`max_norm` must be positive", "0"),
]


@pytest.mark.parametrize(("make", "rule", "found"), BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(make, rule, found):
    with pytest.raises(ValueError, match=f"(?s){rule}.*got.*{found}"):
        make()


def named(**losses):
    return {name: jnp.asarray(loss) for name, loss in losses.items()}


BAD_CALLS = [
    (lambda: mtjax.uw(2), {}, "`uw` needs the extra argument `losses`.*losses=losses"),
    (
        lambda: mtjax.mgda(normalize="loss"),
        {},
        "`mgda` needs the extra argument `losses`",
    ),
    (
        lambda: mtjax.famo(2, optimizer=optax.identity()),
        {"losses": jnp.ones(2)},
        "`famo` needs the extra argument `losses_fn`",
    ),
    (
        lambda: mtjax.famo(2, optimizer=optax.identity()),
        {"losses": jnp.ones(2), "losses_fn": lambda p: jnp.ones(2)},
        "`famo` with an `optimizer` needs `params`",
    ),
    (
        lambda: mtjax.uw(3),
        {"losses": jnp.ones(2)},
        "`num_tasks` of `uw` must be the number of tasks, got 3 for the 2 tasks",
    ),
    (
        lambda: mtjax.uw(2),
        {"losses": jnp.ones(3)},
        r"`losses` must be one scalar for each of the tasks.*got shape \(3,\)",
    ),
    (
        lambda: mtjax.uw(2),
        {"losses": named(a=1.0, b=1.0, c=1.0)},
        "`tasks` must name the 2 tasks.*'a', 'b', 'c'",
    ),
    (
        lambda: mtjax.constant({"a": 1.0, "depth": 1.0}),
        {"losses": named(a=1.0, b=1.0)},
        r"`weights` must name exactly the tasks \('a', 'b'\), got.*'depth'",
    ),
    (
        lambda: mtjax.graddrop(leak=[0.0, 0.0, 0.0]),
        {},
        "`leak` must have one entry for each of the tasks.*got 3",
    ),
    (
        lambda: mtjax.upgrad(preference=[1.0]),
        {},
        r"`preference` must have one entry for each of the 2 tasks, got shape \(1,\)",
    ),
    (
        lambda: mtjax.pcd(2, "depth"),
        {"losses": named(a=1.0, b=1.0)},
        r"`primary` must be one of \('a', 'b'\), got 'depth'",
    ),
    (
        mtjax.equal,
        {"present": jnp.ones(3, bool)},
        r"`present` must have one entry for each of the tasks.*got shape \(3,\)",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD_CALLS)
def test_bad_calls(make, arguments, message):
    tx = make()
    grads = jnp.eye(2)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tx.update(grads, tx.init(grads[0]), **arguments)


def test_unknown_task_in_losses():
    def losses_fn(params):
        return {"a": params.sum(), "b": (params**2).sum()}

    _, grads = mtjax.value_and_task_grads(losses_fn)(jnp.ones(2))
    tx = mtjax.uw(2)
    with pytest.raises(
        ValueError, match=r"`losses` must have exactly.*'a', 'b'.*got.*'c'"
    ):
        tx.update(grads, tx.init(None), losses=named(a=1.0, c=1.0))


def test_wrong_leading_axis():
    tx = mtjax.equal()
    with pytest.raises(ValueError, match=r"leading task axis.*got \{'': \(\)\}.*stack"):
        tx.update(jnp.array(1.0), tx.init(None))
    with pytest.raises(ValueError, match=r"`tasks` must name the 3 tasks .*'a', 'b'"):
        tx.update(jnp.eye(3), tx.init(None), losses=named(a=1.0, b=1.0))


def test_plain_gradients_must_share_a_task_axis():
    tx = mtjax.equal()
    with pytest.raises(ValueError, match=r"leading task axis.*'b': \(3,\)"):
        tx.update({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, tx.init(None))


def test_task_gradients_do_not_pass_for_an_update():
    _, grads = mtjax.value_and_task_grads(lambda p: {"a": p.sum()})(jnp.ones(2))
    adam = optax.adam(0.1)
    with pytest.raises(TypeError, match="TaskGradients"):
        adam.update(grads, adam.init(jnp.ones(2)))
