"""Task vectors, their differentiable combination, and models that do not match."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import merging
from mtjax.merging import merge, task_vectors
from tests.merging.catalogue import models_like

SHAPES = {"a": (2, 3), "b": (3,)}
BASE, MODELS = models_like(SHAPES, 3)
TAUS = task_vectors(BASE, MODELS)


def test_one_gives_the_model_and_zero_the_base():
    for i, model in enumerate(MODELS):
        one = jnp.zeros(3).at[i].set(1.0)
        chex.assert_trees_all_close(merge(BASE, TAUS, one), model, rtol=1e-6)
    chex.assert_trees_all_equal(merge(BASE, TAUS, 0.0), BASE)


def test_coefficients_per_model_tensor_block_and_element():
    base = {"block": BASE, "head": {"w": jnp.ones(2)}}
    models = [{"block": m, "head": {"w": jnp.full(2, 3.0)}} for m in MODELS]
    taus = task_vectors(base, models)
    per_block = {"block": jnp.array([1.0, 0.0, 0.0]), "head": 0.0}
    found = merge(base, taus, per_block)
    chex.assert_trees_all_close(
        found, {"block": MODELS[0], "head": base["head"]}, rtol=1e-6
    )
    per_tensor = {
        "block": {"a": jnp.array([0.0, 1.0, 0.0]), "b": jnp.array([0.0, 0.0, 1.0])},
        "head": {"w": jnp.zeros(3)},
    }
    found = merge(base, taus, per_tensor)["block"]
    np.testing.assert_allclose(found["a"], MODELS[1]["a"], rtol=1e-6)
    np.testing.assert_allclose(found["b"], MODELS[2]["b"], rtol=1e-6)
    mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = merge(BASE, TAUS, {"a": 0.0, "b": mask})["b"]
    expected = [MODELS[0]["b"][0], MODELS[1]["b"][1], MODELS[0]["b"][2]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_of_a_coefficient_is_an_inner_product():
    loss = lambda params: jnp.sum(jnp.sin(params["a"])) + jnp.sum(params["b"] ** 3)
    coefficients = {"a": jnp.array([0.1, 0.2, 0.3]), "b": jnp.array([0.4, 0.5, 0.6])}
    found = jax.grad(lambda c: loss(merge(BASE, TAUS, c)))(coefficients)
    slope = jax.grad(loss)(merge(BASE, TAUS, coefficients))
    for path in SHAPES:
        expected = [jnp.vdot(slope[path], tau) for tau in TAUS[path]]
        np.testing.assert_allclose(found[path], expected, rtol=1e-5)
    # One coefficient per model collects those of all tensors.
    tied = jax.grad(lambda c: loss(merge(BASE, TAUS, c)))(jnp.array([0.1, 0.2, 0.3]))
    each = jax.grad(lambda c: loss(merge(BASE, TAUS, c)))(
        dict.fromkeys(SHAPES, jnp.array([0.1, 0.2, 0.3]))
    )
    np.testing.assert_allclose(tied, each["a"] + each["b"], rtol=1e-5)


def test_sums_are_exact_in_float32_for_bfloat16_vectors():
    taus = task_vectors(BASE, MODELS, dtype=jnp.bfloat16)
    assert taus["a"].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), taus)
    weights = jnp.array([0.3, 0.3, 0.3])
    chex.assert_trees_all_close(
        merge(BASE, taus, weights), merge(BASE, wide, weights), rtol=1e-6
    )


def test_leaves_that_are_not_merged_have_no_vector():
    base = BASE | {"step": jnp.array(4)}
    models = [m | {"step": jnp.array(7)} for m in MODELS]
    taus = task_vectors(base, models, where="^(a|step)")
    assert taus["b"] is None
    assert taus["step"] is None
    found = merge(base, taus, 1.0)
    assert int(found["step"]) == 4
    np.testing.assert_array_equal(found["b"], base["b"])
    np.testing.assert_array_equal(
        task_vectors(base, models, where=lambda path: path == "a")["a"], taus["a"]
    )


def test_a_mismatch_lists_everything_before_anything_is_computed():
    good = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "n": jnp.array(1)}
    bad = {"w": jnp.ones((2, 4)), "extra": jnp.ones(1), "n": jnp.array(1.0)}
    with pytest.raises(ValueError, match="must match the base") as caught:
        merging.average()(None, {"first": good, "second": bad})
    message = str(caught.value)
    for line in (
        "second: b: missing, float32[3]",
        "second: extra: extra, float32[1]",
        "second: n: type, float32[] in place of int32[]",
        "second: w: shape, float32[2, 4] in place of float32[2, 3]",
    ):
        assert line in message
    assert "first:" not in message
    many = {str(i): jnp.ones(1) for i in range(50)}
    with pytest.raises(ValueError, match="and 30 more"):
        task_vectors(many | {"x": jnp.ones(1)}, [{"x": jnp.ones(1)}])


def test_precision_is_a_note_and_no_error():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODELS[0])
    found = merging.mismatches(BASE, {"half": half}, None)
    assert [m.kind for m in found] == ["precision", "precision"]
    merging.average()(BASE, [half])


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="at least one model"):
        merging.average()(BASE, [])
    with pytest.raises(ValueError, match=re.escape("got 'no'; paths look like 'a'")):
        merging.average()(BASE, MODELS, where="no")


def test_any_pytree_will_do():
    listed = lambda t: [(t["a"],), {"inner": t["b"]}]
    found = merging.average()(listed(BASE), [listed(m) for m in MODELS])
    expected = merging.average()(BASE, MODELS)
    chex.assert_trees_all_equal(found, listed(expected))
    assert isinstance(found[0], tuple)
