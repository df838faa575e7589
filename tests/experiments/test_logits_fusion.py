"""Texts become tasks; the experiment measures once, resumes, and writes its table."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import logits_fusion, logits_fusion_models
from experiments.logits_fusion_models import TASKS, encoded, pairs, windows
from mtjax.data import DataNotFoundError

QUICK = logits_fusion.QUICK


class Source(list):
    """Rows in memory, in place of a prepared data set."""

    intent = SimpleNamespace(names=("PlayMusic", "GetWeather"))
    info = SimpleNamespace(features={"intent": intent})

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def source(name, split, data_dir=None):
    """A few texts of each set."""
    rng = np.random.default_rng(len(name + split))
    word = lambda: bytes(rng.integers(97, 123, size=rng.integers(6, 9)).tolist())
    line = lambda n: b" ".join(word() for _ in range(n))
    if name == "gsm8k":
        seen = [b"<<1+1=2>>2 and <<30*2=60>>60, <<10*100=1000>>", b"<<7-3=4>>4"]
        new = [b"<<1+1=2>>2", *(b"<<%d+%d=%d>>" % (i, i, 2 * i) for i in range(10, 20))]
        return Source(
            {"question": line(9), "answer": x + line(9)}
            for x in (seen if split == "train" else new)
        )
    if name == "snips":
        return Source({"text": line(5), "intent": i % 2} for i in range(20))
    if name == "tiny_shakespeare":
        return Source([{"text": line(60)}])
    return Source({"text": b" " + line(12) + b" . \n"} for _ in range(20))


@pytest.fixture
def _texts(monkeypatch):
    monkeypatch.setattr(logits_fusion_models.data, "tfds_source", source)


@pytest.mark.usefixtures("_texts")
def test_tasks():
    config = replace(QUICK.models, context=20)
    known = pairs("calculate", "train", config)
    # Two numbers of at most two digits.
    assert sorted(known) == [
        (b"<<1+1=", b"2\n"),
        (b"<<30*2=", b"60\n"),
        (b"<<7-3=", b"4\n"),
    ]
    new = pairs("calculate", "test", config)
    assert len(new) == 10
    assert not {*known} & {*new}
    for prompt, answer in pairs("complete", "train", config):
        # Three letters of a word, the rest is asked for.
        assert len(prompt) <= 20
        assert prompt[-4:].strip().isalpha()
        assert 4 <= len(answer) <= 10
    (prompt, answer), *_ = pairs("intent", "test", config)
    assert prompt.endswith(b" => ")
    assert {a for _, a in pairs("intent", "test", config)} == {
        b"PlayMusic\n",
        b"GetWeather\n",
    }
    # The order is drawn, and always the same.
    for task in TASKS:
        assert pairs(task, "train", config) == pairs(task, "train", config)
    assert pairs("complete", "train", config) != sorted(
        pairs("complete", "train", config)
    )


def test_examples_of_all_tasks_have_one_shape():
    part = encoded([(b"ab", b"c\n"), (b"d", b"efg\n")], 5, 6)
    np.testing.assert_array_equal(part.mask, [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(part.answer_mask.sum(axis=1), [2, 4])
    assert bytes(part.prompts[0].astype(np.uint8)) == b"\0\0\0ab"
    assert bytes(part.answers[1].astype(np.uint8)) == b"efg\n\0\0"


def test_every_source_gives_as_many_windows():
    corpus = {"a": np.arange(100, 110, dtype=np.uint8), "b": np.arange(90) % 80}
    corpus["b"] = corpus["b"].astype(np.uint8)
    found = windows(corpus, 8, 4, jax.random.key(0))
    assert found.shape == (8, 4)
    assert (found[:4] >= 100).all()
    assert (found[4:] < 100).all()
    # No window reaches from one source into the next.
    many = windows(corpus, 400, 4, jax.random.key(1))
    steps = jnp.diff(many, axis=1)
    assert ((steps == 1) | (steps == -79)).all()
    assert {*many[:200, 0].tolist()} == {*range(100, 106)}


@pytest.mark.slow
@pytest.mark.usefixtures("_texts")
def test_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    models = replace(QUICK.models, examples=6, large_size=(8, 1))
    config = replace(QUICK, models=models, seeds=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(logits_fusion, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits_fusion.main(config, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("models_0/*")}
    assert len(files) == 2 * (1 + len(TASKS))

    (result,) = logits_fusion.main(config, tmp_path)
    # Nothing was trained again, and a third start measures nothing.
    assert files == {path: path.stat().st_mtime_ns for path in files}
    monkeypatch.setattr(logits_fusion, "run", interrupted)
    assert logits_fusion.main(config, tmp_path) == [result]
    assert json.loads((tmp_path / "seed_0.json").read_text()) == result
    trained = logits_fusion_models.prepare(models, 0, tmp_path / "again")
    loaded = logits_fusion_models.prepare(models, 0, tmp_path / "models_0")
    for one, other in zip(
        jax.tree.leaves(trained.experts), jax.tree.leaves(loaded.experts)
    ):
        np.testing.assert_array_equal(one, other)

    # What is the same by definition: the large model, with and without a known task.
    rows, mixed = result["single"], result["mixed"]
    assert rows["large"]["nats per byte"] == mixed["large"]["nats per byte"]
    assert rows["dynamic"]["nats per byte"] != rows["static, 1.0"]["nats per byte"]
    bisected, grid = rows["dynamic, bisect"], rows["dynamic"]
    assert bisected["nats per byte"] == pytest.approx(grid["nats per byte"], rel=0.05)
    assert all(len(weights) > 5 for weights in result["alpha"].values())
    table = (tmp_path / "table.md").read_text()
    assert "| dynamic, small TA |" in table
    assert (tmp_path / "logits_fusion.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="piece: 16 there, 8 here"):
        logits_fusion.main(replace(config, piece=8), tmp_path)


def test_missing_texts_are_told(tmp_path):
    models = replace(QUICK.models, data_dir=tmp_path)
    with pytest.raises(DataNotFoundError, match="`wikitext2` is not prepared"):
        logits_fusion_models.prepare(models, 0, tmp_path / "models")
