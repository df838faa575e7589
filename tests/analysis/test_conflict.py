import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import matrices

compiled = jax.jit(
    lambda gramian, present: mtjax.conflict_statistics(gramian, present=present)
)


def statistics(grads, present=None):
    present = np.ones(len(grads), bool) if present is None else np.asarray(present)
    return compiled(jnp.asarray(matrices.gramian(grads)), jnp.asarray(present))


@pytest.mark.parametrize(
    "kind",
    [matrices.normal, matrices.agreeing, matrices.narrow],
    ids=lambda k: k.__name__,
)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_against_numpy(kind, scale):
    grads = matrices.sample(kind, 6)
    got = statistics(grads * scale)
    lengths = np.linalg.norm(grads, axis=1)
    cosines = grads @ grads.T / np.outer(lengths, lengths)
    pairs = cosines[np.triu_indices(6, 1)]
    np.testing.assert_allclose(got.cosines, cosines, atol=1e-5)
    np.testing.assert_allclose(got.norms, lengths * scale, rtol=1e-5)
    assert float(got.conflict_rate) == pytest.approx(np.mean(pairs < 0), abs=1e-6)
    assert float(got.mean_cosine) == pytest.approx(np.mean(pairs), abs=1e-5)
    values = np.linalg.svd(grads, compute_uv=False)
    condition = values[0] / values[-1]
    assert float(got.condition_number) == pytest.approx(condition, rel=1e-2)


def test_golden_values():
    got = statistics(np.array([[3.0, 0.0], [-3.0, 3.0], [0.0, 4.0]]))
    half = np.sqrt(0.5)
    expected = [[1.0, -half, 0.0], [-half, 1.0, half], [0.0, half, 1.0]]
    np.testing.assert_allclose(got.cosines, expected, atol=1e-6)
    assert float(got.conflict_rate) == pytest.approx(1 / 3)
    assert float(got.mean_cosine) == pytest.approx(0.0, abs=1e-6)
    assert np.isinf(got.condition_number)


def test_absent_tasks_do_not_count():
    grads = matrices.sample(matrices.conflicting, 6)
    present = np.array([True, False, True, True, False, True])
    got, expected = statistics(grads, present), statistics(grads[present])
    for name in ("conflict_rate", "mean_cosine", "condition_number"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-6
        )
    np.testing.assert_allclose(got.norms[present], expected.norms)
    np.testing.assert_array_equal(got.norms[~present], 0.0)
    np.testing.assert_array_equal(got.cosines[~present], 0.0)


def test_zero_gradient_has_no_direction():
    got = statistics(np.array([[1.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(got.cosines, [[1.0, 0.0], [0.0, 0.0]])
    assert float(got.conflict_rate) == 0.0
    assert np.isinf(got.condition_number)


@pytest.mark.parametrize("present", [[False, False], [True, False]])
def test_fewer_than_two_tasks(present):
    got = statistics(np.eye(2), present)
    assert float(got.conflict_rate) == 0.0
    assert float(got.mean_cosine) == 0.0
    assert not np.isnan(got.condition_number)


def test_takes_task_gradients():
    def losses_fn(params):
        return {"a": params.sum(), "b": -2.0 * params[0]}

    @jax.jit
    def measure(params):
        _, grads = mtjax.value_and_task_grads(losses_fn)(params)
        return mtjax.conflict_statistics(grads)

    got = measure(jnp.ones(2))
    np.testing.assert_allclose(got.norms, [np.sqrt(2), 2.0], rtol=1e-6)
    assert float(got.conflict_rate) == 1.0
    condition = np.linalg.cond([[1.0, 1.0], [-2.0, 0.0]])
    assert float(got.condition_number) == pytest.approx(condition, rel=1e-4)
