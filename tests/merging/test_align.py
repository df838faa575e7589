"""Weight matching: undoes permutations, never loses, and finds the best."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.align import align, align_many, permute
from mtjax.merging.permutation_groups import permutation_groups
from mtjax.nn import MLP, LeNet, ViT

KEY = jax.random.key(0)


class WithHead(nn.Module):
    encoder: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.encoder(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.SimpleCell(5))(x)[:, -1])


IMAGES = jax.random.normal(KEY, (2, 8, 8, 1))
MODELS = {
    "mlp": (WithHead(MLP((6, 5))), jax.random.normal(KEY, (4, 4))),
    "lenet": (WithHead(LeNet((4, 6), 5)), IMAGES),
    "vit": (WithHead(ViT(4, width=12, depth=2, heads=3, hidden=7)), IMAGES),
    "rnn": (Recurrent(), jax.random.normal(KEY, (2, 3, 4))),
}


def params_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    normal = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    return tree.unflatten([normal(x) for x in leaves])


def case(name):
    """Function, groups and two random models."""
    model, inputs = MODELS[name]
    params = jax.eval_shape(model.init, KEY, inputs)["params"]
    apply = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs))
    groups = permutation_groups(apply, params, inputs)
    return apply, inputs, groups, params_like(params, 1), params_like(params, 2)


def closeness(first, second):
    """The objective, in float64."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second))
    return sum(np.vdot(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs)


def shuffled(params, groups, seed=0):
    rng = np.random.default_rng(seed)
    permutations = [rng.permutation(group.size) for group in groups]
    return permute(params, groups, permutations), permutations


@pytest.mark.parametrize("name", MODELS)
def test_a_permutation_is_undone_exactly(name):
    _, _, groups, params, _ = case(name)
    changed, permutations = shuffled(params, groups)
    found = align(params, changed, groups, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    for there, back in zip(permutations, found.permutations):
        np.testing.assert_array_equal(there[back], np.arange(len(there)))
    noisy = jax.tree.map(lambda a, b: a + 0.05 * b, changed, params_like(params, 5))
    again = align(params, noisy, groups, key=KEY)
    for one, other in zip(again.permutations, found.permutations):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_and_the_models_come_closer(name):
    apply, inputs, groups, reference, model = case(name)
    found = align(reference, model, groups, key=KEY)
    before, after = apply(model, inputs), apply(found.params, inputs)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    closer = closeness(reference, found.params)
    assert closer > closeness(reference, model)
    # A random order is not as close.
    assert closer > closeness(reference, shuffled(model, groups)[0])
    # What is aligned stays, and so does a model beside itself.
    for other in (reference, found.params):
        again = align(
            reference, align(reference, other, groups, key=KEY).params, groups, key=KEY
        )
        for permutation in again.permutations:
            np.testing.assert_array_equal(permutation, np.arange(len(permutation)))


def mlp(params, x):
    h = jnp.tanh(x @ params["a"])
    return jnp.tanh(h @ params["b"]) @ params["c"]


def random_mlp(seed, hidden=(4, 3)):
    shapes = {"a": (2, hidden[0]), "b": hidden, "c": (hidden[1], 2)}
    return params_like({k: np.zeros(s) for k, s in shapes.items()}, seed)


GROUPS = permutation_groups(mlp, random_mlp(0), jnp.ones(2))


def every_order(params):
    orders = itertools.product(*(itertools.permutations(range(g.size)) for g in GROUPS))
    for p, q in orders:
        a, b, c = (np.asarray(params[name], float) for name in "abc")
        yield {"a": a[:, p], "b": b[p, :][:, q], "c": c[q, :]}


def test_no_group_can_be_bettered_and_the_best_is_near():
    shares = []
    for seed in range(10):
        reference, model = random_mlp(seed), random_mlp(100 + seed)
        found = align(reference, model, GROUPS, key=KEY).params
        mine = closeness(reference, found)
        a, b, c = (np.asarray(found[name], float) for name in "abc")
        one = [
            {"a": a[:, p], "b": b[p, :], "c": c}
            for p in itertools.permutations(range(4))
        ]
        two = [
            {"a": a, "b": b[:, p], "c": c[p, :]}
            for p in itertools.permutations(range(3))
        ]
        assert mine == pytest.approx(max(closeness(reference, x) for x in one + two))
        best = max(closeness(reference, x) for x in every_order(model))
        assert mine <= best + 1e-5
        shares.append(mine / best)
    assert np.mean(np.isclose(shares, 1)) >= 0.5
    assert np.mean(shares) > 0.9


def test_one_group_is_solved_exactly():
    shapes = {"w": (3, 5), "v": (5, 2)}
    reference, model = (
        params_like({k: np.zeros(s) for k, s in shapes.items()}, seed)
        for seed in (1, 2)
    )
    shallow = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
    groups = permutation_groups(shallow, reference, jnp.ones(3))
    found = align(reference, model, groups, key=KEY)
    w, v = (np.asarray(model[name], float) for name in "wv")
    orders = map(list, itertools.permutations(range(5)))
    best = max(orders, key=lambda p: closeness(reference, {"w": w[:, p], "v": v[p]}))
    assert found.permutations[0].tolist() == best


def test_some_groups_and_some_parameters():
    _, _, groups, params, _ = case("vit")
    changed, permutations = shuffled(params, groups)
    hidden = groups.having("mlp_in/bias")
    found = align(params, changed, hidden, where="mlp_in/bias", key=KEY)
    kept, back = found.params["encoder"], params["encoder"]
    for i in range(2):
        block = f"block_{i}"
        np.testing.assert_array_equal(
            kept[block]["mlp_in"]["bias"], back[block]["mlp_in"]["bias"]
        )
    np.testing.assert_array_equal(
        kept["norm"]["scale"], changed["encoder"]["norm"]["scale"]
    )
    assert len(found.permutations) == 2
    assert len(permutations) == len(groups)


def test_the_key_decides_and_decides_all():
    """Of many local optima, which one is found depends on the key and nothing else."""
    _, _, groups, reference, model = case("vit")
    run = lambda seed: align(reference, model, groups, key=jax.random.key(seed))
    first = [run(seed) for seed in range(3)]
    again = [run(seed) for seed in reversed(range(3))]
    for one, other in zip(first, reversed(again)):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    orders = {tuple(map(tuple, found.permutations)) for found in first}
    assert len(orders) > 1


def test_dtypes_and_integers():
    def apply_fn(params, x):
        h = jnp.tanh(x @ params["a"]) * (params["mask"] > 0)[None]
        return h @ params["b"].astype(jnp.float32)

    params = {"a": jnp.asarray(random_mlp(0)["a"]), "mask": jnp.array([0, 1, 1, 1])}
    params["b"] = random_mlp(0, (4, 3))["b"].astype(jnp.bfloat16)
    groups = permutation_groups(apply_fn, params, jnp.ones((1, 2)))
    changed, _ = shuffled(params, groups, seed=3)
    found = align(params, changed, groups, key=KEY).params
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert [found[k].dtype for k in "ab"] == [jnp.float32, jnp.bfloat16]
    # In another precision it is the same model.
    half = jax.tree.map(lambda x: x.astype(jnp.float16) if x.ndim == 2 else x, changed)
    found = align(params, half, groups, key=KEY).params
    np.testing.assert_allclose(found["a"].astype(jnp.float32), params["a"], rtol=1e-3)
    assert found["a"].dtype == jnp.float16


@pytest.mark.parametrize("named", [True, False])
def test_many_models_come_into_one_order(named):
    apply, inputs, groups, params, _ = case("mlp")
    models = {
        name: shuffled(params, groups, seed)[0] for seed, name in enumerate("xyz")
    }
    found = align_many(models if named else list(models.values()), groups, key=KEY)
    assert list(found) == (["x", "y", "z"] if named else ["0", "1", "2"])
    first, *others = found.values()
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    np.testing.assert_allclose(apply(first, inputs), apply(params, inputs), rtol=1e-5)


def test_many_different_models_come_closer():
    apply, inputs, groups, params, _ = case("mlp")
    models = [params_like(params, seed) for seed in range(3)]
    found = align_many(models, groups, key=KEY)
    pairs = lambda some: sum(
        closeness(a, b) for a, b in itertools.combinations(some, 2)
    )
    assert pairs([*found.values()]) > pairs(models) + 1
    for before, after in zip(models, found.values()):
        outputs = [apply(p, inputs) for p in (before, after)]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_said():
    model = random_mlp(0)
    run = lambda a, b, groups=GROUPS, **rest: align(a, b, groups, key=KEY, **rest)
    with pytest.raises(
        ValueError, match=r"differ:\n  model: b: shape, .*\[4, 7\] in place"
    ):
        run(model, model | {"b": jnp.ones((4, 7))})
    with pytest.raises(ValueError, match=r"reference: c: missing"):
        run({"a": model["a"], "b": model["b"]}, model)
    with pytest.raises(ValueError, match="model: d: extra"):
        run(model, model | {"d": jnp.ones(2)})
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1, got 0"):
        run(model, model, max_iterations=0)
    with pytest.raises(
        ValueError, match=r"`where` must choose at least one.*got 'nope'"
    ):
        run(model, model, where="nope")
    broken = model | {"b": model["b"].at[0, 0].set(jnp.nan)}
    with pytest.raises(
        ValueError, match=r"`reference` must be finite .* in 'b'; leave"
    ):
        run(broken, model)
    run(broken, model, where="a|c")
    with pytest.raises(ValueError, match="`models` must be at least two, got 1"):
        align_many([model], GROUPS, key=KEY)
    with pytest.raises(ValueError, match=r"differ:\n  1: d: extra"):
        align_many([model, model | {"d": jnp.ones(2)}], GROUPS, key=KEY)
    right, short, twice = np.arange(4), np.arange(2), np.array([0, 0, 1])
    for wrong in ([right], [right, short], [right, twice]):
        with pytest.raises(
            ValueError, match=r"`permutations` must be .* sizes \[4, 3\]"
        ):
            permute(model, GROUPS, wrong)


def test_a_model_without_groups_is_an_error_with_a_remedy():
    linear = lambda params, x: x @ params["w"]
    params = {"w": jnp.ones((3, 2))}
    groups = permutation_groups(linear, params, jnp.ones(3))
    assert len(groups) == 0
    with pytest.raises(ValueError, match=r"`groups` must hold .* `print\(groups\)`"):
        align(params, params, groups, key=KEY)
    with pytest.raises(ValueError, match="trace the whole model"):
        align_many([params, params], groups, key=KEY)
