"""Time of one Gramian: backward passes of the tasks unrolled, or batched by `vmap`.

Both ways are compiled for each model and number of tasks and then take turns, so that
the ratio is of medians from the same minutes. `_MAX_UNROLLED_ON_CPU` in
mtjax/gradients/stacked.py is set from this table.

Command:  python experiments/benchmarks/pullbacks.py
Machine:  two CPU cores.    Minutes: 2.
Expect:   vmapped takes 1.1 to 2.3 times as long to run; unrolled takes longer to
          compile, at 32 tasks 5 s (MLP) and 18 s (convolutions) against 1 s and 3 s.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtjax
from mtjax.gradients import stacked


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    tasks: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of tasks."""
    rounds: int = 7
    """Timed Gramians per way."""


def mlp(key) -> tuple[dict, Callable, jax.Array]:
    """Three layers of 512 units, batch 128."""
    trunk = list(jax.random.normal(key, (3, 512, 512)) / 23)

    def encode(params, x):
        for kernel in params["trunk"]:
            x = jax.nn.relu(x @ kernel)
        return x

    return {"trunk": trunk}, encode, jax.random.normal(key, (128, 512))


def conv_net(key) -> tuple[dict, Callable, jax.Array]:
    """Three convolutions of 32 channels on 32x32x3 images, batch 16."""
    first = jax.random.normal(key, (3, 3, 3, 32)) / 5
    rest = jax.random.normal(key, (2, 3, 3, 32, 32)) / 17

    def encode(params, x):
        for kernel, stride in zip(params["trunk"], (1, 2, 2)):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x,
                    kernel,
                    (stride, stride),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
        return x.mean((1, 2))

    return {"trunk": [first, *rest]}, encode, jax.random.normal(key, (16, 32, 32, 3))


def compiled_gramian(model, num_tasks: int, unrolled: bool) -> tuple[Callable, float]:
    """One way to get the Gramian, and the seconds that tracing and compiling took."""
    params, encode, x = model
    width = jax.eval_shape(encode, params, x).shape[-1]
    heads = {f"{k:02d}": jnp.full(width, 1.0 + k) for k in range(num_tasks)}

    def losses_fn(params, x):
        z = encode(params, x)
        return {t: jnp.mean(jnp.tanh(z @ head)) for t, head in params["heads"].items()}

    def gramian(params, x):
        return mtjax.value_and_task_grads(losses_fn)(params, x)[1].gramian()

    stacked.unroll_pullbacks = lambda num_tasks: unrolled
    start = time.perf_counter()
    run = jax.jit(gramian).lower(params | {"heads": heads}, x).compile()
    seconds = time.perf_counter() - start
    return lambda: run(params | {"heads": heads}, x).block_until_ready(), seconds


def main(config: Config) -> None:
    """Compiles, takes turns, prints the table."""
    columns = ["model", "tasks", "unrolled ms", "vmapped ms", "vmapped / unrolled"]
    table = Table(*columns, "compile unrolled s", "compile vmapped s")
    cells = [(m, k) for m in (mlp, conv_net) for k in config.tasks]
    for make, num_tasks in track(cells):
        model = make(jax.random.key(0))
        ways = [compiled_gramian(model, num_tasks, u) for u in (True, False)]
        times = ([], [])
        for _ in range(config.rounds + 1):
            for (run, _), into in zip(ways, times):
                start = time.perf_counter()
                run()
                into.append(1e3 * (time.perf_counter() - start))
        u, v = (median(t[1:]) for t in times)
        row = [f"{u:.1f}", f"{v:.1f}", f"{v / u:.2f}", *(f"{s:.1f}" for _, s in ways)]
        table.add_row(make.__name__, str(num_tasks), *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
