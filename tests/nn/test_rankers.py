"""Rankers: what all of them keep, and what makes each of them what it is."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.gradients.split import path_name
from mtjax.losses import entire_space_losses, label_chain_penalty
from mtjax.nn import (
    AITM,
    ESMM,
    MLP,
    PLE,
    SNR,
    STEM,
    AdaTT,
    CrossStitch,
    DSelectK,
    Gate,
    MMoE,
    SharedBottomRanker,
    Tower,
    is_shared,
)
from tests.nn import plain

TASKS = ("a", "b", "c")
X = jax.random.normal(jax.random.key(1), (16, 6))
LABELS = np.random.default_rng(0).integers(0, 2, (3, 16)).astype(np.float32)
SMALL = {"tasks": TASKS, "tower": (3,), "dropout": 0.1}
LEVELS = ((4,), (4,), (4,))
MODELS = {
    "shared_bottom": SharedBottomRanker(**SMALL, widths=(5,)),
    "cross_stitch": CrossStitch(**SMALL, widths=(5, 4), per_channel=True),
    "omoe": MMoE(**SMALL, num_experts=3, widths=((4,),), single_gate=True),
    "mmoe": MMoE(
        **SMALL,
        num_experts=3,
        widths=((4,),),
        gate=functools.partial(Gate, hidden=(4,), dropout=0.1),
    ),
    "ml_mmoe": MMoE(**SMALL, num_experts=3, widths=((4,), (5,))),
    "dselect_k": MMoE(
        **SMALL,
        num_experts=3,
        widths=((4,),),
        gate=functools.partial(DSelectK, k=2, width=5.0),
    ),
    "cgc": PLE(**SMALL, widths=((4,),), gate_dropout=0.1),
    "ple": PLE(**SMALL, widths=LEVELS, gate_hidden=(4,)),
    "snr_trans": SNR(**SMALL, num_experts=3, widths=((4,), (4,))),
    "snr_aver": SNR(**SMALL, num_experts=3, widths=((4,), (4,)), mode="average"),
    "aitm": AITM(**SMALL, bottom=(5, 4)),
    "adatt": AdaTT(**SMALL, own=2, shared=2, widths=((4,), (4,))),
    "stem": STEM(**SMALL, shared=2, widths=LEVELS, gate_hidden=(4,)),
    "esmm": ESMM(tasks=TASKS[:2], hidden=(5,), imputation=True, dropout=0.1),
}


class Embedded(nn.Module):
    """A ranker on embeddings of its own: one, or for STEM one of every task."""

    ranker: nn.Module

    @nn.compact
    def __call__(self, x, *, train=False):
        if isinstance(self.ranker, STEM):
            names = [*(f"table_{t}" for t in TASKS), "table"]
            embedded = {n.split("_")[-1]: nn.Dense(5, name=n)(x) for n in names}
            embedded["shared"] = embedded.pop("table")
        else:
            embedded = nn.Dense(5, name="table")(x)
        return self.ranker(embedded, train=train)


def start(model, x=X, seed=0):
    """Random parameters, biases too."""
    params = jax.jit(model.init)(jax.random.key(seed), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), params
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x=X):
    return model.apply({"params": params}, x)


def losses_of(model, logits):
    if isinstance(model, ESMM):
        losses = entire_space_losses(logits["a"], logits["b"], LABELS[0], LABELS[1])
        return losses._asdict()
    return {
        t: jnp.mean(optax.sigmoid_binary_cross_entropy(logits[t], LABELS[i]))
        for i, t in enumerate(TASKS)
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_ranker_trains_and_says_what_is_shared(name):
    model = Embedded(MODELS[name])
    params = start(model)
    rngs = {"dropout": jax.random.key(2)}

    def losses_fn(params):
        logits = model.apply({"params": params}, X, train=True, rngs=rngs)
        chex.assert_shape(list(logits.values()), (len(X),))
        return losses_of(MODELS[name], logits)

    tx = optax.chain(mtjax.pcgrad(), optax.adam(1e-2))

    @jax.jit
    def step(params):
        losses, grads = mtjax.value_and_task_grads(losses_fn, shared=is_shared)(params)
        updates, _ = tx.update(
            grads, tx.init(params), params, losses=losses, key=jax.random.key(0)
        )
        return losses, grads.stack(), optax.apply_updates(params, updates)

    losses, grads, moved = step(params)
    chex.assert_tree_all_finite((losses, grads, moved))
    for (path, grad), before, after in zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(params),
        jax.tree.leaves(moved),
    ):
        path = path_name(path)
        if "imputation" in path:
            continue
        assert (before != after).any(), path
        tasks_per_entry = np.count_nonzero(grad, axis=0)
        if is_shared(path):
            reached = np.any(np.reshape(grad, (len(grad), -1)), axis=1).sum()
            assert reached > 1 or name == "esmm", path
            # In an array of several tasks some entry is reached by two of them.
            assert tasks_per_entry.max() > 1 or name == "esmm", path
        else:
            assert tasks_per_entry.max() == 1, path


def test_shared_bottom_gradients():
    model = SharedBottomRanker(tasks=TASKS, widths=(5,), tower=(3,))
    params = start(model)
    weights = jnp.array([0.5, 2.0, 1.0])

    @jax.jit
    def gradients(params):
        losses = lambda p: jnp.stack(
            [*losses_of(model, model.apply({"params": p}, X)).values()]
        )
        return (
            jax.jacrev(losses)(params),
            jax.grad(lambda p: losses(p) @ weights)(params),
            jax.grad(lambda p: losses(p)[:2].sum())(params),
        )

    each, total, two = gradients(params)
    combined = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each)
    chex.assert_trees_all_close(total, combined, rtol=1e-4, atol=1e-6)
    for i, task in enumerate("ab"):
        own = jax.tree.map(lambda g, i=i: g[i], each["task_towers"][task])
        chex.assert_trees_all_close(two["task_towers"][task], own, rtol=1e-5)
    # The task that is left out leaves its own tower alone.
    assert not any(g.any() for g in jax.tree.leaves(two["task_towers"]["c"]))


def test_shared_bottom_with_one_task_is_the_single_task_model():
    model = SharedBottomRanker(tasks=("a",), widths=(5, 4), tower=(3,))
    params = start(model)
    dense = {f"Dense_{i}": params[f"bottom_{i}"] for i in range(2)}
    h = MLP((5, 4)).apply({"params": dense}, X)
    expected = Tower((3,)).apply({"params": params["task_towers"]["a"]}, h)
    np.testing.assert_array_equal(model.apply({"params": params}, X)["a"], expected)


def test_cross_stitch():
    model = CrossStitch(tasks=TASKS, widths=(5, 4), tower=(3,))
    params = start(model)
    reference, x = plain.float64(params), np.float64(X)

    def network(stitches):
        z = [x] * 3
        for i, a in enumerate(stitches):
            z = [plain.expert(_layer(reference, i), t, z[t]) for t in range(3)]
            z = [sum(a[t, s] * z[s] for s in range(3)) for t in range(3)]
        return z, [
            plain.tower(reference["task_towers"][t], h) for t, h in zip(TASKS, z)
        ]

    names = ("stitch_0", "task_stitch")
    z, expected = network([reference[n] for n in names])
    _close(apply(model, params), expected)
    apart = params | {n: jnp.eye(3) for n in names}
    found = apply(model, apart)
    for t, task in enumerate(TASKS):
        h = plain.expert(_layer(reference, 0), t, x)
        h = plain.expert(_layer(reference, 1), t, h)
        h = plain.tower(reference["task_towers"][task], h)
        np.testing.assert_allclose(found[task], h, rtol=1e-4, atol=1e-5)
    # With equal shares all columns read the same.
    equal = [np.full((3, 3), 1 / 3)] * 2
    z, expected = network(equal)
    np.testing.assert_allclose(z[0], z[1])
    _close(apply(model, params | {n: jnp.full((3, 3), 1 / 3) for n in names}), expected)
    fresh = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    assert sum(fresh[n].size for n in names) == 2 * 3**2
    fresh = jax.jit(model.init)(jax.random.key(0), X)["params"]
    expected = np.where(np.eye(3), 0.9, 0.05)
    np.testing.assert_allclose(fresh["stitch_0"], expected, rtol=1e-6)


def _layer(params, i):
    return params[f"columns_{i}"]


def _close(found, expected):
    for task, y in zip(TASKS, expected, strict=True):
        np.testing.assert_allclose(found[task], y, rtol=1e-3, atol=1e-5)


def test_aitm():
    model = AITM(tasks=TASKS, bottom=(5, 4))
    params = start(model)
    p, x = plain.float64(params), np.float64(X)
    names = ("bottom_a", "bottom_b", "task_bottom_c")
    z = [plain.expert(p[n], 0, x) for n in names]
    q, shares = [z[0]], []
    steps = (("info_a", "transfer_b"), ("task_info_b", "task_transfer_c"))
    for t, (info, transfer) in enumerate(steps):
        before = plain.relu(q[-1] @ p[info]["kernel"] + p[info]["bias"])
        both = [before, z[t + 1]]
        of = lambda name, p=p[transfer], both=both: [
            u @ p[name]["kernel"] for u in both
        ]
        scores = [(k * r).sum(1) / 2 for k, r in zip(of("key"), of("query"))]
        shares.append(plain.softmax(np.stack(scores, 1)))
        q.append(plain.mixed(shares[-1], of("value")))
    expected = [plain.tower(p["task_towers"][t], h) for t, h in zip(TASKS, q)]
    found, state = model.apply({"params": params}, X, mutable=["intermediates"])
    _close(found, expected)
    for name, share in zip(("transfer_b", "task_transfer_c"), shares):
        weights = state["intermediates"][name]["transfer"][0]
        np.testing.assert_allclose(weights, share, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    slopes = jax.jit(
        jax.jacrev(
            lambda p: jnp.stack([model.apply({"params": p}, X)[t].sum() for t in TASKS])
        )
    )(params)
    # No task hears from a later one, every later one from those before.
    for i, name in enumerate(names):
        for t in range(3):
            heard = any(g[t].any() for g in jax.tree.leaves(slopes[name]))
            assert heard == (t >= i)


def test_label_chain_penalty():
    logits = {
        t: jnp.asarray(z) for t, z in zip(TASKS, np.float32([[2, 0], [1, 1], [0, 3]]))
    }
    y = plain.sigmoid(np.float64([[2, 0], [1, 1], [0, 3]]))
    rise = np.maximum(y[1:] - y[:-1], 0).sum(0)
    penalty = lambda logits, **options: label_chain_penalty(logits, TASKS, **options)
    assert penalty(logits) == pytest.approx(rise.mean(), rel=1e-5)
    assert penalty(logits, mask=jnp.array([1, 0])) == 0
    slopes = jax.grad(penalty)(logits)
    assert not any(slopes[t][0] for t in TASKS)
    # Down for the step that rises, up for the one before it; b is both.
    assert slopes["a"][1] < 0 < slopes["c"][1]
    d = y[1, 1] * (1 - y[1, 1]) / 2
    assert slopes["b"][1] == pytest.approx(d - d, abs=1e-6)
    assert label_chain_penalty(logits, ("a",)) == 0
    with pytest.raises(ValueError, match="`chain` must name tasks of `logits`"):
        label_chain_penalty(logits, ("a", "d"))


@pytest.mark.parametrize("mode", ["transform", "average"])
def test_snr(mode):
    model = SNR(tasks=TASKS, num_experts=2, widths=((4,), (4,)), tower=(3,), mode=mode)
    params = start(model)
    params["routing_1"]["log_alpha"] = jnp.array([[0.5, -6.0], [6.0, -0.5]])
    p = plain.float64(params)
    h = plain.experts(p["experts_0"], np.float64(X))

    def route(r, h):
        z = np.clip(1.2 * plain.sigmoid(r["log_alpha"]) - 0.1, 0, 1)
        w = r.get("kernel", np.broadcast_to(np.eye(4), (*z.shape, 4, 4)))
        pairs = range(len(h))
        return [sum(z[i, j] * h[i] @ w[i, j] for i in pairs) for j in range(z.shape[1])]

    u = route(p["routing_1"], h)
    h = [plain.expert(p["experts_1"], j, u[j]) for j in range(2)]
    u = route(p["task_routing"], h)
    expected = [plain.tower(p["task_towers"][t], h) for t, h in zip(TASKS, u)]
    found, state = model.apply({"params": params}, X, mutable=["losses"])
    _close(found, expected)
    shift = 2 / 3 * np.log(0.1 / 1.1)
    opened = plain.sigmoid(p["routing_1"]["log_alpha"] - shift).sum()
    sown = state["losses"]["routing_1"]["open_connections"][0]
    assert sown == pytest.approx(opened, rel=1e-5)


def test_a_missing_task_or_expert_is_named():
    cases = [
        (MMoE(tasks=()), "`tasks` must name at least one"),
        (PLE(tasks=("a", "a")), "`tasks` must differ from each other"),
        (MMoE(tasks=TASKS, num_experts=0), "`num_experts` must be at least 1"),
        (MMoE(tasks=TASKS, widths=()), "`widths` must describe at least one level"),
        (PLE(tasks=TASKS, own=0), "`own` must be at least 1 .*without own experts use"),
        (PLE(tasks=TASKS, shared=-1), "`shared` must not be negative"),
        (PLE(tasks=TASKS, widths=()), "`widths` must describe"),
        (AdaTT(tasks=TASKS, own=0), "`own` must be at least 1"),
        (SNR(tasks=TASKS, num_experts=0), "`num_experts` must be at least 1"),
        (SNR(tasks=TASKS, widths=()), "`widths` must describe"),
        (AITM(tasks=TASKS, bottom_dropout=(0.1,)), "`dropout` must be one rate"),
        (CrossStitch(tasks=TASKS, widths=()), "`widths` must name"),
        (AITM(tasks=TASKS, bottom=()), "`bottom` must name"),
        (ESMM(tasks=TASKS), "`tasks` must be two"),
        (SharedBottomRanker(tasks=TASKS, widths=()), "`widths` must name"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), X)
    tables = dict.fromkeys((*TASKS, "shared"), X)
    for model, x, message in [
        (STEM(tasks=TASKS), {"a": X}, '`x` must hold one input.*named "shared"'),
        (STEM(tasks=("a", "shared")), tables, "`x` must hold one input"),
        (STEM(tasks=TASKS, shared=0), tables, "`own` and `shared` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), x)
