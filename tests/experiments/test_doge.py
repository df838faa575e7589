"""The experiment on DOGE in its quick form, with few steps."""

from dataclasses import replace

import pytest

from experiments import doge


@pytest.mark.slow
def test_compares_all_variants(tmp_path):
    config = replace(
        doge.QUICK,
        doge=replace(doge.DEFAULT, steps=2),
        scales=(0.2, 0.5),
        published=(0.07,),
        steps=2,
    )
    doge.merged.clear_cache()
    (found,) = doge.main(config, tmp_path, tmp_path / "models")
    methods = {*doge.VARIANTS, doge.AM, "AdaMerging", "TA (tuned)", "individual"}
    assert methods <= set(found["rows"])
    assert found["rows"]["individual"]["normalised"] == 100
    assert found["inside"]["DOGE, steps projected"]["inside, %"] < 1e-6
    assert found["inside"]["no projection"]["inside, %"] > 1
    assert set(found["sweeps"]["DOGE"]) == {"0.2", "0.5"}
    best = found["chosen"]["DOGE"]["scale"]
    assert found["sweeps"]["DOGE"][str(best)] == max(found["sweeps"]["DOGE"].values())
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in methods)
    assert (tmp_path / "doge.png").stat().st_size > 5_000
    # Compiled once, whatever the scale; and with the coefficients as published.
    assert doge.merged._cache_size() == len(doge.VARIANTS) + 1
    assert doge.main(config, tmp_path, tmp_path / "models") == [found]
