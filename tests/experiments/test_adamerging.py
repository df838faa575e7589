"""The experiments on AdaMerging, on tiny models that were never trained."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import adamerging, adamerging_ablations, merge_bench_models
from experiments.merge_bench_measures import Measures


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(drawn_bench, prepared, dies, tmp_path):
    config = replace(adamerging.QUICK, seeds=2, steps=12, batch_size=2)
    prepared(lambda _, seed, __: drawn_bench(("b", "a"), seed=seed, depth=2))
    expected = adamerging.main(config, tmp_path / "whole", tmp_path)
    dies(merge_bench_models, "prepare", 2)  # which is the second seed
    with pytest.raises(KeyboardInterrupt):
        adamerging.main(config, tmp_path / "stopped", tmp_path)
    assert adamerging.main(config, tmp_path / "stopped", tmp_path) == expected

    assert list(expected[0]["rows"]["TA (0.3)"])[:3] == ["b", "a", "mean"]
    assert len(expected[0]["entropies"]["layer-wise"]) == 12
    table = (tmp_path / "stopped" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in adamerging.VARIANTS)
    assert (tmp_path / "stopped" / "adamerging.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="steps: 12 there, 6 here"):
        adamerging.main(replace(config, steps=6), tmp_path / "whole", tmp_path)


@pytest.mark.slow
def test_ablations(drawn_bench, prepared, tmp_path):
    config = replace(adamerging_ablations.QUICK, steps=3, batch_size=2, bins=3)
    config = replace(config, unseen=(("a",), ("b", "c")), fractions=(0.5, 1.0))
    calls = prepared(lambda _, seed, __: drawn_bench(seed=seed, examples=12))
    (found,) = adamerging_ablations.main(config, tmp_path, tmp_path / "models")
    partial = found["partial"]
    assert [row["images per task"] for row in partial.values()] == [12, 6, 12]
    assert partial["50 %"]["entropy, test"] != partial["100 %"]["entropy, test"]
    last = partial["100 %"]["entropy, these images"]
    assert last < partial["start, TA (0.3)"]["entropy, these images"]
    rows = found["unseen"]
    assert {"base", "TA (tuned)", "layer-wise"} <= {*rows}
    for row in rows.values():
        without_a, without_others = row["without a"], row["without b, c"]
        assert row["unseen"] == pytest.approx((without_a + without_others) / 2)
    correlation = found["correlation"]["layer-wise"]
    assert [*correlation] == ["b", "a", "c", "mean", "3 bins", "tasks"]
    assert "| layer-wise |" in (tmp_path / "table.md").read_text()
    # A second start reads what is there.
    again = adamerging_ablations.main(config, tmp_path, tmp_path / "models")
    assert again == [found]
    assert len(calls) == 1


@pytest.mark.slow
def test_what_is_left_out_leaves_no_trace(drawn_bench):
    config = replace(adamerging_ablations.QUICK, unseen=(("a",),), scales=(0.2, 0.4))
    streams = []

    def learn(part, images, _):
        streams.append(images)
        return part.scaled(0.5)

    bench = drawn_bench()
    run = lambda: adamerging_ablations.unseen(Measures(bench), config, learn)
    expected = run()
    bench.models["a"] = jax.tree.map(lambda x: x * np.nan, bench.models["a"])
    for split in ("train", "validation", "stream"):
        bench.data["a"][split]["labels"] = np.full(6, -99)
        bench.data["a"][split]["images"] = np.zeros((6, 28, 28), np.uint8)
    assert run() == expected
    assert all([*images] == ["b", "c"] for images in streams)
    # And of the others nothing is forgotten.
    bench.models["b"] = bench.base
    assert run() != expected


@pytest.mark.parametrize(("right", "expected"), [(True, 1.0), (False, -1.0)])
def test_entropy_tells_the_loss_of_those_who_are_right(right, expected):
    """Of two classes: the loss falls with certainty, or rises with it."""
    rng = np.random.default_rng(0)
    margins = {t: rng.uniform(0.1, 3, 20) * i for i, t in enumerate("ab", 1)}
    logits = {t: np.float32([x, 0 * x]).T for t, x in margins.items()}
    labels = {t: np.full(20, 0 if right else 1) for t in margins}
    measures = SimpleNamespace(
        logits=lambda *_: logits, labels=lambda *_: labels, split=lambda *_: None
    )
    found = adamerging_ablations.correlations(measures, None, 4)
    names = ["a", "b", "mean", "4 bins", "tasks"]
    assert found == pytest.approx(dict.fromkeys(names, expected))
