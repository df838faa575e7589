"""The configuration that a run folder belongs to, and its comparison."""

import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtjax.training.commit import write_atomically


class ConfigMismatchError(ValueError):
    """A run folder was made with another configuration."""


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(
        "`config` must hold numbers, strings, paths, enumerations, lists, mappings and "
        f"dataclasses, got {value!r}; name the choice by a string instead."
    )


def config_to_json(config: Any) -> str:
    """Writes a configuration as JSON.

    Args:
      config: a dataclass or a mapping; tuples become lists, paths become strings,
        enumerations become their names.

    Returns:
      Indented JSON.

    Raises:
      TypeError: if ``config`` or something in it has no JSON form.

    Example:
      >>> print(config_to_json({"lr": 0.1, "tasks": ("a", "b")}).replace(chr(10), ""))
      {  "lr": 0.1,  "tasks": [    "a",    "b"  ]}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`config` must be a dataclass or a mapping, got {type(config).__name__}."
        )
    return json.dumps(dict(config), indent=2, default=_plain)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        flat = {}
        for name, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{name}" if prefix else name))
        return flat
    # Compared as text, because nan differs from itself.
    return {prefix: json.dumps(value)}


def check_same_config(path: Path, config: Any) -> None:
    """Compares a configuration with the one that a file holds.

    Args:
      path: file written with `config_to_json`.
      config: the configuration of this run, a dataclass or a mapping.

    Raises:
      ConfigMismatchError: if a field differs; the message lists every such field.
    """
    saved = _flatten(json.loads(path.read_text(encoding="utf-8")))
    given = _flatten(json.loads(config_to_json(config)))
    lines = differences(saved, given)
    if lines:
        raise ConfigMismatchError(
            f"`config` must equal the one in {path}; these fields differ:\n"
            + "\n".join(lines)
            + "\nUse another folder, or restore the old values."
        )


def open_run_folder(out: Path, config: Any) -> None:
    """Makes the folder of a run, or checks that it is the one of this configuration.

    Args:
      out: the folder, new or empty or with a `config.json` of an earlier start.
      config: the configuration of this run, a dataclass or a mapping.

    Raises:
      ConfigMismatchError: if the folder holds another configuration.
      ValueError: if the folder holds something else.
    """
    path = out / "config.json"
    if path.exists():
        check_same_config(path, config)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(
            f"`out` must be new, empty or the folder of an earlier run, got {out}; "
            "choose another folder."
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, config_to_json(config))


def differences(saved: Mapping[str, str], given: Mapping[str, str]) -> list[str]:
    """One line for each name whose saved value differs from the given one."""
    return [
        f"  {name}: {saved.get(name, 'missing')} there, "
        f"{given.get(name, 'missing')} here"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]
