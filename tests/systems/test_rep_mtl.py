"""Rep-MTL: the two regularisers, what they do to gradients, and several devices."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import mtjax
from mtjax.systems.rep_mtl import (
    RepMTLConfig,
    affinity_cosines,
    csa_loss,
    rep_mtl_objective,
    representation_saliency,
    tsr_loss,
)
from mtjax.training import TrainState, make_train_step

TASKS = ("a", "b", "c")
RAW = RepMTLConfig(log_loss=False)
OFF = RepMTLConfig(lambda_tsr=0.0, lambda_csa=0.0)


def saliencies(seed=0, shape=(6, 3, 2, 5), tasks=TASKS):
    rng = np.random.default_rng(seed)
    return {t: jnp.asarray(rng.normal(size=shape), jnp.float32) for t in tasks}


tsr = jax.jit(tsr_loss, static_argnames="axis_name")
tsr_and_slopes = jax.jit(jax.value_and_grad(tsr_loss))
csa_and_slopes = jax.jit(jax.value_and_grad(csa_loss))
cosines_of = jax.jit(affinity_cosines)


# --- A small smooth model: x -> z of shape (batch, 4, 3), three heads ---------------


def encode(params, batch):
    x = batch["x"]
    return jnp.tanh(x @ params["trunk"]).reshape(len(x), 4, 3)


def heads(params, z, batch):
    losses = {}
    for i, task in enumerate(TASKS):
        hidden = jnp.tanh(z @ params["heads"][task]["hidden"])
        output = jnp.einsum("bnh,nh->b", hidden, params["heads"][task]["output"])
        losses[task] = jnp.mean((output - batch["y"][:, i]) ** 2)
    return losses


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 7))
    normal = lambda *shape: 0.7 * jax.random.normal(next(keys), shape)
    return {
        "trunk": normal(5, 12),
        "heads": {t: {"hidden": normal(3, 4), "output": normal(4, 4)} for t in TASKS},
    }


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    }


def paper_total(params, batch, config):
    """The paper's objective in one differentiable expression, without any splitting."""
    z = encode(params, batch)
    log = lambda loss: jnp.log(loss + 1e-8) if config.log_loss else loss
    losses = {t: log(loss) for t, loss in heads(params, z, batch).items()}
    which = log if config.saliency == "trained" else lambda loss: loss
    s = {
        t: jax.grad(lambda z, t=t: which(heads(params, z, batch)[t]))(z) for t in TASKS
    }
    return (
        sum(losses.values())
        + config.lambda_tsr * tsr_loss(s)
        + config.lambda_csa * csa_loss(s, temperature=config.temperature)
    )


def combined(pair, params, batch, **kwargs):
    """Losses, logs and the update of equal weighting."""
    grad_fn = mtjax.value_and_task_grads(pair, has_aux=True, **kwargs)
    (losses, logs), grads = grad_fn(params, batch)
    return losses, logs, grads.combine()


@functools.cache
def objective(config):
    """`combined` of the small model, compiled once per configuration."""
    pair = rep_mtl_objective((encode, heads), config)
    return jax.jit(functools.partial(combined, pair))


# --- Task-specific saliency regulation ----------------------------------------------


def test_one_task_per_location_has_no_entropy():
    s = saliencies()
    owner = np.random.default_rng(2).integers(3, size=(6, 3, 2))
    apart = {t: s[t] * jnp.asarray(owner == i)[..., None] for i, t in enumerate(TASKS)}
    value, slopes = tsr_and_slopes(apart)
    assert value == pytest.approx(0.0, abs=1e-6)
    assert all(jnp.isfinite(g).all() for g in slopes.values())


def test_equal_saliencies_have_the_largest_entropy():
    s = saliencies()["a"]
    # Signs differ, sizes do not.
    assert tsr({"a": s, "b": -s, "c": s}) == pytest.approx(np.log(3), rel=1e-5)


def test_tsr_by_hand():
    s = saliencies(3)
    size = np.abs(np.stack([np.float64(s[t]).mean(-1).ravel() for t in TASKS]))
    share = size / size.sum(0)
    expected = -(share * np.log(share)).sum(0).mean()
    assert tsr(s) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < np.log(3)


def test_channels_that_cancel_are_not_salient():
    s = jnp.array([[1.0, -1.0], [2.0, -2.0]])
    assert tsr({"a": s, "b": jnp.ones((2, 2))}) == 0.0


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e10])
def test_tsr_ignores_the_common_scale(scale):
    scaled = jax.tree.map(lambda x: x * scale, saliencies())
    assert tsr(scaled) == pytest.approx(float(tsr(saliencies())), rel=1e-5)


def test_locations_without_saliency_do_not_count():
    s = saliencies()
    dark = jax.tree.map(lambda x: x.at[:, 0].set(0.0), s)
    rest = jax.tree.map(lambda x: x[:, 1:], s)
    value, slopes = tsr_and_slopes(dark)
    assert value == pytest.approx(float(tsr(rest)), rel=1e-6)
    assert all(jnp.isfinite(g).all() for g in slopes.values())
    assert tsr(jax.tree.map(jnp.zeros_like, s)) == 0.0


# --- Cross-task saliency alignment ----------------------------------------------------


def brute_force(s, tau, reduction="mean", include=False):
    """With every affinity of channels x channels written out, in float64."""
    s = np.stack([np.float64(s[t]) for t in TASKS])
    s = s.reshape(*s.shape[:2], -1, s.shape[-1])
    batch, unit = s.shape[1], lambda m: m.ravel() / np.linalg.norm(m)
    anchor_columns = s.mean(2)
    anchors = [
        unit(anchor_columns[:, b].T @ anchor_columns[:, b]) for b in range(batch)
    ]
    total = 0.0
    for b in range(batch):
        affinities = [unit(s[t, b].T @ s[t, b]) for t in range(len(s))]
        p = np.array([np.exp(anchors[b] @ m / tau) for m in affinities])
        if reduction == "sum_inside_log":
            p = p.sum(keepdims=True)
        n = sum(np.exp(anchors[b] @ anchors[k] / tau) for k in range(batch) if k != b)
        total += np.mean(-np.log(p / (n + p * include)))
    return total / batch


@pytest.mark.parametrize("shape", [(6, 3, 2, 5), (5, 2, 7), (4, 9)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum_inside_log"])
@pytest.mark.parametrize("include", [False, True])
def test_csa_by_brute_force(shape, reduction, include):
    s = saliencies(4, shape)
    found = jax.jit(
        functools.partial(
            csa_loss,
            temperature=0.2,
            positive_reduction=reduction,
            include_positive_in_denominator=include,
        )
    )(s)
    expected = brute_force(s, 0.2, reduction, include)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_task_affinities_ignore_the_scale_of_their_task():
    s = saliencies(5)
    scaled = {"a": s["a"] * 7.0, "b": s["b"] * 0.01, "c": s["c"]}
    plain, other = cosines_of(s), cosines_of(scaled)
    # The anchors do change; with one task only, nothing does.
    assert jnp.abs(plain.negatives - other.negatives).max() > 1e-3
    alone, louder = {"a": s["a"]}, {"a": s["a"] * 1e-12}
    np.testing.assert_allclose(csa_loss(alone), csa_loss(louder), rtol=1e-5)
    anchors = dict.fromkeys(TASKS, s["a"])
    same = {t: s["a"] * c for t, c in zip(TASKS, (1.0, 30.0, 1e-3))}
    np.testing.assert_allclose(
        cosines_of(anchors).positives, cosines_of(same).positives, rtol=1e-5
    )


def test_cosines_are_cosines():
    cosines = cosines_of(saliencies(6))
    for values in (cosines.positives, cosines.negatives):
        assert values.min() >= 0.0
        assert values.max() <= 1.0 + 1e-5
    np.testing.assert_allclose(jnp.diagonal(cosines.negatives), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(cosines.mask, ~np.eye(6, dtype=bool))


def test_tasks_that_agree_and_samples_that_differ_have_a_low_loss():
    one_hot = jnp.eye(6)[:, None, :] * jnp.ones((6, 4, 1))
    agree = dict.fromkeys(TASKS, one_hot)
    # Cosine 1 to the positives, 0 to the five negatives.
    assert csa_loss(agree) == pytest.approx(np.log(5) - 10.0, rel=1e-5)


@pytest.mark.parametrize("which", ["all", "one task", "one sample"])
def test_csa_of_zeros_is_finite(which):
    s = saliencies()
    if which == "all":
        s = jax.tree.map(jnp.zeros_like, s)
    elif which == "one task":
        s["a"] = jnp.zeros_like(s["a"])
    else:
        s = jax.tree.map(lambda x: x.at[0].set(0.0), s)
    value, slopes = csa_and_slopes(s)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in slopes.values())


def test_errors_name_the_argument(params, batch):
    with pytest.raises(ValueError, match="at least two samples"):
        csa_loss(saliencies(shape=(1, 2, 4)))
    unequal = {"a": jnp.ones((4, 3)), "b": jnp.ones((5, 3))}
    for loss in (tsr_loss, csa_loss):
        with pytest.raises(ValueError, match=r"one shape .* got .*\(5, 3\)"):
            loss(unequal)
    with pytest.raises(ValueError, match="`lambda_csa` must be at least 0, got -1"):
        RepMTLConfig(lambda_csa=-1.0)
    with pytest.raises(ValueError, match="`saliency` must be"):
        RepMTLConfig.__post_init__(SimpleNamespace(**vars(OFF) | {"saliency": "log"}))
    with pytest.raises(ValueError, match=r"exactly the tasks \['a'\], got .*'b'"):
        representation_saliency(
            lambda z: {"a": jnp.sum(z["b"])}, {"b": jnp.ones((2, 2))}
        )


# --- Saliency and objective -----------------------------------------------------------


def test_linear_head_has_a_closed_form():
    rng = np.random.default_rng(7)
    w, z, y = (rng.normal(size=s) for s in ((3, 5), (8, 5), (8, 3)))
    head = lambda z: {"a": 0.5 * jnp.sum((z @ w.T - y) ** 2) / 8}
    found = representation_saliency(head, jnp.asarray(z, jnp.float32))["a"]
    np.testing.assert_allclose(found, (z @ w.T - y) @ w / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        RepMTLConfig(),
        RAW,
        RepMTLConfig(saliency="raw"),
        RepMTLConfig(lambda_csa=0.0),
        RepMTLConfig(lambda_tsr=0.0, temperature=0.5),
    ],
    ids=["log", "raw loss", "raw saliency", "tsr only", "csa only"],
)
def test_the_sum_is_the_objective_of_the_paper(params, batch, config):
    losses, logs, update = objective(config)(params, batch)
    total, gradient = jax.jit(jax.value_and_grad(paper_total), static_argnums=2)(
        params, batch, config
    )
    np.testing.assert_allclose(sum(losses.values()), total, rtol=1e-5)
    chex.assert_trees_all_close(update, gradient, rtol=2e-4, atol=2e-5)
    assert set(logs) == {"task_losses"} | {
        name
        for name, weight in (("tsr", config.lambda_tsr), ("csa", config.lambda_csa))
        if weight
    }
    np.testing.assert_allclose(
        logs["task_losses"]["b"], heads(params, encode(params, batch), batch)["b"]
    )


def test_weights_of_zero_are_equal_weighting_bit_for_bit(params, batch):
    def plain(params, batch):
        losses = heads(params, encode(params, batch), batch)
        return {t: jnp.log(loss + 1e-8) for t, loss in losses.items()}

    grad_fn = mtjax.value_and_task_grads(plain)
    expected = jax.jit(lambda p, b: grad_fn(p, b)[1].combine())(params, batch)
    found = objective(OFF)(params, batch)[2]
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("part", ["trunk", "heads"])
@pytest.mark.parametrize("name", ["lambda_tsr", "lambda_csa"])
def test_regularisers_against_finite_differences(params, batch, name, part):
    config = dataclasses.replace(OFF, **{name: 1.0})
    total = lambda c, params: sum(objective(c)(params, batch)[0].values())
    term = lambda params: float(total(config, params) - total(OFF, params))
    gradient = jax.tree.map(
        jnp.subtract,
        objective(config)(params, batch)[2][part],
        objective(OFF)(params, batch)[2][part],
    )
    # Steepest: detached saliencies would show as a slope of zero.
    direction = jax.tree.map(lambda g: g / optax.tree.norm(gradient), gradient)
    shifted = lambda h: {
        **params,
        part: jax.tree.map(lambda p, d: p + h * d, params[part], direction),
    }
    slope = (term(shifted(0.01)) - term(shifted(-0.01))) / 0.02
    assert slope > 1e-2
    np.testing.assert_allclose(optax.tree.norm(gradient), slope, rtol=1e-2)


def test_heads_stay_task_specific(params, batch):
    pair = rep_mtl_objective((encode, heads))
    _, grads = mtjax.value_and_task_grads(pair, has_aux=True)(params, batch)
    assert grads.shared["trunk"]
    assert not any(jax.tree.leaves(grads.shared["heads"]))


@pytest.mark.parametrize("engine", ["stacked", "representation"])
@pytest.mark.parametrize("make", [mtjax.pcgrad, mtjax.cagrad, mtjax.graddrop])
def test_composes_with_balancers(params, batch, engine, make):
    pair = rep_mtl_objective((encode, heads), RAW)
    tx = optax.chain(make(), optax.adam(1e-2))
    step = make_train_step(pair, tx, has_aux=True, engine=engine)
    state = TrainState.create(params, tx, key=jax.random.key(0))
    first = None
    for _ in range(30):
        state, metrics = step(state, batch)
        first = metrics if first is None else first
    fell = lambda m: sum(m["aux"]["task_losses"].values())
    assert fell(metrics) < fell(first)
    assert int(state.skipped) == 0


def test_entropy_falls_and_alignment_rises_when_trained(params, batch):
    def train(config):
        pair = rep_mtl_objective((encode, heads), config)
        tx = optax.chain(mtjax.equal(), optax.adam(1e-2))
        step = make_train_step(pair, tx, has_aux=True)
        state = TrainState.create(params, tx, key=jax.random.key(0))
        for _ in range(20):  # later the losses are near 0 and gradients are noise
            state, _ = step(state, batch)
        z = encode(state.params, batch)
        s = representation_saliency(lambda z: heads(state.params, z, batch), z)
        return float(tsr_loss(s)), float(csa_loss(s))

    plain_tsr, plain_csa = train(OFF)
    assert train(RepMTLConfig(1.0, 0.0))[0] < plain_tsr - 0.1
    assert train(RepMTLConfig(0.0, 1.0))[1] < plain_csa - 1.0


def test_inputs_per_task(params, batch):
    inputs = {t: jnp.roll(batch["x"], i, axis=0) * (i + 1) for i, t in enumerate(TASKS)}
    batch = {"x": inputs, "y": batch["y"]}

    def encode_each(params, batch):
        return {t: encode(params, {"x": x}) for t, x in batch["x"].items()}

    def heads_each(params, z, batch):
        return {t: heads(params, z[t], batch)[t] for t in TASKS}

    pair = rep_mtl_objective((encode_each, heads_each), RAW)
    losses, _, update = jax.jit(functools.partial(combined, pair))(params, batch)

    @jax.jit
    @jax.value_and_grad
    def total(params):
        z = encode_each(params, batch)
        s = {
            t: jax.grad(lambda own, t=t: heads(params, own, batch)[t])(z[t])
            for t in TASKS
        }
        own = heads_each(params, z, batch)
        return sum(own.values()) + 0.9 * (tsr_loss(s) + csa_loss(s))

    value, gradient = total(params)
    np.testing.assert_allclose(sum(losses.values()), value, rtol=1e-5)
    chex.assert_trees_all_close(update, gradient, rtol=2e-4, atol=2e-5)
    shorter = {"x": {**inputs, "a": inputs["a"][:4]}, "y": batch["y"]}
    heads_of_any = lambda p, z, b: {t: jnp.mean(jnp.tanh(z[t]) ** 2) for t in TASKS}
    unequal = rep_mtl_objective((encode_each, heads_of_any), RAW)
    with pytest.raises(ValueError, match="batches of the same size"):
        combined(unequal, params, shorter)


def test_heads_that_draw_numbers_see_one_key(params, batch):
    def noisy(params, z, batch, *, key):
        keep = jax.random.bernoulli(key, 0.5, z.shape)
        return heads(params, jnp.where(keep, 2.0 * z, 0.0), batch)

    def encode_too(params, batch, *, key):
        return encode(params, batch)

    pair = rep_mtl_objective((encode_too, noisy), RAW)
    grad_fn = mtjax.value_and_task_grads(pair, has_aux=True)
    (_, logs), _ = grad_fn(params, batch, key=jax.random.key(3))
    z = encode(params, batch)
    s = representation_saliency(
        lambda z: noisy(params, z, batch, key=jax.random.key(3)), z
    )
    np.testing.assert_allclose(logs["tsr"], tsr_loss(s), rtol=1e-6)
    np.testing.assert_allclose(logs["csa"], csa_loss(s), rtol=1e-6)


# --- Several devices ------------------------------------------------------------------


@functools.cache
def on_devices(axis_name, config, check_vma=True):
    """Loss, logs and update with the batch split over two devices."""
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    pair = rep_mtl_objective((encode, heads), config, axis_name=axis_name)

    def step(params, batch):
        losses, logs, update = combined(pair, params, batch, axis_name="data")
        return losses, update, jax.lax.pmean(logs, "data") if not axis_name else logs

    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
    )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("config", [RepMTLConfig(), RAW], ids=["log", "raw"])
def test_two_devices_gathered_are_one_with_the_whole_batch(
    params, batch, config, check_vma
):
    expected = objective(config)(params, batch)
    losses, update, logs = on_devices("data", config, check_vma)(params, batch)
    found = (losses, logs, update)
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=2e-4, atol=2e-5
    )


def test_two_devices_alone_use_their_own_negatives(params, batch):
    halves = (
        {k: x[:4] for k, x in batch.items()},
        {k: x[4:] for k, x in batch.items()},
    )
    each = [objective(RepMTLConfig())(params, half) for half in halves]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    losses, update, logs = on_devices(None, RepMTLConfig())(params, batch)
    found = jax.device_get((losses, logs, update))
    chex.assert_trees_all_close(found, jax.device_get(expected), rtol=2e-4, atol=2e-5)
    whole = objective(RepMTLConfig())(params, batch)
    assert abs(float(whole[1]["csa"]) - float(found[1]["csa"])) > 1e-2


def test_tsr_of_devices_with_dark_locations(batch):
    s = jax.tree.map(lambda x: x.at[:2].set(0.0), saliencies())
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )

    def mean_of_losses(s):
        return jax.lax.pmean(tsr_loss(s, axis_name="data"), "data")

    mapped = jax.shard_map(
        mean_of_losses,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    np.testing.assert_allclose(mapped(s), tsr_loss(s), rtol=1e-6)
