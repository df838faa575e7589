"""Rankers with experts and gates: MMoE, CGC and PLE, AdaTT, STEM."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.losses import masked_mean
from mtjax.nn import PLE, STEM, AdaTT, Gate, MMoE, SharedBottomRanker
from tests.nn import plain

TASKS = ("a", "b", "c")
X = jax.random.normal(jax.random.key(1), (8, 6))


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


@functools.partial(jax.jit, static_argnums=0)
def jacobian(model, params, x=X):
    """The gradient of every task's logits, by parameter."""
    sums = lambda p: jnp.stack(
        [jnp.sum(y * y) for y in model.apply({"params": p}, x).values()]
    )
    return jax.jacrev(sums)(params)


def towers(params, inputs):
    return [plain.tower(params["task_towers"][t], h) for t, h in zip(TASKS, inputs)]


def close(found, expected):
    for task, y in zip(TASKS, expected, strict=True):
        np.testing.assert_allclose(found[task], y, rtol=1e-3, atol=1e-5)


MMOE = MMoE(tasks=TASKS, num_experts=4, widths=((5, 4),), tower=(3,))


def test_mmoe():
    params = start(MMOE)
    p, x = plain.float64(params), np.float64(X)
    outputs = plain.experts(p["experts_0"], x)
    weights = [plain.softmax(x @ w) for w in p["task_gates"]["kernel"]]
    close(apply(MMOE, params), towers(p, [plain.mixed(w, outputs) for w in weights]))
    # Experts may change places together with their logits.
    order = np.array([2, 0, 3, 1])
    moved = params | {
        "experts_0": jax.tree.map(lambda k: k[order], params["experts_0"]),
        "task_gates": {"kernel": params["task_gates"]["kernel"][:, :, order]},
    }
    close(apply(MMOE, moved), [*apply(MMOE, params).values()])
    # Without logits every task sees the mean.
    level = params | {"task_gates": jax.tree.map(jnp.zeros_like, params["task_gates"])}
    close(apply(MMOE, level), towers(p, [np.mean(outputs, 0)] * 3))


def test_omoe_is_mmoe_with_tied_gates():
    omoe = MMOE.copy(single_gate=True)
    params = start(omoe)
    kernel = params["gate"]["kernel"]
    tied = {k: v for k, v in params.items() if k != "gate"}
    tied["task_gates"] = {"kernel": jnp.tile(kernel, (3, 1, 1))}
    close(apply(omoe, params), [*apply(MMOE, tied).values()])


@pytest.mark.parametrize("single_gate", [False, True])
def test_one_expert_is_a_shared_bottom(single_gate):
    model = MMOE.copy(num_experts=1, single_gate=single_gate)
    params = start(model)
    bottom = SharedBottomRanker(tasks=TASKS, widths=(5, 4), tower=(3,))
    expert = params["experts_0"]
    same = {"task_towers": params["task_towers"]} | {
        f"bottom_{i}": {
            "kernel": expert[f"kernel_{i}"][0],
            "bias": expert[f"bias_{i}"][0],
        }
        for i in range(2)
    }
    close(apply(model, params), [*apply(bottom, same).values()])


def test_gates_of_further_levels_read_the_input():
    model = MMoE(tasks=TASKS, num_experts=2, widths=((4,), (5,)), tower=(3,))
    params = start(model)
    p, x = plain.float64(params), np.float64(X)
    below = plain.experts(p["experts_0"], x)
    weights = [plain.softmax(x @ w) for w in p["expert_gates_1"]["kernel"]]
    outputs = [
        plain.expert(p["experts_1"], j, plain.mixed(w, below))
        for j, w in enumerate(weights)
    ]
    weights = [plain.softmax(x @ w) for w in p["task_gates"]["kernel"]]
    close(apply(model, params), towers(p, [plain.mixed(w, outputs) for w in weights]))


def ple(p, x, own, shared, levels):
    """PLE group by group; the last group is the shared one."""
    z = [x] * 4
    for i in range(levels):
        last = i == levels - 1
        p_i = p[f"level_{i}"]
        gates = p_i.get("task_gates", p_i.get("gates"))["kernel"]
        mine = p_i["task_experts" if last else "own_experts"]
        outputs = [
            [plain.expert(mine, t * own + k, z[t]) for k in range(own)]
            for t in range(3)
        ]
        common = [plain.expert(p_i["shared_experts"], k, z[3]) for k in range(shared)]
        new = [
            plain.mixed(plain.softmax(z[t] @ gates[t]), outputs[t] + common)
            for t in range(3)
        ]
        if not last:
            weights = plain.softmax(z[3] @ p_i["shared_gate"]["kernel"][0])
            new.append(
                plain.mixed(weights, [e for group in outputs for e in group] + common)
            )

        z = new
    return towers(p, z)


@pytest.mark.parametrize("widths", [((5, 4),), ((4,), (5,)), ((4,), (5,), (3,))])
def test_ple(widths):
    model = PLE(tasks=TASKS, own=2, shared=1, widths=widths, tower=(3,))
    params = start(model)
    x = np.float64(X)
    close(apply(model, params), ple(plain.float64(params), x, 2, 1, len(widths)))
    slopes = jacobian(model, params)
    # Where tasks' own experts reach the others: at all levels but the last.
    for i in range(len(widths)):
        level = slopes[f"level_{i}"]
        last = i == len(widths) - 1
        experts = level["task_experts" if last else "own_experts"]
        for leaf in map(np.asarray, jax.tree.leaves(experts)):
            of_task = leaf.reshape(3, 3, -1)
            reached = np.any(of_task, axis=2)
            np.testing.assert_array_equal(
                reached, np.eye(3) if last else np.ones((3, 3))
            )


def test_without_shared_experts_tasks_are_mixtures_by_themselves():
    model = PLE(tasks=TASKS, own=2, shared=0, widths=((4,),), tower=(3,))
    params = start(model)
    together = apply(model, params)
    level = params["level_0"]
    for t, task in enumerate(TASKS):
        alone = {
            "experts_0": jax.tree.map(
                lambda k, t=t: k[2 * t : 2 * t + 2], level["task_experts"]
            ),
            "task_gates": {"kernel": level["task_gates"]["kernel"][t : t + 1]},
            "task_towers": {task: params["task_towers"][task]},
        }
        single = MMoE(tasks=(task,), num_experts=2, widths=((4,),), tower=(3,))
        found = apply(single, alone)[task]
        np.testing.assert_allclose(found, together[task], rtol=1e-4, atol=1e-5)


def test_losses_on_different_sample_spaces():
    # Outside of a task's space a label is any number, and moves nothing.
    model = PLE(tasks=TASKS, widths=((4,),), tower=(3,))
    params = start(model)
    space = np.array([1, 1, 0, 1, 0, 0, 1, 1])
    labels = np.where(space, np.arange(8) % 2, 7.0).astype(np.float32)

    mask = jnp.asarray(space)

    def loss(params, x):
        logits = model.apply({"params": params}, x)["b"]
        return masked_mean(optax.sigmoid_binary_cross_entropy(logits, labels), mask)

    value, slopes = jax.jit(jax.value_and_grad(loss, argnums=1))(params, X)
    y = np.float64(apply(model, params)["b"])
    each = np.logaddexp(0, y) - labels * y
    assert value == pytest.approx(each[space == 1].mean(), rel=1e-4)
    np.testing.assert_array_equal(np.any(slopes, axis=1), space == 1)


def test_adatt():
    model = AdaTT(tasks=TASKS, own=2, shared=1, widths=((4,), (5,)), tower=(3,))
    params = start(model)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["gates_0"] == {"kernel": (4, 6, 7)}
    assert shapes["task_gates"] == {"kernel": (3, 4, 7)}
    assert shapes["residual_0"] == shapes["task_residual"] == (3, 2)
    assert shapes["experts_1"] == {"kernel_0": (7, 4, 5), "bias_0": (7, 5)}
    assert "shared_residual_0" not in shapes
    p, z = plain.float64(params), [np.float64(X)] * 4
    levels = (("gates_0", "residual_0"), ("task_gates", "task_residual"))
    for i, (gates, residual) in enumerate(levels):
        owner = (0, 0, 1, 1, 2, 2, 3)
        e = [plain.expert(p[f"experts_{i}"], k, z[o]) for k, o in enumerate(owner)]
        new = []
        for t, w in enumerate(p[gates]["kernel"]):
            native = e[6]
            if t < 3:
                v = p[residual][t]
                native = v[0] * e[2 * t] + v[1] * e[2 * t + 1]
            new.append(plain.mixed(plain.softmax(z[t] @ w), e) + native)
        z = new
    close(apply(model, params), towers(p, z))


def test_adatt_without_gates_is_one_network_per_task():
    def closed(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        is_gate = isinstance(context.module, Gate) and context.method_name == "__call__"
        return jnp.zeros_like(out) if is_gate else out

    model = AdaTT(tasks=TASKS, widths=((4,), (5,)), tower=(3,))
    params = start(model)
    p = plain.float64(params)
    with nn.intercept_methods(closed):
        found = model.apply({"params": params}, X)
        bare = model.copy(residual=False).apply({"params": params}, X)
    h = [np.float64(X)] * 3
    for i in range(2):
        h = [plain.expert(p[f"experts_{i}"], t, h[t]) for t in range(3)]
    close(found, towers(p, h))
    # Without the residual nothing of a task is left.
    close(bare, towers(p, [np.zeros((8, 5))] * 3))


def test_stem_reads_all_tables_and_moves_its_own():
    model = STEM(
        tasks=TASKS, own=1, shared=2, widths=((4,),), gate_hidden=(3,), tower=()
    )
    x = {
        t: jax.random.normal(jax.random.key(i), (8, 6))
        for i, t in enumerate((*TASKS, "shared"))
    }
    params = start(model, x)
    p, tables = plain.float64(params), plain.float64(x)
    level = p["level_0"]
    outputs = [
        plain.expert(level["task_experts"], i, tables[t]) for i, t in enumerate(TASKS)
    ]
    outputs += plain.experts(level["shared_experts"], tables["shared"])
    mixed = []
    for i, t in enumerate(TASKS):
        gate = level["task_gates"]
        h = plain.expert(gate["hidden"], i, tables[t] + tables["shared"])
        mixed.append(plain.mixed(plain.softmax(h @ gate["kernel"][i]), outputs))
    close(apply(model, params, x), towers(p, mixed))

    @jax.jit
    def slopes(params, x):
        sums = lambda params, x: jnp.stack(
            [jnp.sum(y * y) for y in model.apply({"params": params}, x).values()]
        )
        return jax.jacrev(sums, argnums=(0, 1))(params, x)

    of_params, of_tables = slopes(params, x)
    for i, task in enumerate(TASKS):
        # What another task's table says changes a prediction without being changed.
        reached = np.any(of_tables[task], axis=(1, 2))
        np.testing.assert_array_equal(reached, np.arange(3) == i)
        changed = apply(model, params, x | {task: x[task] + 1})
        before = apply(model, params, x)
        assert all(np.abs(changed[t] - before[t]).max() > 1e-4 for t in TASKS)
    assert np.any(of_tables["shared"], axis=(1, 2)).all()
    own = of_params["level_0"]["task_experts"]["kernel_0"]
    np.testing.assert_array_equal(np.any(own, axis=(2, 3)), np.eye(3))
    shared = of_params["level_0"]["shared_experts"]["kernel_0"]
    assert np.any(shared, axis=(2, 3)).all()
