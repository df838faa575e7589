"""The experiment, interrupted between two seeds, goes on with the same numbers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import self_positioning as experiment
from experiments.self_positioning_baselines import shared_out, single_models
from experiments.self_positioning_bench import Bench, input_grams
from experiments.self_positioning_data import Scored, Search, Sizes, load_data, measure

SIZES = Sizes(40, 120, 24, 30, 30, queries=2, corpus=4)


def test_what_is_held_out_is_not_trained_on():
    data = load_data(SIZES, 0, None)
    for task in data.tasks.values():
        parts = {split: np.unique(pairs) for split, pairs in task.pairs.items()}
        assert np.intersect1d(parts["train"], parts["held-out"]).size == 0
        for pairs in task.pairs.values():
            first, second = task.groups[pairs.T]
            np.testing.assert_array_equal(first, second)
            assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(data.tasks["sts"].pairs["train"]) == SIZES.sts
    assert len(data.tasks["intent"].pairs["train"]) == SIZES.intent
    # What is measured on never was in a pair, nor on both sides of a search.
    for split in ("validation", "test"):
        (found,) = data.tasks["intent"].measured[split]
        assert np.intersect1d(found.queries, found.corpus).size == 0
        used = [task.pairs["train"] for task in (data.tasks["intent"],)]
        assert np.intersect1d(np.concatenate(used), found.queries).size == 0


def test_seeds_change_the_training_and_not_the_test():
    one, two = (load_data(SIZES, seed, None).tasks for seed in (0, 1))
    for task in one:
        assert not np.array_equal(one[task].pairs["train"], two[task].pairs["train"])
        for a, b in zip(one[task].measured["test"], two[task].measured["test"]):
            np.testing.assert_array_equal(a[0], b[0])


def test_measures_by_hand():
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    pairs = np.array([[0, 1], [0, 2], [0, 3]])
    # Cosines are 0.6, 0.8 and 0, of ranks 2, 3, 1; the scores have 3, 2, 1.
    rho = measure(Scored(pairs, np.array([5.0, 4.0, 1.0])), vectors)["rho"]
    assert rho == pytest.approx(100 * (1 - 6 * 2 / (3 * 8)))
    groups = np.array([7, 7, 8, 7])
    found = measure(Search(np.array([0]), np.array([1, 2, 3]), groups), vectors)
    # Found in the order 2, 1, 3, of which the last two are right.
    gain = 1 / np.log2([2, 3, 4])
    assert found["nDCG@10"] == pytest.approx(100 * gain[1:].sum() / gain[:2].sum())
    assert found["accuracy@1"] == 0


def test_hard_negatives_are_of_another_group_and_not_too_similar():
    bench = Bench(replace(experiment.QUICK.bench, sizes=SIZES), 0)
    vectors = bench.vectors(bench.base, bench.data.used("train"))
    for name, task in bench.data.tasks.items():
        pairs, hard = task.pairs["train"], bench.hard(name, "train")
        assert (task.groups[hard] != task.groups[pairs[:, 0]]).all()
        cosine = lambda a, b: np.sum(vectors[a] * vectors[b], axis=1)
        near = cosine(pairs[:, 0], hard) < 0.95 * cosine(*pairs.T)
        assert near.mean() > 0.5  # others have no such text
        batch = bench.batch(name, "train", np.arange(8), hard=True)
        candidates = np.concatenate([pairs[:8, 1], hard[:8]])
        expected = task.groups[pairs[:8, :1]] != task.groups[candidates][None]
        np.testing.assert_array_equal(batch.mask, expected)


def test_the_layers_that_rest_have_run_before():
    """What learns, on stored states, is the encoder as a whole."""
    from experiments.self_positioning_small import small_encoder
    from mtjax.nn.bert import sentence_vectors

    bench = Bench(replace(experiment.QUICK.bench, sizes=SIZES), 3)
    model, params, tokenize = small_encoder(3)
    texts = bench.data.used("test")
    ids, mask = tokenize([bench.data.texts[i] for i in texts], 24)
    whole = sentence_vectors(model.apply({"params": params}, ids, mask), mask)
    found = bench.vectors(bench.base, texts)
    np.testing.assert_allclose(found[texts], whole, atol=2e-3)  # float16 between


def test_mixtures_by_hand():
    passes = {"intent": 200, "sts": 20}
    of = lambda share, length: shared_out(passes, share, length)
    assert of(0.25, "total") == {"intent": 165, "sts": 55}
    # The larger share has 200 batches, whichever task that is.
    assert of(0.25, "longest") == {"intent": 200, "sts": 67}
    assert of(0.5, "longest") == {"intent": 200, "sts": 200}
    assert of(0.75, "longest") == {"intent": 67, "sts": 200}


def test_inputs_of_kernels_are_those_of_real_tokens():
    bench = Bench(replace(experiment.QUICK.bench, sizes=SIZES, layers=2), 0)
    found = input_grams(bench, bench.base, "sts")
    shapes = {path: gram.shape for path, gram in found.items()}
    names = ("query", "key", "value", "output")
    kernels = [f"attention/{n}" for n in names] + ["mlp_in", "mlp_out"]
    paths = {f"{layer}/{kernel}/kernel" for layer in bench.base for kernel in kernels}
    assert {*shapes} == paths == {p for p in paths if shapes[p][0] in (32, 64)}
    states, mask = bench.inputs(np.unique(bench.data.tasks["sts"].pairs["train"]))
    tokens = np.float64(states[mask])
    assert len(tokens) < mask.size  # there is padding
    expected = tokens.T @ tokens / len(tokens)
    gram = found["layer_0/attention/query/kernel"]
    np.testing.assert_allclose(gram, expected, rtol=1e-4, atol=1e-5)
    # The next layer sees what this one makes of it.
    own = {"params": bench.base["layer_0"]}
    made = []
    for x, real in zip(states[:3], mask[:3]):
        row = jnp.asarray(x[real], jnp.float32)[None]
        made.append(bench.layer.apply(own, row, real[real][None])[0])
    deep = np.concatenate(made, dtype=np.float64)
    one = np.unique(bench.data.tasks["sts"].pairs["train"])[:3]
    bench.data.tasks["sts"].pairs["train"] = one
    few = input_grams(bench, bench.base, "sts")["layer_1/attention/query/kernel"]
    np.testing.assert_allclose(few, deep.T @ deep / len(deep), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(tmp_path, dies):
    config = replace(experiment.QUICK, seeds=2)
    expected = experiment.main(config, tmp_path / "whole")
    dies(experiment, "run", 2)  # which is the second seed
    with pytest.raises(KeyboardInterrupt):
        experiment.main(config, tmp_path / "stopped")
    assert experiment.main(config, tmp_path / "stopped") == expected

    # Rows that were added later need nothing of the others but the models' seed.
    (tmp_path / "stopped" / "more_1.json").unlink()
    runs = dies(experiment, "run", 1)
    assert experiment.main(config, tmp_path / "stopped") == expected
    assert not runs
    alone = single_models(Bench(config.bench, 1))[0]
    for task, params in alone.items():
        measured = Bench(config.bench, 1).scores(params, "test")
        assert measured == expected[1]["rows"][f"{task} alone"]

    rows = expected[0]["rows"]
    assert rows["joint, 50% sts, longest"] != rows["joint, 50% sts"]
    assert rows["RegMean"] != rows["average"]
    for name in (
        "RegMean",
        "joint",
        "joint, 50% sts",
        "SLERP, grid",
        "TIES",
        "Fisher",
        "SP, 0.2",
    ):
        assert 0 < rows[name]["mean"] < 100
        assert f"| {name} |" in (tmp_path / "stopped" / "table.md").read_text()
    assert rows["average"] != rows["SLERP, half way"]
    assert (tmp_path / "stopped" / "self_positioning.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="seeds: 2 there, 1 here"):
        experiment.main(replace(config, seeds=1), tmp_path / "whole")
