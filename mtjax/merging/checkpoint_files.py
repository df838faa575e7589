"""Checkpoints on disk, read one parameter at a time.

Three layouts: a safetensors file, a folder of them as Hugging Face writes it, an orbax
checkpoint. Headers are checked before anything is allocated.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """One array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path  # that holds it
    start: int  # byte in the file

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


@runtime_checkable
class Checkpoint(Protocol):
    """A checkpoint that is open for reading; safe to use from several threads."""

    folder: Path
    arrays: dict[str, Stored]  # by path, in the order of the files
    is_tree: bool  # an orbax checkpoint
    identity: Any  # JSON values that change when the files do

    def read_into(self, path: str, out: np.ndarray, begin: int = 0) -> None:
        """Reads elements from `begin` on into `out`, contiguous and of the dtype."""

    def close(self) -> None:
        """Closes all files."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint.

    Args:
      path: a `.safetensors` file, a folder with some (and the index if there are
        several), or an orbax checkpoint of a tree of arrays.

    Returns:
      The checkpoint.

    Raises:
      ValueError: if nothing there can be read, a file is damaged or cut short, or an
        index names files outside of its folder.
    """
    path = Path(path).expanduser().resolve()
    if path.is_file():
        return SafetensorsCheckpoint([path])
    if not path.is_dir():
        raise ValueError(f"{path} does not exist.")
    if (path / "_CHECKPOINT_METADATA").exists() or (path / "_METADATA").exists():
        from mtjax.merging.orbax_files import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if (path / INDEX).exists():
        return SafetensorsCheckpoint(*_indexed(path))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{path} holds no checkpoint: no *.safetensors file and no orbax metadata. "
            "Convert other formats (*.bin, *.pt) to safetensors first."
        )
    return SafetensorsCheckpoint(files)


class SafetensorsCheckpoint:
    """One or several safetensors files.

    Args:
      files: in the order in which they are read.
      expected: file name of every array, where an index says so.
    """

    def __init__(self, files: list[Path], expected: Mapping[str, str] | None = None):
        """Reads and checks all headers."""
        self.folder, self.is_tree = files[0].parent, False
        self.identity = identity_of(files)
        self.arrays: dict[str, Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in self.arrays:
                    raise ValueError(
                        f"{name!r} is in both {self.arrays[name].file.name} and "
                        f"{file.name} of {self.folder}."
                    )
                self.arrays[name] = stored
        for name, file in (expected or {}).items():
            if (
                name not in self.arrays
                or self.arrays[name].file.name != Path(file).name
            ):
                raise ValueError(
                    f"{self.folder / INDEX} says that {name!r} is in {file}, but it is "
                    "not there."
                )
        self._handles = {file: os.open(file, os.O_RDONLY) for file in files}

    def read_into(self, path: str, out: np.ndarray, begin: int = 0) -> None:
        """Reads elements from `begin` on into `out`, contiguous and of the dtype."""
        stored = self.arrays[path]
        start, done = stored.start + begin * stored.dtype.itemsize, 0
        view = out.reshape(-1).view(np.uint8).data
        while done < len(view):
            handle = self._handles[stored.file]
            count = os.preadv(handle, [view[done:]], start + done)
            if count == 0:
                raise ValueError(f"{stored.file} was cut short while it was read.")
            done += count

    def close(self) -> None:
        """Closes all files."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def identity_of(files: Iterable[Path]) -> list[list[Any]]:
    """Place, size and time of change of files."""
    stats = ((str(file), file.stat()) for file in files)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _indexed(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that an index names, and which array is where."""
    index = folder / INDEX
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weights.values()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files.") from error
    files = []
    for name in names:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{index} names {name!r}, which is outside of its folder.")
        if not file.is_file():
            raise ValueError(f"{index} names {name!r}, which does not exist.")
        files.append(file)
    if not files:
        raise ValueError(f"{index} names no files.")
    return files, weights


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy"):  # checks sizes, offsets and overlaps
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file: {error}"
        ) from error
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name!r} in {file} has the type {entry['dtype']}, which cannot be "
                f"merged; known are {', '.join(DTYPES)}."
            )
        dtype = np.dtype(DTYPES[entry["dtype"]])
        start = 8 + length + entry["data_offsets"][0]
        arrays[name] = Stored(tuple(entry["shape"]), dtype, file, start)
    return dict(sorted(arrays.items(), key=lambda item: item[1].start))


class SafetensorsWriter:
    """Writes arrays part by part into a safetensors file of known layout.

    Args:
      file: to write; if it exists with the same layout, what is there stays.
      arrays: shape and type of every array, in the order of the file.
    """

    def __init__(self, file: Path, arrays: Mapping[str, Stored]):
        """Writes the header and reserves the space."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, stored in arrays.items():
            header[name] = {
                "dtype": CODES[stored.dtype],
                "shape": stored.shape,
                "data_offsets": (offset, offset + stored.nbytes),
            }
            self._places[name] = offset, stored.dtype.itemsize
            offset += stored.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._handle, len(text).to_bytes(8, "little") + text, 0)
        os.truncate(self._handle, self._data + offset)

    def write(self, name: str, values: np.ndarray, begin: int = 0) -> None:
        """Writes a part of an array, from element `begin` on."""
        view = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        offset, itemsize = self._places[name]
        start, done = self._data + offset + begin * itemsize, 0
        while done < len(view):
            done += os.pwrite(self._handle, view[done:], start + done)

    def close(self) -> None:
        """Waits until the disk has everything."""
        os.fsync(self._handle)
        os.close(self._handle)
