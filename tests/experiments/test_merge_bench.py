"""The merge-bench, killed while it trains and taken up again; its real data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import merge_bench, merge_bench_data, merge_bench_models
from mtjax import training
from mtjax.data import prepare

TINY = replace(
    merge_bench.QUICK,
    tasks=("digits_0", "digits_90", "digits_180"),
    images_per_task=200,
    pretrain_steps=60,
    steps=2,
)
METHODS = ("average", "task_arithmetic")


def numbers(rows):
    """All but times, which are not the same twice."""
    return [{k: x for k, x in row.items() if k != "seconds"} for row in rows]


def test_goes_on_where_it_was_killed_with_the_same_numbers(tmp_path, dies, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = merge_bench.main(TINY, whole, METHODS)
    calls = dies(merge_bench_models, "finetune", 2)
    with pytest.raises(KeyboardInterrupt):
        merge_bench.main(TINY, cut, METHODS)
    names = sorted(path.name for path in (cut / "seed_0").iterdir())
    assert names == ["base.safetensors", "digits_0.safetensors"]
    found = merge_bench.main(TINY, cut, METHODS)
    assert len(calls) == 4
    assert numbers(found) == numbers(expected)
    for name in ("base", "digits_0", "digits_90", "digits_180"):
        files = [out / "seed_0" / f"{name}.safetensors" for out in (whole, cut)]
        assert files[0].read_bytes() == files[1].read_bytes()

    # A second start reads everything; one method may be measured again.
    assert merge_bench.main(TINY, cut, METHODS) == found
    again = merge_bench.main(TINY, cut, ("average",), again=True)
    of_average = [r for r in found if r["method"] != "task_arithmetic"]
    assert numbers(again) == numbers(of_average)
    assert len(calls) == 4

    counts = {m: [r["number"] for r in found if r["method"] == m] for m in METHODS}
    assert counts == {m: [2, 3] for m in METHODS}
    individual, base = (
        next(r for r in found if r["method"] == m) for m in ("individual", "base")
    )
    assert individual["bytes"] == 3 * base["bytes"]
    assert json.loads((whole / "results.json").read_text())["rows"] == expected
    table = (whole / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert re.search(r"^\| individual \| 100 \|", table, re.MULTILINE)
    for figure in ("merge_bench", "merge_bench_tasks", "merge_bench_cosines"):
        assert (whole / f"{figure}.png").stat().st_size > 5_000
    with pytest.raises(training.ConfigMismatchError, match="steps: 2 there, 3 here"):
        merge_bench.main(replace(TINY, steps=3), whole, METHODS)


def test_bench_measures_accuracy_of_its_logits(tmp_path):
    bench = merge_bench.prepare(TINY, 0, tmp_path)
    part = bench.data["digits_90"]["test"]
    logits = bench.logits(bench.base, "digits_90", part["images"])
    assert logits.shape == (40, 10)
    right = logits.argmax(-1) == part["labels"]
    assert bench.accuracy(bench.base, "digits_90") == pytest.approx(right.mean())
    few = bench.accuracy(bench.base, "digits_90", most=5)
    assert few == pytest.approx(right[:5].mean())
    assert merge_bench.cosine_matrix(bench).diagonal() == pytest.approx(1, abs=1e-5)


def test_splits_are_disjoint():
    data = merge_bench_data.load_data(["digits_0"], 500, None)["digits_0"]
    sizes = {split: len(part["labels"]) for split, part in data.items()}
    assert sizes == {"train": 300, "validation": 50, "stream": 50, "test": 100}
    images = np.concatenate([part["images"] for part in data.values()])
    assert len(np.unique(images.reshape(500, -1), axis=0)) == 500


def test_turned_digits_are_turned():
    data = merge_bench_data.load_data(["digits_0", "digits_90"], 50, None)
    upright, turned = (data[t]["train"]["images"] for t in ("digits_0", "digits_90"))
    np.testing.assert_array_equal(np.rot90(upright, axes=(1, 2)), turned)


def test_small_slice_has_equally_many_of_each_class():
    part = {"images": np.arange(5), "labels": np.array([1, 0, 1, 1, 0])}
    few = merge_bench_data.small_slice({"a": {"train": part}}, 2)["a"]
    assert few["images"].tolist() == [1, 4, 0, 2]
    assert few["labels"].tolist() == [0, 0, 1, 1]


def test_real_sets_have_one_size(tmp_path):
    originals = Path(__file__).parents[3] / "shared" / "data"
    if not originals.is_dir():
        pytest.skip("the original files are not in shared/data beside the repository")
    for name in ("usps", "fashion_mnist/five_classes"):
        folder = originals / name.partition("/")[0]
        prepare(name, folder, data_dir=tmp_path, progress=False)
    data = merge_bench_data.load_data(["usps", "fashion"], 10_000, tmp_path)
    for task, total, classes in (("usps", 9_298, 10), ("fashion", 5_000, 5)):
        parts = data[task].values()
        assert sum(len(part["labels"]) for part in parts) == total
        for part in parts:
            assert part["images"].shape[1:] == (28, 28)
            assert part["images"].dtype == np.uint8
            assert set(part["labels"]) == set(range(classes))
            # Strokes and clothes are bright on black.
            assert 10 < part["images"].mean() < 120


def test_missing_data_and_unknown_names_are_errors(tmp_path):
    real = replace(TINY, tasks=("kmnist",), data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="mtjax data prepare"):
        merge_bench.main(real, tmp_path / "real")
    with pytest.raises(ValueError, match=r"`tasks` must be among .*got 'emnist'"):
        merge_bench_data.load_data(["emnist"], 10, None)
    with pytest.raises(ValueError, match=r"`methods` must be among .*got \['tais'\]"):
        merge_bench.main(TINY, tmp_path, ["tais"])
