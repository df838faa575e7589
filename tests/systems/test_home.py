"""HoME against NumPy in float64, its paths, its switches, and several devices."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtjax
from mtjax.analysis import expert_utilisation
from mtjax.nn import is_shared
from mtjax.systems.home import (
    ExpertGroups,
    HoME,
    HoMEConfig,
    SelfGates,
    expert_groups,
    home_losses,
)
from tests.nn import plain

TASKS, CATEGORIES = ("a", "b", "c"), ("x", "x", "y")
SMALL = HoMEConfig(2, 1, 1, 2, 2, (5, 4), rank=3, tower=(3,), dropout=0.0)
X = jax.random.normal(jax.random.key(1), (8, 6))
LABELS = {
    t: jnp.asarray(np.random.default_rng(i).integers(0, 2, 8), jnp.float32)
    for i, t in enumerate(TASKS)
}


@functools.cache
def start(config=SMALL, tasks=TASKS, categories=CATEGORIES):
    """A model with random values everywhere, also where the start is 0 or 1."""
    model = HoME(tasks, categories, config)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    rng = np.random.default_rng(0)

    def noise(path, leaf):
        drawn = 0.3 * rng.normal(size=leaf.shape)
        return leaf + jnp.asarray(np.abs(drawn) if "var" in str(path) else drawn)

    return model, jax.tree.map_with_path(noise, variables)


def apply(model, variables, x=X, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, x)


# --- The model in NumPy ---------------------------------------------------------------


def feature_gate(p, g, u):
    shares = plain.softmax(u @ p["mixing"][g])
    total = 0
    for i in range(shares.shape[1]):
        logits = (u @ p["down"][g, :, i]) @ p["up"][g, i]
        total = total + shares[:, i, None] * 2 * plain.sigmoid(logits)
    return u * total


def expert(p, stats, i, u, train):
    dense = p["dense"]
    h = plain.relu(u @ dense["kernel_0"][i] + dense["bias_0"][i])
    h = h @ dense["kernel_1"][i] + dense["bias_1"][i]
    mean, var = stats["norm"]["mean"][i], stats["norm"]["var"][i]
    if train:
        mean, var = h.mean(0), h.var(0)
    h = (h - mean) / np.sqrt(var + 1e-3) * p["norm"]["scale"][i] + p["norm"]["bias"][i]
    return h * plain.sigmoid(h)


def self_gate(p, own, u, outputs):
    logits = u @ p["kernel"][own].T
    weights = plain.sigmoid(logits) if len(own) == 1 else plain.softmax(logits)
    return plain.mixed(weights, outputs)


def group(p, stats, g, own, x, train, self_gated=True):
    """One group: its gated input, its experts, what its self-gate adds."""
    u = feature_gate(p["feature_gates"], g, x)
    outputs = [expert(p["experts"], stats["experts"], i, u, train) for i in own]
    added = self_gate(p["self_gates"], own, u, outputs) if self_gated else None
    return u, outputs, added


def reference(variables, x, train=False):
    """Logits by task, of `SMALL`: 2 + 1 experts below, 1 + 2 + 2 above."""
    p, s = (plain.float64(variables[k]) for k in ("params", "batch_stats"))
    x = np.asarray(x, np.float64)
    first = functools.partial(group, p["level_1"], s["level_1"], x=x, train=train)
    v, e, added = zip(first(0, [0, 1]), first(1, [2]), first(2, [3]))
    weights = lambda g, n: plain.softmax(v[g] @ p["gates"]["kernel"][g][:, :n])
    z_shared = plain.mixed(weights(0, 4), [*e[0], *e[1], *e[2]]) + added[0]
    z = [plain.mixed(weights(g, 3), [*e[0], *e[g]]) + added[g] for g in (1, 2)]
    z = [np.concatenate([z_c, z_shared], axis=1) for z_c in z]

    above = lambda name, *args, **options: group(
        p[name], s[name], *args, train=train, **options
    )
    shared = above("shared", 0, [0], z_shared, self_gated=False)[1]
    logits = {}
    for t, task in enumerate(TASKS):
        c = "xy".index(CATEGORIES[t])
        category = above("category", c, [2 * c, 2 * c + 1], z[c], self_gated=False)[1]
        u, own, added_t = above("task_level", t, [2 * t, 2 * t + 1], z[c])
        gate = plain.softmax(u @ p["task_gates"]["kernel"][t])
        h = plain.mixed(gate, [*shared, *category, *own]) + added_t
        logits[task] = plain.tower(p["task_towers"][task], h)
    return logits


@pytest.mark.parametrize("train", [False, True])
def test_is_the_model_in_numpy(train):
    model, variables = start()
    found, state = apply(model, variables, train=train, mutable=["batch_stats"])
    expected = reference(variables, X, train)
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=2e-4, atol=2e-5)
    if not train:
        chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])


# --- Parts ----------------------------------------------------------------------------


def test_running_averages_take_note_of_the_batch():
    model, variables = start()
    _, state = apply(model, variables, train=True, mutable=["batch_stats"])
    p, s = (plain.float64(variables[k]["level_1"]) for k in ("params", "batch_stats"))
    u = feature_gate(p["feature_gates"], 1, np.float64(X))
    dense = p["experts"]["dense"]
    h = plain.relu(u @ dense["kernel_0"][2] + dense["bias_0"][2])
    h = h @ dense["kernel_1"][2] + dense["bias_1"][2]
    found = state["batch_stats"]["level_1"]["experts"]["norm"]
    old = s["experts"]["norm"]
    for name, value in (("mean", h.mean(0)), ("var", h.var(0))):
        expected = 0.9 * old[name][2] + 0.1 * value
        np.testing.assert_allclose(found[name][2], expected, rtol=1e-4, atol=1e-6)


def test_inference_does_not_depend_on_the_batch():
    model, variables = start()
    whole, part = apply(model, variables), apply(model, variables, X[2:4])
    for task in TASKS:
        np.testing.assert_allclose(part[task], whole[task][2:4], rtol=1e-5)
    options = {"train": True, "mutable": ["batch_stats"]}
    whole, part = (apply(model, variables, x, **options)[0] for x in (X, X[2:4]))
    assert np.abs(part["a"] - whole["a"][2:4]).max() > 1e-2


@pytest.mark.parametrize(
    "form", ["low_rank", pytest.param("full", marks=pytest.mark.slow)]
)
def test_feature_gates_start_as_the_identity(form):
    config = replace(SMALL, feature_gate=form)
    model, without = (
        HoME(TASKS, CATEGORIES, c)
        for c in (config, replace(SMALL, feature_gate="none"))
    )
    variables = jax.jit(model.init)(jax.random.key(3), X)
    drop = lambda tree: (
        {k: drop(v) for k, v in tree.items() if k != "feature_gates"}
        if isinstance(tree, dict)
        else tree
    )
    found = apply(model, variables)
    expected = apply(without, drop(variables))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    # And they learn from the first step on.
    losses = lambda p: home_losses(
        p,
        {"batch_stats": variables["batch_stats"]},
        model,
        X,
        LABELS,
        key=jax.random.key(0),
    )[0]["a"]
    slopes = jax.jit(jax.grad(losses))(variables["params"])["level_1"]["feature_gates"]
    last = slopes["up" if form == "low_rank" else "kernel"]
    assert (np.abs(last).reshape(3, -1).max(1) > 1e-6).all()


def test_self_gate_of_one_expert_is_a_sigmoid():
    config = replace(SMALL, feature_gate="none")
    module = ExpertGroups((1, 3), config)
    x = jnp.stack([X, X + 1], axis=1)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    params = {**variables["params"]}
    params["self_gates"] = {"kernel": jnp.zeros((4, 6))}
    _, experts, added = apply(module, {**variables, "params": params}, x)
    np.testing.assert_allclose(added[:, 0], 0.5 * experts[:, 0], rtol=1e-5)
    np.testing.assert_allclose(
        added[:, 1], experts[:, 1:].mean(1), rtol=1e-4, atol=1e-6
    )


def test_self_gate_reads_its_own_group():
    module = SelfGates((2, 1, 0))
    x = jax.random.normal(jax.random.key(0), (5, 3, 6))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    weights = np.asarray(apply(module, variables, x))
    logits = np.einsum("bnd,nd->bn", x, variables["params"]["kernel"])
    assert weights.shape == (5, 3, 3)
    np.testing.assert_allclose(
        weights[:, 0, :2], plain.softmax(logits[:, :2]), rtol=1e-4
    )
    np.testing.assert_allclose(weights[:, 1, 2], plain.sigmoid(logits[:, 2]), rtol=1e-5)
    assert not weights[:, [0, 1, 1, 2, 2, 2], [2, 0, 1, 0, 1, 2]].any()


def test_one_category_without_shared_experts_is_a_plain_mixture():
    config = replace(
        SMALL,
        level_1_shared=0,
        level_1_category=3,
        self_gate=False,
        level_2_shared=0,
        level_2_category=1,
        level_2_task=0,
        level_2_input="own",
        feature_gate="none",
    )
    model, variables = start(config, ("a",), ("x",))
    p, s = (plain.float64(variables[k]) for k in ("params", "batch_stats"))
    x = np.float64(X)
    below = [
        expert(p["level_1"]["experts"], s["level_1"]["experts"], i, x, False)
        for i in range(3)
    ]
    z = plain.mixed(plain.softmax(x @ p["gates"]["kernel"][1]), below)
    # A single expert above: its gate is 1.
    h = expert(p["category"]["experts"], s["category"]["experts"], 0, z, False)
    expected = plain.tower(p["task_towers"]["a"], h)
    np.testing.assert_allclose(
        apply(model, variables)["a"], expected, rtol=1e-4, atol=1e-5
    )


def test_every_gate_sums_to_one_over_its_own_experts():
    model, variables = start()
    _, state = apply(model, variables, mutable=["intermediates"])
    sown = state["intermediates"]
    first, second = expert_groups(TASKS, CATEGORIES, SMALL)
    assert first == ("shared", "shared", "x", "y")
    assert second == ("shared", *"xxyyaabbcc")
    rows = {"gates": (first, ({*first}, {"shared", "x"}, {"shared", "y"}))}
    per_task = [{"shared", c, t} for t, c in zip(TASKS, CATEGORIES)]
    rows["task_gates"] = (second, per_task)
    for name, (owners, allowed) in rows.items():
        weights = np.asarray(sown[name]["gates"][0])
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
        mask = np.array([[o in own for o in owners] for own in allowed])
        np.testing.assert_array_equal(weights > 0, np.broadcast_to(mask, weights.shape))


# --- Who reaches whom -----------------------------------------------------------------


def moved(slopes):
    """Which experts of a level have a gradient."""
    # Its last bias: hidden ReLUs may all be off.
    return [bool(np.any(s)) for s in slopes["experts"]["dense"]["bias_1"]]


def reached(model, variables):
    """The gradient of every task's outputs at every parameter."""

    @jax.jit
    def slopes(params):
        apply = lambda params: model.apply({**variables, "params": params}, X)
        _, pull = jax.vjp(apply, params)
        one = lambda t: {k: jnp.full(8, float(k == t)) for k in TASKS}
        return {t: pull(one(t))[0] for t in TASKS}

    return jax.device_get(slopes(variables["params"]))


@functools.cache
def reached_by_default():
    return reached(*start())


def test_jacobian_has_the_zeros_of_the_hierarchy():
    owners = dict(zip(TASKS, CATEGORIES))
    for t, slopes in reached_by_default().items():
        # Of the first level other categories' too, through z_sh.
        assert moved(slopes["level_1"]) == [True] * 4
        assert moved(slopes["shared"]) == [True]
        assert moved(slopes["category"]) == [c == owners[t] for c in "xxyy"]
        assert moved(slopes["task_level"]) == [o == t for o in "aabbcc"]
        for name in ("task_gates", "task_level"):
            gate = slopes[name] if name == "task_gates" else slopes[name]["self_gates"]
            rows = np.abs(gate["kernel"]).reshape(3, -1).max(1) > 0
            np.testing.assert_array_equal(rows, [o == t for o in TASKS])
        assert [
            o for o in TASKS if np.any(slopes["task_towers"][o]["logit"]["kernel"])
        ] == [t]


def test_without_shared_representation_categories_are_apart_below():
    """`z_sh` is the only way from the first level to other categories."""
    config = replace(SMALL, level_2_input="own", level_2_shared=0)
    model, variables = start(config)
    params = {**variables["params"]}
    # What the gate reads of z_sh, behind the category's own width.
    kernel = params["task_gates"]["kernel"].at[:, 4:].set(0.0)
    params["task_gates"] = {"kernel": kernel}
    for t, slopes in reached(model, {**variables, "params": params}).items():
        assert moved(slopes["level_1"]) == [True, True, t != "c", t == "c"]


def test_without_hierarchy_every_task_reaches_everything():
    model, variables = start(replace(SMALL, hierarchy=False))
    for slopes in reached(model, variables).values():
        for name in ("level_1", "shared", "category", "level_2"):
            assert all(moved(slopes[name]))
    assert is_shared("params/level_2/experts/dense/kernel_0")


def test_task_modules_are_those_of_a_single_task():
    _, variables = start()
    found = reached_by_default()
    for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "task_towers" in name:
            continue
        leaf = lambda t, path=path: functools.reduce(
            lambda x, k: x[k.key], path, found[t]
        )
        size = len(leaf("a"))
        of_task = np.stack(
            [np.abs(leaf(t)).reshape(size, -1).max(1) > 0 for t in TASKS]
        )
        if is_shared(name):
            assert name.startswith(("level_1", "gates", "shared", "category"))
        else:
            assert (of_task.sum(0) <= 1).all(), name


@pytest.mark.parametrize("self_gate", [True, False])
def test_a_closed_gate_does_not_cut_off_task_experts(self_gate):
    """Where it is all the shared expert's, own experts learn by the self-gate alone."""
    config = replace(SMALL, self_gate=self_gate, feature_gate="none", level_2_task=1)
    model, variables = start(config)
    # Logits 100 apart, in favour of the first expert or of all others.
    kernel = jnp.zeros((3, 8, 4)).at[:, :, 0].set(200.0)
    params = {**variables["params"], "task_gates": {"kernel": kernel}}

    def total(params, x):
        logits = model.apply({**variables, "params": params}, x)
        return sum(jnp.sum(y) for y in logits.values())

    variables = {**variables, "params": params}
    _, state = apply(model, variables, mutable=["intermediates"])
    weights = np.asarray(state["intermediates"]["task_gates"]["gates"][0])
    (rows,) = np.nonzero((weights[:, :, 0] == 1).all(1))
    assert len(rows)
    slopes = jax.jit(jax.grad(total))(params, X[rows])
    assert moved(slopes["task_level"]) == [self_gate] * 3
    assert moved(slopes["shared"]) == [True]


# --- Switches and errors --------------------------------------------------------------


def test_switches():
    sizes = {}
    for name, changes in {
        "all": {},
        "no norm": {"norm": False},
        "relu": {"activation": "relu", "norm": False},
        "no feature gate": {"feature_gate": "none"},
        "no self-gate": {"self_gate": False},
        "own": {"level_2_input": "own"},
        "no task experts": {"level_2_task": 0},
        "no category experts": {"level_2_category": 0},
        "no shared experts": {"level_1_shared": 0, "level_2_shared": 0},
    }.items():
        model = HoME(TASKS, CATEGORIES, replace(SMALL, **changes))
        shapes = jax.eval_shape(model.init, jax.random.key(0), X)
        sizes[name] = sum(x.size for x in jax.tree.leaves(shapes["params"]))
        assert ("batch_stats" in shapes) == ("norm" not in str(changes))
    # Counted by hand. Feature gates: of 3 groups of 6 features, 1 of 4 and 5 of 8.
    gates = sum(n * (2 * d * 2 * 3 + 2 * d) for n, d in ((3, 6), (1, 4), (5, 8)))
    self_gates = 4 * 6 + 6 * 8
    norms = 2 * 4 * (4 + 1 + 4 + 6)
    assert sizes["all"] - sizes["no feature gate"] == gates
    assert sizes["all"] - sizes["no self-gate"] == self_gates
    assert sizes["all"] - sizes["no norm"] == norms == sizes["all"] - sizes["relu"]
    # 10 experts read half as much, as do 5 feature gates and 6 self-gates.
    assert sizes["all"] - sizes["own"] == 10 * 4 * 5 + 5 * 4 * (2 * 2 * 3 + 2) + 6 * 4
    assert max(sizes["no task experts"], sizes["no category experts"]) < sizes["all"]


def test_relu_experts_die_and_swish_experts_do_not():
    rates = {}
    for activation, norm in (("relu", False), ("swish", True)):
        model, variables = start(replace(SMALL, activation=activation, norm=norm))
        params = {**variables["params"]}
        level = {**params["level_1"]}
        dense = {**level["experts"]["dense"]}
        dense["bias_1"] = dense["bias_1"].at[0].set(-100.0)
        level["experts"] = {**level["experts"], "dense": dense}
        params["level_1"] = level
        variables = {**variables, "params": params}
        if norm:
            _, state = apply(
                HoME(TASKS, CATEGORIES, replace(SMALL, momentum=0.0)),
                variables,
                train=True,
                mutable=["batch_stats"],
            )
            variables = {**variables, **state}
        use = expert_utilisation(model, variables, [X])
        rates[activation] = use.zero_rate["level_1/experts"]
        assert {*use.weights} == {"gates", "task_gates"}
    assert rates["relu"][0] == 1
    assert rates["swish"].max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level_1_category": 0}, r"`level_1_category` must be at least 1"),
        ({"level_2_shared": -1}, r"no number of experts negative.*-1"),
        (
            {"level_2_shared": 0, "level_2_category": 0, "level_2_task": 0},
            r"must not all be 0",
        ),
        ({"activation": "gelu"}, r"`activation` must be one of.*'gelu'"),
        ({"feature_gate": "half"}, r"`feature_gate` must be one of"),
        ({"level_2_input": "all"}, r"`level_2_input` must be one of"),
        ({"rank": 0}, r"`rank` and `adapters` must be at least 1, got 0 and 2"),
    ],
)
def test_bad_configurations(changes, message):
    # Not the constructor, which checks annotations first, in tests.
    arguments = SimpleNamespace(**vars(SMALL) | changes)
    with pytest.raises(ValueError, match=message):
        HoMEConfig.__post_init__(arguments)


@pytest.mark.parametrize(
    ("tasks", "categories", "message"),
    [
        ((), (), r"`tasks` must name at least one task"),
        (("a", "b"), ("x",), r"one category for each of the 2 `tasks`, got \('x',\)"),
        (("a", "b"), ("a", "x"), r"must be different names, got \['a'\]"),
        (("a",), ("shared",), r"must be different names, got \['shared'\]"),
        (("shared",), ("x",), r"must be different names, got \['shared'\]"),
    ],
)
def test_bad_tasks(tasks, categories, message):
    with pytest.raises(ValueError, match=message):
        expert_groups(tasks, categories, SMALL)


def test_bad_momentum():
    model = HoME(TASKS, CATEGORIES, replace(SMALL, momentum=1.0))
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1.0"):
        model.init(jax.random.key(0), X)


# --- Training -------------------------------------------------------------------------


def training_step(model, axis_name=None):
    """Losses, gradient of the sum, and the next statistics."""
    grad_fn = mtjax.value_and_task_grads(
        home_losses, has_aux=True, axis_name=axis_name, shared=is_shared
    )

    def step(variables, x, labels):
        state = {"batch_stats": variables["batch_stats"]}
        (losses, state), grads = grad_fn(
            variables["params"], state, model, x, labels, key=jax.random.key(0)
        )
        return losses, grads.combine(jnp.ones(3)), state["batch_stats"]

    return step


@functools.cache
def one_device():
    model, variables = start()
    return jax.device_get(jax.jit(training_step(model))(variables, X, LABELS))


def two_devices():
    return jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )


def test_two_devices_under_jit():
    model, variables = start()
    split = NamedSharding(two_devices(), PartitionSpec("data"))
    x, labels = jax.device_put((X, LABELS), split)
    found = jax.jit(training_step(model))(variables, x, labels)
    chex.assert_trees_all_close(
        jax.device_get(found), one_device(), rtol=2e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "synchronised", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_two_devices_in_shard_map(synchronised):
    _, variables = start()
    config = replace(SMALL, axis_name="data" if synchronised else None)
    step = training_step(HoME(TASKS, CATEGORIES, config), "data")

    def mapped(variables, x, labels):
        losses, grads, stats = step(variables, x, labels)
        return losses, grads, jax.tree.map(lambda s: s[None], stats)

    run = jax.shard_map(
        mapped,
        mesh=two_devices(),
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
    )
    losses, grads, stats = jax.device_get(jax.jit(run)(variables, X, LABELS))
    expected = one_device()
    if synchronised:
        chex.assert_trees_all_close((losses, grads), expected[:2], rtol=2e-4, atol=1e-5)
        both = jax.tree.map(lambda s: np.stack([s, s]), expected[2])
        chex.assert_trees_all_close(stats, both, rtol=1e-5, atol=1e-6)
    else:
        model, _ = start()
        for i, rows in enumerate((slice(0, 4), slice(4, 8))):
            _, state = apply(
                model, variables, X[rows], train=True, mutable=["batch_stats"]
            )
            own = jax.tree.map(lambda s, i=i: s[i], stats)
            chex.assert_trees_all_close(
                own, jax.device_get(state["batch_stats"]), rtol=1e-4, atol=1e-5
            )


def test_losses_are_cross_entropies_of_known_labels():
    model, variables = start()
    labels = {**LABELS, "b": LABELS["b"].at[3:].set(jnp.nan)}
    state = {"batch_stats": variables["batch_stats"]}
    losses, _ = jax.jit(
        lambda p, y: home_losses(p, state, model, X, y, key=jax.random.key(0))
    )(variables["params"], labels)
    for t, z in reference(variables, X, train=True).items():
        y = np.float64(labels[t])
        p = plain.sigmoid(z)
        expected = np.nanmean(-y * np.log(p) - (1 - y) * np.log(1 - p))
        np.testing.assert_allclose(losses[t], expected, rtol=1e-3)


def test_dropout_is_in_the_towers():
    model, variables = start(replace(SMALL, dropout=0.5))
    options = {"train": True, "mutable": ["batch_stats"]}
    runs = [
        apply(model, variables, rngs={"dropout": jax.random.key(i)}, **options)
        for i in range(2)
    ]
    assert np.abs(runs[0][0]["a"] - runs[1][0]["a"]).max() > 1e-3
    chex.assert_trees_all_equal(runs[0][1], runs[1][1])
