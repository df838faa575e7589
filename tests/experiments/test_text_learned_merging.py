"""Learnt merging of text encoders: measures of sentences, and the whole comparison."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text_learned_merging, text_merge_bench_models
from experiments.merge_bench_data import parts, taken
from experiments.merge_bench_measures import Measures, batches
from experiments.twin_merging_measures import Twin
from mtjax.nn.side_branches import apply_mixed
from mtjax.systems.twin_merging import RouterConfig, TwinMergingConfig
from tests.experiments.test_text_merge_bench import TINY

ROUTER = RouterConfig(epochs=5, batch_size=16, learning_rate=1e-2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    return text_merge_bench_models.prepare(TINY, "full", 0, out)


def test_measures_pad_sentences_and_find_the_same_accuracy(bench):
    measures, params = Measures(bench), bench.models["drawn_1"]
    found = measures.accuracy(params, "test")
    for task in bench.tasks:  # which drops the padding that a batch shares
        assert found[task] == pytest.approx(100 * bench.accuracy(params, task))


def test_sentences_are_cut_and_drawn_whole(bench):
    sentences = bench.inputs("drawn_0", "test")
    cut = parts(sentences, 10)
    assert [len(part["ids"]) for part in cut] == [10, 10, 10, 2]
    np.testing.assert_array_equal(cut[1]["mask"], sentences["mask"][10:20])
    drawn = next(batches({"a": sentences}, 6, 0))["a"]
    for ids, mask in zip(drawn["ids"], drawn["mask"]):
        same = (sentences["ids"] == ids).all(1) & (sentences["mask"] == mask).all(1)
        assert same.any()


def test_mixtures_of_text_experts_are_those_of_merged_encoders(bench):
    twin = Twin(bench, ROUTER, (0.3,), jax.random.key(0))
    experts = twin.experts(TwinMergingConfig(rho=0.5))
    sentences = taken(bench.inputs("drawn_0", "test"), slice(4))
    weights = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.7]])
    found = jax.jit(lambda w, x: apply_mixed(bench.encode, experts, w, x))(
        weights, sentences
    )
    for i, weight in enumerate(weights):
        one = bench.encode(experts.mixed(weight), taken(sentences, slice(i, i + 1)))
        np.testing.assert_allclose(found[i], one[0], atol=1e-5)


@pytest.mark.slow
def test_all_ways_are_compared_and_kept(tmp_path, dies):
    config = replace(
        text_learned_merging.QUICK, bench=TINY, scales=(0.3,), router=ROUTER
    )
    (found,) = text_learned_merging.main(config, tmp_path / "a", tmp_path / "models")
    table = found["rows"]
    assert table["fine-tuned"]["normalised"] == pytest.approx(100)
    assert table["TA (tuned)"] == table["TA (0.3)"]
    for name in ("AdaMerging, task-wise", "AdaMerging, layer-wise"):
        assert found["stream"][name]["last"] < found["stream"][name]["first"]
        assert table[name]["MB"] == table["base"]["MB"]
    assert table["Twin"]["MB"] < table["fine-tuned"]["MB"]
    assert json.loads((tmp_path / "a" / "seed_0.json").read_text()) == found
    calls = dies(text_merge_bench_models, "finetune", 0)
    again = text_learned_merging.main(config, tmp_path / "a", tmp_path / "models")
    assert again == [found]
    assert not calls
