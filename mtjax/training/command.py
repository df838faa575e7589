"""`mtjax export`."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mtjax.merging.checkpoint_files import open_checkpoint
from mtjax.merging.match import named_leaves
from mtjax.training.export import PLATFORMS, check_export, export_model


def export(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    checkpoint: Path | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> None:
    """Write a model as one StableHLO file, to be run by JAX alone.

    The model is named by a Python function without arguments that returns
    `(apply_fn, params, example)`: outputs are `apply_fn(params, batch)`, and `example`
    is a batch like those to come, with the examples on the first axis. Batches may then
    have any number of examples. The file is tried in another process, which can import
    nothing but JAX, with two sizes of batches, before the command is done.

      mtjax export my_package.my_module:make --checkpoint CHECKPOINT --out model.jax

    To serve it, with the packages jax and flatbuffers:

      from jax import export
      model = export.deserialize(bytearray(open("model.jax", "rb").read()))
      outputs = model.call(batch)

    Args:
      model: `module:function`; the module is looked for where Python does, and in the
        current folder.
      out: file to write.
      checkpoint: takes the place of the function's parameters: safetensors or orbax,
        with the same paths, shapes and types.
      platforms: where the file will run.
    """
    apply_fn, params, example = _made(model)
    if checkpoint is not None:
        params = _loaded(checkpoint, params)
    exported = export_model(apply_fn, params, example, out, platforms=platforms)
    for batch in (example, jax.tree.map(lambda x: x[:1], example)):
        found = check_export(out, batch)
        expected = jax.tree.leaves(jax.jit(apply_fn)(params, batch))
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(
                np.asarray(ours, np.float64), theirs, rtol=1e-3, atol=1e-5
            )
    size = out.stat().st_size / 1e6
    print(f"{out}: {size:.1f} MB, for {', '.join(exported.platforms)}; checked.")
    for kind, avals in (("in", exported.in_avals), ("out", exported.out_avals)):
        print(f"  {kind}: {', '.join(str(aval) for aval in avals)}")


def _made(name: str) -> tuple[Any, Any, Any]:
    """What the function of that name returns."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`model` must be `module:function` that can be imported, got {name!r}: "
            f"{error}"
        ) from error
    finally:
        sys.path.remove("")
    made = make()
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[0]):
        raise ValueError(
            f"`model` must return (apply_fn, params, example), {name!r} returned "
            f"{type(made).__name__}."
        )
    return made


def _loaded(path: Path, params: Any) -> Any:
    """The arrays of a checkpoint in the places of parameters with the same paths."""
    stored, wanted = open_checkpoint(path), named_leaves(params)
    wrong = [
        f"  {name}: {stored.arrays.get(name, 'missing')} in place of {jnp.shape(leaf)}"
        for name, leaf in wanted.items()
        if name not in stored.arrays or stored.arrays[name].shape != jnp.shape(leaf)
    ]
    if wrong:
        raise ValueError(
            f"`checkpoint` must hold every parameter; {path} differs:\n"
            + "\n".join(wrong[:20])
        )
    leaves = []
    for name, leaf in wanted.items():
        array = np.empty(jnp.shape(leaf), stored.arrays[name].dtype)
        stored.read_into(name, array)
        leaves.append(jnp.asarray(array, jnp.result_type(leaf)))
    stored.close()
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
