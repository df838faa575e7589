"""The comparison of optimizers, cut short and taken up again."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from experiments import uni_perceiver_v2_optimizer as experiment
from mtjax import training


@pytest.fixture
def pictures(monkeypatch):
    """Random images in place of the three sets, which tests cannot download."""

    def load_images(name, split, *, data_dir):
        rng = np.random.default_rng(len(name) + len(split))
        images = rng.integers(256, size=(60, 28, 28)).astype(np.uint8)
        return {"image": images, "label": np.arange(60, dtype=np.uint8) % 5}

    monkeypatch.setattr(experiment, "load_images", load_images)
    # Shares of hits may be zero after four steps on noise, and have no relative change.
    monkeypatch.setattr(experiment, "BETTER", {"digits": {"rmse": "lower"}})


@pytest.mark.slow
def test_goes_on_with_the_same_numbers(tmp_path, dies_after_two_steps, pictures):
    config = replace(
        experiment.QUICK,
        methods=("unmixed MT-AdamW",),
        ratios=(0.4, 0.3, 0.3),
        test_size=20,
        batch_size=10,
        steps=4,
    )
    expected = experiment.main(config, tmp_path / "whole")
    dies_after_two_steps("make_unmixed_step")
    with pytest.raises(KeyboardInterrupt):
        experiment.main(config, tmp_path / "cut")
    assert not (tmp_path / "cut" / "table.md").exists()
    assert experiment.main(config, tmp_path / "cut") == expected
    ((run,),) = expected.values()
    assert [row["step"] for row in run] == [2, 4]
    assert run[0]["loss/clothes"] != run[1]["loss/clothes"]
    for folder in ("whole", "cut"):
        assert "MT-AdamW" in (tmp_path / folder / "table.md").read_text()
        figure = tmp_path / folder / "uni_perceiver_v2_optimizer.png"
        assert figure.stat().st_size > 5_000
        saved = json.loads((tmp_path / folder / "results.json").read_text())
        assert saved == expected
    with pytest.raises(training.ConfigMismatchError, match="steps: 4 there, 6 here"):
        experiment.main(replace(config, steps=6), tmp_path / "whole")


def test_missing_data_are_an_error_before_anything_is_written(tmp_path):
    config = replace(experiment.QUICK, data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="mtjax data prepare"):
        experiment.main(config, tmp_path / "out")
    assert os.listdir(tmp_path) == []
