"""One cell of mlp_step.py: METHOD TASKS BATCH WIDTH INPUTS STEPS, prints JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import optax

import mtjax


def main() -> None:
    """Times the step of one method."""
    name, (tasks, batch, width, inputs, steps) = sys.argv[1], map(int, sys.argv[2:])
    keys = jax.random.split(jax.random.key(0), 6)
    sizes = [inputs, width, width, width]
    params = {
        "trunk": [
            {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
            for k, a, b in zip(keys, sizes, sizes[1:])
        ],
        "heads": {
            f"task_{i}": jax.random.normal(k, (width,)) / width**0.5
            for i, k in enumerate(jax.random.split(keys[3], tasks))
        },
    }
    x = jax.random.normal(keys[4], (batch, inputs))
    y = jax.random.normal(keys[5], (tasks, batch))

    def losses_fn(params, x, y):
        for layer in params["trunk"]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return {
            task: jnp.mean((x @ head - y[i]) ** 2)
            for i, (task, head) in enumerate(params["heads"].items())
        }

    sgd = optax.sgd(1e-3)
    if name == "sum":
        total = lambda params, x, y: sum(losses_fn(params, x, y).values())

        def step(params, state, x, y):
            grads = jax.grad(total)(params, x, y)
            updates, state = sgd.update(grads, state)
            return optax.apply_updates(params, updates), state

        state = sgd.init(params)
    else:
        makers = {
            "uw": lambda: mtjax.uw(tasks),
            "dwa": lambda: mtjax.dwa(tasks, 10),
            "famo": lambda: mtjax.famo(tasks),
            "nash_mtl": lambda: mtjax.nash_mtl(tasks),
        }
        tx = optax.chain(makers.get(name, lambda: getattr(mtjax, name)())(), sgd)
        grad_fn = mtjax.value_and_task_grads(losses_fn)

        def step(params, state, x, y):
            losses, grads = grad_fn(params, x, y)
            updates, state = tx.update(grads, state, params, losses=losses)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)

    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x, y).compile()
    for _ in range(3):
        params, state = jax.block_until_ready(step(params, state, x, y))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, x, y))
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * sorted(times)[len(times) // 2]
    peak = step.memory_analysis().temp_size_in_bytes / 1e6
    print(json.dumps({"ms": milliseconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
