import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import project_orthogonal

BASE = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (6, 2)))[0]
GRAD = jax.random.normal(jax.random.key(1), (4, 6))


def test_nothing_is_left_inside_and_all_outside():
    tx = project_orthogonal({"w": BASE, "b": None})
    grads = {"w": GRAD, "b": jnp.ones(3)}
    found, _ = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(found["w"] @ BASE, 0, atol=1e-6)
    removed = GRAD - found["w"]
    np.testing.assert_allclose(removed @ BASE @ BASE.T, removed, atol=1e-5)
    np.testing.assert_array_equal(found["b"], grads["b"])
    again, _ = tx.update(found, tx.init(grads))
    np.testing.assert_allclose(again["w"], found["w"], atol=1e-6)


def test_sgd_never_enters_the_subspace_but_adam_does():
    params = {"w": jnp.zeros((4, 6))}
    target = jax.random.normal(jax.random.key(2), (4, 6))

    def walk(tx):
        w, state = params, tx.init(params)
        for _ in range(5):
            grads = jax.grad(lambda p: jnp.sum((p["w"] - target) ** 4))(w)
            updates, state = tx.update(grads, state, w)
            w = optax.apply_updates(w, updates)
        return float(jnp.abs(w["w"] @ BASE).max())

    project = project_orthogonal({"w": BASE})
    assert walk(optax.chain(project, optax.sgd(1e-3))) < 1e-6
    assert walk(optax.chain(project, optax.adam(1e-2))) > 1e-4
    assert walk(optax.chain(optax.adam(1e-2), project)) < 1e-6


def test_the_axis_can_be_the_first():
    turned, _ = project_orthogonal({"w": BASE}, axis=0).update({"w": GRAD.T}, ())
    plain, _ = project_orthogonal({"w": BASE}).update({"w": GRAD}, ())
    np.testing.assert_allclose(turned["w"].T, plain["w"], atol=1e-6)


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"`bases` must be matrices.*'w'"):
        project_orthogonal({"w": jnp.ones((2, 3))})
    tx = project_orthogonal({"w": BASE})
    with pytest.raises(ValueError, match="as many rows as the update's axis -1"):
        tx.update({"w": GRAD.T}, ())
