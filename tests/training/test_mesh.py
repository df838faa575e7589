"""Meshes: placement, errors, and one step on eight devices against one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.training import (
    TrainState,
    data_mesh,
    fully_sharded,
    initialize_distributed,
    make_train_step,
    place,
    replicate,
    shard_batch,
)

SCRIPT = Path(__file__).with_name("distributed_run.py")


def make_params():
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "trunk": jax.random.normal(k1, (6, 16)),
        "heads": jax.random.normal(k2, (3, 16)),
    }


def make_batch(seed=0, rows=16):
    x, y = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(x, (rows, 6)), "y": jax.random.normal(y, (rows, 3))}


def losses_fn(params, batch):
    out = jnp.tanh(batch["x"] @ params["trunk"]) @ params["heads"].T
    return {t: jnp.mean((out - batch["y"])[:, i] ** 2) for i, t in enumerate("abc")}


def run(put, prepare, tx, num_steps=3, **kwargs):
    state = put(TrainState.create(make_params(), tx, key=jax.random.key(1)))
    step = make_train_step(losses_fn, tx, **kwargs)
    for seed in range(num_steps):
        state, metrics = step(state, prepare(make_batch(seed)))
    return state, metrics


@pytest.fixture
def num_compiled(caplog):
    """How often a function named `step` has been compiled in this test."""
    with jax.log_compiles():
        yield lambda: sum("Compiling jit(step)" in m for m in caplog.messages)


@pytest.mark.parametrize(("fsdp", "accumulate"), [(False, 1), (True, 2)])
def test_eight_devices_equal_one(fsdp, accumulate):
    mesh = data_mesh()
    tx = optax.chain(mtjax.pcgrad(), optax.adam(1e-2))
    one, one_metrics = run(lambda s: s, lambda b: b, tx)

    def put(state):
        if fsdp:
            return place(state, fully_sharded(state, mesh, min_size=1))
        return replicate(state, mesh)

    many, metrics = run(put, lambda b: shard_batch(b, mesh), tx, accumulate=accumulate)
    chex.assert_trees_all_close(many.params, one.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(metrics, one_metrics, rtol=1e-4)


def test_fully_sharded_state_stays_sharded_and_compiles_once(num_compiled):
    mesh = data_mesh()
    tx = optax.chain(mtjax.equal(), optax.adam(1e-2))
    template = jax.eval_shape(
        lambda: TrainState.create(make_params(), tx, key=jax.random.key(1))
    )
    shardings = fully_sharded(template, mesh, min_size=1)
    state, _ = run(
        lambda s: place(s, shardings),
        lambda b: shard_batch(b, mesh),
        tx,
        state_sharding=shardings,
    )
    jax.tree.map(lambda x, s: chex.assert_equal(x.sharding, s), state, shardings)
    assert state.params["trunk"].addressable_shards[0].data.shape == (6, 2)
    assert state.opt_state[1][0].mu["trunk"].addressable_shards[0].data.size == 12
    assert num_compiled() == 1


def test_replicated_state_compiles_once(num_compiled):
    mesh = data_mesh()
    tx = optax.chain(mtjax.equal(), optax.adam(1e-2))
    state, _ = run(lambda s: replicate(s, mesh), lambda b: shard_batch(b, mesh), tx)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
    assert num_compiled() == 1


def test_fully_sharded_takes_the_largest_axis_that_divides():
    mesh = data_mesh()
    tree = {
        "largest": jnp.ones((8, 24, 16)),
        "first_of_equals": jnp.ones((16, 16)),
        "largest_does_not_divide": jnp.ones((8, 9)),
        "none_divides": jnp.ones((3, 9)),
        "scalar": jnp.ones(()),
        "empty": jnp.ones((0, 8)),
        "key": jax.random.key(0),
    }
    specs = {k: s.spec for k, s in fully_sharded(tree, mesh, min_size=0).items()}
    P = jax.sharding.PartitionSpec
    assert specs == {
        "largest": P(None, "data"),
        "first_of_equals": P("data"),
        "largest_does_not_divide": P("data"),
        "none_divides": P(),
        "scalar": P(),
        "empty": P(None, "data"),
        "key": P(),
    }
    small = fully_sharded(tree, mesh, min_size=10_000)
    assert all(s.is_fully_replicated for s in small.values())


def test_shard_batch():
    mesh = data_mesh(jax.devices()[:4])
    batch = {"x": np.arange(8.0), "flag": np.bool_(True)}
    sharded = shard_batch(batch, mesh)
    np.testing.assert_array_equal(sharded["x"], batch["x"])
    np.testing.assert_array_equal(sharded["x"].addressable_shards[0].data, [0.0, 1.0])
    assert sharded["flag"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"6 rows for 4 devices in batch\['a'\]\[0\]"):
        shard_batch({"a": [np.ones((6, 2))]}, mesh)


def test_errors():
    with pytest.raises(ValueError, match="`devices`"):
        data_mesh([])
    with pytest.raises(ValueError, match="`min_size`"):
        fully_sharded({}, data_mesh(), min_size=-1)
    with pytest.raises(ValueError, match="together or not at all"):
        initialize_distributed("localhost:1", process_id=0)
    with pytest.raises(ValueError, match=r"in \[0, 2\), got 2"):
        initialize_distributed("localhost:1", 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_equal_one(tmp_path, fsdp):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(__file__).parents[2]

    def start(devices, folder, *arguments):
        flag = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(int(fsdp)), *arguments],
            env={**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(*processes):
        try:
            for process in processes:
                output, _ = process.communicate(timeout=240)
                assert process.returncode == 0, output
        finally:
            for process in processes:
                process.kill()
                process.wait()
                process.stdout.close()

    for _ in range(2):
        # The second start resumes from what the first one saved.
        two = [start(4, tmp_path / "two", address, "2", str(i)) for i in range(2)]
        finish(*two)
    finish(start(8, tmp_path / "one"))
    one, two = (np.load(tmp_path / name / "params.npz") for name in ("one", "two"))
    assert sorted(one) == sorted(two) != []
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
