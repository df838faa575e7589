"""The study of walls between models, cut short and taken up again."""

import json
import re

import jax
import numpy as np
import pytest

from experiments import permutation_alignment as study


@pytest.mark.slow
def test_quick_run_goes_on_with_the_same_numbers(tmp_path, dies_after_two_steps):
    config, out = study.QUICK, tmp_path / "cut"
    dies_after_two_steps()
    with pytest.raises(KeyboardInterrupt):
        study.main(config, out)
    assert not list(out.rglob("results.json"))
    resumed = study.main(config, out)
    assert resumed == study.main(config, tmp_path / "whole")
    plain, blocks = resumed
    assert plain["groups"] == [32, 32, 32]
    assert sorted(blocks["groups"]) == [128, 512, 512, 512]
    assert list(plain["lines"]) == ["as trained", "all aligned"]
    assert list(blocks["lines"]) == list(study.WAYS)
    for row in resumed:
        trained, *others = row["lines"].values()
        for line in others:
            # The same two models at the ends, nearer to each other.
            assert line["cosine"] > trained["cosine"] + 0.05
            for split in ("train", "test"):
                ends = [
                    x["loss"][split][:: len(x["loss"][split]) - 1]
                    for x in (trained, line)
                ]
                np.testing.assert_allclose(*ends, rtol=1e-5)
    assert json.loads((out / "results.json").read_text()) == resumed
    table = (out / "table.md").read_text()
    assert re.search(r"^\| residual MLP: all aligned \| [\d.]+ \|", table, re.MULTILINE)
    assert (out / "permutation_alignment.png").stat().st_size > 10_000


def test_barrier_is_the_height_above_the_chord():
    assert study.barrier([1.0, 4.0, 3.0]) == 2.0
    assert study.barrier([1.0, 1.5, 3.0]) == 0.0


def test_cosine():
    tree = {"a": np.ones((2, 2)), "b": -np.ones(2)}
    assert study.cosine(tree, jax.tree.map(lambda x: 3 * x, tree)) == pytest.approx(1)
    assert study.cosine(tree, tree | {"a": -tree["a"]}) == pytest.approx(-1 / 3)
