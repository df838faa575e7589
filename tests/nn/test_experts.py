"""Experts, gates, towers, hard concrete variables and generated weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtjax.nn import DSelectK, Experts, Gate, HyperDense, Hypernetwork, Towers
from mtjax.nn.dselect_k import smooth_step
from mtjax.nn.gates import gate_dropout, masked_softmax
from mtjax.nn.hard_concrete import hard_concrete, open_probability
from tests.nn import plain

X = jax.random.normal(jax.random.key(1), (5, 6))
MASK = ((True, False, True, True), (False, True, True, False))


def start(module, *args):
    """Random parameters, biases too."""
    params = jax.jit(module.init)(jax.random.key(0), *args)["params"]
    noise = lambda p: p + 0.1 * np.random.default_rng(0).normal(size=p.shape)
    return jax.tree.map(lambda p: jnp.asarray(noise(p), p.dtype), params)


def apply(module, params, *args, **options):
    run = functools.partial(module.apply, **options)
    return jax.jit(run)({"params": params}, *args)


def test_experts_are_networks_by_themselves():
    module = Experts(num_experts=3, widths=(8, 4))
    params = start(module, X)
    reference, x = plain.float64(params), np.float64(X)
    found = apply(module, params, X)
    for i, expected in enumerate(plain.experts(reference, x)):
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-5)
    # One input for each.
    several = np.stack([x, 2 * x, x + 1], axis=1)
    found = apply(module, params, jnp.asarray(several, jnp.float32))
    for i in range(3):
        expected = plain.expert(reference, i, several[:, i])
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-5)


def test_experts_may_end_linear():
    module = Experts(num_experts=2, widths=(4,), activate_output=False)
    params = start(module, X)
    found = apply(module, params, X)
    expected = np.einsum("bd,ndw->bnw", X, params["kernel_0"]) + params["bias_0"][None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found < 0).any()


@pytest.mark.parametrize("module", [Experts(400, (8,)), Gate(400, 8)])
def test_start_does_not_depend_on_how_many_there_are(module):
    x = jnp.zeros((1, 50))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    kernel = params.get("kernel_0", params.get("kernel"))
    assert kernel.shape == (400, 50, 8)
    # The variance of `nn.Dense`, one over the fan-in, within five standard errors (a
    # truncated normal's squares spread less than a normal's).
    assert np.var(kernel) == pytest.approx(1 / 50, rel=5 * np.sqrt(2 / kernel.size))


def test_dropout_of_experts():
    module = Experts(num_experts=2, widths=(64,), dropout=0.25)
    params = start(module, X)
    rngs = {"dropout": jax.random.key(3)}
    dropped = apply(module, params, X, train=True, rngs=rngs)
    whole = apply(module, params, X)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)
    alive = int((whole > 0).sum())
    low, high = stats.binom.interval(1 - 1e-6, alive, 0.75)
    assert low <= kept.sum() <= high


def test_masked_softmax():
    logits = jnp.array([[1.0, -2.0, 40.0, 0.5], [3.0, 0.0, -1.0, jnp.inf]])
    found = masked_softmax(logits, np.array([MASK[1], MASK[1]]))
    expected = np.zeros((2, 4))
    expected[:, 1:3] = plain.softmax(np.float64(logits)[:, 1:3])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.asarray(found)[:, [0, 3]] == 0).all()
    np.testing.assert_array_equal(
        masked_softmax(jnp.ones((1, 3)), np.zeros((1, 3), bool)), np.zeros((1, 3))
    )
    slopes = jax.grad(lambda z: masked_softmax(z, np.array(MASK))[:, 2].sum())(logits)
    assert np.isfinite(slopes).all()
    assert (np.asarray(slopes)[~np.array(MASK)] == 0).all()


@pytest.mark.parametrize("per_gate", [False, True])
def test_gate_is_a_softmax_over_its_own_experts(per_gate):
    module = Gate(2, 4, mask=MASK, use_bias=True)
    x = np.float64(X)
    inputs = np.stack([x, x - 1], axis=1) if per_gate else x
    params = start(module, jnp.asarray(inputs, jnp.float32))
    assert params["kernel"].shape == (2, 6, 3)
    found = apply(module, params, jnp.asarray(inputs, jnp.float32))
    reference = plain.float64(params)
    for g, row in enumerate(np.array(MASK)):
        of_gate = inputs[:, g] if per_gate else x
        logits = of_gate @ reference["kernel"][g] + reference["bias"][g]
        expected = np.zeros((5, 4))
        expected[:, row] = plain.softmax(logits[:, : row.sum()])
        np.testing.assert_allclose(found[:, g], expected, rtol=1e-4, atol=1e-6)
        assert (np.asarray(found[:, g])[:, ~row] == 0).all()


def test_gate_with_hidden_layers_and_what_it_shows():
    module = Gate(2, 3, hidden=(5,))
    params = start(module, X)
    found, state = apply(module, params, X, mutable=["intermediates"])
    reference = plain.float64(params)
    for g in range(2):
        h = plain.expert(reference["hidden"], g, np.float64(X))
        expected = plain.softmax(h @ reference["kernel"][g])
        np.testing.assert_allclose(found[:, g], expected, rtol=1e-4, atol=1e-6)
    assert list(state["intermediates"]) == ["gates"]
    np.testing.assert_array_equal(state["intermediates"]["gates"][0], found)


def test_gate_dropout_renormalises_what_is_kept():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4000, 2, 3)))
    dropped = np.asarray(gate_dropout(weights, 0.6, key=jax.random.key(1)))
    np.testing.assert_allclose(dropped.sum(-1), 1.0, rtol=1e-5)
    weights = np.asarray(weights, np.float64)
    expected = np.where(dropped > 0, weights, 0.0)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(dropped, expected, rtol=1e-4)
    # Rows that would lose every expert, 0.6 ** 3 of them, keep all.
    whole = int((dropped > 0).all(-1).sum())
    low, high = stats.binom.interval(1 - 1e-6, 8000, 0.6**3 + 0.4**3)
    assert low <= whole <= high
    np.testing.assert_allclose(
        gate_dropout(jnp.ones((2, 1)), 0.0, key=jax.random.key(0)), 1
    )


def test_towers_are_apart():
    module = Towers(("a", "b"), hidden=(4, 3))
    h = jax.random.normal(jax.random.key(2), (5, 2, 6))
    params = start(module, h)
    found = apply(module, params, h)
    reference = plain.float64(params)
    for t, task in enumerate("ab"):
        expected = plain.tower(reference[task], np.float64(h[:, t]))
        np.testing.assert_allclose(found[task], expected, rtol=1e-4, atol=1e-5)
    together = apply(module, params, h[:, 0])
    np.testing.assert_allclose(together["a"], found["a"], rtol=1e-5)


def test_smooth_step_is_the_cubic_inside_and_flat_outside():
    t = np.linspace(-1, 1, 41)
    for width in (1.0, 1.5):
        inside = np.abs(t) < width / 2
        cubic = -2 * t**3 / width**3 + 3 * t / (2 * width) + 0.5
        slope = -6 * t**2 / width**3 + 3 / (2 * width)
        points = jnp.asarray(t, jnp.float32)
        step = functools.partial(smooth_step, width=width)
        expected = np.where(inside, cubic, t > 0)
        np.testing.assert_allclose(step(points), expected, rtol=1e-5, atol=1e-6)
        slopes = jax.vmap(jax.grad(step))(points)
        np.testing.assert_allclose(slopes, np.where(inside, slope, 0.0), atol=1e-5)
        assert (np.asarray(slopes)[np.abs(t) > width / 2 + 1e-6] == 0).all()


def dselect(z, w, n):
    """Weights of a gate by products over bits, selector by selector."""
    q = np.zeros(n)
    for share, code in zip(plain.softmax(w), z):
        s = [
            0.0 if t <= -0.5 else 1.0 if t >= 0.5 else -2 * t**3 + 1.5 * t + 0.5
            for t in code
        ]
        for i in range(n):
            bits = [i >> j & 1 for j in range(len(code))]
            q[i] += share * np.prod([a if b else 1 - a for a, b in zip(s, bits)])
    return q


@pytest.mark.parametrize("n", [4, 5])
def test_dselect_k(n):
    module = DSelectK(num_gates=2, num_experts=n, k=2)
    params = start(module, X)
    found, state = apply(module, params, X, mutable=["losses"])
    z = np.einsum("bd,gdk->bgk", X, params["codes"]).reshape(5, 2, 2, -1)
    w = np.einsum("bd,gdk->bgk", X, params["mixing"])
    expected = [[dselect(z[b, g], w[b, g], n) for g in range(2)] for b in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    total = found.sum(-1)
    if n == 4:
        np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    else:
        assert (total < 1).any()
    one = np.array([[[1.0, -50.0]]])
    selectors = np.array(
        [
            [
                [dselect(z[b, g, s : s + 1], one[0, 0, :1], n) for s in range(2)]
                for g in range(2)
            ]
            for b in range(5)
        ]
    )
    logs = np.log(np.where(selectors > 0, selectors, 1.0))
    regulariser = -(selectors * logs).sum((1, 2, 3))
    if n == 5:
        regulariser += (1 / selectors.sum(-1)).sum((1, 2))
    np.testing.assert_allclose(
        state["losses"]["dselect_k"][0], regulariser.mean(), rtol=1e-3
    )


def test_dselect_k_settles_on_at_most_k_experts_and_stays():
    module = DSelectK(num_gates=1, num_experts=8, k=3, per_example=False)
    params = start(module, X)
    assert params["codes"].shape == (1, 3, 3)
    code = np.array([[[1, -1, 1], [-1, -1, -1], [1, 1, 1]]]) * 0.5
    params["codes"] = jnp.asarray(code, jnp.float32)
    weights = apply(module, params, X)
    expected = np.zeros(8)
    # Bits from the lowest: 101, 000 and 111.
    expected[[5, 0, 7]] = plain.softmax(np.float64(params["mixing"][0]))
    np.testing.assert_allclose(weights, np.tile(expected, (5, 1, 1)), rtol=1e-5)
    assert (np.asarray(weights) > 0).sum(-1).max() == 3
    slopes = jax.grad(lambda p: module.apply({"params": p}, X)[:, :, 5].sum())(params)
    assert not slopes["codes"].any()
    assert slopes["mixing"].any()


def test_open_probability_is_the_frequency():
    log_alpha = jnp.array([-2.0, -0.5, 0.0, 1.5])
    many = 100_000
    z = hard_concrete(jnp.tile(log_alpha, (many, 1)), key=jax.random.key(0))
    p = np.asarray(open_probability(log_alpha), np.float64)
    np.testing.assert_allclose(
        p, plain.sigmoid(np.float64(log_alpha) - 2 / 3 * np.log(0.1 / 1.1)), rtol=1e-5
    )
    low, high = stats.binom.interval(1 - 1e-6, many, p)
    opened = np.count_nonzero(z, axis=0)
    assert ((low <= opened) & (opened <= high)).all()
    assert float(z.min()) >= 0
    assert float(z.max()) == 1
    settled = np.clip(1.2 * plain.sigmoid(np.float64(log_alpha)) - 0.1, 0, 1)
    np.testing.assert_allclose(hard_concrete(log_alpha), settled, rtol=1e-5, atol=1e-6)


def test_penalty_closes_every_gate():
    slopes = jax.grad(lambda a: 100 * open_probability(a).sum())
    log_alpha = jnp.array([-1.0, 0.0, 3.0])
    for _ in range(20):
        log_alpha = log_alpha - 0.1 * slopes(log_alpha)
    np.testing.assert_array_equal(hard_concrete(log_alpha), jnp.zeros(3))


def test_hypernetwork_starts_the_same_for_all_conditions():
    conditions = jax.random.normal(jax.random.key(0), (5, 3))
    module = Hypernetwork({"w": (6, 4), "b": (4,)}, {"w": nn.initializers.ones})
    params = jax.jit(module.init)(jax.random.key(0), conditions)["params"]
    made = apply(module, params, conditions)
    np.testing.assert_array_equal(made["w"], np.ones((5, 6, 4)))
    np.testing.assert_array_equal(made["b"], np.zeros((5, 4)))
    made = apply(module, start(module, conditions), conditions)
    assert np.abs(made["w"][0] - made["w"][1]).max() > 1e-3


@pytest.mark.parametrize("rank", [None, 2])
def test_hyper_dense(rank):
    conditions = jax.random.normal(jax.random.key(0), (5, 3))
    module = HyperDense(features=4, rank=rank, hidden=(7,))
    params = start(module, X, conditions)
    found = apply(module, params, X, conditions)
    p = plain.float64(params)["hypernetwork"]
    linear = lambda name, h: h @ p[name]["kernel"] + p[name]["bias"]
    for x, condition, y in zip(np.float64(X), np.float64(conditions), found):
        h = plain.relu(linear("hidden_0", condition))
        if rank is None:
            kernel = linear("kernel", h).reshape(6, 4)
        else:
            kernel = linear("down", h).reshape(6, 2) @ linear("up", h).reshape(2, 4)
        np.testing.assert_allclose(
            y, x @ kernel + linear("bias", h), rtol=1e-3, atol=1e-5
        )
    one = apply(module, params, X, conditions[0])
    np.testing.assert_allclose(one[0], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Experts(0), r"`num_experts` must be at least 1, got 0"),
        (Experts(2, widths=()), r"`widths` must name at least one layer"),
        (Gate(0, 2), r"`num_gates` and `num_experts` must be at least 1, got 0 and 2"),
        (
            Gate(2, 3, mask=MASK),
            r"`mask` must have one row per gate.*\(2, 3\).*\(2, 4\)",
        ),
        (Gate(1, 2, mask=((False, False),)), r"`mask` must let every.*gates \[0\]"),
        (DSelectK(1, 2, k=3), r"`k` in \[1, num_experts\], got 1, 2 and 3"),
        (DSelectK(1, 2, k=0), r"`k` in \[1, num_experts\]"),
        (Towers(()), r"`tasks` must name at least one task"),
        (Towers(("a", "a")), r"`tasks` must differ from each other"),
        (Hypernetwork({}), r"`shapes` must name at least one array"),
    ],
)
def test_bad_sizes(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), X)


def test_inputs_of_another_number():
    three = jnp.ones((5, 3, 6))
    with pytest.raises(ValueError, match=r"`x` must hold one input.*2, got 3"):
        Experts(2).init(jax.random.key(0), three)
    with pytest.raises(ValueError, match=r"one input for each of the 2 `tasks`, got 3"):
        Towers(("a", "b")).init(jax.random.key(0), three)
    with pytest.raises(ValueError, match=r"`rate` must be in \[0, 1\), got 1.0"):
        gate_dropout(jnp.ones((1, 2)), 1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`temperature` must be positive"):
        hard_concrete(jnp.zeros(2), stretch=(0.0, 1.1))
    with pytest.raises(ValueError, match=r"`rank` must be at least 1, got 0"):
        HyperDense(3, rank=0).init(jax.random.key(0), X, jnp.ones(2))
