"""Time and memory of a training step whose embedding table has up to ten million rows.

A ranker of a few fields and one logit trains with Adam on its dense layers, and lazy
Adam on the rows that a batch reads (`mtjax.transforms.sparse_rows`). All tables stay in
memory and take turns, so that ratios are of numbers measured seconds apart. Beside
them, up to some size, ordinary Adam on the whole table. "planned" is the table and its
two moments, 12 bytes a number; "in place" what the compiled step changes without a
copy, "temporary" what it needs beyond, both by the compiler's plan; "resident" is the
process's peak during steps, less what it held before the table was made.

Command:  python experiments/benchmarks/embedding_updates.py full --cores 1
          python experiments/benchmarks/embedding_updates.py quick
Machine:  two CPU cores, 4 GB of memory.    Minutes: 2 (full), 1 (quick).
Expect:   a step with 1e7 rows at most 1.2 times as long as with 1e5, although it reads
          half as many distinct rows again; ordinary Adam 3 times at 1e6; resident
          memory as planned.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from turns import clock_on, median_ratio, print_header, print_row

from mtjax.nn import Tower
from mtjax.transforms.sparse_rows import sparse_rows, take_rows, unique_rows


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Sizes of the table, ascending; ratios are to the first."""
    dense_up_to: int = 1_000_000
    """The largest table that ordinary Adam trains too."""
    width: int = 16
    """Of an embedding."""
    batch: int = 4096
    """Examples in a step."""
    fields: int = 8
    """Rows that an example reads."""
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the dense layers."""
    power: float = 1.05
    """Exponent of the popularity of rows, rank by rank; 0 makes all alike."""
    rounds: int = 15
    """Timed rounds; in each, every table gets `steps` steps."""
    steps: int = 4
    """Steps with different batches in a round."""
    cores: int | None = None
    """How many to use; all if None. With 1, time is the process's own."""


QUICK = Config(rows=(1_000, 10_000), dense_up_to=1_000, batch=64, rounds=2)
Options = tyro.conf.OmitArgPrefixes[Config]


class Trained(NamedTuple):
    """What a step changes."""

    table: jax.Array
    of_table: Any  # state of the table's optimizer
    params: Any
    of_params: Any


class Cell:
    """One table, one kind of update, and the batches."""

    def __init__(self, config: Config, num_rows: int, lazy: bool, clock: str):
        """Makes the table, compiles the step and takes some."""
        before = forget_peak()
        self.num_rows, self.lazy = num_rows, lazy
        self.clock = getattr(time, clock)
        self.batches = [batch_of(config, num_rows, i) for i in range(config.steps)]
        model = Tower(config.hidden)
        key = jax.random.key(0)
        params = model.init(key, jnp.ones((1, config.fields * config.width)))
        table = jax.random.normal(key, (num_rows, config.width)) * 0.05
        adam = optax.adam(1e-3)
        make_state = sparse_rows(adam).init if lazy else adam.init
        self.state = Trained(table, make_state(table), params, adam.init(params))
        self.planned = 3 * table.nbytes / 1e6
        step = lazy_step(model, adam) if lazy else dense_step(model, adam)
        self.step = (
            jax.jit(step, donate_argnums=0)
            .lower(self.state, *self.batches[0])
            .compile()
        )
        del table
        # From here on: drawing the initial values needs memory of its own.
        jax.block_until_ready(self.state)
        forget_peak()
        self.run()
        self.resident = resident_megabytes("VmHWM") - before

    def run(self) -> float:
        """Milliseconds of a step, mean over all batches."""
        start = self.clock()
        for ids, labels in self.batches:
            self.state = self.step(self.state, ids, labels)
        jax.block_until_ready(self.state)
        return 1e3 * (self.clock() - start) / len(self.batches)


def batch_of(config: Config, num_rows: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Row numbers by a power law over ranks that are spread over the table, labels."""
    keys = jax.random.split(jax.random.key(seed))
    shape = (config.batch, config.fields)
    u, a = jax.random.uniform(keys[0], shape), 1.0 - config.power
    # Inverse of the continuous distribution of ranks from 1 to the number of rows.
    ranks = (1.0 + u * (float(num_rows) ** a - 1.0)) ** (1.0 / a) if a else num_rows**u
    ids = (ranks.astype(jnp.uint32) * jnp.uint32(2_654_435_761)) % jnp.uint32(num_rows)
    return ids.astype(jnp.int32), jax.random.bernoulli(keys[1], 0.1, shape[:1]) * 1.0


def loss_of(model, params, vectors, labels):
    """Mean binary cross-entropy."""
    logits = model.apply(params, vectors.reshape(len(labels), -1))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def lazy_step(model, adam):
    """Gradients of the rows read; the other rows are not touched."""
    optimizer = sparse_rows(adam)

    def step(state, ids, labels):
        table, of_table, params, of_params = state
        rows, places = unique_rows(ids, len(table))
        grads, of_rows = jax.grad(
            lambda params, vectors: loss_of(model, params, vectors[places], labels),
            argnums=(0, 1),
        )(params, take_rows(table, rows))
        table, of_table = optimizer.update(table, of_table, rows, of_rows)
        updates, of_params = adam.update(grads, of_params)
        params = optax.apply_updates(params, updates)
        return Trained(table, of_table, params, of_params)

    return step


def dense_step(model, adam):
    """Gradients of the whole table."""

    def step(state, ids, labels):
        table, of_table, params, of_params = state
        grads, of_rows = jax.grad(
            lambda params, table: loss_of(model, params, table[ids], labels),
            argnums=(0, 1),
        )(params, table)
        updates, of_table = adam.update(of_rows, of_table)
        table = optax.apply_updates(table, updates)
        updates, of_params = adam.update(grads, of_params)
        params = optax.apply_updates(params, updates)
        return Trained(table, of_table, params, of_params)

    return step


def forget_peak() -> float:
    """Lets the peak of resident memory begin anew; megabytes that are held now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return resident_megabytes("VmRSS")


def resident_megabytes(which: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process on Linux, NaN elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{which}:")]
    return int(found[0]) * 1024 / 1e6 if found else float("nan")


def measure(config: Config) -> None:
    """Makes the tables, lets them take turns, prints the table."""
    clock = clock_on(config.cores)
    # What the process needs in any case is not the first table's.
    Cell(QUICK, 1_000, lazy=True, clock=clock)
    cells = [
        Cell(config, rows, lazy, clock)
        for rows in config.rows
        for lazy in (True, False)
        if lazy or rows <= config.dense_up_to
    ]
    times = [[cell.run() for cell in cells] for _ in range(config.rounds)]
    times = [list(column) for column in zip(*times)]
    print_header(
        [
            "rows",
            "update",
            "ms per step",
            f"/ {config.rows[0]:.0e} rows",
            "distinct rows read",
            "planned MB",
            "in place MB",
            "temporary MB",
            "resident MB",
        ]
    )
    for cell, of_cell in zip(cells, times):
        memory = cell.step.memory_analysis()
        ids, _ = cell.batches[0]
        print_row(
            [
                f"{cell.num_rows:.0e}",
                "lazy Adam" if cell.lazy else "Adam",
                f"{median(of_cell):.1f}",
                f"{median_ratio(of_cell, times[0]):.2f}",
                str(len(jnp.unique(ids))),
                f"{cell.planned:.0f}",
                f"{memory.alias_size_in_bytes / 1e6:.0f}",
                f"{memory.temp_size_in_bytes / 1e6:.0f}",
                f"{cell.resident:.0f}",
            ]
        )


def quick(config: Options = QUICK) -> None:
    """Tiny tables, to see that everything runs."""
    measure(config)


def full(config: Options = Config()) -> None:
    """Tables of up to 10 million rows."""
    measure(config)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
