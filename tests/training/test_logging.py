import json

import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.training import (
    JsonlLogger,
    TensorBoardLogger,
    WandbLogger,
    combine_loggers,
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_flattens_and_reads_arrays(tmp_path):
    logger = JsonlLogger(tmp_path / "new" / "metrics.jsonl")
    logger.log(3, {"losses": {"a": jnp.float32(0.5), "b": np.array([2])}, "ok": True})
    assert rows(tmp_path / "new" / "metrics.jsonl") == [
        {"step": 3, "losses/a": 0.5, "losses/b": 2, "ok": True}
    ]
    logger.close()


def test_jsonl_writes_strict_json_for_values_that_are_not_finite(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log(1, {"a": float("nan"), "b": jnp.inf, "c": -jnp.inf})
    logger.close()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    assert float(row["c"]) == -np.inf


def test_jsonl_rewind_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.log(step, {"a": step})
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 4, "a"')
    logger.rewind(2)
    logger.log(3, {"a": 3})
    logger.close()
    assert path.read_text() == before


def test_jsonl_refuses_what_is_not_a_scalar(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"shape \(2,\) under 'a/b'"):
        logger.log(1, {"a": {"b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="str"):
        logger.log(1, {"a": "text"})
    logger.close()


def test_tensorboard_reads_back(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log(step, {"losses": {"a": 0.5 * step}})
    logger.rewind(2)
    logger.log(3, {"losses": {"a": 7.0}})
    logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("losses/a")]
    assert scalars == [(1, 0.5), (2, 1.0), (3, 7.0)]


def test_wandb_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'mtjax\[wandb\]'"):
        WandbLogger(project="x")


def test_wandb_gets_flat_scalars(monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((row, step))

        def finish(self):
            calls.append("finish")

    class Wandb:
        @staticmethod
        def init(**arguments):
            calls.append(arguments)
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    logger = WandbLogger(project="x")
    logger.rewind(0)
    logger.log(1, {"a": {"b": 2.0}})
    logger.close()
    assert calls == [
        {"resume": "allow", "project": "x"},
        ({"a/b": 2.0}, 1),
        "finish",
    ]


def test_combined_loggers_write_the_same(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    logger = combine_loggers(*map(JsonlLogger, paths))
    logger.log(1, {"a": 1})
    logger.log(2, {"a": 2})
    logger.rewind(1)
    logger.close()
    for path in paths:
        assert rows(path) == [{"step": 1, "a": 1}]
