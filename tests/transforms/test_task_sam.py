"""Sharpness-aware gradients per task, against closed forms and steps by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.transforms.perturbation import uphill
from tests.balancing import matrices, model
from tests.balancing.catalogue import METHODS, jitted

RHO = 0.3


def norm(tree):
    return float(optax.tree.norm(tree))


def sam_gradients(params, batch, rho_shared, rho_own, adaptive=False):
    """Per task, its gradient at its own point, in separate passes by hand."""

    def uphill_of(p, g, rho):
        size = jax.tree.map(jnp.abs, p) if adaptive else optax.tree.ones_like(p)
        slope = jax.tree.map(jnp.multiply, size, g)
        length = norm(slope)
        return jax.tree.map(lambda p, t, s: p + rho * t * s / length, p, size, slope)

    rows = []
    for name in model.NAMES:
        grad_fn = jax.grad(lambda p, name=name: model.losses_fn(p, batch)[name])
        grad, heads = grad_fn(params), dict(params["heads"])
        heads[name] = uphill_of(heads[name], grad["heads"][name], rho_own)
        trunk = uphill_of(params["trunk"], grad["trunk"], rho_shared)
        rows.append(grad_fn({"trunk": trunk, "heads": heads}))
    return rows


@functools.cache
def updates_of(mode, rho_own=RHO, adaptive=False, aggregator=mtjax.mgda, **options):
    tx = mtjax.task_sam(
        aggregator(),
        rho_shared=RHO,
        rho_own=rho_own,
        adaptive=adaptive,
        mode=mode,
        **options,
    )
    params = model.params()
    step = jax.jit(functools.partial(model.update, tx))
    return step(params, tx.init(params), model.batch())[0]


def aggregated(rows, aggregator=mtjax.mgda):
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *rows)
    tx = aggregator()
    return tx.update(stacked, tx.init(None))[0]


def trunks(rows):
    return [row["trunk"] for row in rows]


def parts():
    params, batch = model.params(), model.batch()
    whole = sam_gradients(params, batch, RHO, RHO)
    clean = sam_gradients(params, batch, 0.0, 0.0)
    flat = [jax.tree.map(jnp.subtract, w, c) for w, c in zip(whole, clean, strict=True)]
    return whole, clean, flat


def assert_heads_follow_their_own(updates, rows):
    for name, row in zip(model.NAMES, rows, strict=True):
        chex.assert_trees_all_close(
            updates["heads"][name], row["heads"][name], rtol=1e-4, atol=1e-5
        )


def test_decomposed_aggregates_loss_and_flat_parts_apart():
    whole, clean, flat = parts()
    updates = updates_of("decomposed")
    expected = jax.tree.map(
        jnp.add, aggregated(trunks(clean)), aggregated(trunks(flat))
    )
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-3, atol=1e-4)
    assert_heads_follow_their_own(updates, whole)


def test_direct_aggregates_the_whole_gradients():
    whole, _, _ = parts()
    updates = updates_of("direct")
    expected = aggregated(trunks(whole))
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-3, atol=1e-4)
    assert_heads_follow_their_own(updates, whole)
    other = updates_of("decomposed")["trunk"]
    assert norm(optax.tree.sub(expected, other)) > 0.01 * norm(expected)


def test_second_aggregates_the_two_sums():
    whole, clean, flat = parts()
    updates = updates_of("second")
    expected = aggregated([aggregated(trunks(flat)), aggregated(trunks(clean))])
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-3, atol=1e-4)
    assert_heads_follow_their_own(updates, whole)


def test_each_aggregates_within_tasks_first():
    whole, clean, flat = parts()
    pairs = zip(trunks(flat), trunks(clean), strict=True)
    expected = aggregated([aggregated(pair) for pair in pairs])
    updates = updates_of("each")
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-3, atol=1e-4)
    assert_heads_follow_their_own(updates, whole)


def test_erm_is_the_aggregator():
    base = mtjax.mgda()
    params = model.params()
    tx = mtjax.task_sam(base, mode="erm")
    chex.assert_trees_all_equal(
        model.update(tx, params, tx.init(params), model.batch()),
        model.update(base, params, base.init(params), model.batch()),
    )


def test_linear_aggregator_decomposed_is_direct_is_the_sum():
    rows = sam_gradients(model.params(), model.batch(), RHO, 0.1)
    expected = jax.tree.map(lambda *g: sum(g), *rows)
    for mode in ("decomposed", "direct"):
        updates = updates_of(mode, 0.1, aggregator=mtjax.equal)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_adaptive_perturbation_by_hand():
    rows = sam_gradients(model.params(), model.batch(), RHO, 0.1, adaptive=True)
    updates = updates_of("direct", 0.1, adaptive=True, aggregator=mtjax.equal)
    expected = jax.tree.map(lambda *g: sum(g), *rows)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_quadratic_flat_part_in_closed_form():
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((2, 5, 5))
    hessians = roots @ np.swapaxes(roots, 1, 2)
    theta = rng.standard_normal(5)
    losses_fn = lambda p: {
        t: 0.5 * p @ jnp.asarray(h, jnp.float32) @ p
        for t, h in zip("ab", hessians, strict=True)
    }
    params = jnp.asarray(theta, jnp.float32)
    tx = mtjax.task_sam(mtjax.equal(), rho_shared=RHO, adaptive=False)
    _, grads = mtjax.value_and_task_grads(losses_fn)(params)
    updates, _ = tx.update(grads, tx.init(params), params, losses_fn=losses_fn)
    slopes = [h @ theta for h in hessians]
    flat = [
        RHO * h @ g / np.linalg.norm(g) for h, g in zip(hessians, slopes, strict=True)
    ]
    np.testing.assert_allclose(updates, sum(slopes) + sum(flat), rtol=1e-5)


def test_lengths_of_perturbations():
    grads, params = model.params(seed=3), model.params()
    shared = {"trunk": True, "heads": False}
    shared = jax.tree.map(
        lambda s, p: jax.tree.map(lambda _: s, p),
        shared,
        params,
        is_leaf=lambda x: isinstance(x, bool),
    )
    lengths = {"rho_shared": 0.5, "rho_own": 2.0}
    for scale in (1e-20, 1.0, 1e20):
        scaled = optax.tree.scale(scale, grads)
        steps = uphill(scaled, params, shared, **lengths)
        assert norm(steps["trunk"]) == pytest.approx(0.5, rel=1e-5)
        assert norm(steps["heads"]) == pytest.approx(2.0, rel=1e-5)
        steps = uphill(scaled, params, shared, **lengths, adaptive=True)
        relative = jax.tree.map(jnp.divide, steps, params)
        assert norm(relative["trunk"]) == pytest.approx(0.5, rel=1e-5)
        assert norm(relative["heads"]) == pytest.approx(2.0, rel=1e-5)
    steps = uphill(grads, params, shared, rho_shared=3.0, rho_own=3.0, joint_norm=True)
    assert norm(steps) == pytest.approx(3.0, rel=1e-5)
    assert norm(steps["trunk"]) == pytest.approx(
        3.0 * norm(grads["trunk"]) / norm(grads), rel=1e-5
    )
    zeros = optax.tree.zeros_like(grads)
    chex.assert_trees_all_equal(uphill(zeros, params, shared, **lengths), zeros)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_adaptive_mode_knows_no_units_of_the_parameters(factor):
    """Rescaled parameters with the same losses: the perturbed losses are the same."""
    params, batch = model.params(), model.batch()

    def perturbed_losses(params, losses_fn):
        seen = {}

        def spy(p):
            losses = losses_fn(p)
            seen.update(losses)
            return losses

        found = []
        for name in model.NAMES:
            grad = jax.grad(lambda p, n=name: losses_fn(p)[n])(params)
            shared = jax.tree.map(lambda _: True, params)
            steps = uphill(
                grad, params, shared, rho_shared=0.5, rho_own=0.5, adaptive=True
            )
            found.append(losses_fn(optax.tree.add(params, steps))[name])
        return found

    plain = perturbed_losses(params, lambda p: model.losses_fn(p, batch))
    rescaled = perturbed_losses(
        optax.tree.scale(factor, params),
        lambda p: model.losses_fn(optax.tree.scale(1 / factor, p), batch),
    )
    np.testing.assert_allclose(rescaled, plain, rtol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_task_is_sharpness_aware_minimisation(adaptive):
    params, batch = model.params(), model.batch()
    losses_fn = lambda p: {"a": model.losses_fn(p, batch)["a"]}
    _, grads = mtjax.value_and_task_grads(losses_fn)(params)
    per_task = mtjax.task_sam(
        mtjax.pcgrad(), rho_shared=9.0, rho_own=RHO, adaptive=adaptive
    )
    plain = optax.chain(mtjax.sam(rho=RHO, adaptive=adaptive), mtjax.equal())
    found, expected = (
        tx.update(grads, tx.init(params), params, losses_fn=losses_fn)[0]
        for tx in (per_task, plain)
    )
    grad = jax.grad(lambda p: losses_fn(p)["a"])(params)
    size = jax.tree.map(jnp.abs, params) if adaptive else optax.tree.ones_like(params)
    slope = jax.tree.map(jnp.multiply, size, grad)
    steps = jax.tree.map(lambda t, s: RHO * t * s / norm(slope), size, slope)
    by_hand = jax.grad(lambda p: losses_fn(p)["a"])(optax.tree.add(params, steps))
    chex.assert_trees_all_close(expected, by_hand, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found, by_hand, rtol=1e-4, atol=1e-6)


def test_a_head_does_not_see_other_tasks_data():
    params, batch = model.params(), model.batch()
    other = {"x": batch["x"], "y": batch["y"].at[:, 1:].mul(-3.0)}
    tx = mtjax.task_sam(mtjax.pcgrad(), rho_shared=RHO, rho_own=RHO, adaptive=True)
    step = jax.jit(functools.partial(model.update, tx))
    first, second = (step(params, tx.init(params), b)[0] for b in (batch, other))
    chex.assert_trees_all_equal(first["heads"]["a"], second["heads"]["a"])
    assert bool(jnp.any(first["heads"]["b"] != second["heads"]["b"]))


def test_each_use_has_a_state_of_its_own():
    params, batch = model.params(), model.batch()
    tx = mtjax.task_sam(mtjax.nash_mtl(3), rho_shared=RHO, rho_own=RHO)
    state = tx.init(params)
    chex.assert_trees_all_equal(state.loss, state.flat)
    base = mtjax.nash_mtl(3)
    _, state = model.update(tx, params, state, batch)
    _, expected = model.update(base, params, base.init(params), batch)
    chex.assert_trees_all_close(state.loss, expected, rtol=1e-5)
    differ = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), model.raw(state.loss), model.raw(state.flat)
    )
    assert any(jax.tree.leaves(differ))


def test_scaled_tasks_have_scaled_flat_parts():
    """Behind a weighting both parts are weighted."""
    weights = [0.5, 2.0, 3.0]
    tx = optax.chain(
        mtjax.scale_by_weighting(mtjax.constant(weights)),
        mtjax.task_sam(mtjax.equal(), rho_shared=RHO, rho_own=RHO, adaptive=False),
    )
    params, batch = model.params(), model.batch()
    updates, _ = model.update(tx, params, tx.init(params), batch)
    rows = sam_gradients(params, batch, RHO, RHO)
    expected = jax.tree.map(
        lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *rows
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    # What learns weights on held-out data does so by steps of an optimizer, and the
    # `eps` of PCD is a squared norm.
    [
        m
        for m in METHODS
        if m.claims["scale_all"] == "1" and not m.held_out and m.factory != mtjax.pcd
    ],
    ids=lambda m: m.label,
)
def test_tiny_flat_parts_are_aggregated_like_large_ones(method):
    rows = matrices.sample(matrices.conflicting, 6)
    large = np.asarray(jitted(method, 6)(rows)[0])
    tiny = np.asarray(jitted(method, 6)(1e-8 * rows)[0])
    np.testing.assert_allclose(1e8 * tiny, large, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho_shared": -1.0}, "`rho_shared` must not be negative, got -1.0"),
        ({"rho_own": float("nan")}, "`rho_own` must not be negative, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mtjax.task_sam(mtjax.mgda(), **arguments)


def test_missing_arguments_of_the_update():
    params = model.params()
    tx = mtjax.task_sam(mtjax.mgda())
    _, grads = model.grad_fn(params, model.batch())
    with pytest.raises(ValueError, match="`task_sam` needs the extra argument"):
        tx.update(grads, tx.init(params), params)
    losses_fn = functools.partial(model.losses_fn, batch=model.batch())
    with pytest.raises(ValueError, match="`task_sam` needs `params`"):
        tx.update(grads, tx.init(params), losses_fn=losses_fn)
    only_one = lambda p: {"a": losses_fn(p)["a"]}
    with pytest.raises(ValueError, match="`losses` must have exactly the tasks"):
        tx.update(grads, tx.init(params), params, losses_fn=only_one)
