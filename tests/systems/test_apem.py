"""APEM against NumPy in float64, what it must not depend on, and its switches."""

import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.losses import binary_losses
from mtjax.nn import is_shared
from mtjax.nn.set_attention import SetAttention
from mtjax.systems.apem import (
    APEM,
    APEMConfig,
    DeepAutoGroups,
    TableAPEM,
    apem_losses,
)
from tests.nn import plain

TASKS = ("a", "b", "c")
SMALL = APEMConfig(groups=3, tower=(3,), dropout=0.0)
SIZE, FIELDS, WIDTH = 6, 5, 4
RNG = np.random.default_rng(0)
E = jnp.asarray(RNG.normal(size=(SIZE, FIELDS, WIDTH)), jnp.float32)
PRESENT = jnp.asarray(RNG.uniform(size=(SIZE, FIELDS)) < 0.7).at[0].set(True)
LABELS = {
    t: jnp.asarray(np.random.default_rng(i).integers(0, 2, SIZE), jnp.float32)
    for i, t in enumerate(TASKS)
}


@functools.cache
def start(config=SMALL, tasks=TASKS):
    """A model with random values everywhere, also where the start is 0 or 1."""
    model = APEM(tasks, config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), E, PRESENT)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.6 * rng.normal(size=leaf.shape), leaf.dtype)
    return model, jax.tree.map(draw, shapes)


@functools.cache
def applied(config=SMALL, tasks=TASKS):
    """The compiled model: `run(variables, fields, present)` with what is sown."""
    model, _ = start(config, tasks)
    return jax.jit(functools.partial(model.apply, mutable=["intermediates"]))


# --- The model in NumPy ---------------------------------------------------------------


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(p, x, y, heads):
    """MAB of one example, head by head."""
    q, k, v = (
        z @ p[name]["kernel"] for z, name in ((x, "query"), (y, "key"), (y, "value"))
    )
    size, found = x.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = plain.softmax(q[:, part] @ k[:, part].T / np.sqrt(size))
        found.append(weights @ v[:, part])
    z = norm(p["norm_attention"], x + np.concatenate(found, 1) @ p["out"]["kernel"])
    h = plain.relu(z @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    return norm(p["norm"], z + h @ p["ffn"]["kernel"] + p["ffn"]["bias"])


def excited(p, rows):
    h = plain.relu(rows.mean(1) @ p["squeeze"]["kernel"])
    return rows * plain.sigmoid(h @ p["excite"]["kernel"])[:, None]


def patterns_of(p, e, known, config):
    """U of one example; missing fields are left out of all sets."""
    found = []
    for i in range(config.blocks):
        u = attention(p[f"groups_read_{i}"], p[f"groups_{i}"], e[known], config.heads)
        if config.excite != "none":
            u = excited(p[f"excite_patterns_{i}"], u)
        found.append(u)
        if config.carry == "patterns":
            e, known = u, np.ones(len(u), bool)
        elif i < config.blocks - 1:
            e = attention(p[f"fields_read_{i}"], e, u, config.heads)
            e = np.where(known[:, None], e, 0)
            if config.excite == "both":
                e = excited(p[f"excite_fields_{i}"], e)
    return np.concatenate(found)


def selection(p, u, pooled, config):
    """The weights of all tasks for one example."""
    if config.selector == "mean":
        return np.full((len(TASKS), len(u)), 1 / len(u))
    v = p["indicator" if config.selector == "shared" else "task_indicators"]
    v = np.broadcast_to(v, (len(TASKS), v.shape[1]))
    if config.adaptive:
        v = v * 2 * plain.sigmoid(pooled @ p["adapt"]["kernel"])
    query, key = v @ p["query"]["kernel"], u @ p["key"]["kernel"]
    logits = query @ key.T / np.sqrt(u.shape[1])
    if config.top_k:
        least = np.sort(logits, axis=1)[:, -config.top_k, None]
        logits = np.where(logits >= least, logits, -np.inf)
    return plain.softmax(logits)


def transferred(p, r):
    q = [r[0]]
    for i, task in enumerate(TASKS[1:], 1):
        prefix = "task_" if task == TASKS[-1] else ""
        info, ait = p[f"{prefix}info_{task}"], p[f"{prefix}transfer_{task}"]
        both = plain.relu(q[-1] @ info["kernel"] + info["bias"]), r[i]
        both = np.stack(both)
        v, k, z = (both @ ait[name]["kernel"] for name in ("value", "key", "query"))
        q.append(plain.softmax((k * z).sum(1) / np.sqrt(len(r[i]))) @ v)
    return np.stack(q)


def reference(variables, config):
    """The logits, one example after the other."""
    p, rows = plain.float64(variables["params"]), []
    for e, known in zip(np.float64(E), np.asarray(PRESENT)):
        e = e * known[:, None]
        pooled = e[known].mean(0)
        if config.extractor == "mlp":
            hidden, out = p["extractor_hidden"], p["extractor_out"]
            h = plain.relu(e.ravel() @ hidden["kernel"] + hidden["bias"])
            u = (h @ out["kernel"] + out["bias"]).reshape(-1, WIDTH)
        else:
            u = patterns_of(p["extractor"], e, known, config)
        alpha = selection(p["selector"], u, pooled, config)
        side = e.ravel() if config.pooled == "flat" else pooled
        r = [
            np.concatenate([a @ u @ p["selector"]["value"]["kernel"], side])
            for a in alpha
        ]
        rows.append(transferred(p, np.stack(r)) if config.transfer else np.stack(r))
    r = np.stack(rows)
    logits = {t: plain.tower(p["task_towers"][t], r[:, i]) for i, t in enumerate(TASKS)}
    if config.product:
        chances = np.cumprod([plain.sigmoid(logits[t]) for t in TASKS], axis=0)
        logits = dict(zip(TASKS, np.log(chances) - np.log1p(-chances)))
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "excite": "both"},
        {"adaptive": False, "transfer": True, "excite": "none"},
        {"selector": "shared", "carry": "patterns", "pooled": "flat"},
        {"selector": "mean", "product": True, "heads": 1, "blocks": 3},
        {"extractor": "mlp", "top_k": 1},
    ],
    ids=str,
)
def test_model_is_that_of_numpy(options):
    config = replace(SMALL, **options)
    _, variables = start(config)
    found, _ = applied(config)(variables, E, PRESENT)
    chex.assert_trees_all_close(
        found, reference(variables, config), rtol=2e-4, atol=2e-5
    )


# --- Groups of fields -----------------------------------------------------------------


@functools.cache
def groups():
    """DAGT with its parameters, compiled."""
    model = DeepAutoGroups(SMALL)
    _, variables = start()
    params = {"params": variables["params"]["extractor"]}
    return jax.jit(functools.partial(model.apply, params))


def test_patterns_do_not_know_the_order_of_fields():
    order = np.array([3, 0, 4, 1, 2])
    patterns, fields = groups()(E, PRESENT)
    again, permuted = groups()(E[:, order], PRESENT[:, order])
    chex.assert_trees_all_close(again, patterns, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(permuted, fields[:, order], rtol=1e-4, atol=1e-5)
    assert np.abs(fields[:, 0] - fields[:, 1]).max() > 0.1


def test_one_group_is_one_global_pattern():
    config = replace(SMALL, groups=1, blocks=1, pooled="mean", tower=())
    _, variables = start(config)
    out, state = applied(config)(variables, E, PRESENT)
    state = state["intermediates"]
    assert state["selector"]["gates"][0].shape == (SIZE, 3, 1)
    np.testing.assert_array_equal(state["selector"]["gates"][0], 1)
    # All tasks read the same: equal towers say the same.
    params = dict(variables["params"])
    params["task_towers"] = dict.fromkeys(TASKS, params["task_towers"]["a"])
    same, _ = applied(config)({"params": params}, E, PRESENT)
    chex.assert_trees_all_equal(same["a"], same["b"], same["c"], out["a"])


@pytest.mark.parametrize(("gate", "scale"), [("sigmoid", 0.5), ("double_sigmoid", 1)])
def test_excitation_without_its_second_layer(gate, scale):
    """Sigmoid, the default, halves all patterns; twice the sigmoid keeps them."""
    config = replace(SMALL, blocks=1, excite_gate=gate)
    params = dict(start(replace(SMALL, blocks=1))[1]["params"]["extractor"])
    zero = jax.tree.map(jnp.zeros_like, params["excite_patterns_0"]["excite"])
    params["excite_patterns_0"] = {**params["excite_patterns_0"], "excite": zero}
    run = lambda config: jax.jit(DeepAutoGroups(config).apply)(
        {"params": params}, E, PRESENT
    )[0]
    expected = scale * run(replace(config, excite="none"))
    chex.assert_trees_all_close(run(config), expected, rtol=1e-5, atol=1e-6)


def test_missing_fields_are_not_read():
    """Whatever stands there, also NaN; it gets no gradient, and may be left out."""
    model, variables = start()
    expected, _ = applied()(variables, E, PRESENT)
    other = jnp.where(PRESENT[..., None], E, jnp.nan)
    chex.assert_trees_all_equal(applied()(variables, other, PRESENT)[0], expected)
    total = lambda e: sum(map(jnp.sum, model.apply(variables, e, PRESENT).values()))
    slopes = np.asarray(jax.jit(jax.grad(total))(other))
    np.testing.assert_array_equal(slopes[~np.asarray(PRESENT)], 0)
    assert (np.abs(slopes[np.asarray(PRESENT)]).max(1) > 0).all()

    present = jnp.ones((SIZE, FIELDS), bool).at[:, 2].set(False)
    fewer = jnp.delete(E, 2, axis=1)
    chex.assert_trees_all_close(
        applied()(variables, E, present)[0],
        jax.jit(model.apply)(variables, fewer),
        rtol=1e-5,
        atol=1e-6,
    )


def test_example_without_fields_is_finite():
    model, variables = start()
    nothing = jnp.zeros((SIZE, FIELDS), bool)

    def total(params):
        return sum(map(jnp.sum, model.apply({"params": params}, E, nothing).values()))

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(total))(variables["params"]))


def flops_of_attention(jaxpr):
    """Of products of two activations; those with a matrix do not count."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            sizes = [v.aval.shape for v in eqn.invars]
            (contracted, _), _ = eqn.params["dimension_numbers"]
            if min(map(len, sizes)) > 2:
                inner = np.prod([sizes[0][i] for i in contracted])
                total += 2 * inner * np.prod(eqn.outvars[0].aval.shape)
    return total


def test_attention_of_groups_is_linear_in_fields():
    many, few = 100, 4
    fields, group = jnp.ones((1, many, 8)), jnp.ones((few, 8))
    block = SetAttention()
    shapes = jax.eval_shape(block.init, jax.random.key(0), fields, fields)
    run = lambda p, x, y: block.apply(p, x, y)
    through = lambda p, x, y: run(p, x, run(p, y, x))
    full = flops_of_attention(jax.make_jaxpr(run)(shapes, fields, fields).jaxpr)
    induced = flops_of_attention(jax.make_jaxpr(through)(shapes, fields, group).jaxpr)
    assert full == 4 * many**2 * 8  # scores and sums, over all heads
    assert induced == 2 * 4 * many * few * 8
    assert full / induced == 12.5


# --- The selection --------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
def test_weights_of_the_selection(top_k):
    config = replace(SMALL, top_k=top_k)
    _, variables = start(config)
    _, state = applied(config)(variables, E, PRESENT)
    (alpha,) = state["intermediates"]["selector"]["gates"]
    assert alpha.shape == (SIZE, 3, 6)
    np.testing.assert_allclose(alpha.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal((alpha > 0).sum(-1), top_k or 6)
    assert np.abs(alpha[:, 0] - alpha[:, 1]).max() > 0.1


def test_tasks_of_one_indicator_choose_the_same():
    _, variables = start()
    params = dict(variables["params"])
    v = (
        params["selector"]["task_indicators"]
        .at[1]
        .set(params["selector"]["task_indicators"][0])
    )
    params["selector"] = {**params["selector"], "task_indicators": v}
    params["task_towers"] = dict.fromkeys(TASKS, params["task_towers"]["a"])
    logits, _ = applied()({"params": params}, E, PRESENT)
    chex.assert_trees_all_close(logits["a"], logits["b"], rtol=1e-6)
    assert np.abs(logits["a"] - logits["c"]).max() > 1e-3


@pytest.mark.parametrize("transfer", [False, True])
def test_indicators_hear_of_their_own_task(transfer):
    """With the transfer, also of the steps after it."""
    config = replace(SMALL, transfer=transfer)
    model, variables = start(config)

    def losses(v):
        params = dict(variables["params"])
        params["selector"] = {**params["selector"], "task_indicators": v}
        losses = binary_losses(model.apply({"params": params}, E, PRESENT), LABELS)
        return jnp.stack([losses[t] for t in TASKS])

    v = variables["params"]["selector"]["task_indicators"]
    slopes = np.abs(jax.jit(jax.jacrev(losses))(v)).max(-1)  # of a loss, to a vector
    reached = np.tri(3, dtype=bool) if transfer else np.eye(3, dtype=bool)
    np.testing.assert_array_equal(slopes > 0, reached)


def test_indicators_belong_to_single_tasks():
    _, variables = start(replace(SMALL, transfer=True))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]
    own = {p.split("/")[1] for p in paths if not is_shared(p)}
    assert own == {"selector", "task_towers", "task_info_c", "task_transfer_c"}
    assert not is_shared("params/selector/task_indicators")


def test_adaptive_indicators_start_from_plain_ones():
    _, variables = start()
    params = dict(variables["params"])
    selector = dict(params["selector"])
    selector["adapt"] = jax.tree.map(jnp.zeros_like, selector["adapt"])
    adapted, _ = applied()({"params": {**params, "selector": selector}}, E, PRESENT)
    del selector["adapt"]
    fixed = applied(replace(SMALL, adaptive=False))
    found, _ = fixed({"params": {**params, "selector": selector}}, E, PRESENT)
    chex.assert_trees_all_close(found, adapted, rtol=1e-5, atol=1e-6)


# --- Tables ---------------------------------------------------------------------------


def test_numbers_are_fields_and_what_is_missing_is_masked():
    model = TableAPEM(("a", "b"), {"x": 5, "y": 4}, numbers=2, width=4, config=SMALL)
    ids = jnp.array([[2, 3], [0, 1], [4, 2]])
    numeric = jnp.array([[1.5, -2.0], [0.3, 0.1], [jnp.nan, 7.0]])
    batch = {"categorical": ids, "numeric": numeric}
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    found = jax.jit(model.apply)(variables, batch)

    table = np.asarray(variables["params"]["fields"]["table_4"])
    vectors = np.asarray(variables["params"]["fields"]["number_vectors"])
    categorical = table[np.asarray(ids) + np.array([[0, 5]])]
    numbers = np.nan_to_num(numeric)[:, :, None] * vectors[None]
    fields = jnp.asarray(np.concatenate([categorical, numbers], axis=1))
    present = jnp.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1]], bool)
    body = APEM(("a", "b"), SMALL)
    expected = jax.jit(body.apply)(
        {"params": variables["params"]["body"]}, fields, present
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    def total(params):
        return sum(map(jnp.sum, model.apply({"params": params}, batch).values()))

    slopes = jax.jit(jax.grad(total))(variables["params"])
    chex.assert_tree_all_finite(slopes)
    rows = np.abs(slopes["fields"]["table_4"]).max(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(rows), [2, 4, 6, 7, 8])


# --- Losses ---------------------------------------------------------------------------


def test_losses_with_and_without_the_penalty():
    logits = {t: jnp.asarray(RNG.normal(size=SIZE), jnp.float32) for t in TASKS}
    losses = apem_losses(logits, LABELS, TASKS, penalty=0.5)
    a, b, c = (plain.sigmoid(np.float64(logits[t])) for t in TASKS)
    expected = np.mean(plain.relu(b - a)) + np.mean(plain.relu(c - b))
    np.testing.assert_allclose(losses.pop("chain"), 0.5 * expected, rtol=1e-5)
    chex.assert_trees_all_equal(losses, binary_losses(logits, LABELS))
    assert apem_losses(logits, LABELS, TASKS, penalty=0.0) == losses


def test_penalty_of_predictions_that_fall_is_zero():
    falling = {t: jnp.linspace(2.0, 3.0, SIZE) - i for i, t in enumerate(TASKS)}
    chain = lambda z: apem_losses(z, LABELS, TASKS)["chain"]
    assert chain(falling) == 0
    chex.assert_trees_all_equal(
        jax.grad(chain)(falling), jax.tree.map(jnp.zeros_like, falling)
    )
    rising = {**falling, "b": falling["b"] + 2}
    slopes = jax.grad(chain)(rising)
    assert (slopes["b"] > 0).all()
    assert (slopes["a"] < 0).all()
    np.testing.assert_array_equal(slopes["c"], 0)


def test_any_balancer_takes_the_losses():
    """One step down the sum of losses lowers it, the penalty included."""
    model, variables = start()
    grad_fn = mtjax.value_and_task_grads(
        lambda p: apem_losses(model.apply({"params": p}, E, PRESENT), LABELS, TASKS)
    )

    @jax.jit
    def step(params):
        losses, grads = grad_fn(params)
        update = mtjax.equal().update(grads, mtjax.equal().init(params), params)[0]
        total = lambda p: sum(
            apem_losses(model.apply({"params": p}, E, PRESENT), LABELS, TASKS).values()
        )
        return losses, update, jax.grad(total)(params)

    losses, update, expected = step(variables["params"])
    assert list(losses) == [*TASKS, "chain"]
    chex.assert_trees_all_close(update, expected, rtol=1e-4, atol=1e-6)


def test_dropout_is_in_the_towers():
    config = replace(SMALL, dropout=0.5)
    model, variables = start(config)
    run = jax.jit(
        lambda key: model.apply(
            variables, E, PRESENT, train=True, rngs={"dropout": key}
        )
    )
    first, second = (run(jax.random.key(i))["a"] for i in range(2))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "gate"}, "`selector` must be one of ('task', 'shared', 'mean')"),
        ({"extractor": "fields"}, "`extractor` must be one of ('groups', 'mlp')"),
        ({"groups": 0}, "`groups` and `blocks` must be at least 1, got 0 and 2"),
        ({"groups": 2, "top_k": 5}, "`top_k` must be from 1 to the number of patterns"),
    ],
    ids=str,
)
def test_bad_configurations(options, message):
    # Not the constructor, which checks annotations first, in tests.
    arguments = SimpleNamespace(**vars(SMALL) | options)
    with pytest.raises(ValueError, match=re.escape(message)):
        APEMConfig.__post_init__(arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "`heads` must be a divisor of the width, 4, got 3"),
        ({"excite_gate": "tanh"}, "`gate` must be one of"),
    ],
    ids=str,
)
def test_what_modules_refuse(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start(replace(SMALL, **options))


def test_losses_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="`penalty` must not be negative, got -1"):
        apem_losses({}, {}, TASKS, penalty=-1.0)
    with pytest.raises(ValueError, match="a task named 'chain'"):
        apem_losses({"chain": jnp.zeros(2)}, {}, ("chain",))
