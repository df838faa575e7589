"""The experiment on M2TRec, on drawn sessions, interrupted and resumed."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import m2trec, retrieval_training
from mtjax.data import sequence_problem
from mtjax.systems.m2trec import M2TRecConfig

CONFIG = replace(
    m2trec.QUICK,
    length=3,
    embedding=4,
    model=M2TRecConfig(width=4, layers=1, heads=1, hidden=4),
    batch_size=16,
    epochs=2,
    curve_size=10,
)


def drawn_sessions(*_, seed=0, **__):
    rng = np.random.default_rng(seed)
    sessions, films = 40, np.arange(30)
    return sequence_problem(
        "drawn",
        groups=np.repeat(np.arange(sessions), 4),
        times=np.tile(np.arange(4), sessions),
        items=rng.integers(30, size=4 * sessions),
        parts=np.repeat(np.arange(sessions) * 3 // sessions, 4),
        length=3,
        cold=np.array([3, 7, 11]),
        catalogue=films,
        fields={"genre": films % 3, "decade": films % 2},
        levels=("genre", "decade"),
        multi_hot={"tags": np.eye(5)[films % 5]},
        texts={"title": ([[f"w{i}", f"v{i % 4}"] for i in films], 2)},
    )


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(tmp_path, monkeypatch, dies):
    monkeypatch.setattr(m2trec, "movielens_sequences", drawn_sessions)
    names = ("M2TRec", "M2TRec, item only", "ids")
    kept = {name: m2trec.METHODS[name] for name in names}
    monkeypatch.setattr(m2trec, "METHODS", kept)
    monkeypatch.setattr(m2trec, "MULTI", ["M2TRec"])
    calls = dies(m2trec, "fit", 2)
    with pytest.raises(KeyboardInterrupt):
        m2trec.main(CONFIG, tmp_path)
    results = m2trec.main(CONFIG, tmp_path)
    assert len(calls) == len(names) + 1

    assert list(results) == [*names, "popularity"]
    run = results["M2TRec"][0]
    assert [step for step, _ in run["curve"]] == [1, 2, 3, 4]
    assert set(run["losses"][0]) == {"item", "genre", "decade"}
    assert results["M2TRec, item only"][0]["levels"] == {}
    for name in results:
        assert 0 <= results[name][0]["metrics"]["cold recall@20"] <= 100
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in text for name in results)
    assert "genre, most frequent" in text
    assert (tmp_path / "m2trec.png").stat().st_size > 5_000


def test_catalogues_of_the_methods():
    problem = drawn_sessions()
    seen = {}
    for name, how in m2trec.METHODS.items():
        model, rows = m2trec.make(problem, CONFIG, *how)
        seen[name] = rows["categorical"]
        assert model.config.output == how[2]
        assert set(model.levels) == ({"genre", "decade"} if how[1] else set())
    warm = problem.items.num_warm
    assert seen["M2TRec"].shape[1] == 2
    # Films that training lacks are unknown to a table of ids.
    assert seen["ids"][:, 0].tolist() == [*range(warm), *[1] * (32 - warm)]
    np.testing.assert_array_equal(seen["ids and metadata"][:, 2:], seen["ids"])


def test_slices_and_steps():
    problem = drawn_sessions()
    slices, targets = m2trec.slices(problem), problem.test["target"]
    parts = np.stack([slices[x] for x in ("cold", "sparse", "middle", "head")])
    assert (parts.sum(axis=0) == 1).all()
    np.testing.assert_array_equal(slices["cold"], targets >= problem.items.num_warm)
    counts = problem.items.train_counts
    assert (
        counts[targets[slices["sparse"]]].max() <= counts[targets[slices["head"]]].min()
    )
    assert m2trec.steps_to([[5, 1.0], [10, 3.0], [15, 2.5]], 2.0) == 10
    assert np.isnan(m2trec.steps_to([[5, 1.0]], 2.0))


def test_ranks_leave_out_what_was_seen():
    split = {
        "history": np.array([[2, 3, 0], [4, 0, 0]], np.int32),
        "target": np.array([5, 3], np.int32),
    }
    scores = np.array([9.0, 9.0, 8.0, 7.0, 6.0, 5.0, 6.5])
    score = lambda block: np.tile(scores, (len(block["target"]), 1))
    # First: above 5 are 4 and 6, since 2 and 3 were seen. Second: 2 only.
    ranks = retrieval_training.target_ranks(score, split, 7)
    assert ranks.tolist() == [3.0, 2.0]
