import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices

TASKS = ("a", "b", "c")


def encode(params, x):
    return jnp.tanh(x @ params["trunk"])


def losses_from_representation(params, z, x):
    return {t: jnp.mean((z @ h - x[:, 0]) ** 2) for t, h in params["heads"].items()}


ENCODE, LOSSES = mtjax.rotated(encode, losses_from_representation)


def problem(seed=0, angles=0.0, size=4):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    model = {"trunk": draw(3, 4), "heads": {t: draw(4) for t in TASKS}}
    rotations = {t: angles * draw(size, size) for t in TASKS}
    return {"model": model, "rotations": rotations}, draw(6, 3)


def rotation(a):
    return np.asarray(jax.scipy.linalg.expm(a - a.T), np.float64)


def gradients_at_z(params, x):
    """Per task, on the examples: those at the rotated and at the shared features."""
    model, z = params["model"], encode(params["model"], x)
    at_rotated, at_z = {}, {}
    for t in TASKS:
        turn = rotation(params["rotations"][t])
        r = jnp.asarray(np.asarray(z) @ turn.T, jnp.float32)
        loss = lambda r, t=t: losses_from_representation(model, r, x)[t]
        at_rotated[t] = np.asarray(jax.grad(loss)(r), np.float64)
        at_z[t] = at_rotated[t] @ turn
    return at_rotated, at_z


def test_without_rotation_losses_are_the_plain_ones():
    params, x = problem()
    params["rotations"] = mtjax.init_rotations(TASKS, 4)
    plain = losses_from_representation(params["model"], encode(params["model"], x), x)
    got = LOSSES(params, ENCODE(params, x), x)
    for t in TASKS:
        assert float(got[t]) == pytest.approx(float(plain[t]), rel=1e-6)


def test_each_rotation_belongs_to_its_task():
    params, x = problem(angles=0.3)
    _, grads = mtjax.value_and_task_grads((ENCODE, LOSSES))(params, x)
    assert grads.split.owners["rotations"] == {t: (t,) for t in TASKS}
    assert grads.split.owners["model"]["heads"] == {t: (t,) for t in TASKS}
    assert grads.shared["model"]["trunk"]


@pytest.mark.parametrize("angles", [0.0, 0.4])
def test_model_gets_the_gradients_at_fixed_rotations(angles):
    params, x = problem(angles=angles)
    turns = {t: jnp.asarray(rotation(a)) for t, a in params["rotations"].items()}

    def total(model):
        z = encode(model, x)
        return sum(
            losses_from_representation(model, z @ turns[t].T, x)[t] for t in TASKS
        )

    expected = jax.grad(total)(jax.tree.map(jnp.asarray, params["model"]))
    _, grads = mtjax.value_and_task_grads((ENCODE, LOSSES))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads.combine()["model"],
        expected,
    )


def test_gramian_is_that_of_the_gradients_turned_back():
    params, x = problem(angles=0.4)
    _, grads = mtjax.value_and_task_grads((ENCODE, LOSSES))(params, x)
    rows = np.stack([g.ravel() for g in gradients_at_z(params, x)[1].values()])
    np.testing.assert_allclose(grads.gramian(), rows @ rows.T, rtol=1e-4, atol=1e-6)


def test_slope_of_the_alignment_at_no_rotation():
    # With R = 1 + S the alignment is that at S = 0 less sum_n <v_n, S g_n>.
    params, x = problem()
    at_rotated, at_z = gradients_at_z(params, x)
    aim = sum(g / np.linalg.norm(g) for g in at_z.values()) / len(TASKS)
    _, grads = mtjax.value_and_task_grads((ENCODE, LOSSES))(params, x)
    slopes = grads.combine()["rotations"]
    for t in TASKS:
        product = aim.T @ at_rotated[t]
        np.testing.assert_allclose(slopes[t], product - product.T, rtol=1e-3, atol=1e-6)


def test_rotations_learn_to_align_the_gradients():
    params, x = problem(seed=3)

    def mean_cosine(params):
        rows = np.stack([g.ravel() for g in gradients_at_z(params, x)[1].values()])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows @ rows.T)[np.triu_indices(3, 1)].mean()

    optimizers = {"model": optax.set_to_zero(), "rotations": optax.adam(0.02)}
    tx = optax.chain(
        mtjax.rotograd(3), optax.partition(optimizers, {k: k for k in optimizers})
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            _, grads = mtjax.value_and_task_grads((ENCODE, LOSSES))(params, x)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    after = train(params)
    before = mean_cosine(params)
    assert mean_cosine(after) > before + 0.3
    for t in TASKS:
        turn = rotation(after["rotations"][t])
        np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=1e-5)
        assert np.linalg.det(turn) == pytest.approx(1.0, abs=1e-4)
        assert not np.allclose(turn, np.eye(4), atol=1e-2)


def test_only_the_first_features_may_be_rotated():
    params, x = problem(angles=0.5, size=2)
    z = np.asarray(encode(params["model"], x), np.float64)
    got = LOSSES(params, ENCODE(params, x), x)
    for t in TASKS:
        turned = np.hstack([z[:, :2] @ rotation(params["rotations"][t]).T, z[:, 2:]])
        errors = turned @ np.asarray(params["model"]["heads"][t]) - np.asarray(x)[:, 0]
        assert float(got[t]) == pytest.approx(np.mean(errors**2), rel=1e-4)


def test_magnitudes_are_those_of_the_formula():
    tx = mtjax.rotograd(4, burn_in_steps=2)
    update, state = jax.jit(tx.update), tx.init(None)
    samples = [matrices.sample(matrices.normal, 4, i) * (i + 1) for i in range(4)]
    samples[2][1] *= 5.0
    all_norms = [np.linalg.norm(g, axis=1) for g in samples]
    for i, (grads, norms) in enumerate(zip(samples, all_norms, strict=True)):
        updates, state = update(jnp.asarray(grads, jnp.float32), state)
        ratios = norms / all_norms[0 if i < 2 else 2]
        length = ratios / ratios.sum() @ norms
        expected = length * np.sum(grads / norms[:, None], axis=0)
        np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-3)


def test_a_task_that_comes_late_is_compared_with_its_own_start():
    tx = mtjax.rotograd(2)
    grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    _, state = tx.update(grads, tx.init(None), present=jnp.array([True, False]))
    np.testing.assert_array_equal(state.steps, [1, 0])
    updates, state = tx.update(2.0 * grads, state)
    # Ratios 2 and 1, norms 6 and 2.
    np.testing.assert_allclose(updates, np.full(2, (2 * 6 + 1 * 2) / 3), rtol=1e-5)
    np.testing.assert_allclose(state.first_norms, [3.0, 2.0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="`burn_in_steps` must not be negative"):
        mtjax.rotograd(2, burn_in_steps=-1)
    with pytest.raises(ValueError, match=r"`size` must be at least 2 .*got 1"):
        mtjax.init_rotations(TASKS, 1)
    params, x = problem()
    del params["rotations"]["b"]
    with pytest.raises(ValueError, match=r"`rotations` must be those of .*'a', 'c'"):
        LOSSES(params, ENCODE(params, x), x)
