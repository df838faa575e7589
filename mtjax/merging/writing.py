"""Writes a merged checkpoint so that nobody ever sees half of it."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtjax.merging.checkpoint_files import (
    INDEX,
    SafetensorsCheckpoint,
    SafetensorsWriter,
    Stored,
)

SHARD = 5 * 10**9  # bytes per file of a folder
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")


class Output:
    """A folder beside the target, which becomes the target when it is complete.

    Args:
      out: the target, which does not exist: a `.safetensors` file, or a folder.
      arrays: shape and type of everything that will be written, in that order.
      identity: text that says what is being merged from what; `None` starts anew. If an
        earlier attempt left arrays of the same text, they are not written again.
    """

    def __init__(self, out: Path, arrays: Mapping[str, Stored], identity: str | None):
        """Makes the folder, or opens that of an earlier attempt."""
        self._out, self._folder = out, out.with_name(out.name + ".partial")
        self._arrays = arrays
        self.done = self._resume(identity)
        self._single = out.suffix == ".safetensors"
        self._files = _files(arrays, None if self._single else SHARD)
        self._open: list[SafetensorsWriter] = []
        self._writer_of: dict[str, SafetensorsWriter] = {}
        for name, paths in self._files.items():
            layout = {path: arrays[path] for path in paths}
            self._open.append(SafetensorsWriter(self._folder / name, layout))
            self._writer_of |= dict.fromkeys(paths, self._open[-1])

    def _resume(self, identity: str | None) -> set[str]:
        text = identity if identity is None else _digest(identity, self._arrays)
        journal = self._folder / "journal"
        found = journal.read_text(encoding="utf-8") if journal.exists() else ""
        lines = found.split("\n")
        if text is None or lines[:1] != [text]:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            lines = [text or "", ""]
            journal.write_text("\n".join(lines), encoding="utf-8")
        self._journal = journal.open("a", encoding="utf-8")
        # The last line was cut short or is empty.
        return {json.loads(line) for line in lines[1:-1] if line}

    def write(self, path: str, values: np.ndarray, begin: int) -> None:
        """Writes a part of an array, from element `begin` on; the last part ends it."""
        self._writer_of[path].write(path, values, begin)
        if begin + values.size == self._arrays[path].size:
            self._journal.write(json.dumps(path) + "\n")
            self._journal.flush()
            self.done.add(path)

    def close(self) -> None:
        """Closes the files; arrays that are complete stay for another attempt."""
        self._journal.close()
        while self._open:
            self._open.pop().close()
        if not self.done and self._folder.exists():
            shutil.rmtree(self._folder)

    def finish(self, copied_from: Path | None) -> None:
        """Puts the result in its place.

        Args:
          copied_from: folder whose other files (configuration, tokenizer) go along.
        """
        self.close()
        (self._folder / "journal").unlink()
        if self._single:
            (file,) = self._files
            (self._folder / file).replace(self._out)
            self._folder.rmdir()
            return
        if len(self._files) > 1:
            weights = {p: name for name, paths in self._files.items() for p in paths}
            total = sum(stored.nbytes for stored in self._arrays.values())
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))
        for file in sorted(copied_from.iterdir()) if copied_from else []:
            if file.is_file() and file.name != INDEX and file.suffix not in _WEIGHTS:
                shutil.copyfile(file, self._folder / file.name)
        self._folder.replace(self._out)


class TreeOutput(Output):
    """An orbax checkpoint, written from the complete arrays one by one at the end."""

    def finish(self, copied_from: Path | None) -> None:
        """Puts the result in its place; `copied_from` has no other files."""
        from mtjax.merging.orbax_files import save

        self.close()
        arrays = SafetensorsCheckpoint([self._folder / name for name in self._files])
        tree = self._folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of an attempt that was killed here
        try:
            save(tree, arrays)
        finally:
            arrays.close()
        tree.replace(self._out)
        shutil.rmtree(self._folder)


def _files(arrays: Mapping[str, Stored], most: int | None) -> dict[str, list[str]]:
    """Which arrays go into which file."""
    groups, filled = [[]], 0
    for path, stored in arrays.items():
        if most is not None and groups[-1] and filled + stored.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += stored.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    number = len(groups)
    names = (f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1))
    return dict(zip(names, groups))


def _digest(identity: str, arrays: Mapping[str, Any]) -> str:
    layout = [[path, list(s.shape), s.dtype.name] for path, s in arrays.items()]
    return hashlib.sha256(json.dumps([identity, layout]).encode()).hexdigest()
