"""EMR: elected vector, masks and factors against NumPy, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.compressed import CompressedTasks
from mtjax.merging.emr import emr


def tree(flat):
    flat = jnp.asarray(flat, jnp.float32)
    return {"bias": flat[:3], "kernel": flat[3:].reshape(5, 2)}


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def drawn(number, seed=0):
    # Halves: sums are exact, and some of them are 0.
    rng = np.random.default_rng(seed)
    base = rng.integers(-4, 5, 13) / 2
    return base, rng.integers(-4, 5, (number, 13)) / 2


@pytest.mark.parametrize("number", [2, 3])
def test_against_numpy(number):
    base, vectors = drawn(number)
    models = {f"task {i}": tree(base + v) for i, v in enumerate(vectors)}
    found = emr(tree(base), models)
    elected = np.where(vectors.sum(0) > 0, 1.0, -1.0)
    assert (vectors.sum(0) == 0).any()
    unified = elected * np.max(np.maximum(vectors * elected, 0), axis=0)
    np.testing.assert_array_equal(flat(found.vector), unified)
    for i, vector in enumerate(vectors):
        task = f"task {i}"
        mask = vector * unified > 0
        np.testing.assert_array_equal(flat(found.mask(task)), mask)
        scale = np.abs(vector).sum() / np.abs(mask * unified).sum()
        assert found.scales[task] == pytest.approx(scale, rel=1e-6)
        added = flat(found.restore(task)) - base
        np.testing.assert_allclose(added, scale * mask * unified, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.abs(added).sum(), np.abs(vector).sum(), rtol=1e-5)


def test_one_model_and_equal_models_come_back():
    base, (vector,) = drawn(1)
    model = tree(base + vector)
    for models in ([model], [model, model, model]):
        found = emr(tree(base), models)
        np.testing.assert_array_equal(flat(found.restore("0")), flat(model))
        assert found.scales["0"] == 1.0


def test_order_does_not_matter_and_bytes_count_the_factors():
    base, vectors = drawn(3)
    models = {t: tree(base + v) for t, v in zip("abc", vectors)}
    found = emr(tree(base), models)
    other = emr(tree(base), dict(zip("xyz", (models[t] for t in "cab"))))
    np.testing.assert_array_equal(flat(other.vector), flat(found.vector))
    np.testing.assert_array_equal(other.masks["x"], found.masks["c"])
    assert other.scales["x"] == found.scales["c"]
    assert found.nbytes == 2 * 4 * 13 + 3 * 2 + 3 * 4


def test_a_task_that_loses_everywhere_or_has_not_moved_gets_the_base():
    base, (vector, _) = drawn(2)
    models = {"won": tree(base + 2 * vector), "lost": tree(base - vector)}
    models["still"] = tree(base)
    found = emr(tree(base), models)
    for task in ("lost", "still"):
        np.testing.assert_array_equal(flat(found.restore(task)), base)
    assert found.scales["lost"] == 1.0
    np.testing.assert_array_equal(flat(found.restore("won")), base + 2 * vector)


def test_tiny_task_vectors_do_not_underflow():
    base, vectors = np.zeros(13), 1e-30 * drawn(2)[1]
    found = emr(tree(base), {t: tree(v) for t, v in zip("ab", vectors)})
    agree = np.sign(vectors[0]) * np.sign(flat(found.vector)) > 0
    assert agree.any()
    np.testing.assert_array_equal(flat(found.mask("a")), agree)


def test_leaves_left_out_and_storage(tmp_path):
    base, vectors = drawn(2)
    models = {t: tree(base + v) for t, v in zip("ab", vectors)}
    found = emr(tree(base), models, where="kernel")
    assert found.vector["bias"] is None
    assert found.elements == 10
    restored = found.restore("a")
    np.testing.assert_array_equal(restored["bias"], tree(base)["bias"])
    norm = lambda x: np.abs(np.asarray(x) - base[3:].reshape(5, 2)).sum()
    np.testing.assert_allclose(
        norm(restored["kernel"]), norm(models["a"]["kernel"]), rtol=1e-5
    )
    found.save(tmp_path / "tasks.safetensors")
    loaded = CompressedTasks.load(tmp_path / "tasks.safetensors")
    for task in "ab":
        np.testing.assert_allclose(
            flat(loaded.restore(task)), flat(found.restore(task)), rtol=1e-6
        )
