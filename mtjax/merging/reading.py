"""Reads one parameter of several checkpoints, ahead of time and in bounded memory."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from mtjax.merging.checkpoint_files import Checkpoint
from mtjax.merging.merger import Merger, Source, leaf_key

PIECE = 1 << 19  # elements merged at once where a method allows it
_ALIGNMENT = 64  # bytes; JAX takes such buffers on CPUs without copying
_INSIDE = 3  # pieces in memory at once: read, computed, written


class Unit(NamedTuple):
    """What is read at once: a parameter or a part of it, in elements."""

    path: str
    begin: int
    end: int


@dataclass(frozen=True)
class Reader:
    """Reads units of all models.

    Attributes:
      merger: tells how parameters may be cut.
      reference: checkpoint with the paths and shapes; the base if there is one.
      columns: the models, and their own paths by the reference's.
      has_base: whether the reference is a base.
      depths: by path, of all parameters that are merged.
      key: for methods that draw random numbers.
    """

    merger: Merger
    reference: Checkpoint
    columns: Sequence[tuple[Checkpoint, Mapping[str, str]]]
    has_base: bool
    depths: Mapping[str, float]
    key: Key[Array, ""] | None

    @property
    def whole(self) -> bool:
        """Whether parameters must be in memory whole."""
        local = any(s.totals and s.scope == "tensor" for s in self.merger.steps)
        return local or not self.merger.elementwise

    def units(self, path: str) -> list[Unit]:
        """The units of one parameter."""
        size = self.reference.arrays[path].size
        step = size if self.whole else PIECE
        return [Unit(path, *span) for span in spans(0, size, step)]

    def nbytes(self, unit: Unit) -> int:
        """Bytes of what is read."""
        base = self.reference.arrays[unit.path].dtype.itemsize if self.has_base else 0
        rows = len(self.columns) * self._dtype(unit.path).itemsize
        return (unit.end - unit.begin) * (base + rows)

    @property
    def memory(self) -> int:
        """The most bytes of models that are in memory at once, with the output."""
        most = self._largest
        itemsize = self.reference.arrays[most.path].dtype.itemsize
        one = self.nbytes(most) + (most.end - most.begin) * itemsize
        return one if self.whole else _INSIDE * one

    @property
    def _largest(self) -> Unit:
        units = (unit for path in self.depths for unit in self.units(path))
        return max(units, key=self.nbytes)

    def ahead(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, list[Source]]]:
        """Reads units one after the other, the next ones while one is being used."""
        todo, waiting, inside = deque(units), deque(), 0
        most = self.nbytes(self._largest) * (1 if self.whole else _INSIDE)
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            while todo or waiting:
                while todo and (not waiting or inside + self.nbytes(todo[0]) <= most):
                    unit = todo.popleft()
                    inside += self.nbytes(unit)
                    waiting.append((unit, pool.submit(self.read, unit)))
                unit, future = waiting.popleft()
                pieces = future.result()
                yield unit, pieces
                pieces.clear()  # whoever still holds the list must not keep the arrays
                inside -= self.nbytes(unit)

    def read(self, unit: Unit) -> list[Source]:
        """Reads one unit."""
        step = PIECE if self.merger.elementwise else max(unit.end - unit.begin, 1)
        return [
            self._piece(unit.path, *span) for span in spans(unit.begin, unit.end, step)
        ]

    def _piece(self, path: str, begin: int, end: int) -> Source:
        stored = self.reference.arrays[path]
        base = None
        if self.has_base:
            base = aligned_empty((end - begin,), stored.dtype)
            self.reference.read_into(path, base, begin)
        rows = aligned_empty((len(self.columns), end - begin), self._dtype(path))
        for row, (checkpoint, names) in zip(rows, self.columns):
            if path not in names:  # as if the model had not changed it
                row[:] = base
                continue
            dtype = checkpoint.arrays[names[path]].dtype
            raw = row if dtype == row.dtype else np.empty(row.shape, dtype)
            checkpoint.read_into(names[path], raw, begin)
            if raw is not row:
                row[:] = raw
        if not self.merger.elementwise:
            rows = rows.reshape(-1, *stored.shape)
            base = base if base is None else base.reshape(stored.shape)
        base, rows = jax.device_put((base, rows), may_alias=True)
        depth = np.float32(self.depths[path])
        return Source(base, rows, leaf_key(self.key, path), depth, np.uint32(begin))

    def _dtype(self, path: str) -> np.dtype:
        """The type in which models are read: theirs if they have one in common."""
        own = [(c, names[path]) for c, names in self.columns if path in names]
        found = {checkpoint.arrays[name].dtype for checkpoint, name in own}
        if self.has_base:
            found.add(self.reference.arrays[path].dtype)
        one = len(found) == 1 and np.dtype(np.float64) not in found
        return found.pop() if one else np.dtype(np.float32)


def spans(begin: int, end: int, step: int) -> list[tuple[int, int]]:
    """Cuts a range; an empty one is one empty piece."""
    starts = range(begin, max(end, begin + 1), max(step, 1))
    return [(start, min(start + step, end)) for start in starts]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX can use on a CPU without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
