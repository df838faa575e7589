"""Training throughput of MMoE and PLE, beside torch-rechub in the same minutes.

Both libraries train rankers of the same sizes on the same examples, drawn at random in
the shape of Census-Income: 31 categorical fields and 7 numbers, two tasks. "step" is a
step on a batch that is in memory already, "epoch" what a user of the library runs: here
one compiled scan over shuffled rows, there `MTLTrainer.train_one_epoch` on a shuffled
`DataLoader`. Workers take turns, a ratio is the median of ratios of numbers that were
measured seconds apart. torch-rechub puts a batch normalisation behind every layer; it
is taken out, so that both compute the same.

Commands: python experiments/benchmarks/ranking_throughput.py full
              --rechub-python PEER/bin/python
          python experiments/benchmarks/ranking_throughput.py quick
Peer:     python3 -m venv PEER && PEER/bin/pip install torch torch-rechub
Machine:  two CPU cores, or one with a GPU.
Minutes:  5 (full), 1 (quick).
Expect:   docs/benchmarks.md.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro
from turns import (
    Worker,
    clock_on,
    has_module,
    median_ratio,
    print_header,
    print_row,
)


@dataclass(frozen=True)
class Size:
    """Of a ranker and its batches."""

    embedding: int
    expert: tuple[int, ...]
    tower: tuple[int, ...]
    batch: int


SIZES = {
    "tiny": Size(4, (16,), (8,), 256),
    "census": Size(4, (16,), (8,), 1024),
    "middle": Size(16, (128, 64), (32,), 1024),
    "large": Size(16, (256, 128), (64,), 4096),
}
SizeName = Literal["tiny", "census", "middle", "large"]


@dataclass(frozen=True)
class Config:
    """What is measured, and for how long."""

    rechub_python: Path | None = None
    """Interpreter of an environment with torch-rechub."""
    models: tuple[Literal["MMoE", "PLE"], ...] = ("MMoE", "PLE")
    """MMoE has 8 experts; PLE two levels, 2 own experts and 1 shared."""
    sizes: tuple[SizeName, ...] = ("census", "middle", "large")
    """Of rankers and batches."""
    rows: int = 32_768
    """Examples of an epoch."""
    vocabulary: int = 100
    """Values of a categorical field."""
    rounds: int = 3
    seconds: float = 1.0
    """A measurement takes at least so long."""
    cores: int | None = None
    """Confine everything to so many CPU cores."""


def row(config: Config, model: str, size: Size, pythons: dict, clock: str) -> None:
    """Measures one ranker and prints its line."""
    cell = {"model": model, "rows": config.rows, "vocabulary": config.vocabulary}
    cell |= {"seconds": config.seconds, "clock": clock} | asdict(size)
    workers = {
        library: Worker(python, f"{library}_ranking", cell)
        for library, python in pythons.items()
    }
    for worker in workers.values():
        worker.ready()
    examples = {"step": size.batch, "epoch": config.rows}
    times: dict = {(x, what): [] for x in workers for what in examples}
    for _ in range(config.rounds):
        for what in examples:
            for library, worker in workers.items():
                times[library, what].append(worker.milliseconds(what))
    parameters = [worker.facts["parameters"] for worker in workers.values()]
    widths = ", ".join(map(str, size.expert))
    cells = [model, str(size.embedding), widths, str(size.batch)]
    cells.append(" / ".join(f"{n:,}" for n in parameters))
    for what, count in examples.items():
        own = times["jax", what]
        cells.append(f"{count / median(own) * 1e3:,.0f}")
        if "rechub" in workers:
            theirs = times["rechub", what]
            cells.append(f"{count / median(theirs) * 1e3:,.0f}")
            cells.append(f"{median_ratio(theirs, own):.2f}")
    print_row(cells)
    for worker in workers.values():
        worker.close()


def measure(config: Config) -> None:
    """Prints one table over all rankers."""
    clock = clock_on(config.cores)
    pythons: dict[str, str | Path] = {"jax": sys.executable}
    if has_module(config.rechub_python, "torch_rechub"):
        pythons["rechub"] = config.rechub_python
    else:
        print("torch-rechub is left out: no `--rechub-python` that has it.")
    columns = ["model", "embedding", "expert", "batch", "parameters"]
    for what in ("step", "epoch"):
        columns.append(f"{what}: examples/s")
        if "rechub" in pythons:
            columns += ["torch-rechub", "mtjax / torch-rechub"]
    print(f"load {os.getloadavg()[0]:.1f}, {config.rounds} rounds")
    print_header(columns)
    for model in config.models:
        for size in config.sizes:
            row(config, model, SIZES[size], pythons, clock)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}", flush=True)


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(sizes=("tiny",), rows=2048, rounds=1, seconds=0.1)


def quick(config: Options = QUICK) -> None:
    """A minute: the smallest rankers."""
    measure(config)


def full(config: Options = Config()) -> None:
    """The table of the documentation."""
    measure(config)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
