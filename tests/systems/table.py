"""Writes docs/systems/index.md: `python -m tests.systems.table`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "systems" / "index.md"

INTRODUCTION = """\
# Systems

<!-- Written by `python -m tests.systems.table`; do not edit. -->

Published multi-task systems, one file each: the idea, its losses and training stages,
without input and output. The script of the same name trains it beside its baselines;
the page of the same name has the measured numbers and what we read from them.
"""


def systems() -> list[str]:
    """The stems of all systems."""
    found = (ROOT / "mtjax" / "systems").glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def page() -> str:
    """The whole page, from the docstrings of systems and experiments."""
    header = ["System", "Idea", "Needs", "File", "Command", "Measured"]
    rows = [header, ["---"] * len(header), *map(row, systems())]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def row(stem: str) -> list[str]:
    """One line of the table."""
    system, script = (
        docstring(f"{folder}/{stem}.py") for folder in ("mtjax/systems", "experiments")
    )
    name, _, idea = system.partition("\n")[0].rstrip(".").partition(": ")
    return [
        f"[{name}]({stem}.md)",
        idea,
        entry(system, "Needs"),
        f"`mtjax/systems/{stem}.py`",
        f"`{entry(script, 'Command').partition(' (')[0]}`",
        entry(script, "Expect"),
    ]


def docstring(path: str) -> str:
    """The docstring of a file of the repository, read without importing it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)) or ""


def entry(text: str, name: str) -> str:
    """What stands after `name:` up to the next entry or empty line, as one line."""
    found = re.search(rf"^{name}:\s+(.+?)(?=\n\n|\n\w+:|\Z)", text, re.DOTALL | re.M)
    if found is None:
        raise ValueError(f"The docstring {text[:40]!r} has no entry `{name}:`.")
    return " ".join(found[1].split()).removesuffix(".")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
