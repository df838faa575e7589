"""A ranker of mtjax; the argument is a cell of ranking_throughput.py as JSON."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ranking_log import FIELDS, NUMBERS, TASKS, drawn
from serve import milliseconds, serve

import mtjax
from mtjax.losses import binary_losses
from mtjax.nn import PLE, FieldEmbeddings, MMoE, is_shared


class Ranker(nn.Module):
    """Embeddings of all fields in front of a ranker of vectors."""

    body: nn.Module
    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, values, numbers):
        """The logits of both tasks."""
        sizes = {f"field_{i:02}": self.vocabulary for i in range(FIELDS)}
        fields = FieldEmbeddings(sizes, self.width, numbers=NUMBERS)
        return self.body(fields(values, numbers))


def main() -> None:
    """Compiles a step and an epoch, and serves both."""
    cell = json.loads(sys.argv[1])
    expert, tower = tuple(cell["expert"]), tuple(cell["tower"])
    body = {
        "MMoE": MMoE(TASKS, 8, (expert,), tower),
        "PLE": PLE(TASKS, 2, 1, (expert, expert), tower=tower),
    }[cell["model"]]
    model = Ranker(body, cell["vocabulary"], cell["embedding"])
    data = jax.tree.map(jnp.asarray, drawn(cell["rows"], cell["vocabulary"]))
    size = cell["batch"]
    batch = jax.tree.map(lambda x: x[:size], data)
    params = jax.jit(model.init)(jax.random.key(0), *batch[:2])

    def losses_fn(params, values, numbers, labels):
        return binary_losses(
            model.apply(params, values, numbers), dict(zip(TASKS, labels.T))
        )

    grad_fn = mtjax.value_and_task_grads(losses_fn, shared=is_shared)
    tx = optax.chain(mtjax.equal(), optax.adam(1e-3))

    def step(carry, batch):
        params, state = carry
        losses, grads = grad_fn(params, *batch)
        updates, state = tx.update(grads, state, params, losses=losses)
        return (optax.apply_updates(params, updates), state), losses

    def epoch(carry, data, rows):
        rows = rows.reshape(-1, size)
        draw = lambda carry, rows: step(carry, jax.tree.map(lambda x: x[rows], data))
        return jax.lax.scan(draw, carry, rows)

    carry, rng = (params, tx.init(params)), np.random.default_rng(0)
    step, epoch = (jax.jit(f, donate_argnums=0) for f in (step, epoch))

    def one_step():
        nonlocal carry
        carry, _ = jax.block_until_ready(step(carry, batch))

    def one_epoch():
        nonlocal carry
        rows = rng.permutation(cell["rows"])[: cell["rows"] // size * size]
        carry, _ = jax.block_until_ready(epoch(carry, data, rows))

    whats = {"step": one_step, "epoch": one_epoch}
    for run in (*whats.values(), *whats.values()):
        run()
    facts = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    timing = cell["seconds"], cell["clock"]
    serve(facts, lambda what: milliseconds(whats[what], *timing))


if __name__ == "__main__":
    main()
