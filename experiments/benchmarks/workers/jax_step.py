"""A training step with mtjax; the argument is a cell of step_time.py as JSON."""

import json
import sys
import time

import jax
import optax
from jax_models import make_problem
from serve import milliseconds, serve

import mtjax
from mtjax.study.methods import METHODS


def main() -> None:
    """Compiles the step and serves it."""
    cell = json.loads(sys.argv[1])
    sizes = (cell["model"], cell["tasks"], cell["batch"], cell["width"])
    params, losses_fn, batch = make_problem(*sizes)
    sgd = optax.sgd(1e-3)
    if cell["method"] == "sum":
        tx = sgd
        total = lambda params, *batch: sum(losses_fn(params, *batch).values())

        def step(params, state, *batch):
            grads = jax.grad(total)(params, *batch)
            updates, state = sgd.update(grads, state)
            return optax.apply_updates(params, updates), state

    else:
        tx = optax.chain(METHODS[cell["method"]].make(cell["tasks"], 10), sgd)
        grad_fn = mtjax.value_and_task_grads(losses_fn, engine=cell["engine"])

        def step(params, state, *batch):
            losses, grads = grad_fn(params, *batch)
            updates, state = tx.update(grads, state, params, losses=losses)
            return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    clock = getattr(time, cell["clock"])
    start = clock()
    run = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "compile_s": clock() - start,
        "peak_mb": run.memory_analysis().temp_size_in_bytes / 1e6,
        "device": jax.devices()[0].device_kind,
    }

    def advance():
        nonlocal carry
        carry = jax.block_until_ready(run(*carry, *batch))

    for _ in range(2):
        advance()
    serve(facts, lambda _: milliseconds(advance, cell["seconds"], cell["clock"]))


if __name__ == "__main__":
    main()
