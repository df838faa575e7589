"""The loop: logging, evaluation, early stop, best checkpoint, resume."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import mtjax
from mtjax.training import (
    Checkpoints,
    EarlyStop,
    JsonlLogger,
    TrainState,
    fit,
    make_train_step,
)


def make_state():
    params = {"w": jnp.zeros(())}
    return TrainState.create(params, optax.sgd(1.0), key=jax.random.key(0))


@jax.jit
def step_fn(state, batch):
    new = dataclasses.replace(
        state, params={"w": state.params["w"] + batch}, step=state.step + 1
    )
    metrics = {"losses": {"a": batch}, "skipped": state.skipped, "aux": jnp.ones(3)}
    return new, metrics


def batches(n=100):
    return (jnp.float32(i) for i in range(1, n + 1))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_counts_steps_and_logs_the_values_of_that_step(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    state, history = fit(
        make_state(), step_fn, batches(), num_steps=5, logger=logger, log_every=2
    )
    logger.close()
    assert float(state.params["w"]) == 15.0
    assert history == []
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 2, "train/losses/a": 2.0, "train/skipped": 0},
        {"step": 4, "train/losses/a": 4.0, "train/skipped": 0},
    ]


def test_evaluates_periodically_and_at_the_end(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    _, history = fit(
        make_state(),
        step_fn,
        batches(),
        num_steps=5,
        evaluate=lambda state: {"a": {"w": state.params["w"]}},
        eval_every=2,
        logger=logger,
        log_every=4,
    )
    logger.close()
    assert history == [
        {"step": 2, "a/w": 3.0},
        {"step": 4, "a/w": 10.0},
        {"step": 5, "a/w": 15.0},
    ]
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[1].keys() == {
        "step",
        "train/losses/a",
        "train/skipped",
        "eval/a/w",
    }


def scripted(values):
    values = iter(values)
    return lambda state: {"loss": next(values)}


def test_stops_early_and_keeps_the_best(tmp_path):
    values = [3.0, 1.0, 1.2, float("nan"), 1.1, 0.0]
    with Checkpoints(tmp_path, keep=1, keep_best=("loss", "min")) as checkpoints:
        state, history = fit(
            make_state(),
            step_fn,
            batches(),
            num_steps=50,
            evaluate=scripted(values),
            eval_every=2,
            checkpoints=checkpoints,
            early_stop=EarlyStop("loss", "min", patience=3),
        )
        assert int(state.step) == 10
        assert len(history) == 5
        assert checkpoints.best == 4
        best, _ = checkpoints.restore(state, step=checkpoints.best)
        assert float(best.params["w"]) == 10.0


def test_early_stop_survives_a_resume(tmp_path):
    values = [1.0, 2.0, 3.0, 4.0]
    arguments = {
        "eval_every": 1,
        "save_every": 1,
        "early_stop": EarlyStop("loss", "min", patience=3),
    }
    with Checkpoints(tmp_path) as checkpoints:
        fit(
            make_state(),
            step_fn,
            batches(),
            num_steps=2,
            evaluate=scripted(values),
            checkpoints=checkpoints,
            **arguments,
        )
        state, history = fit(
            make_state(),
            step_fn,
            batches(),
            num_steps=50,
            evaluate=scripted(values[2:]),
            checkpoints=checkpoints,
            **arguments,
        )
        assert int(state.step) == 4
        assert [row["loss"] for row in history] == values
        # Starting a stopped run again does nothing.
        again, _ = fit(
            make_state(),
            step_fn,
            batches(),
            num_steps=50,
            evaluate=scripted([]),
            checkpoints=checkpoints,
            **arguments,
        )
        assert int(again.step) == 4


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "stops"),
    [
        ("min", 0.0, [3.0, 2.0, 1.0], False),
        ("min", 0.0, [1.0, 1.0, 1.0], True),
        ("max", 0.0, [1.0, 2.0, 3.0], False),
        ("max", 0.5, [1.0, 1.3, 1.4], True),
        ("max", 0.5, [1.0, 1.3, 1.6], False),
        ("min", 0.0, [float("nan")] * 2, True),
        ("min", 0.0, [1.0], False),
    ],
)
def test_early_stop_rule(mode, min_delta, values, stops):
    rule = EarlyStop("x", mode, patience=2, min_delta=min_delta)
    assert (
        rule.should_stop([{"step": i, "x": v} for i, v in enumerate(values)]) == stops
    )


def test_iterator_without_a_state_is_forwarded(tmp_path):
    for num_steps in (3, 7):
        with Checkpoints(tmp_path) as checkpoints:
            state, _ = fit(
                make_state(),
                step_fn,
                batches(),
                num_steps=num_steps,
                checkpoints=checkpoints,
            )
    assert float(state.params["w"]) == sum(range(1, 8))


def test_metrics_after_the_last_checkpoint_are_forgotten(tmp_path):
    def broken():
        yield from itertools.islice(batches(), 5)
        raise RuntimeError("power cut")

    def start(data):
        logger = JsonlLogger(tmp_path / "metrics.jsonl")
        with Checkpoints(tmp_path) as checkpoints:
            try:
                fit(
                    make_state(),
                    step_fn,
                    data,
                    num_steps=8,
                    checkpoints=checkpoints,
                    save_every=3,
                    logger=logger,
                    log_every=1,
                )
            finally:
                logger.close()

    with pytest.raises(RuntimeError, match="power cut"):
        start(broken())
    assert len(read(tmp_path / "metrics.jsonl")) == 5
    start(batches())
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))


def losses_of_two(params, batch):
    return {"a": (params["w"] - 1.0) ** 2, "b": (params["w"] - 2.0) ** 2 + batch}


def test_a_skipped_step_names_the_task_whose_loss_is_not_finite():
    tx = optax.chain(mtjax.equal(), optax.sgd(0.1))
    step = make_train_step(losses_of_two, tx)
    fresh = lambda: TrainState.create({"w": jnp.zeros(())}, tx, key=jax.random.key(0))
    nan = float("nan")
    data = [jnp.float32(x) for x in (0.0, nan, 0.0, nan)]
    # Once, though two steps were skipped, and also if the last step is the first.
    with pytest.warns(
        RuntimeWarning, match="Step 2 was skipped: the loss of 'b' is nan"
    ):
        state, _ = fit(fresh(), step, data, num_steps=4, log_every=1)
    assert int(state.skipped) == 2
    with pytest.warns(RuntimeWarning, match="Step 2 was skipped") as caught:
        fit(fresh(), step, data, num_steps=2)
    assert len(caught) == 1


def test_an_update_that_is_not_finite_under_finite_losses_is_told_apart():
    tx = optax.chain(mtjax.equal(), optax.scale(float("inf")))
    step = make_train_step(losses_of_two, tx)
    state = TrainState.create({"w": jnp.zeros(())}, tx, key=jax.random.key(0))
    with pytest.warns(RuntimeWarning, match="Step 1 .* although all losses are") as got:
        fit(state, step, [jnp.float32(0.0)] * 3, num_steps=3)
    assert len(got) == 1


def test_progress_bar_is_silent_without_a_terminal(capfd):
    fit(make_state(), step_fn, batches(), num_steps=3)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_shows_losses_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    fit(make_state(), step_fn, batches(), num_steps=3, log_every=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a 3" in err
    fit(make_state(), step_fn, batches(), num_steps=3, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_every": 0}, "`log_every` must be at least 1, got 0"),
        ({"eval_every": 1}, "need `evaluate`"),
        ({"early_stop": EarlyStop("x", "min")}, "need `evaluate`"),
        ({"save_every": 1}, "needs `checkpoints`"),
        ({"num_steps": 200}, "ended after step 100"),
        (
            {
                "evaluate": lambda state: {"y": 1.0},
                "early_stop": EarlyStop("x", "min"),
            },
            "`metric` must be in what `evaluate` returns, got 'x'",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(make_state(), step_fn, batches(), **{"num_steps": 2, **arguments})


@pytest.mark.parametrize(
    "arguments", [{"patience": 0}, {"min_delta": -1.0}, {"min_delta": float("nan")}]
)
def test_early_stop_errors(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EarlyStop("x", "min", **arguments)
