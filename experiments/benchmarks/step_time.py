"""Time and memory of a training step, beside torchjd and LibMTL in the same minutes.

Every cell is a process of its own. The plain sums of all libraries stay alive next to
the methods and take turns with them, so a ratio is the median of ratios of numbers that
were measured seconds apart. "peak MB" is what a step holds beyond parameters and batch:
for mtjax the compiler's plan, for PyTorch the rise of resident memory (on a GPU, of
allocated memory) during steps. "bound" counts passes, with one for a forward pass and
two for a backward pass, as a multiple of the plain sum's three: weightings of the
losses 1; Gramian methods (1 + 2 (K + 1)) / 3 with the tasks' gradients, (K + 2) / 3
without them (K cotangents, one weight gradient); elementwise methods (1 + 2 K) / 3.

Commands: python experiments/benchmarks/step_time.py full --model mlp
              --torchjd-python PEER/bin/python --libmtl-python PEER/bin/python
          python experiments/benchmarks/step_time.py quick
Peers:    python3 -m venv PEER && PEER/bin/pip install torch torchjd==0.18.0 scipy
          PEER/bin/pip install --no-deps LibMTL==1.1.5
Machine:  two CPU cores, or one with a GPU.
Minutes:  10 a model (full), 1 (quick).
Expect:   docs/benchmarks.md.
"""

import os
import sys
from collections.abc import Iterable
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

from mtjax.study.methods import METHODS, check_methods

# The names in torchjd and in LibMTL, where they have the method.
_PEERS: dict[str, tuple[str | None, str | None]] = {
    "sum": ("Sum", "EW"),
    "uw": ("UW", "UW"),
    "dwa": ("DWA", "DWA"),
    "famo": ("FAMO", None),
    "gls": ("GeometricMean", "GLS"),
    "rlw": ("Random", "RLW"),
    "imtl_l": ("IMTLL", None),
    "stch": ("STCH", None),
    "cosmos": ("COSMOS", None),
    "pbi": ("PBI", None),
    "pcgrad": ("PCGrad", "PCGrad"),
    "gradvac": ("GradVac", "GradVac"),
    "mgda": ("MGDA", "MGDA"),
    "cagrad": ("CAGrad", "CAGrad"),
    "nash_mtl": ("NashMTL", None),
    "imtl_g": ("IMTLG", None),
    "imtl": (None, "IMTL"),
    "aligned_mtl": ("AlignedMTL", None),
    "fair_grad": ("FairGrad", None),
    "dualproj": ("DualProj", None),
    "pcd": ("PCD", None),
    "upgrad": ("UPGrad", None),
    "krum": ("Krum", None),
    "config": ("ConFIG", None),
    "gradnorm": (None, "GradNorm"),
    "excess_mtl": ("ExcessMTL", None),
    "graddrop": ("GradDrop", None),
    "trimmed_mean": ("TrimmedMean", None),
}
# Compiling a convolutional step of eight tasks takes up to a minute.
_FEW = ("uw", "pcgrad", "mgda", "cagrad", "upgrad", "graddrop")
_SIZES = {"mlp": (256, 1024), "resnet": (32, 16), "vit": (16, 128)}
_TINY = {"mlp": (8, 16), "resnet": (2, 8), "vit": (2, 16)}


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    model: str = "mlp"
    """One of mlp, resnet, vit."""
    tasks: int = 8
    """Number of tasks."""
    batch: int | None = None
    """Examples; 256 for mlp, 32 for resnet, 16 for vit."""
    width: int | None = None
    """Units, or channels of the first stage; 1024, 16, 128."""
    methods: tuple[str, ...] = ()
    """Which; all that a peer has for mlp, a selection for the others."""
    engines: tuple[str, ...] = ("stacked", "ghost")
    """Compared with each other, with `mgda`."""
    rounds: int = 5
    """Turns of every cell."""
    seconds: float = 0.7
    """Of timed steps in a turn, three steps at least."""
    cores: int | None = None
    """CPU cores to keep to. With one, the time of the processor is taken instead of
    that of the wall: for a CPU that others use."""
    torchjd_python: Path | None = None
    """Interpreter of an environment with torchjd."""
    libmtl_python: Path | None = None
    """Interpreter of an environment with LibMTL."""


def bounds(kind: str, tasks: int) -> str:
    """Least number of plain sums by counting passes."""
    if kind == "losses":
        return "1"
    if kind == "gradients":
        return f"{(1 + 2 * tasks) / 3:.1f}"
    return f"{(1 + 2 * (tasks + 1)) / 3:.1f}, ghost {(tasks + 2) / 3:.1f}"


class Bench:
    """One model with the plain sums of all libraries, which stay alive."""

    def __init__(self, config: Config, tiny: bool):
        """Starts the plain sums.

        Raises:
          RuntimeError: if a peer's model has another number of parameters.
        """
        self.config = config
        batch, width = (_TINY if tiny else _SIZES)[config.model]
        self.cell = {
            "model": config.model,
            "tasks": config.tasks,
            "batch": config.batch or batch,
            "width": config.width or width,
            "seconds": config.seconds,
            "clock": clock_on(config.cores),
        }
        peers = {"torchjd": config.torchjd_python, "libmtl": config.libmtl_python}
        modules = {"torchjd": "torchjd", "libmtl": "LibMTL"}
        self.pythons: dict[str, str | Path] = {"mtjax": sys.executable}
        for library, python in peers.items():
            if has_module(python, modules[library]):
                self.pythons[library] = python
            else:
                print(f"{library} is left out: no `--{library}-python` that has it.")
        self.sums = {x: self.start(x, "sum").ready() for x in self.pythons}
        sizes = {x: worker.facts["parameters"] for x, worker in self.sums.items()}
        if len(set(sizes.values())) > 1:
            raise RuntimeError(f"The models differ in their parameters: {sizes}.")
        self.parameters = sizes["mtjax"]

    def start(self, library: str, method: str, engine: str = "auto") -> Worker:
        """A worker of a library."""
        cell = self.cell | {"method": method, "engine": engine}
        if library == "mtjax":
            return Worker(self.pythons[library], "jax_step", cell)
        cell["method"] = _PEERS[method][library == "libmtl"]
        return Worker(self.pythons[library], f"{library}_step", cell)

    def turns(self, workers: dict[str, Worker]) -> tuple[dict, dict, dict]:
        """Lets workers and plain sums take turns.

        Returns:
          Times of the workers, times of the plain sums, and what went wrong.
        """
        times: dict[str, list[float]] = {x: [] for x in workers}
        sums: dict[str, list[float]] = {x: [] for x in self.sums}
        errors: dict[str, str] = {}
        for _ in range(self.config.rounds):
            for library, worker in self.sums.items():
                sums[library].append(worker.milliseconds())
                if library not in workers or library in errors:
                    continue
                try:
                    times[library].append(workers[library].milliseconds())
                except WorkerError as error:
                    errors[library] = str(error)
        return {x: t for x, t in times.items() if x not in errors}, sums, errors

    def row(self, method: str) -> None:
        """Measures a method everywhere and prints its row."""
        workers, errors = {}, {}
        started = {"mtjax": self.start("mtjax", method)}
        for library in ("libmtl", "torchjd"):
            name = _PEERS.get(method, (None, None))[library == "libmtl"]
            if library in self.pythons and name is not None:
                # Peers choose their route when they start: nothing may disturb them.
                for worker in started.values():
                    _settle(worker)
                started[library] = self.start(library, method)
        for library, worker in started.items():
            try:
                workers[library] = worker if worker.facts else worker.ready()
            except WorkerError as error:
                errors[library] = str(error)
        if "mtjax" in errors:
            raise WorkerError(f"mtjax, {method}: {errors['mtjax']}")
        times, sums, failed = self.turns(workers)
        errors |= failed
        facts = workers["mtjax"].facts
        cells = [
            method,
            bounds(METHODS[method].kind, self.config.tasks),
            f"{median(times['mtjax']):.1f}",
            f"{median_ratio(times['mtjax'], sums['mtjax']):.2f}",
            f"{facts['peak_mb']:.0f}",
            f"{facts['compile_s']:.1f}",
        ]
        for library in ("torchjd", "libmtl"):
            if library not in self.pythons:
                continue
            if library not in times:
                why = errors.get(library, "")
                cells += [f"fails: {why[:60]}" if why else "", "", "", ""]
                continue
            peer, route = times[library], workers[library].facts["route"]
            cells += [
                f"{median(peer):.1f} {route}".strip(),
                f"{median_ratio(peer, sums[library]):.2f}",
                f"{workers[library].facts['peak_mb']:.0f}",
                f"{median_ratio(peer, times['mtjax']):.2f}",
            ]
        print_row(cells)
        for worker in started.values():
            worker.close()

    def table(self, methods: Iterable[str]) -> None:
        """Measures the plain sums, then all methods."""
        columns = ["method", "bound / sum", "mtjax ms", "/ sum", "peak MB", "compile s"]
        for library in self.sums:
            if library != "mtjax":
                columns += [f"{library} ms", "/ its sum", "its peak MB", "/ mtjax"]
        print_header(columns)
        _, sums, _ = self.turns({})
        facts = self.sums["mtjax"].facts
        cells = ["plain sum", "1", f"{median(sums['mtjax']):.1f}", "1"]
        cells += [f"{facts['peak_mb']:.0f}", f"{facts['compile_s']:.1f}"]
        for library, times in list(sums.items())[1:]:
            peak = self.sums[library].facts["peak_mb"]
            ratio = median_ratio(times, sums["mtjax"])
            cells += [f"{median(times):.1f}", "1", f"{peak:.0f}", f"{ratio:.2f}"]
        print_row(cells)
        for method in methods:
            self.row(method)

    def engine_table(self) -> None:
        """Compares the engines with each other."""
        workers = {x: self.start("mtjax", "mgda", x) for x in self.config.engines}
        for worker in workers.values():
            worker.ready()
        times: dict[str, list[float]] = {x: [] for x in workers}
        sums = []
        for _ in range(self.config.rounds):
            sums.append(self.sums["mtjax"].milliseconds())
            for engine, worker in workers.items():
                times[engine].append(worker.milliseconds())
        print_header(["mgda, engine", "ms", "/ sum", "peak MB", "compile s"])
        for engine, worker in workers.items():
            cells = [f"{median(times[engine]):.1f}"]
            cells += [f"{median_ratio(times[engine], sums):.2f}"]
            cells += [f"{worker.facts['peak_mb']:.0f}"]
            print_row([engine, *cells, f"{worker.facts['compile_s']:.1f}"])
            worker.close()


def _settle(worker: Worker) -> None:
    """Waits until a worker is ready or has failed."""
    if not worker.facts:
        try:
            worker.ready()
        except WorkerError:
            return


def measure(config: Config, tiny: bool = False) -> None:
    """Prints the tables of one model."""
    check_methods(config.methods or _FEW)
    bench = Bench(config, tiny)
    shape = f"batch {bench.cell['batch']}, width {bench.cell['width']}"
    print(
        f"{config.model}: {config.tasks} tasks, {shape}, {bench.parameters} "
        f"parameters, on {bench.sums['mtjax'].facts['device']}, load "
        f"{os.getloadavg()[0]:.1f}, {config.rounds} rounds"
    )
    every = [x for x in _PEERS if x != "sum"] if config.model == "mlp" else _FEW
    bench.table(config.methods or every)
    if config.engines:
        bench.engine_table()
    for worker in bench.sums.values():
        worker.close()
    print(f"load at the end {os.getloadavg()[0]:.1f}", flush=True)


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(tasks=2, methods=("uw", "cagrad"), engines=(), rounds=1, seconds=0.05)


def quick(config: Options = QUICK) -> None:
    """Tiny models, to see that everything runs."""
    measure(config, tiny=True)


def full(config: Options = Config()) -> None:
    """The tables of docs/benchmarks.md."""
    measure(config)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
