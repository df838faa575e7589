"""The experiment, interrupted between two seeds, goes on with the same numbers."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.merge_bench_models import Bench
from mtjax.nn import ViT

SCRIPT = Path(__file__).parents[2] / "experiments" / "adamerging.py"
SPLITS = ("train", "validation", "stream", "test")


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("experiment_adamerging", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained(config, seed, out):
    """A bench whose models are drawn, not trained."""
    rng = np.random.default_rng(seed)
    model = ViT(patch=14, width=4, depth=2, heads=1, hidden=4)
    base = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))["params"]
    change = lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    tasks = ("b", "a")
    part = lambda: {
        "images": rng.integers(256, size=(6, 28, 28)).astype(np.uint8),
        "labels": rng.integers(3, size=6).astype(np.int32),
    }
    return Bench(
        tasks,
        base,
        {task: jax.tree.map(change, base) for task in tasks},
        {t: {"kernel": jnp.eye(4)[:, :3], "bias": jnp.ones(3)} for t in tasks},
        {task: {split: part() for split in SPLITS} for task in tasks},
        model,
    )


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(experiment, tmp_path, monkeypatch):
    config = replace(experiment.QUICK, seeds=2, steps=12, batch_size=2)
    monkeypatch.setattr(experiment.merge_bench, "prepare", untrained)
    expected = experiment.main(config, tmp_path / "whole", tmp_path)

    def interrupted(config, seed, out):
        if seed == 1:
            raise KeyboardInterrupt
        return untrained(config, seed, out)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.merge_bench, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.main(config, tmp_path / "stopped", tmp_path)
    assert experiment.main(config, tmp_path / "stopped", tmp_path) == expected

    assert list(expected[0]["rows"]["TA (0.3)"])[:3] == ["b", "a", "mean"]
    assert len(expected[0]["entropies"]["layer-wise"]) == 12
    table = (tmp_path / "stopped" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in experiment.VARIANTS)
    assert (tmp_path / "stopped" / "adamerging.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="steps: 12 there, 6 here"):
        experiment.main(replace(config, steps=6), tmp_path / "whole", tmp_path)
