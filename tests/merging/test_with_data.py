"""Methods that look at data or scores: Fisher, RegMean, soups; adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import merging
from mtjax.merging import (
    fisher_average,
    fisher_information,
    greedy_soup,
    lora_task_vector,
    regmean,
    regmean_plus_plus,
)
from mtjax.nn import dense_grams
from tests.merging.catalogue import models_like

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((12, 4)).astype(np.float32)


def logits_fn(params, inputs):
    return inputs @ params["w"] + params["b"][None]


PARAMS = {"w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32), "b": jnp.ones(3)}


def expected_fisher(labels=None):
    """In NumPy: the gradient of log p(y) at w is x (onehot - p)."""
    logits = INPUTS @ np.asarray(PARAMS["w"], float) + 1
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    w, b = np.zeros((4, 3)), np.zeros(3)
    for i, (x, p) in enumerate(zip(INPUTS, probabilities)):
        for y in range(3):
            share = p[y] if labels is None else float(labels[i] == y)
            slope = np.eye(3)[y] - p
            w += share * np.outer(x, slope) ** 2 / 12
            b += share * slope**2 / 12
    return {"w": w, "b": b}


def test_fisher_information_of_logistic_regression():
    batches = [jnp.asarray(INPUTS[:8]), jnp.asarray(INPUTS[8:])]
    found = fisher_information(logits_fn, PARAMS, batches)
    for path, values in expected_fisher().items():
        np.testing.assert_allclose(found[path], values, rtol=1e-4, atol=1e-6)
    labels = RNG.integers(0, 3, 12)
    given = fisher_information(
        logits_fn, PARAMS, [(jnp.asarray(INPUTS), jnp.asarray(labels))], labels="given"
    )
    for path, values in expected_fisher(labels).items():
        np.testing.assert_allclose(given[path], values, rtol=1e-4, atol=1e-6)


def test_sampled_labels_are_right_on_average():
    many = [jnp.tile(jnp.asarray(INPUTS), (50, 1))] * 4
    found = fisher_information(
        logits_fn, PARAMS, many, labels="sampled", key=jax.random.key(0)
    )
    for path, values in expected_fisher().items():
        np.testing.assert_allclose(found[path], values, rtol=0.25, atol=0.02)
    with pytest.raises(ValueError, match="`key`"):
        fisher_information(logits_fn, PARAMS, many, labels="sampled")
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_information(logits_fn, PARAMS, [])


BASE, MODELS = models_like({"w": (4, 3), "b": (3,)}, 3)


def test_fisher_average():
    equal = [jax.tree.map(jnp.ones_like, BASE)] * 3
    mean = merging.average()(None, MODELS)
    found = fisher_average(MODELS, equal)
    for path in BASE:
        np.testing.assert_allclose(found[path], mean[path], rtol=1e-5, atol=1e-6)
    # Who is sure of an element decides it; of what nobody is sure, the mean.
    sure = [jax.tree.map(jnp.zeros_like, BASE) for _ in range(3)]
    sure[1]["b"] = jnp.array([1e12, 0.0, 0.0])
    found = fisher_average(MODELS, sure)
    np.testing.assert_allclose(found["b"][0], MODELS[1]["b"][0], rtol=1e-5)
    np.testing.assert_allclose(found["b"][1:], mean["b"][1:], rtol=1e-5)
    # Normalised, the size of a model's Fisher information does not matter.
    random = [jax.tree.map(jnp.abs, m) for m in MODELS]
    louder = [random[0], jax.tree.map(lambda x: 1e3 * x, random[1]), random[2]]
    same = [
        fisher_average(MODELS, f, normalise=True, eps=0.0) for f in (random, louder)
    ]
    np.testing.assert_allclose(same[0]["w"], same[1]["w"], rtol=1e-4)
    weighted = fisher_average(MODELS, equal, weights=[1, 0, 0])
    np.testing.assert_allclose(weighted["w"], MODELS[0]["w"], rtol=1e-4, atol=1e-5)


def test_fisher_average_says_what_does_not_fit():
    fishers = [jax.tree.map(jnp.ones_like, BASE)] * 2
    with pytest.raises(ValueError, match="names of the models"):
        fisher_average(MODELS, fishers)
    with pytest.raises(ValueError, match=r"one value per model \(3\)"):
        fisher_average(MODELS, [*fishers, BASE], weights=[1.0])
    with pytest.raises(ValueError, match="b: shape"):
        fisher_average(MODELS, [*fishers, BASE | {"b": jnp.ones(4)}])


def grams_of(seed, rows=30):
    inputs = np.random.default_rng(seed).standard_normal((rows, 4))
    return inputs, {"w": jnp.asarray(inputs.T @ inputs, jnp.float32)}


def test_regmean_solves_the_normal_equations():
    data = [grams_of(i) for i in range(3)]
    found = regmean(MODELS, [g for _, g in data], off_diagonal=1.0)
    solution = np.asarray(found["w"], float)
    residual = sum(x.T @ (x @ (solution - m["w"])) for (x, _), m in zip(data, MODELS))
    np.testing.assert_allclose(residual, 0, atol=1e-3)
    mean = merging.average()(None, MODELS)
    np.testing.assert_allclose(found["b"], mean["b"])
    # Equal inputs: the average. One model: itself. No cross terms: rows are averaged.
    same = regmean(MODELS, [data[0][1]] * 3)
    np.testing.assert_allclose(same["w"], mean["w"], rtol=1e-4, atol=1e-5)
    alone = regmean(MODELS[:1], [data[0][1]])
    np.testing.assert_allclose(alone["w"], MODELS[0]["w"], rtol=1e-4, atol=1e-5)
    rows = regmean(MODELS, [g for _, g in data], off_diagonal=0.0)
    shares = np.stack([np.diag(g["w"]) for _, g in data])
    kernels = np.stack([m["w"] for m in MODELS])
    expected = (shares[..., None] * kernels).sum(0) / shares.sum(0)[:, None]
    np.testing.assert_allclose(rows["w"], expected, rtol=1e-4, atol=1e-5)


def test_regmean_leaves_dead_inputs_to_the_average():
    gram = jnp.diag(jnp.array([1.0, 1.0, 0.0, 1.0]))
    found = regmean(MODELS, [{"w": gram}] * 3)
    np.testing.assert_allclose(
        found["w"], merging.average()(None, MODELS)["w"], rtol=1e-4, atol=1e-6
    )


def test_regmean_says_what_does_not_fit():
    grams = [grams_of(i)[1] for i in range(3)]
    for bad, message in (
        ([{"v": grams[0]["w"]}] * 3, "no parameter"),
        ([{"w": jnp.eye(5)}] * 3, "must be square and fit"),
        (grams[:2], "names of the models"),
    ):
        with pytest.raises(ValueError, match=message):
            regmean(MODELS, bad)
    with pytest.raises(ValueError, match="`off_diagonal`"):
        regmean(MODELS, grams, off_diagonal=2.0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="first")(x)
        return nn.Dense(2, name="second")(x)


def test_grams_of_a_model_and_regmean_plus_plus():
    net = Net()
    models = [net.init(jax.random.key(i), INPUTS)["params"] for i in range(2)]
    data = {str(i): jnp.asarray(INPUTS[6 * i : 6 * i + 6]) for i in range(2)}

    @jax.jit
    def grams_fn(params, inputs):
        return dense_grams(lambda: net.apply({"params": params}, inputs))

    found = grams_fn(models[0], data["0"])
    hidden = data["0"] @ models[0]["first"]["kernel"] + models[0]["first"]["bias"][None]
    assert sorted(found) == ["first/kernel", "second/kernel"]
    np.testing.assert_allclose(
        found["first/kernel"], data["0"].T @ data["0"], rtol=1e-5
    )
    np.testing.assert_allclose(found["second/kernel"], hidden.T @ hidden, rtol=1e-4)

    # What a mask leaves out is as if it were not there.
    run = lambda: net.apply({"params": models[0]}, data["0"])
    masked = dense_grams(run, np.arange(6) < 4)
    few = grams_fn(models[0], data["0"][:4])
    for path, gram in few.items():
        np.testing.assert_allclose(masked[path], gram, rtol=1e-5, atol=1e-6)

    grams = {name: grams_fn(m, data[name]) for name, m in zip("01", models)}
    plain = regmean(models, grams)
    layers = [["first/kernel"], ["second/kernel"]]
    merged = regmean_plus_plus(models, lambda n, p: grams_fn(p, data[n]), layers)
    np.testing.assert_allclose(
        merged["first"]["kernel"], plain["first"]["kernel"], rtol=1e-5, atol=1e-6
    )
    # The second layer is fitted to what the merged first one gives it.
    seen = {}
    for name, model in zip("01", models):
        half = {"first": model["first"] | {"kernel": merged["first"]["kernel"]}}
        seen[name] = grams_fn(model | half, data[name])
    expected = regmean(models, seen)["second"]["kernel"]
    np.testing.assert_allclose(
        merged["second"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(merged["second"]["kernel"], plain["second"]["kernel"])
    with pytest.raises(ValueError, match="gave nothing for 'third/kernel'"):
        regmean_plus_plus(models, lambda n, p: grams_fn(p, data[n]), [["third/kernel"]])


def test_a_greedy_soup_is_no_worse_than_its_best_model():
    models = {name: jnp.asarray(x) for name, x in zip("abcd", (0.0, 1.1, 2.0, -9.0))}
    score = lambda x: -float(jnp.abs(x - 0.9))
    soup, chosen = greedy_soup(models, score)
    assert chosen == ["b", "a", "c"] or score(soup) >= max(map(score, models.values()))
    assert "d" not in chosen
    assert score(soup) >= max(map(score, models.values()))


def test_an_adapter_is_its_product():
    a, b = RNG.standard_normal((2, 6)), RNG.standard_normal((5, 2))
    names = (
        "base_model.model.q.lora_A.weight",
        "q.lora_B.default.weight",
    )
    adapter = dict(zip(names, (jnp.asarray(a), jnp.asarray(b))))
    found = lora_task_vector(adapter, alpha=8.0)
    assert list(found) == ["q.weight"]
    np.testing.assert_allclose(found["q.weight"], 4 * b @ a, rtol=1e-5)
    stable = lora_task_vector(adapter, alpha=8.0, rank_stabilised=True)
    np.testing.assert_allclose(stable["q.weight"], 8 / np.sqrt(2) * b @ a, rtol=1e-5)
    with pytest.raises(ValueError, match="no lora_B for 'q'"):
        lora_task_vector({names[0]: adapter[names[0]]}, alpha=8.0)
    with pytest.raises(ValueError, match="alone, got 'bias'"):
        lora_task_vector(adapter | {"bias": jnp.ones(3)}, alpha=8.0)
    with pytest.raises(ValueError, match=r"\(r, in\)"):
        lora_task_vector(adapter | {names[1]: jnp.ones((5, 3))}, alpha=8.0)
