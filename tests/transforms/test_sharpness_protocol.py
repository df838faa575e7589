"""What the sharpness-aware transforms promise around every balancer, and in a step."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import mtjax
from mtjax.training import TrainState, make_train_step
from tests.balancing import model
from tests.balancing.catalogue import METHODS

SIZE, KEY = 3, jax.random.key(3)
SPLIT, REPLICATED = PartitionSpec("data"), PartitionSpec()
RHO = 0.3
TRANSFORMS = {
    "task_sam": lambda base, rho, **options: mtjax.task_sam(
        base, rho_shared=rho, rho_own=rho, adaptive=False, **options
    ),
    "sam": lambda base, rho, **options: optax.chain(
        mtjax.sam(rho=rho, **options), base
    ),
    "samo": lambda base, rho, **options: optax.chain(
        mtjax.samo(rho=rho, **options), base
    ),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)

# Convex, not quadratic about the same point, and cheap to compile.
CENTRES = np.random.default_rng(1).standard_normal((SIZE, 4)).astype(np.float32)


def losses_fn(params):
    return {
        t: 0.5 + jnp.sum(jnp.cosh(params["trunk"] - c)) + params["own"][t] ** 2
        for t, c in zip(model.NAMES, jnp.asarray(CENTRES), strict=True)
    }


PARAMS = {
    "trunk": jnp.array([0.3, -0.5, 1.0, 0.1]),
    "own": {t: jnp.array(0.7) for t in model.NAMES},
}


@functools.cache
def compiled(method):
    """The balancer, and what is wrapped around it, as one program."""
    base = method.make(SIZE)
    # Relative to parameters that are zero there is no perturbation.
    transforms = {
        "base": base,
        "task_sam": mtjax.task_sam(base, rho_shared=RHO, rho_own=RHO),
        "sam": optax.chain(mtjax.sam(rho=RHO, adaptive=True), base),
    }

    @jax.jit
    def update(states, params, present):
        losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
        further = {"validation_losses_fn": losses_fn, "resampled": [grads, grads]}
        return {
            name: tx.update(
                grads,
                states[name],
                params,
                losses=losses,
                losses_fn=losses_fn,
                present=present,
                key=KEY,
                **further,
            )
            for name, tx in transforms.items()
        }

    return update, {name: tx.init(PARAMS) for name, tx in transforms.items()}


QUICK = ("equal()", "uw(K)", "pcgrad()", "mgda()", "nash_mtl(K)", "graddrop()")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, id=m.label, marks=[] if m.label in QUICK else pytest.mark.slow)
        for m in METHODS
    ],
)
def test_around_every_balancer(method):
    if method.resampled:
        pytest.skip("needs further batches, of which there are no flat parts")
    if method.factory is mtjax.forum:
        pytest.skip("moves along held-out losses, which have no flat parts")
    update, states = compiled(method)
    everyone = jnp.ones(SIZE, bool)
    unmoved = update(states, optax.tree.zeros_like(PARAMS), everyone)
    found = update(states, PARAMS, everyone)
    nobody = update(states, PARAMS, ~everyone)
    for name in ("task_sam", "sam"):
        # No perturbation, no flat parts: the balancer itself.
        chex.assert_trees_all_close(
            unmoved[name][0], unmoved["base"][0], rtol=1e-3, atol=1e-4
        )
        updates, _ = found[name]
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
        chex.assert_tree_all_finite(updates)
        differ = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)), updates, found["base"][0]
        )
        assert any(jax.tree.leaves(differ))
        updates, state = nobody[name]
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))
        old, new = model.raw(states[name]), model.raw(state)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if a.shape == (SIZE,):
                np.testing.assert_array_equal(a, b)


@each_transform
@pytest.mark.parametrize("base", [mtjax.pcgrad, mtjax.graddrop])
def test_zero_radius_is_the_balancer(name, base):
    losses, grads = mtjax.value_and_task_grads(losses_fn)(PARAMS)
    found, expected = (
        tx.update(
            grads, tx.init(PARAMS), PARAMS, losses=losses, losses_fn=losses_fn, key=KEY
        )[0]
        for tx in (TRANSFORMS[name](base(), 0.0), base())
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@each_transform
def test_absent_task_is_as_if_it_did_not_exist(name):
    tx = TRANSFORMS[name](mtjax.mgda(), RHO)

    @functools.partial(jax.jit, static_argnums=0)
    def update(tasks, present):
        fn = lambda p: {t: losses_fn(p)[t] for t in tasks}
        losses, grads = mtjax.value_and_task_grads(fn)(PARAMS)
        # Evaluated again, the loss of an absent task may be anything.
        again = lambda p: {t: v * (1.0 if t in "ab" else 1e6) for t, v in fn(p).items()}
        return tx.update(
            grads,
            tx.init(PARAMS),
            PARAMS,
            losses=losses,
            losses_fn=again,
            present=present,
            key=KEY,
        )[0]

    three = update("abc", jnp.array([True, True, False]))
    assert float(three["own"].pop("c")) == 0.0
    two = update("ab", jnp.array([True, True]))
    two["own"].pop("c")
    chex.assert_trees_all_close(three, two, rtol=1e-4, atol=1e-6)


@each_transform
def test_keeps_bfloat16_and_takes_stacked_gradients(name):
    tx = TRANSFORMS[name](mtjax.pcgrad(), RHO)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
    for given in (grads, grads.stack()):
        updates, _ = tx.update(
            given, tx.init(params), params, losses=losses, losses_fn=losses_fn, key=KEY
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_tree_all_finite(updates)


def test_samo_with_no_guess_is_one_direction_for_all():
    """Shared parameters go uphill of the sum, each task's own uphill of its loss."""
    tx = optax.chain(mtjax.samo(rho=RHO, beta=0.0), mtjax.equal())
    _, grads = mtjax.value_and_task_grads(losses_fn)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, losses_fn=losses_fn)
    total = jax.grad(lambda p: sum(losses_fn(p).values()))(PARAMS)["trunk"]
    trunk = PARAMS["trunk"] + RHO * total / jnp.linalg.norm(total)
    expected = sum(jnp.sinh(trunk - c) for c in jnp.asarray(CENTRES))
    np.testing.assert_allclose(updates["trunk"], expected, rtol=1e-5)
    for t in model.NAMES:
        np.testing.assert_allclose(updates["own"][t], 2 * (0.7 + RHO), rtol=1e-5)


def test_samo_guess_has_the_length_of_the_gradient_and_points_uphill():
    rho = 1e-3
    tx = mtjax.samo(rho=rho, beta=1.0, zo_eps=1e-2)
    # The gradient of half a square is the place where it was taken.
    squares = lambda p: {
        t: 0.5 * jnp.sum(p["trunk"] ** 2) + 0.0 * p["own"][t] for t in model.NAMES
    }
    _, grads = mtjax.value_and_task_grads(squares)(PARAMS)
    there, state = tx.update(grads, tx.init(PARAMS), PARAMS, losses_fn=squares, key=KEY)
    steps = there.stack()["trunk"] - PARAMS["trunk"][None]
    np.testing.assert_allclose(jnp.linalg.norm(steps, axis=1), rho, rtol=1e-3)
    assert bool(jnp.all(steps @ PARAMS["trunk"] > 0))
    assert not np.allclose(steps[0], steps[1], atol=1e-5)
    again, _ = tx.update(grads, state, PARAMS, losses_fn=squares)
    assert not np.allclose(again.stack()["trunk"], there.stack()["trunk"], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mtjax.sam(rho=-0.1), "`rho` must not be negative, got -0.1"),
        (lambda: mtjax.samo(beta=1.5), "`beta` must be between 0 and 1, got 1.5"),
        (lambda: mtjax.samo(zo_eps=0.0), "`zo_eps` must be positive, got 0.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- In a training step ---------------------------------------------------------------


def state_and_step(name, loss=model.losses_fn, base=mtjax.pcgrad, wrap=None, **options):
    inside = {"axis_name": options["axis_name"]} if "axis_name" in options else {}
    balancer = (wrap or TRANSFORMS[name])(base(), RHO, **inside)
    tx = optax.chain(balancer, optax.sgd(0.1))
    state = TrainState.create(model.params(), tx, key=KEY)
    return state, make_train_step(loss, tx, donate=False, **options)


@each_transform
def test_mesh_shard_map_and_accumulation_change_nothing(name):
    """The parts of a batch together decide where the gradients are taken."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    batch = model.batch(16)
    state, step = state_and_step(name)
    expected = step(state, batch)[0].params
    assert any(
        bool(jnp.any(a != b))
        for a, b in zip(
            jax.tree.leaves(expected), jax.tree.leaves(state.params), strict=True
        )
    )
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, SPLIT))
    close(step(state, sharded)[0].params, expected)
    state, step = state_and_step(name, accumulate=2)
    close(step(state, batch)[0].params, expected)
    state, step = state_and_step(name, axis_name="data")
    for check_vma in (True, False) if name == "task_sam" else (True,):
        mapped = jax.shard_map(
            lambda s, b: step(s, b)[0].params,
            mesh=mesh,
            in_specs=(REPLICATED, SPLIT),
            out_specs=REPLICATED,
            check_vma=check_vma,
        )
        close(jax.jit(mapped)(state, batch), expected)


def test_perturbations_of_parts_of_a_batch_are_other_ones():
    """Which is why gradients are averaged over devices before anything else."""
    batch = model.batch(16)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    state, step = state_and_step("task_sam", base=mtjax.equal)
    whole, *parts = (step(state, b)[0].params for b in (batch, *halves))
    averaged = jax.tree.map(lambda a, b: 0.5 * (a + b), *parts)
    difference = optax.tree.norm(optax.tree.sub(averaged, whole))
    moved = optax.tree.norm(optax.tree.sub(whole, state.params))
    assert difference > 0.01 * moved


class Noisy(nn.Module):
    """Two heads on a trunk with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.tanh(x))
        return {t: nn.Dense(1, name=t)(x)[:, 0] for t in "ab"}


def test_batch_statistics_and_dropout_are_those_of_the_clean_pass():
    x = model.batch(16)["x"]
    variables = Noisy().init({"params": KEY, "dropout": KEY}, x)
    noises = []

    def losses_fn(params, x, *, model_state, key):
        y, changed = Noisy().apply(
            {"params": params, **model_state},
            x,
            rngs={"dropout": key},
            mutable="batch_stats",
        )
        jax.debug.callback(
            lambda k: noises.append(k.tobytes()), jax.random.key_data(key)
        )
        return {t: jnp.mean(v**2) for t, v in y.items()}, changed

    stats = {}
    for balancer in (mtjax.pcgrad(), TRANSFORMS["task_sam"](mtjax.pcgrad(), RHO)):
        tx = optax.chain(balancer, optax.sgd(0.1))
        state = TrainState.create(
            variables["params"],
            tx,
            model_state={"batch_stats": variables["batch_stats"]},
            key=KEY,
        )
        step = make_train_step(
            losses_fn, tx, with_model_state=True, with_key=True, donate=False
        )
        after, _ = step(state, x)
        jax.effects_barrier()
        stats[len(stats)] = after.model_state
    chex.assert_trees_all_equal(stats[0], stats[1])
    assert len(noises) >= 4
    assert len(set(noises)) == 1
