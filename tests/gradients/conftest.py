"""One small problem for all tests of gradients, with its gradients by `jax.jacrev`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TASKS = ("a", "b", "c")


def encode(params, x):
    return jnp.tanh(x @ params["trunk"]["kernel"] + params["trunk"]["bias"][None])


def losses_from_z(params, z, x):
    head = {task: z @ params["heads"][task] for task in TASKS}
    return {
        "c": jnp.mean((head["c"] * jnp.sum(params["of_b_and_c"])) ** 2),
        "a": jnp.mean((head["a"] - 1) ** 2),
        "b": jnp.mean((head["b"] + x[:, 0]) ** 2) + jnp.sum(params["of_b_and_c"] ** 2),
    }


def losses_fn(params, x):
    return losses_from_z(params, encode(params, x), x)


gradient_per_task = jax.jit(jax.jacrev(losses_fn))


class Problem(NamedTuple):
    params: dict
    x: jax.Array  # (16, 6)

    losses_fn = staticmethod(losses_fn)
    pair = (encode, losses_from_z)
    tasks = TASKS
    weights = jnp.array([0.3, 2.0, -1.0])

    @property
    def shared(self):
        return {
            "trunk": {"kernel": True, "bias": True},
            "heads": dict.fromkeys(TASKS, False),
            "of_b_and_c": True,
            "unused": False,
        }

    def per_task(self):
        """Each task's gradient by `jax.jacrev`, in the order of the tasks."""
        rows = gradient_per_task(self.params, self.x)
        return [rows[task] for task in TASKS]

    def stacked(self):
        return jax.tree.map(lambda *g: jnp.stack(g), *self.per_task())

    def combined(self, weights):
        """The definition of `combine`, from each task's gradient."""
        return jax.tree.map(
            lambda shared, *g: (
                sum(w * x for w, x in zip(weights, g)) if shared else sum(g)
            ),
            self.shared,
            *self.per_task(),
        )

    def gramian(self):
        """The definition of `gramian`, from each task's gradient."""
        shared = jax.tree.leaves(self.shared)
        rows = np.stack(
            [
                np.concatenate(
                    [
                        np.ravel(leaf).astype(np.float64)
                        for leaf, s in zip(jax.tree.leaves(g), shared)
                        if s
                    ]
                )
                for g in self.per_task()
            ]
        )
        return (rows @ rows.T).astype(np.float32)


@pytest.fixture(scope="session")
def problem():
    k = iter(jax.random.split(jax.random.key(0), 8))
    params = {
        "trunk": {
            "kernel": jax.random.normal(next(k), (6, 8)) / 3,
            "bias": jax.random.normal(next(k), (8,)),
        },
        "heads": {task: jax.random.normal(next(k), (8,)) for task in TASKS},
        "of_b_and_c": jax.random.normal(next(k), (2,)),
        "unused": jnp.ones(3),
    }
    return Problem(params, jax.random.normal(next(k), (16, 6)))


@pytest.fixture(params=["unrolled", "vmapped"])
def pullbacks(request, monkeypatch):
    """Both ways in which the stacked engine gets its rows."""
    most = 10**6 if request.param == "unrolled" else 0
    monkeypatch.setattr("mtjax.gradients.stacked._MAX_UNROLLED_ON_CPU", most)
    return request.param
