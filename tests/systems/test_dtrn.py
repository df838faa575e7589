"""DTRN against NumPy, double loops, plain transformers, and its own ablations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.analysis.field_weights import field_weights
from mtjax.losses.binary import binary_losses
from mtjax.losses.sample_space import labels_within
from mtjax.nn import PLE, MMoE, SharedBottomRanker
from mtjax.nn.added_task import add_task, only
from mtjax.nn.histories import stacked_histories
from mtjax.nn.task_inputs import Bottom, EachTask, Extraction, OwnTowers
from mtjax.systems.dtrn import (
    DTRN,
    ConditionalTransformer,
    DTRNConfig,
    Inputs,
    TaskInterests,
    TaskRefinement,
    scale_difference,
)
from tests.nn import plain

TASKS, KINDS = ("like", "love", "dislike"), ("rated", "liked", "disliked")
B, T, R, L, D, F, K = 4, 3, 3, 5, 8, 2, 3
SMALL = DTRNConfig(
    width=D,
    length=6,
    hidden=12,
    task_width=4,
    kind_width=4,
    hyper_hidden=(6, 5),
    reduction=1,
)
COUNTS = np.array([[5, 2, 0], [1, 5, 3], [4, 0, 5], [3, 1, 2]])


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


MASK = jnp.asarray(np.arange(L) < COUNTS[..., None])
INPUTS = Inputs(drawn((B, F, K), 1), drawn((B, R, L, D), 2), MASK, drawn((B, D), 3))
HISTORIES, CANDIDATE = INPUTS.histories, INPUTS.candidate


def start(module, *args, noise=0.3, method=None):
    """Random parameters: heads of the hypernetwork are not at zero any more."""
    init = lambda: module.init(jax.random.key(0), *args, method=method)
    if noise is None:
        return jax.jit(init)().get("params", {})
    rng = np.random.default_rng(7)
    draw = lambda x: jnp.asarray(noise * rng.normal(size=x.shape), jnp.float32)
    return jax.tree.map(draw, jax.eval_shape(init).get("params", {}))


def interest_of(module):
    """TIM as a function of parameters."""

    def run(params, histories=HISTORIES, mask=MASK, candidate=CANDIDATE):
        variables = {"params": params}
        states = module.apply(variables, histories, mask, method="encode")
        return module.apply(variables, states, mask, candidate, method="pool")

    return jax.jit(run)


def both_parts(module, histories, mask, candidate):
    return module.pool(module.encode(histories, mask), mask, candidate)


def tim(config=SMALL, tasks=T, kinds=R, noise=0.3):
    module = TaskInterests(tasks, kinds, config)
    some = HISTORIES[:, :kinds], MASK[:, :kinds], CANDIDATE
    return module, start(module, *some, noise=noise, method=both_parts)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def normed(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) + shift


def plain_interest(p, config, items, candidate, norms):
    """One task, one sequence without padding, one head at a time."""
    if not len(items):
        return np.zeros(config.width)
    x = items + p["positions"][: len(items)][::-1]
    for i in range(config.layers):
        a = p[f"attention_{i}"]
        q, k, v = (dense(a[name], x) for name in ("query", "key", "value"))
        size, heard = config.width // config.heads, []
        for h in range(config.heads):
            own = slice(h * size, (h + 1) * size)
            weights = plain.softmax(q[:, own] @ k[:, own].T / np.sqrt(size))
            heard.append(weights @ v[:, own])
        heard = dense(a["output"], np.concatenate(heard, axis=-1))
        x = normed(x + heard, norms[f"scale_{i}_0"], norms[f"shift_{i}_0"])
        h = dense(p[f"ffn_out_{i}"], plain.relu(dense(p[f"ffn_in_{i}"], x)))
        x = normed(x + h, norms[f"scale_{i}_1"], norms[f"shift_{i}_1"])
    if config.pooling == "mean":
        return x.mean(0)
    scores = x @ (candidate @ p["match"]) / np.sqrt(config.width)
    return plain.softmax(scores) @ x


def plain_norms(p, task, kind):
    c = np.concatenate([p["task_embeddings"][task], p["kind_embeddings"][kind]])
    h, p = c, p["hypernetwork"]
    for name in ("hidden_0", "hidden_1"):
        h = plain.relu(dense(p[name], h))
    return {name: dense(head, h) for name, head in p.items() if "hidden" not in name}


@pytest.mark.parametrize(
    "change", [{"layers": 2}, {"pooling": "mean", "heads": 4}], ids=str
)
def test_interests_are_those_of_a_double_loop_in_numpy(change):
    config = replace(SMALL, **change)
    module, params = tim(config)
    found = interest_of(module)(params)
    p, histories, candidate = plain.float64((params, HISTORIES, CANDIDATE))
    for b, task, kind in np.ndindex(B, T, R):
        expected = plain_interest(
            p["encoder"],
            config,
            histories[b, kind, : COUNTS[b, kind]],
            candidate[b],
            plain_norms(p, task, kind),
        )
        np.testing.assert_allclose(found[b, task, kind], expected, rtol=2e-4, atol=2e-5)
    # Tasks do not hear the same.
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.01


def test_at_the_start_all_tasks_have_the_interests_of_a_plain_transformer():
    module, params = tim(noise=None)
    found = interest_of(module)(params)
    same = np.broadcast_to(found[:, :1], found.shape)
    np.testing.assert_allclose(found, same, rtol=1e-6, atol=1e-6)
    shared = TaskInterests(T, R, replace(SMALL, conditioning="shared"))
    ones = {f"scale_0_{i}": jnp.ones(D) for i in (0, 1)}
    zeros = {f"shift_0_{i}": jnp.zeros(D) for i in (0, 1)}
    plainly = {"encoder": {**params["encoder"], **ones, **zeros}}
    expected = interest_of(shared)(plainly)
    assert expected.shape == (B, 1, R, D)
    np.testing.assert_allclose(found[:, :1], expected, rtol=1e-5, atol=1e-6)
    assert np.all(scale_difference(module, params) == 0)
    assert np.any(found[1])


def test_permuted_behaviours_have_permuted_interests():
    module, params = tim()
    order = jnp.array([2, 0, 1])
    run = interest_of(module)
    expected = run(params)[:, :, order]
    moved = params | {"kind_embeddings": params["kind_embeddings"][order]}
    found = run(moved, HISTORIES[:, order], MASK[:, order])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # The embeddings have to go with them.
    assert np.abs(run(params, HISTORIES[:, order], MASK[:, order]) - found).max() > 0.01


@pytest.mark.parametrize("conditioning", ["hypernetwork", "separate", "none"])
def test_an_empty_history_gives_zeros_and_finite_gradients(conditioning):
    module, params = tim(replace(SMALL, conditioning=conditioning, layers=2))
    run = interest_of(module)
    # What padding holds does not matter, even if it is no number.
    padded = jnp.where(MASK[..., None], HISTORIES, jnp.nan)
    found = run(params, padded)
    np.testing.assert_allclose(found, run(params), rtol=1e-4, atol=1e-6)
    for b, kind in zip(*np.nonzero(COUNTS == 0), strict=True):
        assert np.all(found[b, :, kind] == 0)

    def loss(params, histories, mask):
        return jnp.sum(jnp.sin(run(params, histories, mask)))

    for mask in (MASK, jnp.zeros_like(MASK)):
        grads = jax.jit(jax.grad(loss, (0, 1)))(params, padded, mask)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_neither_length_nor_side_of_the_padding_matters():
    module, params = tim(replace(SMALL, layers=2))
    run = interest_of(module)
    left = np.zeros((B, R, L + 1, D), np.float32)
    mask = np.zeros((B, R, L + 1), bool)
    for b, kind in np.ndindex(B, R):
        if n := COUNTS[b, kind]:
            left[b, kind, -n:] = HISTORIES[b, kind, :n]
            mask[b, kind, -n:] = True
    found = run(params, jnp.asarray(left), jnp.asarray(mask))
    np.testing.assert_allclose(found, run(params), rtol=1e-5, atol=1e-6)


def test_the_first_attention_once_gives_what_a_pass_per_task_does():
    config = replace(SMALL, layers=2)
    module, params = tim(config)
    norms = module.apply({"params": params}, method="norms")
    encoder = ConditionalTransformer(config)
    weights = {"params": params["encoder"]}
    encode = jax.jit(
        lambda n: encoder.apply(weights, HISTORIES, MASK, n, method="encode")
    )
    found = encode(norms)
    for task in range(T):
        alone = encode({name: v[task : task + 1] for name, v in norms.items()})
        np.testing.assert_allclose(
            found[:, task : task + 1], alone, rtol=1e-5, atol=1e-5
        )
    # The program has the first layer's attention for one task, the second's for all.
    jaxpr = str(jax.make_jaxpr(encode)(norms))
    assert f"f32[{B * R},{L},{D}]" in jaxpr
    assert f"f32[{B * T * R},{L},{D}]" in jaxpr
    once = replace(config, layers=1)
    first = ConditionalTransformer(once)
    encode = lambda n: first.apply(weights, HISTORIES, MASK, n, method="encode")
    jaxpr = str(jax.make_jaxpr(encode)({k: v for k, v in norms.items() if "_0_" in k}))
    assert f"f32[{B * T * R},{L},{D}]" not in jaxpr


def test_separate_transformers_are_plain_ones():
    config = replace(SMALL, conditioning="separate")
    module, params = tim(config)
    found = interest_of(module)(params)
    p, histories, candidate = plain.float64((params, HISTORIES, CANDIDATE))
    for b, task, kind in np.ndindex(B, T, R):
        pair = task * R + kind
        own = jax.tree.map(lambda x, pair=pair: x[pair], p["task_encoders"])
        items = histories[b, kind, : COUNTS[b, kind]]
        expected = plain_interest(own, config, items, candidate[b], own)
        np.testing.assert_allclose(found[b, task, kind], expected, rtol=2e-4, atol=2e-5)


def test_without_the_transformer_interests_are_means():
    module, params = tim(replace(SMALL, conditioning="none"))
    assert not params
    found = interest_of(module)(params)
    for b, kind in np.ndindex(B, R):
        n = COUNTS[b, kind]
        expected = HISTORIES[b, kind, :n].mean(0) if n else np.zeros(D)
        np.testing.assert_allclose(found[b, 0, kind], expected, atol=1e-6)


def size(params):
    return sum(x.size for x in jax.tree.leaves(params))


def shapes(config, tasks=T, kinds=R):
    module = TaskInterests(tasks, kinds, config)
    items = jnp.zeros((1, kinds, config.length, config.width))
    mask = jnp.zeros(items.shape[:3], bool)
    init = lambda: module.init(
        jax.random.key(0), items, mask, jnp.zeros((1, config.width)), method=both_parts
    )
    return jax.eval_shape(init).get("params", {})


def test_numbers_of_parameters():
    few, many = shapes(DTRNConfig()), shapes(DTRNConfig(), tasks=9, kinds=5)
    # (9 - 3) tasks and (5 - 3) kinds, 16 each; the rest does not depend on them.
    assert size(many) - size(few) == 6 * 16 + 2 * 16
    assert size(many["hypernetwork"]) == size(few["hypernetwork"])
    separate = shapes(DTRNConfig(conditioning="separate"))
    d, length, hidden = 32, 20, 128
    one = 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d + length * d + d * d
    assert size(separate) == 9 * one
    assert size(few) < 0.25 * size(separate)


def trm(squeeze="concat", noise=0.5):
    module = TaskRefinement(T, reduction=2, squeeze=squeeze)
    interests = drawn((B, T, R, D), 4)
    return module, start(module, INPUTS.fields, interests, noise=noise), interests


@pytest.mark.parametrize("squeeze", ["concat", "mean"])
def test_refinement_weighs_whole_fields_as_in_numpy(squeeze):
    module, params, interests = trm(squeeze)
    found, state = jax.jit(
        lambda p: module.apply(
            {"params": p}, INPUTS.fields, interests, mutable=["intermediates"]
        )
    )(params)
    p, fields, interests = plain.float64((params, INPUTS.fields, interests))
    assert p["down"].shape[2] == (F + R) // 2
    for b, task in np.ndindex(B, T):
        vectors = [*fields[b], *interests[b, task]]
        z = (
            [v.mean() for v in vectors]
            if squeeze == "mean"
            else np.concatenate(vectors)
        )
        h = plain.relu(z @ p["down"][task])
        w = 2 * plain.sigmoid(h @ p["up"][task])
        expected = np.concatenate([a * v for a, v in zip(w, vectors, strict=True)])
        np.testing.assert_allclose(found[b, task], expected, rtol=1e-4, atol=1e-5)
        (sown,) = state["intermediates"]["field_weights"]
        np.testing.assert_allclose(sown[b, task], w, rtol=1e-4)


def test_refinement_with_zeros_is_the_identity():
    module, params, interests = trm()
    zeros = params | {"up": jnp.zeros_like(params["up"])}
    found = module.apply({"params": zeros}, INPUTS.fields, interests)
    flat = INPUTS.fields.reshape(B, 1, -1).repeat(T, axis=1)
    expected = jnp.concatenate([flat, interests.reshape(B, T, -1)], axis=-1)
    np.testing.assert_array_equal(found, expected)


def heads(tasks=TASKS):
    return {
        "towers": OwnTowers(tasks, (6,)),
        "MMoE": EachTask(tasks, MMoE(tasks, 4, ((5,),), (3,))),
        "PLE": Extraction(PLE(tasks, widths=((5,),), tower=(3,))),
        "PLE, each": EachTask(tasks, PLE(tasks, widths=((5,),), tower=(3,))),
    }


def dtrn(name, config=SMALL, tasks=TASKS, **options):
    return DTRN(tasks, KINDS, heads(tasks)[name], config, **options)


def logits_of(model):
    return jax.jit(lambda params, x=INPUTS: model.apply({"params": params}, x))


LABELS = {
    t: jnp.asarray([0.0, 1.0, 1.0, 0.0])[jnp.array(o)]
    for t, o in zip(TASKS, ((0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3)))
}


@pytest.mark.parametrize("name", ["towers", "MMoE", "PLE, each"])
def test_no_task_trains_what_is_another_ones(name):
    model = dtrn(name)
    params = start(model, INPUTS)
    run = logits_of(model)

    def losses(params):
        found = binary_losses(run(params), LABELS)
        return jnp.stack([found[task] for task in TASKS])

    grads = jax.jit(jax.jacrev(losses))(params)
    codes = grads["interests"]["task_embeddings"]
    assert codes.shape == (T, *params["interests"]["task_embeddings"].shape)
    for task, other in np.ndindex(T, T):
        towers = grads["head"].get("ranker", grads["head"])["task_towers"]
        parts = {
            "TIM": [codes[task, other]],
            "TRM": [g[task, other] for g in grads["task_refinement"].values()],
            "tower": [g[task] for g in jax.tree.leaves(towers[TASKS[other]])],
        }
        for part in parts.values():
            assert any(map(np.any, part)) == (task == other)
    shared = {k: v for k, v in grads["interests"].items() if k != "task_embeddings"}
    names = {"task_embeddings", "kind_embeddings", "encoder", "hypernetwork"}
    assert set(grads["interests"]) == names
    for task in range(T):
        for name in ("query", "key", "value", "output"):
            assert np.any(shared["encoder"]["attention_0"][name]["kernel"][task])
        assert all(np.any(g[task]) for g in jax.tree.leaves(shared["hypernetwork"]))


def test_one_task_and_one_behaviour_is_a_transformer_with_senet():
    model = DTRN(("like",), ("rated",), OwnTowers(("like",), (6,)), SMALL)
    inputs = INPUTS._replace(histories=HISTORIES[:, :1], mask=MASK[:, :1])
    params = start(model, inputs)
    found = logits_of(model)(params, inputs)["like"]
    p, x = plain.float64((params, inputs._replace(mask=None)))
    own = plain_norms(p["interests"], 0, 0)
    for b in range(B):
        items = x.histories[b, 0, : COUNTS[b, 0]]
        encoder = p["interests"]["encoder"]
        interest = plain_interest(encoder, SMALL, items, x.candidate[b], own)
        vectors = [*x.fields[b], interest]
        h = plain.relu(np.concatenate(vectors) @ p["task_refinement"]["down"][0])
        w = 2 * plain.sigmoid(h @ p["task_refinement"]["up"][0])
        bottom = np.concatenate([a * v for a, v in zip(w, vectors, strict=True)])
        tower = p["head"]["task_towers"]["like"]
        np.testing.assert_allclose(
            found[b], plain.tower(tower, bottom[None])[0], rtol=5e-4, atol=5e-5
        )


def bottom_of(model, params):
    def run(module, x):
        return module.bottom(module.encode(x.histories, x.mask), x)

    return jax.jit(lambda: model.apply({"params": params}, INPUTS, method=run))()


def test_under_mmoe_experts_and_gates_read_what_is_the_tasks():
    model = dtrn("MMoE")
    params = start(model, INPUTS)
    found = logits_of(model)(params)
    p, x = plain.float64((params["head"]["ranker"], bottom_of(model, params).tasks))
    for i, task in enumerate(TASKS):
        outputs = plain.experts(p["experts_0"], x[:, i])
        weights = plain.softmax(x[:, i] @ p["task_gates"]["kernel"][i])
        h = plain.mixed(weights, outputs)
        expected = plain.tower(p["task_towers"][task], h)
        np.testing.assert_allclose(found[task], expected, rtol=1e-3, atol=1e-4)


def test_under_ple_shared_experts_read_fields_and_mean_interests():
    model = dtrn("PLE")
    params = start(model, INPUTS)
    found, bottom = logits_of(model)(params), bottom_of(model, params)
    interests = interest_of(TaskInterests(T, R, SMALL))(params["interests"])
    flat = INPUTS.fields.reshape(B, -1), interests.mean(1).reshape(B, -1)
    expected = jnp.concatenate(flat, axis=-1)
    np.testing.assert_allclose(bottom.shared, expected, rtol=1e-4, atol=1e-5)
    p, own, shared = plain.float64(
        (params["head"]["ranker"], bottom.tasks, bottom.shared)
    )
    level = p["level_0"]
    common = plain.experts(level["shared_experts"], shared)
    for i, task in enumerate(TASKS):
        pair = [
            plain.expert(level["task_experts"], 2 * i + k, own[:, i]) for k in (0, 1)
        ]
        weights = plain.softmax(own[:, i] @ level["task_gates"]["kernel"][i])
        h = plain.mixed(weights, [*pair, *common])
        expected = plain.tower(p["task_towers"][task], h)
        np.testing.assert_allclose(found[task], expected, rtol=1e-3, atol=1e-4)


def test_where_all_read_the_same_heads_are_the_rankers_themselves():
    x = drawn((B, 11), 5)
    same = Bottom(jnp.repeat(x[:, None], T, axis=1), x)
    ple = PLE(TASKS, widths=((5,), (4,)), tower=(3,))
    params = start(ple, x)
    expected = jax.jit(lambda p: ple.apply({"params": p}, x))(params)
    head = Extraction(PLE(TASKS, widths=((5,), (4,)), tower=(3,)))
    once = Bottom(x[:, None], x)
    for bottom in (same, once):
        run = jax.jit(lambda p, b=bottom: head.apply({"params": {"ranker": p}}, b))
        found = run(params)
        for task in TASKS:
            np.testing.assert_allclose(found[task], expected[task], rtol=1e-5)
    each = EachTask(TASKS, ple)
    for bottom in (same, once):
        run = jax.jit(lambda p, b=bottom: each.apply({"params": {"ranker": p}}, b))
        for task, found in run(params).items():
            np.testing.assert_allclose(found, expected[task], rtol=1e-5)


def test_with_both_modules_off_it_is_the_ranker_on_means():
    ranker = SharedBottomRanker(TASKS, (7,), (4,))
    off = replace(SMALL, conditioning="none", refinement=False)
    model = DTRN(TASKS, KINDS, EachTask(TASKS, ranker), off)
    params = start(model, INPUTS)
    assert set(params) == {"head"}
    counts = np.maximum(COUNTS, 1)[..., None]
    means = np.where(MASK[..., None], HISTORIES, 0).sum(2) / counts
    x = np.concatenate([INPUTS.fields.reshape(B, -1), means.reshape(B, -1)], axis=-1)
    expected = ranker.apply({"params": params["head"]["ranker"]}, jnp.asarray(x))
    for task, found in logits_of(model)(params).items():
        np.testing.assert_allclose(found, expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["hypernetwork", "separate"])
def test_states_of_one_user_serve_many_candidates(conditioning):
    model = dtrn("MMoE", replace(SMALL, conditioning=conditioning))
    params = {"params": start(model, INPUTS)}
    one = INPUTS._replace(histories=HISTORIES[1:2], mask=MASK[1:2])
    copies = lambda x: jnp.repeat(x, B, axis=0)
    all_at_once = one._replace(histories=copies(one.histories), mask=copies(one.mask))
    expected = logits_of(model)(params["params"], all_at_once)
    encode = jax.jit(lambda x, mask: model.apply(params, x, mask, method="encode"))
    states = encode(one.histories, one.mask)
    assert states.shape == (1, T, R, L, D)
    rank = jax.jit(lambda x: model.apply(params, x, one, method="rank"))
    found = rank(states)
    for task in TASKS:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["towers", "MMoE", "PLE"])
def test_an_added_task_leaves_the_rest_as_it_was(name):
    before = dtrn(name, tasks=TASKS[:2])
    after = dtrn(name, averaged=2)
    old, fresh = start(before, INPUTS), start(after, INPUTS, noise=0.2)
    params, trainable = add_task(old, fresh)
    expected = logits_of(before)(old)
    run = logits_of(after)
    tx = optax.chain(optax.adamw(0.1), only(trainable))

    @jax.jit
    def step(params, state):
        loss = lambda p: sum(binary_losses(run(p), LABELS).values())
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    own = lambda p: binary_losses(run(p), LABELS)["dislike"]
    first, state = own(params), tx.init(params)
    trained = params
    for _ in range(5):
        trained, state = step(trained, state)
    assert own(trained) < first
    for p in (params, trained):
        found = run(p)
        for task in TASKS[:2]:
            np.testing.assert_allclose(
                found[task], expected[task], rtol=1e-4, atol=1e-5
            )
    # All that moved is the new task's, and all that is the new task's moved or is dead.
    same = jax.tree.map(lambda a, b, new: (a == b) | new, trained, params, trainable)
    assert all(np.all(x) for x in jax.tree.leaves(same))
    rows = trainable["interests"]["task_embeddings"]
    np.testing.assert_array_equal(rows.any(1), [False, False, True])
    moved = (
        trained["interests"]["task_embeddings"]
        != params["interests"]["task_embeddings"]
    )
    np.testing.assert_array_equal(moved.all(1), [False, False, True])
    moved = trained["task_refinement"]["up"] != params["task_refinement"]["up"]
    np.testing.assert_array_equal(moved.any((1, 2)), [False, False, True])
    assert jax.tree.all(
        jax.tree.map(
            jnp.all,
            trainable["head"].get("ranker", trainable["head"])["task_towers"][
                "dislike"
            ],
        )
    )


def test_with_the_mean_of_all_tasks_an_added_one_is_heard():
    before, after = dtrn("PLE", tasks=TASKS[:2]), dtrn("PLE")
    old = start(before, INPUTS)
    params = add_task(old, start(after, INPUTS, noise=0.2)).params
    change = logits_of(after)(params)["like"] - logits_of(before)(old)["like"]
    assert np.abs(change).max() > 1e-4


def test_what_cannot_stay_frozen_cannot_be_extended():
    deep = lambda tasks: PLE(tasks, widths=((4,), (4,)))
    x = jnp.ones((1, 3))
    old, fresh = (start(deep(tasks), x) for tasks in (TASKS[:2], TASKS))
    with pytest.raises(ValueError, match=r"`fresh` must only .* level_0"):
        add_task(old, fresh)
    with pytest.raises(ValueError, match=r"it lacks .*task_towers/dislike"):
        add_task(start(MMoE(TASKS), x), start(MMoE(TASKS[:2]), x))


def test_losses_have_sample_spaces():
    nan = jnp.nan
    labels = {"click": jnp.array([1.0, 0.0, nan]), "buy": jnp.array([1.0, 0.0, 1.0])}
    found = labels_within(labels, {"buy": "click"})
    np.testing.assert_array_equal(found["buy"], [1.0, nan, nan])
    np.testing.assert_array_equal(found["click"], labels["click"])
    logits = {"buy": jnp.array([0.3, 5.0, 5.0])}
    loss = binary_losses(logits, found)["buy"]
    assert loss == pytest.approx(np.log1p(np.exp(-0.3)), rel=1e-5)
    with pytest.raises(ValueError, match="`within` must name tasks of `labels`"):
        labels_within(labels, {"buy": "show"})


def test_missing_and_short_sequences_are_padded():
    sequences = {
        "disliked": (HISTORIES[:, 2], np.asarray(MASK[:, 2])),
        "rated": (HISTORIES[:, 0, :3], MASK[:, 0, :3]),
    }
    items, mask = stacked_histories(sequences, KINDS)
    assert items.shape == (B, R, L, D)
    np.testing.assert_array_equal(mask[:, 2], MASK[:, 2])
    np.testing.assert_array_equal(items[:, 2], HISTORIES[:, 2])
    np.testing.assert_array_equal(mask[:, 0, :3], MASK[:, 0, :3])
    assert not mask[:, 0, 3:].any()
    assert not mask[:, 1].any()
    for wrong in ({}, {"shown": sequences["rated"]}):
        with pytest.raises(ValueError, match="`sequences` must name at least one"):
            stacked_histories(wrong, KINDS)


def test_any_balancer_keeps_tasks_apart():
    model = dtrn("towers", SMALL)
    params = start(model, INPUTS)
    run = logits_of(model)
    grad_fn = mtjax.value_and_task_grads(lambda p: binary_losses(run(p), LABELS))
    tx = mtjax.pcgrad()

    @jax.jit
    def update(params):
        losses, grads = grad_fn(params)
        return tx.update(grads, tx.init(params), params, losses=losses)[0]

    updates = update(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert all(np.any(row) for row in updates["interests"]["task_embeddings"])


def test_diagnostics():
    model = dtrn("towers")
    params = start(model, INPUTS)
    module = TaskInterests(T, R, SMALL)
    found = scale_difference(module, params["interests"])
    p = plain.float64(params["interests"])
    scales = np.array(
        [
            [
                [v for k, v in plain_norms(p, task, kind).items() if "scale" in k]
                for kind in range(R)
            ]
            for task in range(T)
        ]
    )
    for i, j in np.ndindex(T, T):
        expected = np.abs(scales[i] - scales[j]).mean()
        assert found[i, j] == pytest.approx(expected, rel=1e-4)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], INPUTS) for i in (0, 1)]
    weights = field_weights(model, {"params": params}, halves)
    assert list(weights) == ["task_refinement"]
    _, state = model.apply({"params": params}, INPUTS, mutable=["intermediates"])
    (sown,) = state["intermediates"]["task_refinement"]["field_weights"]
    np.testing.assert_allclose(
        weights["task_refinement"], np.mean(sown, axis=0), rtol=1e-5
    )
    with pytest.raises(ValueError, match="must weigh fields, got none"):
        field_weights(model, {"params": params}, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "`heads` must divide `width`, got 3 and 32"),
        ({"layers": 0}, "`layers` must be at least 1, got 0"),
        ({"reduction": 0}, "`reduction` must be at least 1"),
        ({"conditioning": "film"}, "`conditioning` must be one of .*'film'"),
        ({"squeeze": "max"}, "`squeeze` must be one of"),
    ],
)
def test_configurations_are_checked(change, message):
    # Past the type checker, which would find some of these before.
    config = object.__new__(DTRNConfig)
    vars(config).update(vars(DTRNConfig()) | change)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_inputs_are_checked():
    model = dtrn("towers")
    init = lambda m, x=INPUTS: m.init(jax.random.key(0), x)
    few = INPUTS._replace(histories=HISTORIES[:, :2], mask=MASK[:, :2])
    with pytest.raises(ValueError, match=r"hold 3 kinds .* got \(2, 5, 8\)"):
        init(model, few)
    with pytest.raises(ValueError, match="at most 4 items of width 8"):
        init(dtrn("towers", replace(SMALL, length=4)))
    with pytest.raises(ValueError, match="`kinds` must name at least one"):
        init(DTRN(TASKS, (), heads()["towers"], SMALL))
    with pytest.raises(ValueError, match="`tasks` must differ"):
        init(DTRN(("a", "a"), KINDS, heads()["towers"], SMALL))
