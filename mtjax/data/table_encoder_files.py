"""Table encoders as JSON files, to encode in another process what training saw."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mtjax.data.table_encoder import TableEncoder

_FORMAT = "mtjax.TableEncoder"


def save_table_encoder(encoder: TableEncoder, path: str | Path) -> None:
    """Writes an encoder, exactly: numbers keep all their digits.

    Args:
      encoder: from `fit_table_encoder`.
      path: of the JSON file; it is replaced if it is there.

    Raises:
      ValueError: if a column holds something else than texts, numbers and flags.

    Example:
      >>> import tempfile
      >>> from mtjax.data.table_encoder import fit_table_encoder
      >>> encoder = fit_table_encoder([{"shop": np.array(["b", "a"])}], fields=["shop"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_table_encoder(encoder, f"{folder}/encoder.json")
      ...     again = load_table_encoder(f"{folder}/encoder.json")
      >>> again.categorical({"shop": np.array(["a", "c"])}).tolist()
      [[2], [1]]
    """
    content = {
        "format": _FORMAT,
        "fields": list(encoder.fields),
        "values": {name: _as_json(name, v) for name, v in encoder.values.items()},
        "numbers": list(encoder.numbers),
        "log1p": sorted(encoder.log1p),
        "means": dict(encoder.means),
        "stds": dict(encoder.stds),
    }
    Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_table_encoder(path: str | Path) -> TableEncoder:
    """Reads what `save_table_encoder` wrote.

    Args:
      path: of the file.

    Returns:
      The encoder.

    Raises:
      ValueError: if the file is none of an encoder.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"`path` must be a file from `save_table_encoder`, got {str(path)!r}, "
            "which is none. Save the encoder again."
        )
    return TableEncoder(
        fields=tuple(content["fields"]),
        values={name: _from_json(v) for name, v in content["values"].items()},
        numbers=tuple(content["numbers"]),
        log1p=frozenset(content["log1p"]),
        means=content["means"],
        stds=content["stds"],
    )


def _as_json(name: str, values: np.ndarray) -> dict[str, Any]:
    if values.dtype.kind not in "USifub":
        raise ValueError(
            f"`encoder` must have texts, numbers or flags in {name!r}, got "
            f"{values.dtype}. Convert the column before fitting."
        )
    listed = values.tolist()
    if values.dtype.kind == "S":
        listed = [value.decode("latin-1") for value in listed]
    return {"dtype": values.dtype.str, "values": listed}


def _from_json(column: dict[str, Any]) -> np.ndarray:
    dtype, listed = np.dtype(column["dtype"]), column["values"]
    if dtype.kind == "S":
        listed = [value.encode("latin-1") for value in listed]
    return np.array(listed, dtype)
