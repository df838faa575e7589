"""The file that makes a checkpoint valid: digests of all its other files.

Orbax renames a finished folder into place, but a disk, a copy or a hand can damage it
later, and orbax notices only some of that, loudly. Everything is therefore checked
before orbax sees it.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

COMMIT = "commit.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees all of it or nothing; text as UTF-8."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def write_commit(folder: Path, record: dict[str, Any]) -> None:
    """Finishes a checkpoint.

    Args:
      folder: the checkpoint, with all its files written.
      record: what to keep with it, in JSON types; ``"files"`` is added, which maps each
        file to its size in bytes and its SHA-256.
    """
    body = json.dumps({**record, "files": _digest(folder)})
    seal = json.dumps(hashlib.sha256(body.encode()).hexdigest())
    write_atomically(folder / COMMIT, f'{{"sha256": {seal}, "record": {body}}}\n')


def read_commit(folder: Path) -> dict[str, Any]:
    """Reads what `write_commit` wrote.

    Args:
      folder: a finished checkpoint.

    Returns:
      The record.

    Raises:
      ValueError: if the file is damaged.
    """
    try:
        sealed = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        record = sealed["record"]
        seal = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / COMMIT} is not readable") from error
    if sealed["sha256"] != seal:
        raise ValueError(f"{folder / COMMIT} does not match its own checksum")
    return record


def find_problem(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint; reads all of it.

    Args:
      folder: the checkpoint.

    Returns:
      Half a sentence, or ``None`` if every file is there and unchanged.
    """
    if not folder.exists():
        return "it does not exist"
    if not (folder / COMMIT).exists():
        return "it was never finished"
    try:
        expected = read_commit(folder)["files"]
    except ValueError:
        return f"its {COMMIT} is damaged"
    found = _digest(folder)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"files are missing or changed, first {wrong[0]}" if wrong else None


def _digest(folder: Path) -> dict[str, list[Any]]:
    digests = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.name.startswith(COMMIT):
            continue
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digests[str(file.relative_to(folder))] = [file.stat().st_size, sha256]
    return digests


def encode_data_state(data_state: Any) -> str:
    """Writes the state of a data iterator as JSON.

    Args:
      data_state: bytes, or JSON values that may hold bytes and NumPy numbers.

    Returns:
      The text.

    Raises:
      TypeError: if something in it has no JSON form.

    Example:
      >>> decode_data_state(encode_data_state({"next_index": 3, "inner": b"x"}))
      {'next_index': 3, 'inner': b'x'}
    """

    def default(value):
        if isinstance(value, bytes):
            return {"__bytes__": base64.b64encode(value).decode()}
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        raise TypeError(
            f"`data_state` must hold bytes or JSON values, got {type(value).__name__}."
        )

    return json.dumps(data_state, default=default)


def decode_data_state(text: str) -> Any:
    """Reads what `encode_data_state` wrote; tuples come back as lists."""

    def hook(value):
        if value.keys() == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return value

    return json.loads(text, object_hook=hook)
