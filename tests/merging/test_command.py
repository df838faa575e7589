"""`mtjax merge` as people type it, and what it takes of memory and interruptions."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mtjax import merging
from mtjax.cli import main
from mtjax.merging.checkpoint_files import open_checkpoint
from mtjax.merging.orbax_files import save
from tests.merging.catalogue import models_like

SHAPES = {"layers.0.weight": (6, 8), "layers.1.weight": (6, 8), "head": (8,)}


@pytest.fixture
def files(tmp_path):
    """Paths and trees of a base and three models."""
    base, models = models_like(SHAPES, 3)
    paths = []
    for name, tree in zip(("base", "a", "b", "c"), (base, *models)):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file({p: np.asarray(x) for p, x in tree.items()}, paths[-1])
    return paths, base, models


def run(capsys, *args):
    """Exit status, standard output, standard error."""
    try:
        main(["merge", *map(str, args)])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def check(out, expected):
    found = load_file(out)
    assert sorted(found) == sorted(expected)
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=1e-5, atol=1e-6)


def test_options(capsys, tmp_path, files):
    (base_file, *model_files), base, models = files
    out = tmp_path / "out.safetensors"
    status, text, _ = run(
        capsys,
        *("--method", "ties", "--base", base_file, "--models", *model_files),
        *("--out", out, "--set", "density=0.5", "scale=0.7", "--exclude", "head"),
    )
    assert status == 0
    assert "merge 2 arrays of 3 models, copy 1" in text
    assert "in 4 pass(es)" in text
    check(out, merging.ties(0.5, 0.7)(base, models, where="layers"))


def test_a_recipe_with_steps_and_names(capsys, tmp_path, files):
    (base_file, *model_files), base, models = files
    out = tmp_path / "out.safetensors"
    recipe = {
        "base": base_file,
        "models": dict(zip("xyz", model_files)),
        "out": str(tmp_path / "elsewhere"),
        "method": [{"dare": {"drop_rate": 0.5}}, {"task_arithmetic": {"scale": 0.3}}],
        "seed": 3,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, text, _ = run(
        capsys, "--recipe", tmp_path / "recipe.yaml", "--out", out, "--dry-run"
    )
    assert status == 0
    assert "Nothing was written" in text
    assert not out.exists()
    status, _, _ = run(capsys, "--recipe", tmp_path / "recipe.yaml", "--out", out)
    assert status == 0
    merger = merging.chain(merging.dare(0.5), merging.task_arithmetic(0.3))
    check(out, merger(base, models, key=jax.random.key(3)))


def test_a_method_inside_a_method(capsys, tmp_path, files):
    (base_file, *model_files), base, models = files
    line = ("--base", base_file, "--models", *model_files, "--method", "knots")
    out = tmp_path / "out.safetensors"
    status, _, _ = run(capsys, *line, "--out", out, "--set", "merger=ties")
    assert status == 0
    knots = lambda merger: merging.knots(merger, out_axis=0)
    check(out, knots(merging.ties())(base, models))
    steps = "merger=[{dare: {drop_rate: 0.5}}, {ties: {density: 0.5}}]"
    out = tmp_path / "steps.safetensors"
    status, _, _ = run(capsys, *line, "--out", out, "--set", steps, "--seed", "3")
    assert status == 0
    merger = merging.chain(merging.dare(0.5), merging.ties(density=0.5))
    check(out, knots(merger)(base, models, key=jax.random.key(3)))
    for given, message in (("merger=[]", "at least one step"), ("x=1", "it takes")):
        again = tmp_path / "again.safetensors"
        status, _, text = run(capsys, *line, "--out", again, "--set", given)
        assert status == 2
        assert message in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "tise"], "task_arithmetic"),
        (["--method", "ties", "--set", "densty=1"], "it takes density, scale"),
        (["--method", "ties", "--set", "density=2.0"], "`density`"),
        (["--method", "ties", "--set", "density"], "NAME=VALUE"),
        (["--method", "slerp"], "two models"),
        (["--method", "ties", "--dtype", "float12"], "float12"),
        (["--method", "ties", "--dtype", "int8"], "float16, bfloat16"),
        (["--method", "ties", "--dtype", "complex64"], "got complex64"),
        (["--method", "ties", "--missing", "maybe"], "unchanged"),
        (["--method", "ties", "--include", "none"], "at least one"),
        (["--method", "ties", "--recipe", "bad.yaml"], "unknown keys ['modles']"),
        ([], "--method must be given"),
    ],
)
def test_errors_exit_with_2_and_write_nothing(
    capsys, tmp_path, monkeypatch, files, args, message
):
    (base_file, *model_files), _, _ = files
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("modles: [a]")
    before = sorted(tmp_path.iterdir())
    paths = ["--base", base_file, "--models", *model_files, "--out", "out"]
    status, _, error = run(capsys, *args, *paths)
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def large(folder, layers, size, models=3):
    """Checkpoints of bfloat16 in two files each; paths of the base and the models."""
    rng = np.random.default_rng(0)
    folders = []
    for name in ("base", *(f"m{i}" for i in range(models))):
        folders.append(folder / name)
        folders[-1].mkdir()
        where = {}
        for part in range(2):
            file = f"model-{part + 1:05}-of-00002.safetensors"
            tree = {
                f"layers.{i}.weight": rng.standard_normal(size, np.float32).astype(
                    jnp.bfloat16
                )
                for i in range(part, layers, 2)
            }
            save_file(tree, folders[-1] / file)
            where |= dict.fromkeys(tree, file)
        index = folders[-1] / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folders


# A small parent: what a process peaks at begins with the memory of the one it forks.
WATCH = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(status)
"""


def command(folders, out, *more):
    base, *models = map(str, folders)
    code = "from mtjax.cli import main; main()"
    line = [sys.executable, "-c", code, "merge", "--models", *models]
    return [*line, "--base", base, "--out", str(out), *more]


def peak_of(line):
    """Bytes that a command needs at most."""
    environment = os.environ | {"XLA_FLAGS": ""}
    watch = [sys.executable, "-c", WATCH, *line]
    out = subprocess.run(watch, env=environment, check=True, capture_output=True)
    return int(out.stdout.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "average",
        "task_arithmetic",
        "ties",
        "[{ties: {scope: tensor}}]",
        "[{dare: {drop_rate: 0.5}}, task_arithmetic]",
    ],
)
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, method):
    folders = large(tmp_path, layers=8, size=20_000_000)
    leaf, models = 2 * 20_000_000, len(folders) - 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: {method}")
    line = command(folders, tmp_path / "out", "--recipe", str(recipe))
    assert peak_of(line) < (models + 2) * leaf + 300e6


@pytest.mark.slow
def test_memory_does_not_grow_with_an_orbax_checkpoint(tmp_path):
    folders = large(tmp_path, layers=20, size=20_000_000, models=2)
    for i, folder in enumerate(folders):
        source = open_checkpoint(folder)
        folders[i] = folder.with_name(f"{folder.name}_orbax")
        save(folders[i], source)
        source.close()
    peak = peak_of(command(folders, tmp_path / "out", "--method", "average"))
    assert (tmp_path / "out" / "_CHECKPOINT_METADATA").exists()
    # Orbax decodes and encodes whole arrays: up to four more. A model is 800 MB.
    assert peak < (2 + 2 + 4) * 40_000_000 + 300e6


@pytest.mark.slow
def test_a_killed_merge_goes_on(tmp_path):
    folders = large(tmp_path, layers=6, size=6_000_000)
    line = command(folders, tmp_path / "out", "--method", "ties")
    whole = command(folders, tmp_path / "whole", "--method", "ties")
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal"
    while child.poll() is None:
        if journal.exists() and journal.read_text().count("\n") > 2:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
