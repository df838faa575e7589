"""Exported models: any number of examples, no package but JAX."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mtjax import cli
from mtjax.merging.match import named_leaves
from mtjax.nn import MMoE
from mtjax.training.export import check_export, export_model

MODEL = MMoE(("click", "buy"), 3, ((4,),))
BATCH = jax.random.normal(jax.random.key(0), (5, 6))


@functools.cache
def made(seed=1):
    return jax.jit(MODEL.init)(jax.random.key(seed), BATCH)


def make():
    """For the command."""
    return MODEL.apply, made(), BATCH


def close(found, batch, params):
    for a, b in zip(jax.tree.leaves(MODEL.apply(params, batch)), found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_another_process_gives_the_same_for_other_sizes(tmp_path):
    file = tmp_path / "model.jax"
    exported = export_model(MODEL.apply, made(), BATCH, file)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(aval.shape[0]) for aval in exported.out_avals] == ["batch", "batch"]
    larger = jnp.concatenate([BATCH, 2 * BATCH])
    close(check_export(file, larger), larger, made())


def test_a_model_that_needs_more_than_jax_is_told(tmp_path, monkeypatch):
    file = tmp_path / "model.jax"
    export_model(MODEL.apply, made(), BATCH, file, platforms=["cpu"])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RuntimeError, match="cannot be run by JAX alone"):
        check_export(file, BATCH)


def test_the_number_of_examples_must_not_be_an_integer(tmp_path):
    fixed = lambda params, x: x + jnp.zeros((len(x), 1))
    with pytest.raises(ValueError, match=r"`apply_fn` .* use `x.shape\[0\]`"):
        export_model(fixed, {}, BATCH, tmp_path / "model.jax")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("example", "platforms", "match"),
    [
        ({"x": jnp.ones((2, 3)), "y": jnp.ones(3)}, ["cpu"], "`example` must hold"),
        (jnp.ones(()), ["cpu"], "`example` must hold"),
        (BATCH, ["abacus"], "`platforms` must be among"),
        (BATCH, [], "`platforms` must be among"),
    ],
)
def test_errors(tmp_path, example, platforms, match):
    identity = lambda params, x: x
    with pytest.raises(ValueError, match=match):
        export_model(identity, {}, example, tmp_path / "m", platforms=platforms)


def test_command_takes_a_checkpoint_and_checks(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    weights = tmp_path / "weights.safetensors"
    other = made(2)
    save_file({k: np.asarray(x) for k, x in named_leaves(other).items()}, weights)
    out = tmp_path / "model.jax"
    cli.main(
        ["export", "test_export:make", "--checkpoint", str(weights), "--out", str(out)]
    )
    assert "float32[batch,6]" in capsys.readouterr().out
    close(check_export(out, BATCH), BATCH, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "`model` must be `module:function`"),
        ("json:nothing", "`model` must be `module:function`"),
        ("os:getcwd", "`model` must return"),
    ],
)
def test_command_names_what_is_wrong(tmp_path, capsys, name, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", name, "--out", str(tmp_path / "m")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
