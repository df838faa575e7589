"""The experiment on DTRN: its quick run, sizes, and what an added task leaves alone."""

from dataclasses import replace

import pytest

from experiments import dtrn, dtrn_models


def test_rankers_without_dtrn_are_as_large_as_with_it():
    runs = dtrn.Runs(dtrn.QUICK)
    for name in dtrn_models.HEADS:
        with_it = runs.size(f"DTRN, {name}", dtrn.QUICK.units)
        without = runs.size(name, runs.units[name])
        one_more = runs.size(name, runs.units[name] + 1)
        assert with_it <= without < with_it + (one_more - without)
        assert runs.units[f"DTRN, {name}"] == dtrn.QUICK.units


@pytest.mark.slow
def test_quick_resumes_with_the_same_numbers(tmp_path, dies):
    training = replace(dtrn.QUICK.training, epochs=1)
    methods = (dtrn.BASE, dtrn.FULL, dtrn.ADDED)
    config = replace(dtrn.QUICK, training=training, methods=methods)
    expected = dtrn.main(config, tmp_path / "whole")
    dies(dtrn, "fit", 3)
    with pytest.raises(KeyboardInterrupt):
        dtrn.main(config, tmp_path / "stopped")
    found = dtrn.main(config, tmp_path / "stopped")
    clock = {"seconds": 0.0}
    for name, rows in expected.items():
        assert [r | clock for r in found[name]] == [r | clock for r in rows]
    table = (tmp_path / "stopped" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in config.methods)
    assert (tmp_path / "stopped" / "dtrn.png").stat().st_size > 5_000
    added, full = expected[dtrn.ADDED], expected[dtrn.FULL]
    for row in added:
        assert row["drift"] < 1e-3
        assert 0 < row["dislike AUC"] < 1
    for row in full:
        assert row["scale difference"] > 0
        assert list(row["weights"]) == ["like", "love", "dislike"]
        # Three columns, a number, the genres and three histories.
        assert {len(w) for w in row["weights"].values()} == {8}
