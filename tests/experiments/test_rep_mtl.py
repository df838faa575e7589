"""The experiment, interrupted after two steps, goes on with the same numbers."""

import itertools
import json
from dataclasses import replace

import pytest

from experiments import rep_mtl as experiment


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    config = replace(
        experiment.QUICK,
        variants=("TSR+CSA",),
        steps=4,
        eval_every=2,
        train_size=100,
        test_size=40,
        batch_size=8,
    )
    expected = experiment.main(config, tmp_path / "whole")

    batches = experiment.batches

    def interrupted(*args):
        yield from itertools.islice(batches(*args), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.main(config, tmp_path / "stopped")
    found = experiment.main(config, tmp_path / "stopped")

    for name, [run] in expected.items():
        # How long a step takes is not the same twice.
        clock = {"step": run[-1]["step"], "step time": 1.0}
        assert [{**row, **clock} for row in found[name][0]] == [
            {**row, **clock} for row in run
        ]
        assert [row["step"] for row in run] == [2, 4]
    for folder in ("whole", "stopped"):
        assert (tmp_path / folder / "table.md").read_text().count("TSR+CSA") == 1
        assert (tmp_path / folder / "rep_mtl.png").stat().st_size > 5_000
    lines = [
        (tmp_path / folder / "runs" / "TSR+CSA_0" / "metrics.jsonl").read_text()
        for folder in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]
    assert json.loads(lines[0].splitlines()[-1])["step"] == 4
    with pytest.raises(ValueError, match="steps: 4 there, 6 here"):
        experiment.main(replace(config, steps=6), tmp_path / "whole")
