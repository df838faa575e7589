"""Merges checkpoints on disk without ever holding a model.

One thread reads, the caller's computes, one writes. How much is in flight is bounded in
bytes, so that memory does not grow with the size of the checkpoints.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Key
from rich.progress import Progress

from mtjax.merging.checkpoint_files import CODES, Checkpoint, Stored, open_checkpoint
from mtjax.merging.depth import depth_of_blocks
from mtjax.merging.match import (
    Mismatch,
    Where,
    by_name,
    check_match,
    mismatches,
)
from mtjax.merging.merger import DepthOf, Merger, Pieces
from mtjax.merging.reading import PIECE, Reader, Unit, aligned_empty, spans
from mtjax.merging.writing import Output, TreeOutput

Missing = Literal["error", "unchanged"]
_UNWRITTEN = 2  # parts that wait for the disk
_FLOATS = tuple(dtype for dtype in CODES if jnp.issubdtype(dtype, jnp.floating))


@dataclass(frozen=True)
class Plan:
    """What a merge will do, told from headers alone.

    Attributes:
      reader: reads what is merged.
      arrays: shape and type of everything that is written, in that order.
      kept: paths that are copied from the base.
      notes: differences between the models that stop no merge.
    """

    reader: Reader
    arrays: Mapping[str, Stored]
    kept: tuple[str, ...]
    notes: tuple[Mismatch, ...]

    @property
    def merged(self) -> tuple[str, ...]:
        """Paths that are merged."""
        return tuple(self.reader.depths)

    @property
    def bytes_read(self) -> int:
        """Bytes read in all passes."""
        units = (u for path in self.merged for u in self.reader.units(path))
        once = sum(self.reader.nbytes(unit) for unit in units)
        copied = sum(self.reader.reference.arrays[path].nbytes for path in self.kept)
        return (self.reader.merger.passes + 1) * once + copied

    @property
    def bytes_written(self) -> int:
        """Bytes of the new checkpoint."""
        return sum(stored.nbytes for stored in self.arrays.values())

    def describe(self) -> str:
        """The plan in words."""
        reader = self.reader
        lines = [
            f"merge {len(self.merged)} arrays of {len(reader.columns)} models, "
            f"copy {len(self.kept)}",
            f"read {_size(self.bytes_read)} in {reader.merger.passes + 1} pass(es), "
            f"write {_size(self.bytes_written)}",
            f"hold {_size(reader.memory)} of models in memory at once, "
            + ("whole arrays" if reader.whole else "pieces of arrays"),
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def merge_checkpoints(
    merger: Merger,
    models: Mapping[str, Any] | Sequence[Any],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    where: Where = None,
    missing: Missing = "error",
    dtype: DTypeLike | None = None,
    depth_of: DepthOf = depth_of_blocks,
    key: Key[Array, ""] | None = None,
    identity: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> Plan:
    """Merges checkpoints into a new one, parameter by parameter.

    Args:
      merger: the method.
      models: checkpoints (see `open_checkpoint`), by name or in a sequence. Layouts may
        differ as long as the paths of arrays agree; dots and slashes are the same.
      out: what to write, must not exist: a `.safetensors` file; or a folder in the
        base's layout, which is safetensors with the base's other files (configuration,
        tokenizer), or orbax. Orbax is written at the end, from a file beside it that
        has the same size. Nothing is seen at this place before it is complete.
      base: the model that all were fine-tuned from.
      where: which arrays to merge; see `Merger`. Others, and arrays that are not
        floating point, are copied from the base (without one: from the first model).
      missing: what to do with a model that lacks an array: an error, or to take it as
        unchanged from the base.
      dtype: of merged arrays; the base's own by default. Arithmetic is in float32.
      depth_of: see `Merger`.
      key: see `Merger`. Results are those of merging in memory with the same key.
      identity: text that identifies the merger, such as a recipe. With it, a merge that
        was stopped goes on when it is started again with the same inputs: what was
        written stays, passes that only read are repeated.
      dry_run: plan only.
      progress: show a bar.

    Returns:
      The plan.

    Raises:
      ValueError: if models do not match, a file is damaged, `out` exists, or `dtype` is
        no type of floating point numbers. Nothing is written then.
    """
    out = Path(out).expanduser().resolve()
    if out.exists():
        raise ValueError(f"`out` must be new, but {out} exists.")
    merger.check(base is not None, key)
    if dtype is not None and np.dtype(dtype) not in _FLOATS:
        raise ValueError(
            f"`dtype` must be one of {', '.join(x.name for x in _FLOATS)}, got "
            f"{np.dtype(dtype).name}."
        )
    if missing == "unchanged" and base is None:
        raise ValueError("`missing` can only be 'unchanged' if `base` is given.")
    with ExitStack() as stack:

        def opened(path) -> Checkpoint:
            checkpoint = open_checkpoint(path)
            stack.callback(checkpoint.close)
            return checkpoint

        named = by_name(models)
        if not isinstance(models, Mapping):  # errors name the files
            named = {f"{i} ({Path(path).name})": path for i, path in named.items()}
        columns = {name: opened(path) for name, path in named.items()}
        first = next(iter(columns.values()))
        reference = first if base is None else opened(base)
        names = {name: _own_names(reference, c) for name, c in columns.items()}
        chosen, notes = _compare(reference, columns, names, where, missing)
        depths = depth_of(chosen)
        reader = Reader(
            merger,
            reference,
            [(columns[name], names[name]) for name in columns],
            base is not None,
            {path: depths[path] for path in chosen},
            key,
        )
        arrays = {
            path: stored._replace(dtype=np.dtype(dtype))
            if dtype is not None and path in reader.depths
            else stored
            for path, stored in reference.arrays.items()
        }
        for path, stored in arrays.items():
            if stored.dtype not in CODES:
                raise ValueError(
                    f"{path!r} has the type {stored.dtype.name}, which cannot be "
                    f"written; known are {', '.join(x.name for x in CODES)}."
                )
        kept = tuple(path for path in arrays if path not in reader.depths)
        plan = Plan(reader, arrays, kept, tuple(notes))
        if not dry_run:
            _run(plan, out, identity, progress)
    return plan


def _run(plan: Plan, out: Path, identity: str | None, progress: bool) -> None:
    reader = plan.reader
    if identity is not None:
        opened = [reader.reference, *(c for c, _ in reader.columns)]
        identity = json.dumps([identity, [c.identity for c in opened]])
    tree = reader.reference.is_tree and out.suffix != ".safetensors"
    output = (TreeOutput if tree else Output)(out, plan.arrays, identity)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("reading", total=plan.bytes_read)

        def pieces(paths):
            for unit, read in reader.ahead(u for p in paths for u in reader.units(p)):
                yield unit, read
                bar.advance(task, reader.nbytes(unit))

        todo = [path for path in plan.merged if path not in output.done]
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
                totals = ()
                if todo:
                    totals = reader.merger.totals(
                        lambda: (read for _, read in pieces(plan.merged))
                    )
                bar.update(task, description="merging")
                pending = []
                ready = chain(
                    _copied(plan, output.done), _merged(plan, pieces(todo), totals)
                )
                for part in ready:
                    pending.append(pool.submit(output.write, *part))
                    del part
                    if len(pending) > _UNWRITTEN:
                        pending.pop(0).result()
                for write in pending:
                    write.result()
            bar.update(task, description="finishing")
            output.finish(reader.reference.folder)
        finally:
            output.close()


def _copied(plan: Plan, done: Set[str]) -> Iterator[tuple[str, np.ndarray, int]]:
    reference = plan.reader.reference
    for path in plan.kept:
        if path in done:
            continue
        stored = reference.arrays[path]
        for begin, end in spans(0, stored.size, PIECE):
            values = aligned_empty((end - begin,), stored.dtype)
            reference.read_into(path, values, begin)
            yield path, values, begin


def _merged(
    plan: Plan, pieces: Iterable[tuple[Unit, Pieces]], totals: tuple
) -> Iterator[tuple[str, np.ndarray, int]]:
    for unit, read in pieces:
        dtype, begin = plan.arrays[unit.path].dtype, unit.begin
        # JAX has no float64 as a rule; results are float32 then.
        computed = jax.dtypes.canonicalize_dtype(dtype)
        for result in plan.reader.merger.merged(read, totals, computed):
            values = np.asarray(result, dtype).reshape(-1)
            yield unit.path, values, begin
            begin += values.size


def _own_names(reference: Checkpoint, model: Checkpoint) -> dict[str, str]:
    """The model's paths by the reference's; dots and slashes are the same."""
    own = {path.replace("/", "."): path for path in model.arrays}
    found = {path: own.get(path.replace("/", ".")) for path in reference.arrays}
    return {path: name for path, name in found.items() if name is not None}


def _compare(
    reference: Checkpoint,
    columns: Mapping[str, Checkpoint],
    names: Mapping[str, Mapping[str, str]],
    where: Where,
    missing: Missing,
) -> tuple[list[str], list[Mismatch]]:
    """Which arrays are merged, and what may be worth knowing."""
    models = {}
    for name, column in columns.items():
        renamed = {own: path for path, own in names[name].items()}
        models[name] = {renamed.get(p, p): x for p, x in column.arrays.items()}
    found = mismatches(reference.arrays, models, where)
    if missing == "unchanged":
        models = {name: dict(reference.arrays) | x for name, x in models.items()}
    chosen = check_match(reference.arrays, models, where)
    return chosen, [m for m in found if m.kind in ("precision", "missing")]


def _size(nbytes: int) -> str:
    """Bytes in units that people read."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.3g} {unit}"
    return f"{nbytes} B"
