"""Runs every check: `python -m tests`, or some: `python -m tests lint`."""

import os
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PATHS = ["mtjax", "tests", "experiments", "notebooks", "docs"]
_CHECKS = {
    "lint": [
        ["ruff", "format", "--check", *_PATHS],
        ["ruff", "check", *_PATHS],
        ["pyrefly", "check"],
    ],
    "tests": [[sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]],
    "docs": [["mkdocs", "build", "--strict", "--quiet"]],
}


def main(names: list[str]) -> int:
    """Runs the named checks, all if none is named; returns the worst exit status."""
    unknown = [name for name in names if name not in _CHECKS]
    if unknown:
        print(f"checks are {', '.join(_CHECKS)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    # Tools of the same environment as this interpreter come first.
    tools = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    worst = 0
    for name in names or _CHECKS:
        for command in _CHECKS[name]:
            print(f"$ {' '.join(command)}", flush=True)
            start = time.monotonic()
            status = subprocess.run(command, cwd=_ROOT, env=environment).returncode
            print(f"exit {status} after {time.monotonic() - start:.0f} s", flush=True)
            worst = max(worst, abs(status))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
