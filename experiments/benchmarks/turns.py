"""Workers in processes of their own that measure in turns."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

_WORKERS = Path(__file__).parent / "workers"


class WorkerError(Exception):
    """A worker ended before it had answered."""


class Worker:
    """A process that measures when it is asked, and rests meanwhile.

    Attributes:
      facts: what it told when it was ready.
    """

    def __init__(self, python: str | Path, script: str, cell: dict):
        """Starts it; `ready` waits for it.

        Args:
          python: interpreter.
          script: stem of a file in `workers`.
          cell: what it shall measure.
        """
        errors, name = tempfile.mkstemp()
        self._errors = Path(name)
        # Several processes share a GPU: none may take its memory beforehand.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [python, str(_WORKERS / f"{script}.py"), json.dumps(cell)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        os.close(errors)
        self.facts: dict = {}

    def ready(self) -> "Worker":
        """Waits until it can measure.

        Raises:
          WorkerError: with the last line of what it printed, if it cannot.
        """
        self.facts = self._answer()
        return self

    def milliseconds(self, what: str = "") -> float:
        """Asks it to measure.

        Raises:
          WorkerError: if that failed.
        """
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["ms"]

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.unlink()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        said = self._errors.read_text().strip().splitlines()
        raise WorkerError(said[-1] if said else "ended without a word")


def has_module(python: Path | None, module: str) -> bool:
    """Whether an interpreter is there and finds a module."""
    if python is None:
        return False
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", find], check=False).returncode == 0
    except OSError:
        return False


def clock_on(cores: int | None) -> str:
    """Confines this process and the workers it starts to some cores.

    Returns:
      The clock of the module `time` to read. On one core it is that of the process:
      on a machine that others use, the other one measures what they do.
    """
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return "process_time" if cores == 1 else "perf_counter"


def median_ratio(times: list[float], others: list[float]) -> float:
    """Of times that were measured side by side."""
    return median(a / b for a, b in zip(times, others))


def print_row(cells: list[str]) -> None:
    """Prints a line of a Markdown table at once."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_header(columns: list[str]) -> None:
    """Prints the head of a Markdown table."""
    print()
    print_row(columns)
    print_row(["---"] * len(columns))
