"""A folder that holds the run of another configuration is refused by all."""

import importlib
import inspect

import pytest

from mtjax.training import ConfigMismatchError


@pytest.mark.parametrize(
    "name",
    [
        "adamerging",
        "adamerging_ablations",
        "atlas",
        "atlas_few_shot",
        "atlas_test_time",
        "balancing_study",
        "concrete_subspace",
        "doge",
        "flat_regions",
        "joint_or_merged",
        "logits_fusion",
        "merge_bench",
        "permutation_alignment",
        "self_positioning",
        "tall_masks",
        "text_merge_bench",
        "twin_merging",
    ],
)
def test_another_configuration_needs_another_folder(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    (tmp_path / "config.json").write_text('{"seeds": 7}')
    models = "models" in inspect.signature(experiment.main).parameters
    with pytest.raises(ConfigMismatchError, match="seeds: 7 there"):
        experiment.main(experiment.QUICK, tmp_path, *[tmp_path / "models"] * models)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
