"""DOGE: coefficients, subspace, gaps and corrections against NumPy."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import merging
from mtjax.systems import doge as system
from mtjax.systems.doge import (
    DogeConfig,
    coefficients,
    correction,
    doge,
    doge_merge,
    matrices,
    objective,
    shared_subspace,
)
from mtjax.transforms import project_orthogonal

TASKS, OUT, IN = 3, 6, 8


def vectors_of(seed=0, scale=1.0, shape=(TASKS, OUT, IN)):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(scale * values, jnp.float32)


@pytest.fixture(scope="module")
def vectors():
    return vectors_of()


def numpy_gaps(delta, vectors, weights):
    """`(models, out)`, in float64."""
    v, w = np.float64(vectors), np.float64(weights)
    merged = np.tensordot(w, v + np.float64(delta), 1)
    return np.einsum("toi,toi->to", v, v - merged[None])


base = {
    "block": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    "conv": jnp.ones((2, 2, 3, 4)),
    "steps": jnp.array(3),
}


def model(seed):
    rng = np.random.default_rng(seed)
    move = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(move, {k: base[k] for k in ("block", "conv")}) | {
        "steps": jnp.array(9)
    }


MODELS = {"a": model(1), "b": model(2), "c": model(3)}

# --- Pieces ---------------------------------------------------------------------------


def test_coefficients_equalise_contributions(vectors):
    found = coefficients(vectors, DogeConfig())
    sizes = np.linalg.norm(np.float64(vectors).reshape(TASKS, -1), axis=1)
    np.testing.assert_allclose(found * sizes, [0.07] * TASKS, rtol=1e-5)
    # A task vector of another length contributes the same.
    longer = vectors.at[1].multiply(5.0)
    again = coefficients(longer, DogeConfig())
    np.testing.assert_allclose(again[1] * longer[1], found[1] * vectors[1], rtol=1e-5)
    relative = coefficients(vectors, DogeConfig(coefficients="relative"))
    np.testing.assert_allclose(relative, found * sizes.mean(), rtol=1e-5)
    both = (vectors, 3 * vectors)
    ratios = [coefficients(v, DogeConfig(coefficients="relative")) for v in both]
    np.testing.assert_allclose(*ratios, rtol=1e-5)  # without units
    constant = coefficients(vectors, DogeConfig(0.3, "constant"))
    np.testing.assert_array_equal(constant, np.float32([0.3] * TASKS))


def test_a_frozen_layer_has_no_coefficient(vectors):
    frozen = vectors.at[1].set(0.0)
    found = coefficients(frozen, DogeConfig())
    assert found[1] == 0
    assert (found[np.array([0, 2])] > 0).all()
    delta, losses = correction(frozen, DogeConfig(steps=5))
    assert jnp.isfinite(delta).all()
    assert jnp.isfinite(losses).all()


def test_the_shared_subspace(vectors):
    basis = np.float64(shared_subspace(vectors, 2, 4))
    projection = basis @ basis.T
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-5)
    assert np.trace(projection) == pytest.approx(4, abs=1e-5)
    kept = [np.linalg.svd(np.float64(v))[0][:, :2] for v in vectors]
    both = np.linalg.svd(np.concatenate(kept, axis=1))[0][:, :4]
    np.testing.assert_allclose(projection, both @ both.T, atol=1e-4)


def test_directions_of_no_strength_are_not_shared():
    """Two tasks of rank one span two dimensions, however many are asked for."""
    rng = np.random.default_rng(0)
    thin = rng.normal(size=(2, OUT, 1)) @ rng.normal(size=(2, 1, IN))
    basis = shared_subspace(jnp.asarray(thin, jnp.float32), 3, 5)
    assert np.trace(np.float64(basis @ basis.T)) == pytest.approx(2, abs=1e-5)
    columns = np.linalg.svd(thin)[0][:, :, 0]
    np.testing.assert_allclose(basis @ (basis.T @ columns.T), columns.T, atol=1e-5)
    nothing = shared_subspace(jnp.zeros((2, OUT, IN)), 3, 5)
    assert not nothing.any()


@pytest.mark.parametrize("inner", ["row", "layer"])
@pytest.mark.parametrize("number", [1, TASKS])
def test_the_objective_against_numpy(vectors, inner, number):
    delta = vectors_of(9, 0.1, (number, OUT, IN))
    weights = coefficients(vectors, DogeConfig(0.4))
    gaps = numpy_gaps(delta, vectors, weights)
    expected = np.sum((gaps if inner == "row" else gaps.sum(1)) ** 2)
    found = objective(delta, vectors, weights, inner)
    assert found == pytest.approx(expected, rel=1e-5)


def test_rows_are_outputs_in_both_layouts():
    """Flax's kernels are PyTorch's transposed, and so is what comes of them."""
    flax_base = {"w": jnp.ones((IN, OUT))}
    flax_models = [{"w": 1 + jnp.swapaxes(v, 0, 1)} for v in vectors_of(4)]
    turn = lambda tree: jax.tree.map(jnp.transpose, tree)
    config = DogeConfig(0.5, steps=7, learning_rate=1e-2)
    found = doge_merge(flax_base, flax_models, config)
    torch = doge_merge(
        turn(flax_base), [turn(m) for m in flax_models], replace(config, out_axis=0)
    )
    np.testing.assert_allclose(found["w"], torch["w"].T, rtol=1e-5, atol=1e-6)
    wrong = doge_merge(flax_base, flax_models, replace(config, out_axis=0))
    assert np.abs(found["w"] - wrong["w"]).max() > 1e-3


# --- Corrections ----------------------------------------------------------------------


def test_nothing_is_missing_of_a_single_task():
    alone = vectors_of(1, shape=(1, OUT, IN))
    config = DogeConfig(1.0, "constant", steps=5)
    for solver in ("adam", "exact"):
        delta, losses = correction(alone, replace(config, solver=solver))
        np.testing.assert_allclose(delta, 0, atol=1e-6)
        np.testing.assert_allclose(losses, 0, atol=1e-8)


def test_the_exact_correction_serves_all_tasks(vectors):
    config = DogeConfig(0.4, project=False, solver="exact")
    weights = coefficients(vectors, config)
    delta, (before, after) = correction(vectors, config)
    assert after < 1e-8 * before
    slope = jax.grad(objective)(delta, vectors, weights)
    at_start = jax.grad(objective)(jnp.zeros_like(delta), vectors, weights)
    assert jnp.abs(slope).max() < 1e-4 * jnp.abs(at_start).max()
    # And is the smallest that does, row by row.
    v, c = np.float64(vectors), float(weights.sum())
    missing = numpy_gaps(0.0, vectors, weights)
    for row in range(OUT):
        expected = np.linalg.pinv(v[:, row]) @ missing[:, row] / c
        np.testing.assert_allclose(delta[0, row], expected, rtol=1e-3, atol=1e-4)


def test_the_exact_correction_outside_the_shared_subspace(vectors):
    config = DogeConfig(0.4, divisor=3, solver="exact")
    weights = coefficients(vectors, config)
    basis = shared_subspace(vectors, 2, 2)
    delta, losses = correction(vectors, config)
    np.testing.assert_allclose(basis.T @ delta[0], 0, atol=1e-5)
    # Least squares in all of X, with delta = (1 - P) X.
    outside = np.eye(OUT) - np.float64(basis @ basis.T)
    v, c = np.float64(vectors), float(weights.sum())
    system = c * np.einsum("toi,op->topi", v, outside).reshape(TASKS * OUT, OUT * IN)
    missing = numpy_gaps(0.0, vectors, weights).ravel()
    x = np.linalg.lstsq(system, missing, rcond=1e-10)[0].reshape(OUT, IN)
    np.testing.assert_allclose(delta[0], outside @ x, rtol=1e-3, atol=1e-3)
    least = np.sum((missing - system @ x.ravel()) ** 2)
    assert losses[1] == pytest.approx(least, rel=1e-3, abs=1e-6 * float(losses[0]))


@pytest.mark.parametrize("per_task", [False, True])
def test_the_objective_falls(vectors, per_task):
    config = DogeConfig(0.4, steps=200, learning_rate=1e-2, per_task=per_task)
    delta, losses = correction(vectors, config)
    assert delta.shape == (TASKS if per_task else 1, OUT, IN)
    assert (jnp.diff(losses) < 0).all()
    assert losses[-1] < 0.8 * losses[0]
    # Adam moves no element by more than about its learning rate per step.
    assert jnp.abs(delta).max() <= 1.2 * 200 * 1e-2


def test_adam_as_published(vectors):
    """Two hundred steps by hand, in float64: project the gradient, then Adam."""
    config = DogeConfig(0.4, divisor=3, steps=200, learning_rate=1e-3)
    weights = np.float64(coefficients(vectors, config))
    basis = np.float64(shared_subspace(vectors, 2, 2))
    v, c = np.float64(vectors), weights.sum()
    delta, m, s = np.zeros((OUT, IN)), 0.0, 0.0
    for i in range(1, 201):
        slope = -2 * c * np.einsum("to,toi->oi", numpy_gaps(delta, v, weights), v)
        slope -= basis @ (basis.T @ slope)
        m, s = 0.9 * m + 0.1 * slope, 0.999 * s + 0.001 * slope**2
        step = (m / (1 - 0.9**i)) / (np.sqrt(s / (1 - 0.999**i)) + 1e-8)
        delta -= 1e-3 * step
    found, _ = correction(vectors, config)
    np.testing.assert_allclose(found[0], delta, rtol=1e-2, atol=1e-3)


def test_what_is_kept_out_of_the_shared_subspace(vectors):
    """Gradient descent stays outside; Adam does not, unless its steps are projected."""
    basis = shared_subspace(vectors, 2, 2)
    weights = coefficients(vectors, DogeConfig(0.4))
    tx = optax.chain(project_orthogonal(basis, axis=1), optax.sgd(1e-4))
    delta = jnp.zeros((1, OUT, IN))
    state = tx.init(delta)
    for _ in range(5):
        slope = jax.grad(objective)(delta, vectors, weights)
        updates, state = tx.update(slope, state)
        delta = optax.apply_updates(delta, updates)
        np.testing.assert_allclose(basis.T @ delta[0], 0, atol=1e-6)
    assert jnp.abs(delta).max() > 1e-4
    config = DogeConfig(0.4, divisor=3, steps=50, learning_rate=1e-3)
    inside = {}
    for name, changes in {
        "published": {},
        "steps": {"project_update": True},
        "neither": {"project": False},
    }.items():
        found, _ = correction(vectors, replace(config, **changes))
        inside[name] = float(jnp.linalg.norm(basis.T @ found[0]))
    assert inside["steps"] < 1e-5
    assert inside["neither"] > 1.1 * inside["published"] > 1e-3


# --- The whole model ------------------------------------------------------------------


def test_is_task_arithmetic_without_its_parts():
    config = DogeConfig(0.3, "constant", density=1.0, steps=0)
    found = doge_merge(base, MODELS, config)
    expected = merging.task_arithmetic(0.3)(base, MODELS, where=matrices(base))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_other_leaves_stay_those_of_the_base():
    found = doge_merge(base, MODELS, DogeConfig(steps=2), where="block")
    np.testing.assert_array_equal(found["block"]["bias"], base["block"]["bias"])
    np.testing.assert_array_equal(found["conv"], base["conv"])
    assert found["steps"] == 3
    assert jnp.abs(found["block"]["kernel"] - 1).max() > 1e-3
    chex.assert_trees_all_equal_dtypes(found, base)


def test_the_mask_is_of_all_matrices_together():
    config = DogeConfig(density=0.3, steps=2)
    plain = merging.task_vectors(base, MODELS, where=matrices(base))
    found = system.corrected(config).changed(plain)
    assert found["block"]["bias"] is None
    flat = lambda tree: np.concatenate(
        [np.asarray(tree[k]).reshape(3, -1) for k in ("conv",)]
        + [np.asarray(tree["block"]["kernel"]).reshape(3, -1)],
        axis=1,
    )
    kept, sizes = flat(found) != 0, np.abs(flat(plain))
    number = int(np.ceil(0.3 * sizes.shape[1]))
    for mask, size in zip(kept, sizes):
        assert abs(mask.sum() - number) <= 1
        assert size[mask].min() > size[~mask].max()  # of the original vectors
    shares = kept[:, :48].mean(1)
    assert np.ptp(shares) > 0.01  # not so many of every matrix


def test_convolutions_are_matrices_with_a_row_per_output():
    config = DogeConfig(0.5, density=1.0, steps=4, learning_rate=1e-2)
    found = doge_merge(base, MODELS, config, where="conv")["conv"]
    fold = lambda tree: {"w": tree["conv"].reshape(-1, 4)}
    folded = doge_merge(fold(base), [fold(m) for m in MODELS.values()], config)["w"]
    np.testing.assert_allclose(found.reshape(-1, 4), folded, rtol=1e-5, atol=1e-6)


def test_works_inside_jit():
    config = DogeConfig(0.5, steps=3, learning_rate=1e-2)
    expected = doge_merge(base, MODELS, config)
    found = jax.jit(lambda base, models: doge_merge(base, models, config))(base, MODELS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["norm", "relative", "constant"])
def test_all_scales_are_tried_by_one_program(kind):
    config = DogeConfig(coefficients=kind, steps=3, learning_rate=1e-2)
    merge = lambda scale: doge_merge(base, MODELS, replace(config, scale=scale))
    compiled = jax.jit(chex.assert_max_traces(merge, n=1))
    for scale in (0.2, 0.7):
        found = compiled(scale)
        chex.assert_trees_all_close(found, merge(scale), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="`where` must choose at least one parameter"):
        doge_merge(base, MODELS, where="bias")
    with pytest.raises(ValueError, match=r"at least two axes, got one of shape \(5,\)"):
        doge(DogeConfig(steps=1))(base, MODELS)
    for name, value in (
        ("scale", 0.0),
        ("density", 0.0),
        ("divisor", 0),
        ("steps", -1),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            DogeConfig(**{name: value})
    with pytest.raises(ValueError, match="`solver` must be 'adam' for corrections"):
        DogeConfig(solver="exact", per_task=True)
