"""Step time and peak memory of balancers on an MLP, beside torchjd in the same run.

The model of DESIGN, section 6: eight tasks on a 512 -> 3 x 1024 trunk, batch 256, SGD.
Every cell is a process of its own, so that its memory can be told: "peak MB" is what a
step holds beyond parameters and batch, for mtjax the compiler's plan (exact, and kept
between steps), for torchjd the rise of resident memory during steps. Cells of both
libraries take turns, and the ratios are of medians over the rounds.

Command:  python experiments/benchmarks/mlp_step.py --torch-python TORCH_ENV/bin/python
Peer:     python3 -m venv TORCH_ENV && TORCH_ENV/bin/pip install torch torchjd==0.18.0
Machine:  two CPU cores.    Minutes: 4.
Expect:   loss weightings within 1.05 of the plain sum; Gramian methods at about eight
          plain sums, at less than half of torchjd's time and memory.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

_WORKERS = Path(__file__).parent / "workers"
_METHODS = {
    "sum": "sum",
    "uw": None,
    "dwa": None,
    "famo": None,
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "nash_mtl": "NashMTL",
    "upgrad": "UPGrad",
    "graddrop": "GradDrop",
}


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the measurement."""

    torch_python: Path | None = None
    """Interpreter of an environment with torchjd; without it that half is left out."""
    tasks: int = 8
    """Number of tasks."""
    batch: int = 256
    """Examples per step."""
    width: int = 1024
    """Units of each of the three trunk layers."""
    inputs: int = 512
    """Input features."""
    steps: int = 15
    """Timed steps per round, after three to warm up."""
    rounds: int = 2
    """Rounds over all cells."""


def main(config: Config) -> None:
    """Measures all cells and prints the table."""
    cells = [("mtjax", name, sys.executable, name) for name in _METHODS]
    if config.torch_python is None:
        print("torchjd is left out: pass --torch-python to compare with it.")
    else:
        cells += [
            ("torchjd", name, str(config.torch_python), peer)
            for name, peer in _METHODS.items()
            if peer is not None
        ]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    sizes = [config.tasks, config.batch, config.width, config.inputs, config.steps]
    for library, name, python, argument in track(cells * config.rounds, "measuring"):
        worker = _WORKERS / f"{library}_mlp.py"
        command = [python, str(worker), argument, *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        found.setdefault((library, name), []).append(
            json.loads(done.stdout.splitlines()[-1])
        )
    print_table(found)


def print_table(found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Prints times, memory and ratios."""
    time = {cell: median(r["ms"] for r in rows) for cell, rows in found.items()}
    memory = {cell: min(r["peak_mb"] for r in rows) for cell, rows in found.items()}
    table = Table(
        "method",
        "mtjax ms",
        "/ own sum",
        "peak MB",
        "torchjd ms",
        "/ own sum",
        "peak MB",
        "time mtjax / torchjd",
        "memory mtjax / torchjd",
    )
    for name in _METHODS:
        ours, peer = ("mtjax", name), ("torchjd", name)
        row = [
            f"{time[ours]:.1f}",
            f"{time[ours] / time['mtjax', 'sum']:.2f}",
            f"{memory[ours]:.0f}",
        ]
        if peer in time:
            row += [
                f"{time[peer]:.1f}",
                f"{time[peer] / time['torchjd', 'sum']:.2f}",
                f"{memory[peer]:.0f}",
                f"{time[ours] / time[peer]:.2f}",
                f"{memory[ours] / memory[peer]:.2f}",
            ]
        table.add_row(name, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
