"""The comparison of TALL-masks, Consensus and baselines on a tiny bench."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tall_masks
from experiments.merge_bench_models import Bench
from mtjax.nn import ViT

TASKS = ("a", "b", "c")


@pytest.fixture(scope="module")
def bench():
    """Models that were never trained; their data are only there to be counted."""
    rng = np.random.default_rng(0)
    model = ViT(width=4, depth=1, heads=1, hidden=4)
    sizes = {"mlp_in": {"kernel": (9, 10)}, "norm": {"scale": (3,)}}
    shapes = {
        layer: {n: np.zeros(x) for n, x in sizes[layer].items()} for layer in sizes
    }
    # Few elements change, as if each task needed its own.
    draw = lambda p, share: jnp.asarray(
        p + rng.normal(size=p.shape) * (rng.random(p.shape) < share), jnp.float32
    )
    base = jax.tree.map(lambda p: draw(p, 1.0), shapes)
    models = {t: jax.tree.map(lambda p: draw(p, 0.2), base) for t in TASKS}
    part = {"images": np.zeros((50, 28, 28), np.uint8), "labels": np.arange(50)}
    data = {t: dict.fromkeys(("validation", "test"), part) for t in TASKS}
    return FakeBench(TASKS, base, models, {}, data, model)


class FakeBench(Bench):
    """Accuracy is the closeness to the model of the task."""

    def accuracy(self, params, task, split="test", most=None):
        gap = lambda p, q: np.abs(np.asarray(p["kernel"] - q["kernel"])).mean()
        close = gap(params["mlp_in"], self.models[task]["mlp_in"])
        share = len(self.data[task][split]["labels"][:most]) / 50
        return share / (1 + float(close))


@pytest.mark.slow
def test_all_numbers_and_the_figure(bench, prepared, tmp_path):
    seen = prepared(lambda *_: bench)
    results = tall_masks.main(tall_masks.QUICK, tmp_path, tmp_path / "models")
    assert [seed for _, seed, _ in seen] == [0]
    rows = results[0]["rows"]
    alone = rows["one model per task"]
    assert alone["normalised"] == 100
    # Masks bring tasks back that one model cannot serve; random masks do not.
    assert rows["TALL + TA"]["mean"] > rows["TA"]["mean"] > rows["random masks"]["mean"]
    elements = 90 + 3
    masks = len(TASKS) * -(-elements // 8)
    assert rows["TALL + TA"]["MB"] == pytest.approx((8 * elements + masks) / 1e6)
    assert alone["MB"] == pytest.approx(3 * 4 * elements / 1e6)
    densities = results[0]["densities"]
    assert densities["random masks"] == pytest.approx(densities["TALL + TA"])
    assert sum(results[0]["agreement"]["TA"]["all"]) == pytest.approx(1)
    assert list(results[0]["curves"]) == ["2", "3"]
    assert results[0]["curves"]["3"]["TA"] == rows["TA"]["normalised"]
    assert (tmp_path / "tall_masks.png").stat().st_size > 10_000
    table = (tmp_path / "table.md").read_text()
    assert re.search(r"^\| Consensus TIES \| [\d.]+ \|", table, re.MULTILINE)
    # A second start reads what is there.
    again = tall_masks.main(tall_masks.QUICK, tmp_path, tmp_path / "models")
    assert again == results
    assert len(seen) == 1
    assert json.loads((tmp_path / "seed_0.json").read_text()) == results[0]
