"""Training on all devices of one or more processes: a script for tests, not a test.

`python distributed_run.py FOLDER FSDP [ADDRESS NUM_PROCESSES PROCESS_ID]` trains for
three steps from a new folder, or on to six from one that holds a checkpoint, and writes
the parameters to FOLDER/params.npz after six. One process makes both parts at once.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import mtjax
from mtjax.training import (
    Checkpoints,
    TrainState,
    data_mesh,
    fit,
    fully_sharded,
    initialize_distributed,
    make_train_step,
    place,
    shard_batch,
)


class Rows:
    """This process's rows of every global batch, with a state that differs."""

    def __init__(self):
        self._step = 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng(self._step)
        self._step += 1
        x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 3))
        mine = slice(jax.process_index(), None, jax.process_count())
        rows = np.split(np.arange(16), jax.process_count())[mine][0]
        return {"x": x[rows].astype("f4"), "y": y[rows].astype("f4")}

    def get_state(self):
        return {"step": self._step, "process": "x" * (1 + jax.process_index())}

    def set_state(self, state):
        assert len(state["process"]) == 1 + jax.process_index()
        self._step = state["step"]


def losses_fn(params, batch):
    out = jnp.tanh(batch["x"] @ params["trunk"]) @ params["heads"].T
    return {t: jnp.mean((out - batch["y"])[:, i] ** 2) for i, t in enumerate("abc")}


def main(folder, fsdp, *distributed):
    if distributed:
        address, num_processes, process_id = distributed
        initialize_distributed(address, int(num_processes), int(process_id))
    assert jax.device_count() == 8
    mesh = data_mesh()
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {
        "trunk": jax.random.normal(k1, (6, 16)),
        "heads": jax.random.normal(k2, (3, 16)),
    }
    tx = optax.chain(mtjax.pcgrad(), optax.adam(1e-2))
    state = TrainState.create(params, tx, key=jax.random.key(1))
    shardings = fully_sharded(state, mesh, min_size=1 if int(fsdp) else 10**9)
    state = place(state, shardings)
    step = make_train_step(losses_fn, tx, state_sharding=shardings)
    resumed = (Path(folder) / "checkpoints").exists()
    with Checkpoints(folder, config={"fsdp": fsdp}) as checkpoints:
        state, _ = fit(
            state,
            lambda state, batch: step(state, shard_batch(batch, mesh)),
            Rows(),
            num_steps=6 if resumed or not distributed else 3,
            checkpoints=checkpoints,
            save_every=2,
        )
    everything = multihost_utils.process_allgather(state.params, tiled=True)
    if jax.process_index() == 0 and int(state.step) == 6:
        np.savez(Path(folder) / "params.npz", **everything)


if __name__ == "__main__":
    main(*sys.argv[1:])
