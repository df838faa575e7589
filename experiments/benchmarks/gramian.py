"""Ways to take the inner products of gradients that lie apart in memory, on a CPU.

The rule behind `mtjax.gradients.gramian`: one pass per pair, one product of stacked
arrays, or a loop over blocks. Times are the processor's clock, so that other programs
disturb them less; all ways get the same arrays in the same process.

Command:  python experiments/benchmarks/gramian.py
Machine:  any CPU.    Minutes: 1.
Expect:   pairs and blocks close to each other up to eight tasks, blocks 2.5 times
          ahead at 16; stacking seven times behind.
"""

import time
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from mtjax.gradients import gramian
from mtjax.gradients._rows import Rows


@dataclass(frozen=True)
class Config:
    """Sizes of the measurement."""

    tasks: tuple[int, ...] = (2, 3, 4, 8, 16)
    """Numbers of tasks."""
    sizes: tuple[int, ...] = (2**18, 2**20)
    """Numbers of parameters in a leaf, multiples of 1024."""
    repeats: int = 9
    """Timed calls; the median counts."""


def main(config: Config) -> None:
    """Measures all ways and prints the table."""
    table = Table("tasks", "parameters", "pairs ms", "stacked ms", "blocks ms")
    for size in config.sizes:
        for tasks in config.tasks:
            keys = jax.random.split(jax.random.key(0), tasks)
            arrays = [jax.random.normal(key, (1024, size // 1024)) for key in keys]
            times = [milliseconds(way, arrays, config.repeats) for way in WAYS]
            table.add_row(str(tasks), str(size), *(f"{ms:.1f}" for ms in times))
    Console().print(table)


def milliseconds(way, arrays, repeats: int) -> float:
    """Median processor time of one call."""
    call = jax.jit(way)
    jax.block_until_ready(call(arrays))
    found = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(call(arrays))
        found.append(time.process_time() - start)
    return 1e3 * median(found)


def pairs(arrays):
    """One pass per pair."""
    return [gramian._inner(a, b) for i, a in enumerate(arrays) for b in arrays[: i + 1]]


def stacked(arrays):
    """One product of stacked arrays."""
    whole = jnp.stack(arrays)
    return gramian._inner_of_all(whole, whole)


def blocks(arrays):
    """A loop over blocks that fit the cache."""
    tasks = tuple(range(len(arrays)))
    rows = Rows(tasks, arrays)
    return gramian._in_blocks(rows, rows, tasks)


WAYS = (pairs, stacked, blocks)

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
