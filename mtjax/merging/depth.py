"""Where in the model a parameter stands, told from its path."""

import re
from collections.abc import Sequence


def depth_of_blocks(paths: Sequence[str]) -> dict[str, float]:
    """The place of every parameter's block between the first block and the last.

    The block of a parameter is the first number in its path (`"encoder/layers_3/…"`,
    `"model.layers.3.…"`). Parameters without one (embeddings, a last norm) stand at 0,
    with the first block.

    Args:
      paths: of all parameters that are merged.

    Returns:
      Numbers from 0 to 1 by path.

    Example:
      >>> depth_of_blocks(["embed", "layers_0/w", "layers_1/w", "layers_2/w"])
      {'embed': 0.0, 'layers_0/w': 0.0, 'layers_1/w': 0.5, 'layers_2/w': 1.0}
    """
    found = {
        path: re.search(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])", _split(path))
        for path in paths
    }
    blocks = {path: int(m.group()) for path, m in found.items() if m}
    first, last = min(blocks.values(), default=0), max(blocks.values(), default=0)
    span = max(last - first, 1)
    return {path: (blocks.get(path, first) - first) / span for path in paths}


def _split(path: str) -> str:
    return path.replace("_", "/")
