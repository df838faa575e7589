"""The experiments of aTLAS on tiny models that were never trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import atlas, atlas_few_shot, atlas_test_time
from experiments.atlas_shared import labelled, tune, views
from experiments.merge_bench_measures import Measures
from mtjax.data.pseudo_labels import trusted_labels


@pytest.mark.slow
def test_addition_and_negation(drawn_bench, prepared, tmp_path):
    calls = prepared(lambda *_: drawn_bench(examples=12))
    config = replace(atlas.QUICK, steps=4, every=2, negation_steps=2, negation_every=1)
    config = replace(config, scales=(0.3,), batch_size=6, adamerging_steps=2)
    results = atlas.main(config, tmp_path, tmp_path / "models")
    rows = results[0]["rows"]
    assert {*rows["base"]} == {"a", "b", "c", "mean", "normalised"}
    assert rows["individual"]["normalised"] == 100
    for name in atlas.VARIANTS:
        steps, scores = zip(*results[0]["scores"][name])
        assert steps == (0, 2, 4)
        assert results[0]["steps"][name] in steps
        # The step was chosen by these scores, which are of validation images.
        chosen = scores[steps.index(results[0]["steps"][name])]
        assert chosen == max(scores) >= scores[0]
    forgotten = results[0]["negation by target"]
    assert [*forgotten] == ["a", "b", "c"]
    means = results[0]["negation"]["base"]
    assert means["target"] == pytest.approx(
        np.mean([row["base"]["target"] for row in forgotten.values()])
    )
    assert 0 <= results[0]["disentanglement"]["aTLAS"]["error, %"] <= 100
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in atlas.VARIANTS)
    assert (tmp_path / "atlas.png").stat().st_size > 10_000
    # A second start reads what is there.
    assert atlas.main(config, tmp_path, tmp_path / "models") == results
    assert len(calls) == 1


@pytest.mark.slow
def test_few_shots(drawn_bench, prepared, tmp_path, monkeypatch):
    calls = prepared(lambda *_: drawn_bench(examples=12))
    data = drawn_bench(seed=7, examples=12).data["a"]
    monkeypatch.setattr(atlas_few_shot, "load_data", lambda names, *_: {names[0]: data})
    config = replace(atlas_few_shot.QUICK, steps=2, shots=(2,), batch_size=4)
    results = atlas_few_shot.main(config, tmp_path, tmp_path / "models")
    rows = results[0]["rows"]
    assert all([*row] == ["2 shots"] for row in rows.values())
    assert {"class means", "aTLAS", "random basis", "aTLAS + LP++", "full"} <= {*rows}
    budgets = results[0]["budgets"]
    assert [*budgets["gradient, blockwise"]] == ["1 vectors"]
    assert (tmp_path / "atlas_few_shot.png").stat().st_size > 10_000
    # Neither the models nor their task vectors know the task.
    assert [out for *_, out in calls] == [tmp_path / "models" / "without_digits_270"]


def test_the_task_that_is_held_out_is_not_in_the_bench():
    config = atlas_few_shot.QUICK
    assert config.others.tasks == ("digits_0", "digits_90", "digits_180")
    with pytest.raises(ValueError, match=r"`held_out` must be one of .* got 'mnist'"):
        _ = replace(config, held_out="mnist").others


@pytest.mark.slow
def test_test_time(drawn_bench, prepared, tmp_path):
    prepared(lambda *_: drawn_bench(examples=12))
    config = replace(atlas_test_time.QUICK, steps=2, batch_size=4)
    results = atlas_test_time.main(config, tmp_path, tmp_path / "models")
    assert {"base", "aTLAS, UFM", "LayerNorm, SAR"} <= {*results[0]["rows"]}
    assert [*results[0]["rows"]["base"]] == ["b", "a", "c", "mean"]
    assert all(
        0 <= row["collapsed tasks"] <= 3 for row in results[0]["collapsed"].values()
    )


@pytest.mark.slow
def test_labels_play_no_part_at_test_time(drawn_bench):
    """Labels that would poison everything change not one bit."""
    bench = drawn_bench(examples=60)
    config = replace(atlas_test_time.QUICK, steps=2, batch_size=4)
    m = Measures(bench)
    run = lambda: atlas_test_time.adapt(m, "a", "UFM", "aTLAS", config, 0)
    expected = run()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, bench.base)
    assert max(jax.tree.leaves(moved)) > 1e-4
    # It has labels to learn from, which are the model's own guesses.
    stream = bench.data["a"]["stream"]
    own = trusted_labels(m.logits(bench.base, {"a": stream["images"]})["a"])
    assert (own >= 0).any()
    assert (own != stream["labels"])[own >= 0].any()
    for split in bench.data["a"].values():
        split["labels"] = (split["labels"] + 1) % 3
    jax.tree.map(np.testing.assert_array_equal, run(), expected)


def test_views():
    images = np.zeros((50, 28, 28), np.uint8)
    images[:, 8:20, 10:18] = 200
    for strength, least in ((1.0, 0.3), (0.3, 0.9)):
        found = views(images, np.random.default_rng(0), strength=strength)
        assert found.dtype == np.float32
        assert found.shape == images.shape
        assert 0 <= found.min() <= found.max() <= 200.001
        shares = found.sum((1, 2)) / images.sum((1, 2))
        assert (shares > least / 2).all()
        assert shares.mean() > least
        assert np.abs(found - found[:1]).max() > 50  # each in its own way
    again = views(images, np.random.default_rng(0), strength=0.3)
    np.testing.assert_array_equal(found, again)
    still = views(images, np.random.default_rng(0), strength=0.0)
    np.testing.assert_allclose(still, images, atol=1e-3)


def test_labelled_batches():
    part = lambda n: {"images": np.arange(n), "labels": -np.arange(n)}
    parts = {"a": part(5), "b": part(9)}
    batch = next(labelled(parts, 7, 0))
    for task in parts:
        np.testing.assert_array_equal(batch[task]["inputs"], -batch[task]["labels"])
        assert len(batch[task]["labels"]) == 3
    with pytest.raises(ValueError, match="`size` must be at least the number of tasks"):
        next(labelled(parts, 1, 0))


def test_tune_changes_what_is_chosen():
    params = {"a": {"w": jnp.ones(2)}, "b": jnp.ones(2)}
    objective = lambda p, x: jnp.sum((p["a"]["w"] + p["b"] - x) ** 2)
    batches = [jnp.zeros(2)] * 30
    start = objective, params, batches
    found = tune(*start, where="^a", steps=30, learning_rate=0.2)
    np.testing.assert_array_equal(found["b"], params["b"])
    assert objective(found, batches[0]) < 0.5
    everything = tune(*start, where="", steps=30, learning_rate=0.2)
    assert np.abs(everything["b"] - 1).min() > 0.1
    # One step of Adam goes by the learning rate, whatever the slope.
    once = tune(*start, where="^a", steps=1, learning_rate=0.2)
    np.testing.assert_allclose(once["a"]["w"], 0.8, rtol=1e-3)
