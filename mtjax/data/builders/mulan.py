"""The multi-target regression sets of Mulan: one configuration each."""

import csv
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.rows import (
    MISSING,
    encode_rows,
    table_features,
    table_metadata,
)
from mtjax.data.builders.spec import DatasetSpec, Original, require

# name: examples, numeric inputs, categorical inputs, targets (which come last).
_SETS = {
    "andro": (49, 30, 0, 6),
    "atp1d": (337, 411, 0, 6),
    "atp7d": (296, 411, 0, 6),
    "edm": (154, 16, 0, 2),
    "enb": (768, 8, 0, 2),
    "jura": (359, 15, 0, 3),
    "oes10": (403, 298, 0, 16),
    "oes97": (334, 263, 0, 16),
    "osales": (639, 401, 0, 12),
    "scpf": (1_137, 23, 0, 3),
    "sf1": (323, 0, 10, 3),
    "sf2": (1_066, 0, 10, 3),
    "slump": (103, 7, 0, 3),
    "wq": (1_060, 16, 0, 14),
}


def _read(folder: Path, *, name: str, num_targets: int) -> Original:
    path = require(folder, f"{name}.arff")
    lines = path.read_text(encoding="latin-1").splitlines()
    values: dict[str, list[str] | None] = {}
    data = iter(lines)
    for line in data:
        head = line.strip()
        if head.lower().startswith("@data"):
            break
        if head.lower().startswith("@attribute"):
            # Not scipy.io.arff: some names hold quotes that it takes for string ends.
            column, _, kind = head[len("@attribute") :].strip().rpartition(" ")
            listed = kind.startswith("{")
            values[column.strip()] = (
                [MISSING, *kind.strip("{}").split(",")] if listed else None
            )
    columns = list(values)
    targets = columns[-num_targets:]
    inputs = columns[:-num_targets]
    numeric = [column for column in inputs if values[column] is None]
    categories = {column: listed for column in inputs if (listed := values[column])}

    def rows() -> Iterator[list[str]]:
        for fields in csv.reader(data):
            if fields:
                yield [field.strip() for field in fields]

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "targets": np.array(
                [
                    np.nan if record[target] == MISSING else float(record[target])
                    for target in targets
                ],
                dtype=np.float32,
            )
        }

    encoded = encode_rows(
        rows(),
        path=path,
        columns=columns,
        numeric=numeric,
        categories=categories,
        others=others,
    )
    metadata = table_metadata(numeric, categories) | {"targets": targets}
    return Original({"train": encoded}, metadata)


def _features(
    numeric: int, categorical: int, targets: int
) -> dict[str, tfds.features.FeatureConnector]:
    return {
        **table_features(numeric, categorical),
        "targets": tfds.features.Tensor(shape=(targets,), dtype=np.float32),
    }


MULAN: tuple[DatasetSpec, ...] = tuple(
    DatasetSpec(
        name=f"mulan_mtr/{name}",
        description=f"Multi-target regression set {name}: {targets} targets in one "
        "vector, whose names and those of the inputs are in `metadata`; missing "
        "numbers are NaN. No official split.",
        licence="unclear (the repository states none)",
        homepage="https://github.com/tsoumakas/mulan",
        citation="Multi-target regression via input space expansion: treating targets "
        "as inputs, 2016.",
        tasks=("targets",),
        splits={"train": rows},
        features=partial(_features, numeric, categorical, targets),
        read=partial(_read, name=name, num_targets=targets),
    )
    for name, (rows, numeric, categorical, targets) in _SETS.items()
)
