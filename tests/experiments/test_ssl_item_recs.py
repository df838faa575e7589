"""The experiment on SSL for item recommendation, on drawn logs."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import retrieval_training, ssl_item_recs, ssl_item_recs_report
from mtjax.data import sequence_problem
from mtjax.systems.ssl_item_recs import SSLItemRecsConfig

CONFIG = replace(
    ssl_item_recs.QUICK,
    length=3,
    embedding=4,
    model=SSLItemRecsConfig((4, 3)),
    alphas=(0.1, 1.0),
    few=0.5,
    batch_size=16,
    epochs=2,
    epochs_few=2,
    ks=(2, 5),
    tail=3,
)


def drawn_log(*_, seed=0, **__):
    rng = np.random.default_rng(seed)
    users, films = 20, np.arange(30)
    return sequence_problem(
        "drawn",
        groups=np.repeat(np.arange(users), 6),
        times=np.tile(np.arange(6), users),
        items=np.concatenate([rng.permutation(30)[:6] for _ in range(users)]),
        parts=np.tile([0, 0, 0, 0, 1, 2], users),
        length=3,
        min_history=0,
        cold=np.array([3, 7, 11]),
        catalogue=films,
        fields={"genre": films % 3, "decade": films % 2},
        multi_hot={"tags": np.eye(5)[films % 5]},
        texts={"title": ([[f"w{i}", f"v{i % 4}"] for i in films], 2)},
        extras={"user": 100 + np.repeat(np.arange(users), 6)},
    )


@pytest.mark.slow
def test_resumes_where_it_was_interrupted(tmp_path, monkeypatch, dies):
    monkeypatch.setattr(ssl_item_recs, "movielens_sequences", drawn_log)
    kept = {x: ssl_item_recs.METHODS[x] for x in (ssl_item_recs.PLAIN, "CFM")}
    monkeypatch.setattr(ssl_item_recs, "METHODS", kept)
    calls = dies(ssl_item_recs, "fit", 3)
    with pytest.raises(KeyboardInterrupt):
        ssl_item_recs.main(CONFIG, tmp_path)
    results = ssl_item_recs.main(CONFIG, tmp_path)
    assert len(calls) == 2 * 3 + 1

    assert "CFM, few | 1.0" in results
    run = results["CFM | 0.1"][0]
    assert [step for step, _ in run["curve"]] == [4, 8]
    assert set(run["losses"][0]) == {"retrieval", "ssl"}
    assert set(results["two towers | 0.0"][0]["losses"][0]) == {"retrieval"}
    text = (tmp_path / "table.md").read_text()
    assert text.count("| CFM |") == text.count("| two towers |") == 4
    assert (tmp_path / "ssl_item_recs.png").stat().st_size > 5_000


def test_alphas_are_chosen_on_validation():
    label = ssl_item_recs_report.label
    results = {
        label("CFM", 0.1): [{"validation": 1.0}, {"validation": 4.0}],
        label("CFM", 1.0): [{"validation": 3.0}, {"validation": 1.0}],
        label("CFM", 1.0, few=True): [{"validation": 9.0}],
    }
    best, alphas = ssl_item_recs_report.chosen(results, ["CFM", "RFM"])
    assert (best["CFM"], alphas) == (results[label("CFM", 0.1)], {"CFM": "0.1"})
    best, _ = ssl_item_recs_report.chosen(results, ["CFM"], few=True)
    assert best["CFM"] == results[label("CFM", 1.0, few=True)]


def test_what_users_had_is_not_ranked():
    problem = drawn_log()
    splits = retrieval_training.pairs_of_users(problem)
    assert splits["train"]["user"].min() == 1
    test = splits["test"]
    flags = retrieval_training.liked(splits, ("train", "validation"), test, 32)
    for user, row in zip(test["user"], flags, strict=True):
        before = [
            splits[x]["target"][splits[x]["user"] == user]
            for x in ("train", "validation")
        ]
        expected = set(np.concatenate(before)) if user else set()
        assert set(np.flatnonzero(row)) == expected
    slices = ssl_item_recs.slices(problem, CONFIG)
    parts = np.sum([slices[x] for x in ("cold", "tail", "head")], axis=0)
    assert (parts == 1).all()
