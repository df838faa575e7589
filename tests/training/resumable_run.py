"""A small training run that can be killed: a script for tests, not a test.

`python resumable_run.py FOLDER [--balancer NAME] [--kill-at STEP]
[--kill-in data|save|commit]` trains, resuming from FOLDER, and kills itself with
SIGKILL where it is told to.
"""

import argparse
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtjax
from mtjax.training import (
    Checkpoints,
    JsonlLogger,
    TrainState,
    checkpoint,
    fit,
    make_train_step,
)

NUM_STEPS = 12
CONFIG = {"lr": 1e-2, "batch": 8}


BALANCERS = {
    "famo": lambda: mtjax.famo(3),
    "pcgrad": lambda: mtjax.pcgrad(),
    "graddrop": lambda: mtjax.graddrop(),
}


def losses_fn(params, batch, *, model_state, key):
    x, y = batch["x"], batch["y"]
    x = x + 0.1 * jax.random.normal(key, x.shape)
    mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(x, axis=0)
    hidden = jnp.tanh((x - mean[None]) @ params["trunk"])
    losses = {
        task: jnp.mean((hidden @ params["heads"][task] - y[:, i]) ** 2)
        for i, task in enumerate(("a", "b", "c"))
    }
    return losses, {"mean": jax.lax.stop_gradient(mean)}


def make_state(tx):
    k1, k2 = jax.random.split(jax.random.key(1))
    params = {
        "trunk": jax.random.normal(k1, (4, 16)),
        "heads": {
            task: jax.random.normal(jax.random.fold_in(k2, i), (16,))
            for i, task in enumerate(("a", "b", "c"))
        },
    }
    return TrainState.create(
        params, tx, model_state={"mean": jnp.zeros(4)}, key=jax.random.key(2)
    )


def make_data():
    rng = np.random.default_rng(0)
    rows = [
        {"x": rng.normal(size=4).astype("f4"), "y": rng.normal(size=3).astype("f4")}
        for _ in range(40)
    ]
    data = grain.MapDataset.source(rows).seed(3).shuffle().repeat()
    return data.batch(8).to_iter_dataset()


class KillingIterator:
    """Kills the process instead of giving out a batch."""

    def __init__(self, iterator, kill_at):
        self._iterator, self._kill_at = iterator, kill_at
        self._step = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._step += 1
        return next(self._iterator)

    def get_state(self):
        return {"step": self._step, "inner": self._iterator.get_state()}

    def set_state(self, state):
        self._step = state["step"]
        self._iterator.set_state(state["inner"])


def kill_while_saving(kill_at, where):
    """Kills at the first save from this step on: early in it, or just before commit."""
    save, commit = checkpoint.ocp.save_checkpointables_async, checkpoint.write_commit

    def dying_save(path, *args, **kwargs):
        response = save(path, *args, **kwargs)
        if int(os.path.basename(path)) >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return response

    def dying_commit(path, record):
        if record["step"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(path, record)

    if where == "save":
        checkpoint.ocp.save_checkpointables_async = dying_save
    if where == "commit":
        checkpoint.write_commit = dying_commit


def run(folder, balancer="famo", kill_at=None, save_every=2):
    tx = optax.chain(BALANCERS[balancer](), optax.adam(CONFIG["lr"]))
    step = make_train_step(losses_fn, tx, with_model_state=True, with_key=True)
    logger = JsonlLogger(os.path.join(folder, "metrics.jsonl"))
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        state, history = fit(
            make_state(tx),
            step,
            KillingIterator(iter(make_data()), kill_at),
            num_steps=NUM_STEPS,
            evaluate=lambda state: {"norm": optax.tree.norm(state.params)},
            eval_every=3,
            checkpoints=checkpoints,
            save_every=save_every,
            logger=logger,
            log_every=1,
        )
    logger.close()
    return state, history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-in", default="data")
    parser.add_argument("--balancer", default="famo")
    arguments = parser.parse_args()
    if arguments.kill_in != "data":
        kill_while_saving(arguments.kill_at, arguments.kill_in)
        arguments.kill_at = None
    run(arguments.folder, arguments.balancer, kill_at=arguments.kill_at)
