"""Time of the aggregation alone, on a Jacobian that is there already.

mtjax and torchjd get the same matrix, one row per task, and take turns. Matrices above
`--limit-gb` are skipped, and said so. A method that takes seconds is measured once.

Commands: python experiments/benchmarks/aggregator_time.py full
              --torchjd-python PEER/bin/python
          python experiments/benchmarks/aggregator_time.py quick
Peer:     as in step_time.py.
Machine:  two CPU cores, or one with a GPU.
Minutes:  10 (full), 1 (quick).
Expect:   docs/benchmarks.md.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from turns import (
    Worker,
    WorkerError,
    clock_on,
    has_module,
    median_ratio,
    print_header,
    print_row,
)

_PEERS = {
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "nash_mtl": "NashMTL",
    "aligned_mtl": "AlignedMTL",
    "upgrad": "UPGrad",
    "config": "ConFIG",
    "graddrop": "GradDrop",
    "gradvac": "GradVac",
    "imtl_g": "IMTLG",
    "fair_grad": "FairGrad",
    "dualproj": "DualProj",
    "pcd": "PCD",
    "krum": "Krum",
    "trimmed_mean": "TrimmedMean",
}
_FEW = ("pcgrad", "mgda", "cagrad", "nash_mtl", "aligned_mtl", "upgrad", "graddrop")


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    tasks: tuple[int, ...] = (2, 8, 32, 128)
    """Numbers of rows."""
    parameters: tuple[int, ...] = (100_000, 1_000_000, 25_000_000)
    """Numbers of columns."""
    methods: tuple[str, ...] = _FEW
    """Which."""
    rounds: int = 3
    """Turns of every cell."""
    seconds: float = 0.3
    """Of timed aggregations in a turn."""
    limit_gb: float = 4.0
    """Largest matrix."""
    cores: int | None = None
    """CPU cores to keep to. With one, the time of the processor is taken instead of
    that of the wall: for a CPU that others use."""
    torchjd_python: Path | None = None
    """Interpreter of an environment with torchjd."""


def table(
    config: Config, tasks: int, parameters: int, pythons: dict, clock: str
) -> None:
    """Measures one matrix and prints its rows."""
    cell = {"tasks": tasks, "parameters": parameters}
    cell |= {"seconds": config.seconds, "clock": clock}
    workers = {
        library: Worker(python, f"{library}_aggregators", cell)
        for library, python in pythons.items()
    }
    for worker in workers.values():
        worker.ready()
    for method in config.methods:
        names = {"jax": method, "torchjd": _PEERS[method]}
        times: dict[str, list[float]] = {library: [] for library in workers}
        errors: dict[str, str] = {}
        for _ in range(config.rounds):
            for library, worker in workers.items():
                if library in errors:
                    continue
                try:
                    times[library].append(worker.milliseconds(names[library]))
                except WorkerError as error:
                    errors[library] = str(error)
        if "jax" in errors:
            raise WorkerError(f"mtjax, {method}: {errors['jax']}")
        cells = [str(tasks), f"{parameters:.0e}", method, f"{median(times['jax']):.2f}"]
        if "torchjd" in errors:
            cells += [f"fails: {errors['torchjd'][:60]}", ""]
        elif "torchjd" in workers:
            ratio = median_ratio(times["torchjd"], times["jax"])
            cells += [f"{median(times['torchjd']):.2f}", f"{ratio:.2f}"]
        print_row(cells)
    for worker in workers.values():
        worker.close()


def measure(config: Config) -> None:
    """Prints one table over all matrices."""
    clock = clock_on(config.cores)
    pythons: dict[str, str | Path] = {"jax": sys.executable}
    columns = ["tasks", "parameters", "method", "mtjax ms"]
    if has_module(config.torchjd_python, "torchjd"):
        pythons["torchjd"] = config.torchjd_python
        columns += ["torchjd ms", "torchjd / mtjax"]
    else:
        print("torchjd is left out: no `--torchjd-python` that has it.")
    print(f"load {os.getloadavg()[0]:.1f}, {config.rounds} rounds")
    print_header(columns)
    skipped = []
    for parameters in config.parameters:
        for tasks in config.tasks:
            size = 4e-9 * tasks * parameters
            if size > config.limit_gb:
                skipped.append(f"{tasks} x {parameters:.0e} ({size:.1f} GB)")
            else:
                table(config, tasks, parameters, pythons, clock)
    if skipped:
        print(f"\nSkipped above {config.limit_gb} GB: {', '.join(skipped)}.")
    print(f"load at the end {os.getloadavg()[0]:.1f}", flush=True)


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config((2, 4), (1000,), ("cagrad", "graddrop"), rounds=1, seconds=0.05)


def quick(config: Options = QUICK) -> None:
    """Tiny matrices, to see that everything runs."""
    measure(config)


def full(config: Options = Config()) -> None:
    """The table of docs/benchmarks.md."""
    measure(config)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
