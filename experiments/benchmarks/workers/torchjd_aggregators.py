"""Aggregators of torchjd on one matrix; the argument is a cell as JSON."""

import json
import sys
import warnings
from functools import cache

import torch
import torchjd.aggregation as ta
from matrix import sampled
from serve import milliseconds, serve
from torch_facts import finish
from torchjd_step import arguments

warnings.filterwarnings("ignore")


def main() -> None:
    """Makes the matrix, and a method when it is first asked for."""
    cell = json.loads(sys.argv[1])
    grads = torch.from_numpy(sampled(cell["tasks"], cell["parameters"]))
    if torch.cuda.is_available():
        grads = grads.cuda()

    @cache
    def aggregator(name):
        aggregate = getattr(ta, name)(**arguments(name, cell["tasks"]))

        def step():
            aggregate(grads)
            finish()

        step()
        return step

    timing = (cell["seconds"], cell["clock"])
    serve({}, lambda name: milliseconds(aggregator(name), *timing))


if __name__ == "__main__":
    main()
