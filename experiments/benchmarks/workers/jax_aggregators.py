"""Aggregators of mtjax on one matrix; the argument is a cell as JSON."""

import json
import sys
from functools import cache

import jax
import jax.numpy as jnp
from matrix import sampled
from serve import milliseconds, serve

from mtjax.study.methods import METHODS


def main() -> None:
    """Makes the matrix, compiles a method when it is first asked for."""
    cell = json.loads(sys.argv[1])
    grads = jnp.asarray(sampled(cell["tasks"], cell["parameters"]))

    @cache
    def aggregator(name):
        tx = METHODS[name].make(cell["tasks"], 10)
        state = tx.init(grads[0])
        run = jax.jit(lambda grads, state: tx.update(grads, state)[0])
        run = run.lower(grads, state).compile()
        step = lambda: run(grads, state).block_until_ready()
        step()
        return step

    timing = (cell["seconds"], cell["clock"])
    serve({}, lambda name: milliseconds(aggregator(name), *timing))


if __name__ == "__main__":
    main()
