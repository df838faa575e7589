"""Orbax checkpoints as a source and a target of merges."""

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from mtjax.merging.checkpoint_files import Checkpoint, Stored, identity_of
from mtjax.merging.match import named_leaves, nested


class OrbaxCheckpoint:
    """An orbax checkpoint of a tree of arrays, read array by array.

    Args:
      folder: of the checkpoint, as `orbax.checkpoint.v1.save` wrote it.
    """

    def __init__(self, folder: Path):
        """Reads the metadata."""
        self.folder, self.is_tree = folder, True
        self.identity = identity_of(sorted(f for f in folder.rglob("*") if f.is_file()))
        try:
            self.tree = ocp.metadata(str(folder)).metadata
        except Exception as error:  # orbax raises many kinds
            raise ValueError(
                f"{folder} is no readable orbax checkpoint: {error}"
            ) from error
        self._context = ocp.Context()
        self._context.pytree.loading.partial_load = True
        self._keys = {
            name: _keys(folder, path)
            for name, (path, _) in zip(
                named_leaves(self.tree), jax.tree_util.tree_leaves_with_path(self.tree)
            )
        }
        self._lock = threading.Lock()
        self._last: tuple[str | None, Any] = None, None
        self.arrays = {
            name: Stored(tuple(leaf.shape), np.dtype(leaf.dtype), folder, 0)
            for name, leaf in named_leaves(self.tree).items()
        }

    def read_into(self, path: str, out: np.ndarray, begin: int = 0) -> None:
        """Reads elements from `begin` on into `out`, contiguous and of the dtype."""
        with self._lock:
            if self._last[0] != path:  # parts of one array are read in a row
                self._last = None, None  # not two at once
                self._last = path, self._load(path)
            values = self._last[1]
        out.reshape(-1)[:] = values[begin : begin + out.size]

    def _load(self, path: str) -> np.ndarray:
        stored = self.arrays[path]
        leaf = np.broadcast_to(np.zeros((), stored.dtype), stored.shape)  # no memory
        wanted = _nested(self._keys[path], leaf)
        with self._context:
            (values,) = jax.tree.leaves(ocp.load(str(self.folder), wanted))
        return np.asarray(values).reshape(-1)

    def close(self) -> None:
        """Nothing stays open."""


def save(folder: Path, arrays: Checkpoint) -> None:
    """Writes the tree of another checkpoint, with one of its arrays in memory.

    Args:
      folder: to write; seen only when it is complete.
      arrays: to be written; slashes in their paths are levels of the tree.
    """
    tree = nested({path: _Later(arrays, path) for path in arrays.arrays})
    types = orbax.type_handlers.create_type_handler_registry(
        (_Later, _OneByOne()),
        (jax.Array, orbax.type_handlers.ArrayHandler()),  # or orbax warns
    )
    handler = orbax.PyTreeCheckpointHandler(type_handler_registry=types)
    composite = orbax.CompositeCheckpointHandler(pytree=handler)
    with orbax.Checkpointer(composite) as checkpointer:
        checkpointer.save(
            str(folder), orbax.args.Composite(pytree=orbax.args.PyTreeSave(tree))
        )


class _Later:
    """An array of another checkpoint, with what orbax asks before it is read."""

    def __init__(self, source: Checkpoint, path: str):
        self._source, self._path = source, path
        stored = source.arrays[path]
        self.shape, self.dtype = stored.shape, stored.dtype
        self.ndim, self.size, self.nbytes = len(self.shape), stored.size, stored.nbytes

    def read(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        self._source.read_into(self._path, values)
        return values


class _OneByOne(orbax.type_handlers.NumpyHandler):
    """Writes arrays one after the other, where orbax would hold copies of all."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        args = args or [orbax.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args):
            written = await super().serialize([value.read()], [info], [arg])
            for future in written:
                future.result()
        return []


def _keys(folder: Path, path: Any) -> list[str]:
    if not all(isinstance(entry, jax.tree_util.DictKey) for entry in path):
        raise ValueError(
            f"{folder} holds a tree that is not made of dictionaries alone, at "
            f"{jax.tree_util.keystr(path)}; save `flax.serialization.to_state_dict` of "
            "it."
        )
    return [entry.key for entry in path]


def _nested(keys: list[str], leaf: Any) -> Any:
    return {keys[0]: _nested(keys[1:], leaf)} if keys else leaf
