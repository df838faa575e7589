"""The text merge-bench, killed while it trains and taken up again; its real data."""

import json
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import (
    text_merge_bench,
    text_merge_bench_data,
    text_merge_bench_models,
    text_merge_bench_training,
)
from experiments.text_merge_bench_models import KINDS
from mtjax.data import prepare
from mtjax.training import ConfigMismatchError

TINY = replace(
    text_merge_bench.QUICK,
    tasks=("drawn_0", "drawn_1"),
    train=32,
    validation=32,
    test=32,
    epochs=2,
)
METHODS = ("average", "task_arithmetic")
SIZES = {"train": 40, "validation": 10, "test": 20}


def numbers(rows):
    """All but times, which are not the same twice."""
    return {
        kind: [{k: x for k, x in row.items() if k != "seconds"} for row in part]
        for kind, part in rows.items()
    }


@pytest.mark.slow
def test_goes_on_where_it_was_killed_with_the_same_numbers(tmp_path, dies, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = text_merge_bench.main(TINY, whole, METHODS)
    calls = dies(text_merge_bench_models, "finetune", 4)
    with pytest.raises(KeyboardInterrupt):
        text_merge_bench.main(TINY, cut, METHODS)
    lora = sorted(path.name for path in (cut / "seed_0" / "lora").iterdir())
    assert lora == ["drawn_0.safetensors"]
    found = text_merge_bench.main(TINY, cut, METHODS)
    assert len(calls) == 5
    assert numbers(found) == numbers(expected)
    for name in (f"{kind}/{task}" for kind in KINDS for task in TINY.tasks):
        files = [out / "seed_0" / f"{name}.safetensors" for out in (whole, cut)]
        assert files[0].read_bytes() == files[1].read_bytes()

    # A second start reads everything.
    assert text_merge_bench.main(TINY, cut, METHODS) == found
    assert len(calls) == 5
    for kind, rows in found.items():
        assert [r["method"] for r in rows] == ["base", "individual", *METHODS]
        assert rows[1]["bytes"] == 2 * rows[0]["bytes"]
        for figure in ("methods", "cosines"):
            path = whole / f"text_merge_bench_{kind}_{figure}.png"
            assert path.stat().st_size > 5_000
    assert found["full"][0]["accuracy"] == found["lora"][0]["accuracy"]
    results = json.loads((whole / "results.json").read_text())
    assert results["lora"]["rows"] == expected["lora"]
    assert (whole / "table.md").read_text() in capsys.readouterr().out
    with pytest.raises(ConfigMismatchError, match="epochs: 2 there, 3 here"):
        text_merge_bench.main(replace(TINY, epochs=3), whole, METHODS)


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    out = tmp_path_factory.mktemp("benches")
    return {k: text_merge_bench_models.prepare(TINY, k, 0, out) for k in KINDS}


def test_accuracy_is_that_of_all_sentences_in_any_order(benches):
    bench = benches["full"]
    part, head = bench.data["drawn_1"]["test"], bench.heads["drawn_1"]
    whole = text_merge_bench_training.joined(bench.frozen, bench.models["drawn_1"])
    z = text_merge_bench_training.features(bench.model, whole, part)
    logits = z @ head["kernel"] + head["bias"][None]
    right = np.asarray(logits.argmax(-1) == part["labels"])
    found = bench.accuracy(bench.models["drawn_1"], "drawn_1")
    assert found == pytest.approx(right.mean())
    few = bench.accuracy(bench.models["drawn_1"], "drawn_1", most=7)
    assert few == pytest.approx(right[:7].mean())


def test_full_fine_tuning_changes_all_of_the_layers_and_no_embedding(benches):
    bench = benches["full"]
    assert set(bench.base) == {"layer_0", "layer_1"}
    embeddings = [f"{name}_embeddings" for name in ("position", "segment", "word")]
    assert sorted(bench.frozen) == ["embeddings_norm", *embeddings]
    # A key's bias adds the same to all scores of a query: softmax does not see it.
    for path, x in flatten_dict(bench.base).items():
        if path[-2:] != ("key", "bias"):
            for model in bench.models.values():
                assert np.abs(flatten_dict(model)[path] - x).max() > 1e-4
    config = replace(TINY, embeddings=True)
    whole = text_merge_bench_training.joined(bench.frozen, bench.base)
    base, frozen = text_merge_bench_models.divided(config, "full", whole)
    assert not frozen
    chex.assert_trees_all_equal(base, whole)


def test_lora_changes_matrices_by_its_rank(benches):
    bench = benches["lora"]
    names = {path[-2:] for path in flatten_dict(bench.base)}
    assert names == {("query", "kernel"), ("value", "kernel")}
    for model in bench.models.values():
        changes = jax.tree.map(lambda x, y: np.asarray(x - y), model, bench.base)
        for change in jax.tree.leaves(changes):
            sizes = np.linalg.svd(change.astype(np.float64), compute_uv=False)
            assert sizes[TINY.lora_rank - 1] > 1e-4
            assert sizes[TINY.lora_rank] < 1e-5
    start = text_merge_bench_training.start(TINY, "lora", bench.base, jax.random.key(0))
    same = text_merge_bench_training.changed(TINY, "lora", bench.base, start)
    chex.assert_trees_all_equal(same, bench.base)
    start = {n: x + 1 if "lora_B" in n else x for n, x in start.items()}
    moved = text_merge_bench_training.changed(TINY, "lora", bench.base, start)
    at = "layer_0/attention/query/kernel"
    a, b = (np.asarray(start[f"{at}.lora_{n}.weight"], np.float64) for n in "AB")
    expected = TINY.lora_alpha / TINY.lora_rank * (b @ a).T
    get = lambda tree: tree["layer_0"]["attention"]["query"]["kernel"]
    difference = np.asarray(get(moved) - get(bench.base))
    np.testing.assert_allclose(difference, expected, atol=1e-5)


def test_seeds_share_test_sentences_alone():
    load = lambda seed: text_merge_bench_data.load_data(
        ["drawn_0"], SIZES, None, 8, None, seed
    )["drawn_0"]
    first, second = load(0), load(1)
    assert {n: len(x["labels"]) for n, x in first.items()} == SIZES
    chex.assert_trees_all_equal(first["test"], second["test"])
    assert np.any(first["train"]["ids"] != second["train"]["ids"])
    ids = np.concatenate([part["ids"] for part in first.values()])
    assert len(np.unique(ids, axis=0)) == len(ids)


def test_batches_lose_padding_and_no_sentence():
    rng = np.random.default_rng(0)
    mask = np.arange(24) < rng.integers(1, 12, (32, 1))
    part = {"ids": rng.integers(1, 9, (32, 24)) * mask, "mask": mask}
    part["labels"] = np.arange(32)
    config = replace(TINY, batch_size=8, epochs=1)
    found = list(text_merge_bench_training.batches(config, part, 0))
    assert {batch["ids"].shape for batch in found} <= {(8, 8), (8, 16)}
    labels = np.concatenate([batch["labels"] for batch in found])
    assert sorted(labels) == list(range(32))
    for batch in found:
        assert batch["mask"].sum() == mask[batch["labels"]].sum()
        width = batch["ids"].shape[1]
        np.testing.assert_array_equal(
            batch["ids"], part["ids"][batch["labels"], :width]
        )


def test_real_sets_are_read_without_what_they_repeat(tmp_path):
    originals = (
        Path(__file__).parents[3] / "shared" / "data" / "sentence_classification"
    )
    if not originals.is_dir():
        pytest.skip("the original files are not in shared/data beside the repository")
    for task in ("trec", "cr"):
        name = f"sentence_classification/{task}"
        prepare(name, originals, data_dir=tmp_path, progress=False)

    def tokenize(texts, most):
        """Every text is a token of its own."""
        ids = np.array([[words.setdefault(t, len(words))] for t in texts], np.int32)
        return ids, ids >= 0

    words = {}
    sizes = {"train": 5_000, "validation": 300, "test": 500}
    data = text_merge_bench_data.load_data(
        ["trec", "cr"], sizes, tokenize, 32, tmp_path, 0
    )
    # TREC has 5,381 questions to train with, of which some are in its test part.
    found = {n: len(x["labels"]) for n, x in data["trec"].items()}
    assert found == sizes
    assert set(data["trec"]["test"]["labels"]) == set(range(6))
    found = {n: len(x["labels"]) for n, x in data["cr"].items()}
    assert found == {"train": 3_766 - 800, "validation": 300, "test": 500}
    for splits in data.values():
        ids = np.concatenate([part["ids"] for part in splits.values()])
        assert len(np.unique(ids)) == len(ids)


def test_unknown_names_and_missing_data_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`tasks` must be among .*\['imdb'\]"):
        text_merge_bench.main(replace(TINY, tasks=("imdb",)), tmp_path)
    with pytest.raises(ValueError, match=r"`methods` must be among .*got \['tais'\]"):
        text_merge_bench.main(TINY, tmp_path, ["tais"])
    real = replace(TINY, tasks=("trec",), data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="mtjax data prepare"):
        text_merge_bench_models.prepare(real, "full", 0, tmp_path)


def test_heads_know_the_classes_roughly(benches):
    bench = benches["full"]
    for task in bench.tasks:
        assert bench.heads[task]["kernel"].shape == (16, text_merge_bench_data.CLASSES)
        assert jnp.all(jnp.isfinite(bench.heads[task]["bias"]))
        assert bench.accuracy(bench.base, task, "train") > 1 / 3
