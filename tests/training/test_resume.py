"""Killing a run with SIGKILL and starting it again changes nothing."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import pytest

SCRIPT = Path(__file__).with_name("resumable_run.py")


@pytest.fixture(scope="module")
def resumable_run():
    spec = importlib.util.spec_from_file_location("resumable_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def uninterrupted(resumable_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    state, history = resumable_run.run(folder)
    return raw(state), history, (folder / "metrics.jsonl").read_text()


def raw(state):
    def data(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, state)


def start(folder, *arguments):
    # Faster to start than under the import hook, and closer to what users run.
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(folder, *arguments):
    process = start(folder, *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors


def assert_same_run(module, folder, uninterrupted, balancer="famo"):
    state, history = module.run(folder, balancer)
    expected, expected_history, expected_lines = uninterrupted
    chex.assert_trees_all_equal(raw(state), expected)
    assert history == expected_history
    assert (Path(folder) / "metrics.jsonl").read_text() == expected_lines


@pytest.mark.filterwarnings("ignore:Skipping checkpoint")
def test_killed_between_and_inside_saves(resumable_run, uninterrupted, tmp_path):
    killed(tmp_path, "--kill-at", "5")
    killed(tmp_path, "--kill-at", "8", "--kill-in", "save")
    assert_same_run(resumable_run, tmp_path, uninterrupted)


def test_finished_run_returns_at_once(resumable_run, uninterrupted, tmp_path):
    assert_same_run(resumable_run, tmp_path, uninterrupted)
    assert_same_run(resumable_run, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping checkpoint")
@pytest.mark.parametrize("where", ["data", "save", "commit"])
@pytest.mark.parametrize("step", [1, 2, 3, 6, 7, 11])
def test_killed_anywhere(resumable_run, uninterrupted, tmp_path, step, where):
    killed(tmp_path, "--kill-at", str(step), "--kill-in", where)
    assert_same_run(resumable_run, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping checkpoint")
@pytest.mark.parametrize("balancer", ["pcgrad", "graddrop"])
def test_killed_with_other_balancers(resumable_run, tmp_path, balancer):
    state, history = resumable_run.run(tmp_path / "whole", balancer)
    lines = (tmp_path / "whole/metrics.jsonl").read_text()
    folder = tmp_path / "killed"
    killed(folder, "--balancer", balancer, "--kill-at", "6", "--kill-in", "save")
    killed(folder, "--balancer", balancer, "--kill-at", "9")
    assert_same_run(resumable_run, folder, (raw(state), history, lines), balancer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping checkpoint")
@pytest.mark.parametrize("seed", range(4))
def test_killed_from_outside(resumable_run, uninterrupted, tmp_path, seed):
    rng = random.Random(seed)
    metrics = tmp_path / "metrics.jsonl"
    process = start(tmp_path)
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 3.0))
    process.kill()
    process.communicate(timeout=120)
    assert_same_run(resumable_run, tmp_path, uninterrupted)
