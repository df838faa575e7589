"""A training step with LibMTL 1.1.5; the argument is a cell of step_time.py as JSON.

Its weightings are mixed into a model of our own, as its trainer does. The package's
first file imports a model zoo made for torchvision before 0.13; it is left out.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Callable

import numpy as np
import torch
from torch_facts import serve_step
from torch_models import Problem, make_problem

SETTINGS = {"mgda_gn": "none", "calpha": 0.5, "rescale": 1, "beta": 0.5}
SETTINGS |= {"alpha": 1.5, "T": 2.0, "dist": "Normal"}


def weighting_class(name: str) -> type:
    """A weighting of LibMTL by name, without the rest of the package."""
    package = types.ModuleType("LibMTL")
    found = importlib.util.find_spec("LibMTL")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["LibMTL"] = package
    return getattr(importlib.import_module("LibMTL.weighting"), name)


def make_step(name: str, problem: Problem) -> Callable[[], None]:
    """One step of a weighting, later than its first epochs."""

    class Model(weighting_class(name)):
        def get_share_params(self):
            return problem.trunk.parameters()

        def zero_grad_share_params(self):
            # It writes into the gradients afterwards, which torch 2 would delete.
            problem.trunk.zero_grad(set_to_none=False)

    model = Model()
    model.task_num, model.device = len(problem.heads), problem.x.device
    model.rep_grad, model.epoch = False, 2
    model.train_loss_buffer = np.ones((model.task_num, 3))
    model.init_param()
    parameters = [*problem.parameters(), *model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step() -> None:
        _, losses = problem.losses()
        optimizer.zero_grad(set_to_none=False)
        model.backward(torch.stack(losses), **SETTINGS)
        optimizer.step()

    return step


def main() -> None:
    """Makes the step and serves it."""
    cell = json.loads(sys.argv[1])
    sizes = (cell["model"], cell["tasks"], cell["batch"], cell["width"])
    problem = make_problem(*sizes)
    serve_step(make_step(cell["method"], problem), problem, cell)


if __name__ == "__main__":
    main()
