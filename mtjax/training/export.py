"""Models as StableHLO artefacts, which run where mtjax is not installed."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import PyTree

from mtjax.training.commit import write_atomically

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    apply_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    example: PyTree,
    path: str | Path,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> export.Exported:
    """Writes a model with its parameters to one file, for batches of any size.

    The file is what `jax.export` serialises: portable StableHLO with the parameters as
    constants, which later versions of JAX read as well (their compatibility is
    promised for six months). To serve it, nothing of mtjax is needed, only the packages
    `jax` and `flatbuffers`::

        import pathlib
        from jax import export
        model = export.deserialize(bytearray(pathlib.Path("model.jax").read_bytes()))
        outputs = model.call(batch)

    Args:
      apply_fn: `apply_fn(params, batch)`: from a batch to outputs, in the form for
        inference; a pure function that never asks for the number of examples as an
        integer (`x.shape[0]` and not `len(x)`).
      params: the parameters, or all variables of a Linen module.
      example: a batch whose arrays have the examples on the first axis: types and other
        sizes are those that the artefact will take. Lists, tuples and dictionaries.
      path: of the file; replaced at once when everything has succeeded.
      platforms: where it will run.

    Returns:
      What was written.

    Raises:
      ValueError: if an array of `example` has no first axis, their first axes differ, a
        platform is unknown, or the model cannot be traced for batches of any size.

    Example:
      >>> import tempfile
      >>> apply_fn = lambda params, batch: {"click": batch["x"] @ params}
      >>> params, example = jnp.array([1.0, 2.0]), {"x": jnp.ones((4, 2))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder) / "model.jax"
      ...     _ = export_model(apply_fn, params, example, file)
      ...     model = export.deserialize(bytearray(file.read_bytes()))
      >>> print(model.call({"x": jnp.ones((3, 2))})["click"])
      [3. 3. 3.]
    """
    unknown = sorted(set(platforms) - {*PLATFORMS, "rocm"})
    if unknown or not platforms:
        raise ValueError(
            f"`platforms` must be among {(*PLATFORMS, 'rocm')}, got "
            f"{tuple(platforms)!r}."
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(example)]
    if not shapes or len({shape[:1] for shape in shapes} | {()}) != 2:
        raise ValueError(
            "`example` must hold arrays with one number of examples on the first axis, "
            f"got the shapes {shapes}."
        )
    (batch,) = export.symbolic_shape("batch")
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *jnp.shape(x)[1:]), jnp.result_type(x)),
        example,
    )
    serve = jax.jit(lambda inputs: apply_fn(params, inputs))
    try:
        exported = export.export(serve, platforms=tuple(platforms))(abstract)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise ValueError(
            "`apply_fn` must be traceable for any number of examples, which is a "
            "symbol and no integer: use `x.shape[0]`, not `len(x)`. JAX says: "
            f"{error}"
        ) from error
    write_atomically(Path(path), bytes(exported.serialize()))
    return exported


def check_export(path: str | Path, batch: PyTree) -> list[np.ndarray]:
    """Runs an exported model in a process of its own that has nothing but JAX.

    Args:
      path: what `export_model` wrote.
      batch: inputs of any number of examples.

    Returns:
      The leaves of the outputs.

    Raises:
      RuntimeError: if the process fails, with what it said.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, *leaves)
        command = [sys.executable, "-c", _SERVE, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} cannot be run by JAX alone:\n{done.stderr}")
        with np.load(outputs) as found:
            return [found[f"arr_{i}"] for i in range(len(found.files))]


# What others than JAX and what it needs are is told by name: in an environment without
# them, nothing would be blocked.
_SERVE = """
import importlib.abc, pathlib, sys

class OnlyJax(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("mtjax", "flax", "optax", "orbax", "tensorflow"):
            raise ImportError(f"the exported model needs {name}")

sys.meta_path.insert(0, OnlyJax())
import jax, numpy
from jax import export

path, inputs, outputs = sys.argv[1:]
model = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
with numpy.load(inputs) as found:
    leaves = [found[f"arr_{i}"] for i in range(len(found.files))]
args, kwargs = jax.tree.unflatten(model.in_tree, leaves)
numpy.savez(outputs, *jax.tree.leaves(model.call(*args, **kwargs)))
"""
