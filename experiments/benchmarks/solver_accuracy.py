"""Accuracy of the solvers on the Gramian against float64 ones, and their time.

Each solver gets the float32 Gramian of sampled gradients; the reference solves the
same Gramian in float64 with scipy or numpy. "weights" is the largest difference of a
weight times its gradient's norm, relative to the largest of them; "update" that of the
update, relative to the longest term in it. Where gradients are linearly dependent, many
weights are equally good and only "update" and "KKT" (what the solver itself reports)
tell; where no direction improves all tasks, Nash-MTL and FairGrad have no solution and
the reference is NaN. "rounding" is what the float32 Gramian alone changes in the
weights of the reference. With `--peer_python`, an environment with torchjd, its
aggregators get the same gradients.

Command:  python experiments/benchmarks/solver_accuracy.py
Machine:  two CPU cores.    Minutes: 3.
Expect:   weights within 1e-4 wherever they are unique, as the tests assert; converged
          everywhere but for Nash-MTL and FairGrad on stationary gradients.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import nnls

from mtjax import balancing

REG_EPS = 1e-4
DIMENSION = 80


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    tasks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of tasks."""
    methods: tuple[str, ...] = ("mgda", "dualproj", "upgrad", "nash_mtl", "fair_grad")
    """Whose weights."""
    rounds: int = 5
    """Timed solves."""
    peer_python: Path | None = None
    """Interpreter of an environment that has torchjd."""


def normal(k, rng):
    """Independent gradients."""
    return rng.standard_normal((k, DIMENSION))


def conflicting(k, rng):
    """One direction, on which the tasks disagree, dominates."""
    sides = np.where(np.arange(k) % 2, -1.0, 1.0) * rng.uniform(0.5, 2.0, k)
    direction = rng.standard_normal(DIMENSION)
    return normal(k, rng) + 30 * np.outer(sides, direction / np.linalg.norm(direction))


def low_rank(k, rng):
    """Rank half the number of tasks, all in one half-space."""
    rank = max(1, k // 2)
    mix = np.abs(rng.standard_normal((k, rank))) + 0.1
    return mix @ rng.standard_normal((rank, DIMENSION))


def stationary(k, rng):
    """A combination with positive weights vanishes."""
    grads, weights = normal(k, rng), rng.uniform(0.2, 1.0, k)
    return grads - weights @ grads / weights.sum()


def scaled(k, rng):
    """Lengths over six powers of ten."""
    return normal(k, rng) * 10.0 ** rng.uniform(-3.0, 3.0, (k, 1))


KINDS = (normal, conflicting, low_rank, stationary, scaled)


def hull_reference(gramian):
    """MGDA: least squares with the sum of the weights as one more equation."""
    norms = np.sqrt(np.diag(gramian))
    values, vectors = np.linalg.eigh(gramian / np.outer(norms, norms))
    factor = (vectors * np.sqrt(np.maximum(values, 0.0))).T
    system = np.vstack([factor, norms.min() / norms])
    target = np.append(np.zeros(len(norms)), 1.0)
    weights = nnls(system, target, maxiter=100_000)[0] / norms
    return weights / weights.sum()


def cone_reference(gramian, wanted):
    """DualProj: its dual problem by least squares, with its regularisation."""
    matrix = gramian / np.trace(gramian) + REG_EPS * np.eye(len(gramian))
    factor = np.linalg.cholesky(matrix).T
    return wanted + nnls(factor, -factor @ wanted, maxiter=100_000)[0]


def mean_cone_reference(gramian):
    """UPGrad: the mean of the projections of all gradients."""
    wanted = np.eye(len(gramian)) / len(gramian)
    return np.sum([cone_reference(gramian, u) for u in wanted], axis=0)


def fair_reference(gramian, alpha):
    """Nash-MTL and FairGrad: damped Newton steps; NaN if they do not converge."""
    norms = np.sqrt(np.diag(gramian))
    matrix = gramian / np.outer(norms, norms)
    rates = norms ** (1 / alpha - 1)
    beta = rates ** (alpha / (1 + alpha))
    for _ in range(300):
        right = rates * beta ** (-1 / alpha)
        hessian = matrix + np.diag(right / beta / alpha)
        step = np.linalg.solve(hessian, right - matrix @ beta)
        beta = beta + step / (1 + (1 + 1 / alpha) * np.abs(step / beta).max())
        if beta.min() <= 0 or beta.max() > 1e5:
            break
    good = np.allclose(matrix @ beta / right, 1.0, atol=1e-8, rtol=0)
    return beta / norms if good else np.full(len(norms), np.nan)


def means(k):
    """One over the number of tasks, for each."""
    return jnp.full(k, 1 / k, jnp.float32)


SOLVERS: dict[str, tuple[Callable, Callable]] = {
    "mgda": (balancing.min_norm_weights, hull_reference),
    "dualproj": (
        lambda g: balancing.project_on_dual_cone(g, means(len(g)), REG_EPS),
        lambda g: cone_reference(g, np.full(len(g), 1 / len(g))),
    ),
    "upgrad": (
        lambda g: balancing.projection_weights(g, means(len(g)), REG_EPS),
        mean_cone_reference,
    ),
    "nash_mtl": (balancing.fair_weights, lambda g: fair_reference(g, 1.0)),
    "fair_grad": (
        lambda g: balancing.fair_weights(g, alpha=2.0),
        lambda g: fair_reference(g, 2.0),
    ),
}

# Runs in the other environment: prints one update, or what went wrong, per problem.
PEER = """
import json, sys, warnings
import numpy as np, torch
import torchjd.aggregation as ta
warnings.filterwarnings("ignore")
for line in sys.stdin:
    name, grads = json.loads(line)
    grads = torch.tensor(grads, dtype=torch.float32)
    k = len(grads)
    try:
        make = {
            "mgda": lambda: ta.MGDA(epsilon=1e-5, max_iters=250),
            "dualproj": ta.DualProj,
            "upgrad": ta.UPGrad,
            "nash_mtl": lambda: ta.NashMTL(n_tasks=k, max_norm=0.0),
            "fair_grad": lambda: ta.FairGrad(alpha=2.0),
        }[name]
        print(json.dumps(make()(grads).tolist()), flush=True)
    except Exception as error:
        print(json.dumps(type(error).__name__), flush=True)
"""


def differences(grads, weights, expected) -> tuple[float, float]:
    """Of the weights and of the update, relative."""
    norms = np.linalg.norm(grads, axis=1)
    longest = np.abs(expected * norms).max()
    moved = np.linalg.norm((weights - expected) @ grads)
    return np.abs((weights - expected) * norms).max() / longest, moved / longest


def peer_differences(config, problems) -> list[str]:
    """How far torchjd's updates are from the references', or what it raised."""
    lines = [json.dumps([name, grads.tolist()]) for name, _, grads, _ in problems]
    try:
        run = subprocess.run(
            [config.peer_python, "-c", PEER],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        Console().print(f"No torchjd in `--peer_python`: {error}")
        return ["-"] * len(problems)
    found = []
    for line, (_, _, grads, expected) in zip(run.stdout.splitlines(), problems):
        answer = json.loads(line)
        if isinstance(answer, str):
            found.append(answer)
            continue
        longest = np.abs(expected * np.linalg.norm(grads, axis=1)).max()
        moved = np.linalg.norm(np.array(answer, np.float64) - expected @ grads)
        if not np.all(np.isfinite(np.array(answer, np.float64))):
            found.append("NaN")
        else:
            found.append(f"{moved / longest:.0e}")
    return found


def main(config: Config) -> None:
    """Solves, compares, prints the tables."""
    rows, problems = [], []
    cells = [(m, k) for m in config.methods for k in config.tasks]
    for method, k in track(cells):
        solve, reference = SOLVERS[method]
        solve = jax.jit(solve)
        for kind in KINDS:
            grads = kind(k, np.random.default_rng(k)).astype(np.float32)
            grads = grads.astype(np.float64)
            gramian = jnp.asarray(grads @ grads.T, jnp.float32)
            expected = reference(np.asarray(gramian, np.float64))
            times = []
            for _ in range(config.rounds + 1):
                start = time.perf_counter()
                weights, info = jax.block_until_ready(solve(gramian))
                times.append(1e6 * (time.perf_counter() - start))
            off = differences(grads, np.asarray(weights, np.float64), expected)
            rounding, _ = differences(grads, reference(grads @ grads.T), expected)
            row = [method, kind.__name__, str(k), *(f"{x:.0e}" for x in off)]
            row += [f"{rounding:.0e}", f"{float(info.kkt_residual):.0e}"]
            row += [str(info.iterations), "yes" if info.converged else "no"]
            rows.append([*row, f"{np.median(times[1:]):.0f}"])
            problems.append((method, kind, grads, expected))
    columns = ["solver", "gradients", "tasks", "weights", "update", "rounding", "KKT"]
    columns += ["steps", "converged", "us"]
    if config.peer_python is None:
        Console().print("No `--peer_python`: torchjd is not compared with.")
    else:
        columns.append("torchjd update")
        for row, found in zip(rows, peer_differences(config, problems)):
            row.append(found)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
