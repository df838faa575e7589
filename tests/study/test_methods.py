"""What methods ask for beside a batch reaches them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import mtjax
from mtjax.balancing import balancer
from mtjax.data import Problem, Task
from mtjax.study.methods import METHODS, Method
from mtjax.study.setting import Setting
from mtjax.study.step import make_step
from mtjax.study.sweep import Sweep
from mtjax.training import TrainState

TASKS = (
    Task("one", "regression", None, "rmse", False),
    Task("two", "regression", None, "rmse", False),
)
HELD_OUT = np.arange(43) % 5 == 0


def make_setting(size: int = 43) -> Setting:
    """Targets are zero in the data that are trained on and ten in those held out."""
    x = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
    y = np.where(HELD_OUT[:size], 10.0, 0.0).astype(np.float32)
    part = {"inputs": x, "targets": {"one": y, "two": y}, "mask": None}
    return Setting(Problem("tiny", TASKS, part, part, part, "", ""), TASKS, 8)


def first_step(setting: Setting, method: Method):
    """Parameters and the balancer's state after one step."""
    tx = optax.chain(method.make(2, 3), method.optimizer(1e-2))
    params = setting.init(jax.random.key(0))
    state = TrainState.create(params, tx, key=jax.random.key(1))
    step = make_step(setting, method, tx)
    return step, state, setting.data_for(method)


class Seen(NamedTuple):
    """What the last step brought."""

    squares: Array  # (batches, 2, 2) inner products of the tasks' gradients
    held_out: Array  # () the first held-out loss


def witness(further: int, held_out: bool) -> Method:
    """The plain sum, which remembers what it was given."""

    def init(params):
        del params
        return Seen(jnp.zeros((1 + further, 2, 2)), jnp.zeros(()))

    def update(grads, state, step):
        squares = jnp.stack([g.gramian() for g in (grads, *step.resampled)])
        loss = state.held_out
        if step.validation_losses_fn is not None:
            loss = step.validation_losses_fn(step.params)["one"]
        return grads.combine(), Seen(squares, loss)

    make = lambda k, n: balancer("witness", init, update)
    return Method(make, "losses", "looks on", further=further, held_out=held_out)


def test_further_batches_are_others():
    step, state, data = first_step(make_setting(), witness(2, held_out=False))
    squares = step(state, data)[0].opt_state[0].squares
    assert squares.shape == (3, 2, 2)
    assert len(np.unique(np.asarray(squares[:, 0, 0]))) == 3


def test_nothing_is_drawn_that_is_not_asked_for():
    step, state, data = first_step(make_setting(), witness(0, held_out=False))
    after, metrics = step(state, data)
    assert after.opt_state[0].squares.shape == (1, 2, 2)
    assert after.opt_state[0].held_out == 0.0
    assert data[1] is None
    assert len(data[0]["inputs"]) == 43
    assert float(metrics["losses"]["one"]) > 5.0  # some of all are in the batch


def test_held_out_data_are_not_trained_on():
    setting = make_setting()
    step, state, (train, held_out) = first_step(setting, witness(0, held_out=True))
    np.testing.assert_array_equal(train["targets"]["one"], np.zeros(34))
    np.testing.assert_array_equal(held_out["targets"]["one"], np.full(9, 10.0))
    rows = np.concatenate([train["inputs"], held_out["inputs"]])
    everything = np.asarray(setting.data["inputs"])
    np.testing.assert_array_equal(
        np.unique(rows, axis=0), np.unique(everything, axis=0)
    )
    after, metrics = step(state, (train, held_out))
    assert float(metrics["losses"]["one"]) < 5.0
    assert float(after.opt_state[0].held_out) > 50.0


def test_one_example_cannot_be_held_out_and_trained_on():
    with pytest.raises(ValueError, match="at least 2 training examples, got 1"):
        make_setting(1).data_for(METHODS["moml"])


def test_needs_in_words():
    named = {name: method.needs for name, method in METHODS.items() if method.needs}
    assert named == {
        "modo": "2 further batches",
        "sdmgrad": "2 further batches",
        "auto_lambda": "held-out data",
        "moml": "held-out data",
        "forum": "held-out data",
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gets_what_it_needs(name):
    step, state, data = first_step(make_setting(), METHODS[name])
    after, _ = jax.eval_shape(step, state, data)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("name", ["modo", "forum", "mtadam"])
def test_lanes_learn_at_their_own_rates(name):
    """By their own optimizer, which for MTAdam is the last step of SGD."""
    rates = (0.0, 1e-3, 2e-3)
    grid = {"learning_rates": rates, "seeds": 1, "steps_per_epoch": 3}
    sweep = Sweep(make_setting(), name, **grid)
    before = jax.tree.leaves(sweep.fresh_state().params)
    after = jax.tree.leaves(sweep.advance(sweep.fresh_state(), 1).params)
    moved = [np.asarray(b - a) for a, b in zip(before, after)]
    assert all(np.all(m[0] == 0) for m in moved)
    assert any(np.any(m[1] != 0) for m in moved)
    for m in moved:
        np.testing.assert_allclose(m[2], 2 * m[1], rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_log_variants_do_not_know_the_units_of_losses():
    losses, grads = jnp.array([2.0, 0.5]), jnp.array([[1.0, 2.0], [3.0, -1.0]])
    factors = jnp.array([1.0, 100.0])

    def update(name, losses, grads):
        tx = METHODS[name].make(2, 3)
        return tx.update(grads, tx.init(grads[0]), losses=losses)[0]

    for name in ("log_mgda", "log_cagrad", "log_imtl_g"):
        rescaled = update(name, factors * losses, factors[:, None] * grads)
        expected = update(name, losses, grads)
        np.testing.assert_allclose(rescaled, expected, rtol=1e-4)
    logs = grads / losses[:, None]
    mgda = mtjax.mgda()
    expected = mgda.update(logs, mgda.init(grads[0]))[0]
    np.testing.assert_allclose(update("log_mgda", losses, grads), expected, rtol=1e-6)
