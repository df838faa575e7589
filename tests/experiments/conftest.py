"""What tests of experiments share: models that were drawn, and deaths half way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import merge_bench_models
from mtjax import training
from mtjax.nn import ViT

SPLITS = ("train", "validation", "stream", "test")


@pytest.fixture(scope="session")
def drawn_bench():
    """Makes benches whose models, images and labels are drawn, not trained."""

    def make(
        tasks=("b", "a", "c"), *, seed=0, examples=6, width=4, depth=1, change=0.1
    ):
        rng = np.random.default_rng(seed)
        model = ViT(patch=14, width=width, depth=depth, heads=1, hidden=4)
        base = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))["params"]
        move = lambda x: x + change * jnp.asarray(rng.normal(size=x.shape), x.dtype)
        part = lambda: {
            "images": rng.integers(256, size=(examples, 28, 28)).astype(np.uint8),
            "labels": rng.permutation(examples).astype(np.int32) % 3,
        }
        return merge_bench_models.Bench(
            tasks,
            base,
            {task: jax.tree.map(move, base) for task in tasks},
            {t: {"kernel": jnp.eye(width)[:, :3], "bias": jnp.ones(3)} for t in tasks},
            {task: {split: part() for split in SPLITS} for task in tasks},
            model,
        )

    return make


@pytest.fixture
def prepared(monkeypatch):
    """Lets `make(config, seed, out)` stand for the training of the merge-bench."""

    def patch(make):
        calls = []

        def prepare(*args):
            calls.append(args)
            return make(*args)

        monkeypatch.setattr(merge_bench_models, "prepare", prepare)
        return calls

    return patch


@pytest.fixture
def dies(monkeypatch):
    """Lets one call of a function end like an interrupted run; lists all calls."""

    def patch(owner, name, call):
        original, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, dying)
        return calls

    return patch


@pytest.fixture
def dies_after_two_steps(monkeypatch):
    """Interrupts, once, the third of the training steps that `maker` makes."""

    def patch(maker="make_train_step"):
        original, died = getattr(training, maker), []

        def make(*args, **kwargs):
            step = original(*args, **kwargs)

            def dying(state, batch):
                if int(state.step) == 2 and not died:
                    died.append(True)
                    raise KeyboardInterrupt
                return step(state, batch)

            return dying

        monkeypatch.setattr(training, maker, make)

    return patch
