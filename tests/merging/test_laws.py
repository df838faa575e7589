"""What must hold for every way to merge."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.merging import property_table
from tests.merging.catalogue import KEY, METHODS, SHAPES, merged, models_like

ONE = {"kernel": (6, 8)}
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)


@every
def test_unchanged_models_give_the_base(method):
    base, _ = models_like(SHAPES, 1)
    found = merged(method, base, method.models[-1] * [base])
    chex.assert_trees_all_close(found, base, rtol=2e-6, atol=1e-6)


@every
def test_keeps_structure_and_dtype(method):
    base, models = models_like(ONE, method.models[-1])
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    found = merged(method, cast(base), [cast(m) for m in models])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, cast(base))
    chex.assert_tree_all_finite(found)


@every
def test_names_order_the_models(method):
    base, models = models_like(SHAPES, method.models[-1])
    named = dict(zip("bca", models))
    ordered = [named[name] for name in sorted(named)]
    chex.assert_trees_all_equal(
        merged(method, base, named), merged(method, base, ordered)
    )


@every
def test_is_the_same_inside_jit(method):
    base, models = models_like(ONE, method.models[-1])
    jitted = jax.jit(lambda b, m: method.merger(b, m, key=KEY))
    chex.assert_trees_all_close(
        jitted(base, models), merged(method, base, models), rtol=1e-4, atol=1e-5
    )


@every
def test_eight_devices_give_what_one_does(method):
    base, models = models_like({"kernel": (8, 6)}, method.models[-1])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    placed = jax.device_put((base, models), sharding)
    found = merged(method, *placed)
    chex.assert_trees_all_close(
        found, merged(method, base, models), rtol=1e-4, atol=1e-5
    )


@every
def test_leaves_counters_and_heads_alone(method):
    base, models = models_like(SHAPES, method.models[-1])
    base |= {"step": jnp.array(3), "head": jnp.ones((2, 5))}
    models = [
        m | {"step": jnp.array(9), "head": jnp.zeros((2, k))}
        for k, m in enumerate(models)
    ]
    found = method.merger(base, models, where=r"^(embed|layers|step)", key=KEY)
    assert int(found["step"]) == 3
    np.testing.assert_array_equal(found["head"], base["head"])
    assert not np.allclose(found["embed"], base["embed"])


@every
def test_is_finite_on_degenerate_vectors(method):
    base, models = models_like(SHAPES, method.models[-1])
    huge = jax.tree.map(lambda x: 1e12 * x, models[0])
    for odd in (base, jax.tree.map(jnp.zeros_like, base), huge):
        found = merged(method, base, [odd, *models[1:]])
        chex.assert_tree_all_finite(found)


@every
def test_a_random_method_repeats_itself(method):
    base, models = models_like(SHAPES, method.models[-1])
    first, again = (merged(method, base, models) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    if method.merger.needs_key:
        other = method.merger(base, models, key=jax.random.key(8))
        assert not np.allclose(first["embed"], other["embed"])
        with pytest.raises(ValueError, match="`key` must be given"):
            method.merger(base, models)


@every
def test_says_when_the_base_is_missing(method):
    base, models = models_like(SHAPES, method.models[-1])
    if method.merger.needs_base:
        with pytest.raises(ValueError, match="`base` must be given"):
            method.merger(None, models, key=KEY)
    else:
        chex.assert_trees_all_close(
            method.merger(None, models, key=KEY),
            merged(method, base, models),
            rtol=2e-5,
            atol=1e-5,
        )


@pytest.mark.slow
def test_page_is_up_to_date():
    assert property_table.PAGE.read_text(encoding="utf-8") == property_table.page(), (
        "Run `python -m tests.merging.property_table`."
    )
