"""The study of flat regions, cut short and taken up again."""

import json
import re

import pytest

from experiments import flat_regions


@pytest.mark.slow
def test_quick_run_goes_on_with_the_same_numbers(tmp_path, dies_after_two_steps):
    config, out = flat_regions.QUICK, tmp_path / "cut"
    dies_after_two_steps()
    with pytest.raises(KeyboardInterrupt):
        flat_regions.main(config, out)
    assert not list(out.rglob("results.json"))
    resumed = flat_regions.main(config, out)
    assert resumed == flat_regions.main(config, tmp_path / "whole")
    assert [r["variant"] for r in resumed] == ["F", "direct", "erm"]
    by_variant = {r["variant"]: r["sharpness"] for r in resumed}
    assert by_variant["F"] != by_variant["erm"]
    assert by_variant["F"] != by_variant["direct"]
    assert json.loads((out / "results.json").read_text()) == resumed
    table = (out / "tables.md").read_text()
    assert re.search(r"^\| mgda, F \| [\d.]+ \|", table, re.MULTILINE)
    assert (out / "flat_regions.png").stat().st_size > 10_000
    lines = (out / "multi_mnist" / "mgda_F_0" / "run" / "metrics.jsonl").read_text()
    assert [json.loads(x)["step"] for x in lines.splitlines()] == [2, 4]


def test_missing_clothes_are_an_error_before_anything_is_written(tmp_path):
    config = flat_regions.Config(("multi_fashion",), data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="mtjax data prepare"):
        flat_regions.main(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
