"""A training step with torchjd; the argument is a cell of step_time.py as JSON.

Methods on the Gramian can take three routes: its Gramian engine, its Jacobian at once,
or row by row. Each is tried and the fastest one is served. With the Gramian engine the
heads get the weights of their tasks as well, which saves torchjd a second backward
pass through them.
"""

import json
import sys
import warnings
from collections.abc import Callable

import torch
import torchjd.aggregation as ta
import torchjd.scalarization as ts
from serve import milliseconds
from torch_facts import finished, serve_step
from torch_models import Problem, make_problem
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

warnings.filterwarnings("ignore")


def scalarizers(tasks: int, device: torch.device) -> dict[str, Callable]:
    """Those with arguments, by name."""
    even = torch.full((tasks,), 1 / tasks, device=device)
    return {
        "UW": lambda: ts.UW(tasks),
        "FAMO": lambda: ts.FAMO(tasks),
        "IMTLL": lambda: ts.IMTLL(tasks),
        "STCH": lambda: ts.STCH(mu=1.0),
        "COSMOS": lambda: ts.COSMOS(1.0, even),
        "PBI": lambda: ts.PBI(1.0, even),
    }


def arguments(name: str, tasks: int) -> dict[str, object]:
    """Of an aggregator, where it has any without a default."""
    return {
        "CAGrad": {"c": 0.5},
        "FairGrad": {"alpha": 2.0},
        "Krum": {"n_byzantine": 1},
        "NashMTL": {"n_tasks": tasks},
        "TrimmedMean": {"trim_number": 1},
    }.get(name, {})


def scalarized(name: str, problem: Problem) -> Callable[[], None]:
    """A step with a weighting of the losses."""
    tasks, device = len(problem.heads), problem.x.device
    make = scalarizers(tasks, device).get(name, lambda: getattr(ts, name)())
    scalarizer = make()
    learnt = []
    if isinstance(scalarizer, torch.nn.Module):
        scalarizer.to(device)
        learnt = list(scalarizer.parameters())
    optimizer = torch.optim.SGD([*problem.parameters(), *learnt], lr=1e-3)

    def step() -> None:
        _, losses = problem.losses()
        optimizer.zero_grad()
        scalarizer(torch.stack(losses)).backward()
        optimizer.step()
        if name == "FAMO":
            # Ours takes the losses of the next step; this is its way, on old ones.
            scalarizer.update(torch.stack(losses).detach())

    return step


def aggregated(name: str, problem: Problem, chunk: int | None) -> Callable[[], None]:
    """A step through the Jacobian, `chunk` rows at a time."""
    aggregator = getattr(ta, name)(**arguments(name, len(problem.heads)))
    optimizer = torch.optim.SGD(problem.parameters(), lr=1e-3)

    def step() -> None:
        z, losses = problem.losses()
        optimizer.zero_grad()
        mtl_backward(losses, features=z, parallel_chunk_size=chunk)
        jac_to_grad(problem.trunk.parameters(), aggregator)
        optimizer.step()

    return step


def weighted(name: str, problem: Problem) -> Callable[[], None]:
    """A step through the Gramian engine."""
    weighting = getattr(ta, f"{name}Weighting")(**arguments(name, len(problem.heads)))
    engine = Engine(problem.trunk, batch_dim=None)
    optimizer = torch.optim.SGD(problem.parameters(), lr=1e-3)

    def step() -> None:
        losses = torch.stack(problem.losses()[1])
        optimizer.zero_grad()
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()

    return step


def fastest(name: str, cell: dict) -> tuple[str, Callable[[], None], Problem]:
    """The route that takes least, with a model of its own."""
    make = {
        "jacobian": lambda p: aggregated(name, p, None),
        "rows": lambda p: aggregated(name, p, 1),
    }
    if hasattr(ta, f"{name}Weighting") and name != "ExcessMTL":
        make["gramian"] = lambda p: weighted(name, p)
    sizes = (cell["model"], cell["tasks"], cell["batch"], cell["width"])
    times = {}
    for route, of in make.items():
        step = finished(of(make_problem(*sizes)))
        step()
        times[route] = milliseconds(step, cell["seconds"] / 2, cell["clock"])
    route = min(times, key=times.get)
    problem = make_problem(*sizes)
    return route, make[route](problem), problem


def main() -> None:
    """Makes the step and serves it."""
    cell = json.loads(sys.argv[1])
    name = cell["method"]
    if hasattr(ta, name) and name not in ("Sum", "Random"):
        route, step, problem = fastest(name, cell)
        serve_step(step, problem, cell, route)
    else:
        sizes = (cell["model"], cell["tasks"], cell["batch"], cell["width"])
        problem = make_problem(*sizes)
        serve_step(scalarized(name, problem), problem, cell)


if __name__ == "__main__":
    main()
