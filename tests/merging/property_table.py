"""Writes docs/mergers.md: `python -m tests.merging.property_table`."""

from pathlib import Path

import jax
import numpy as np

from tests.balancing.property_table import _idea, _paper, _table
from tests.merging.catalogue import METHODS, SHAPES, merged, models_like

PAGE = Path(__file__).parents[2] / "docs" / "mergers.md"

INTRODUCTION = """\
# Mergers

<!-- Written by `python -m tests.merging.property_table`; do not edit. -->

Every data-free method is called with a base and fine-tuned models, in memory or on
disk, as the [guide](guide/merging.md) shows: `mtjax.merging.ties()(base, models)`.
"""

PROPERTIES = """\
## Properties

Measured by the tests on random models, not copied from papers. A task vector is a model
minus the base.

- **One model**: what merging a single model gives.
- **Equal models**: what merging three copies of a model gives.
- **Order**: whether the order of the models matters.
- **All vectors times 2**: what that does to the merged one.
- **All vectors negated**: the same.
- **Linear**: whether the merged vector is linear in the task vectors.
- **Random**: whether it depends on a key.
- **Base**: whether a base model is needed.
- **Passes**: how often all models are read before the first parameter is written.
- **In memory**: what must be there at once when files are merged.
"""

COLUMNS = (
    "One model",
    "Equal models",
    "Order",
    "All vectors times 2",
    "All vectors negated",
    "Linear",
    "Random",
    "Base",
    "Passes",
    "In memory",
)


def page() -> str:
    """The whole page, measured now."""
    factories = {m.factory: None for m in METHODS}
    ideas = [[f"`{f.__name__}`", _idea(f), _paper(f)] for f in factories]
    rows = [[f"`{m.label}`", *properties(m)] for m in METHODS]
    parts = [
        INTRODUCTION,
        _table(["Method", "Idea", "Paper"], ideas),
        PROPERTIES,
        _table(["Method", *COLUMNS], rows),
    ]
    return "\n".join(parts)


def properties(method) -> list[str]:
    """One line of the table."""
    number = method.models[-1]
    base, models = models_like(SHAPES, number)
    other = models_like(SHAPES, number, seed=1)[1]

    def vector(*trees):
        return _minus(merged(method, base, list(trees)), base)

    def moved(trees, factor):
        return [
            jax.tree.map(lambda b, x: b + factor * (x - b), base, tree)
            for tree in trees
        ]

    def added(model, more):
        return jax.tree.map(lambda b, x, y: x + y - b, base, model, more)

    plain = vector(*models)
    one = "-" if 1 not in method.models else _name(vector(models[0]), models[0], base)
    both = vector(*map(added, models, other))
    merger = method.merger
    local = any(s.totals and s.scope == "tensor" for s in merger.steps)
    return [
        one,
        _name(vector(*number * [models[0]]), models[0], base),
        "matters" if not _close(vector(*models[::-1]), plain) else "-",
        "times 2" if _close(vector(*moved(models, 2.0)), 2 * plain) else "other",
        "negated" if _close(vector(*moved(models, -1.0)), -plain) else "other",
        "yes" if _close(both, plain + vector(*other)) else "-",
        "yes" if merger.needs_key else "-",
        "needed" if merger.needs_base else "-",
        str(merger.passes),
        "a parameter" if local or not merger.elementwise else "pieces",
    ]


def _minus(tree, base):
    leaves = [np.ravel(tree[p]) - np.ravel(base[p]) for p in SHAPES]
    return np.concatenate(leaves).astype(np.float64)


def _close(found, expected):
    return np.allclose(found, expected, rtol=1e-3, atol=1e-4)


def _name(found, model, base):
    """How a merged vector relates to that of the model."""
    own = _minus(model, base)
    factor = found @ own / (own @ own)
    if _close(found, factor * own):
        return "the model" if abs(factor - 1) < 1e-4 else f"times {factor:.3g}"
    return "other"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
