"""Measurements that stay in a run folder and are not repeated by a second start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtjax.training.commit import write_atomically


def kept(path: Path, measure: Callable[[], Any], *, again: bool = False) -> Any:
    """What a file holds; if there is none, what is measured, which is then written.

    Args:
      path: of the file; its folder is made if it is missing.
      measure: gives results in JSON types.
      again: measure even if the file is there.

    Returns:
      The results, as JSON has them.
    """
    if again or not path.exists():
        found = json.dumps(measure())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, found)
    return json.loads(path.read_text())
