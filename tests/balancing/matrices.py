"""Gradient matrices of many kinds, in float64, one row per task."""

import numpy as np

DIMENSION = 80


def normal(num_tasks, rng):
    return rng.standard_normal((num_tasks, DIMENSION))


def conflicting(num_tasks, rng):
    """One direction on which the tasks disagree dominates."""
    return normal(num_tasks, rng) + 30.0 * rank_one(num_tasks, rng)


def agreeing(num_tasks, rng):
    """No two gradients conflict."""
    return np.abs(normal(num_tasks, rng))


def low_rank(num_tasks, rng):
    """Rank at most half the number of tasks."""
    rank = max(1, num_tasks // 2)
    basis = rng.standard_normal((rank, DIMENSION))
    return rng.standard_normal((num_tasks, rank)) @ basis


def agreeing_low_rank(num_tasks, rng):
    """Rank at most half the number of tasks, all in one half-space."""
    rank = max(1, num_tasks // 2)
    mix = np.abs(rng.standard_normal((num_tasks, rank))) + 0.1
    return mix @ rng.standard_normal((rank, DIMENSION))


def strongly_stationary(num_tasks, rng):
    """A combination with positive weights, not all equal, vanishes."""
    grads, weights = normal(num_tasks, rng), rng.uniform(0.2, 1.0, num_tasks)
    return grads - (weights @ grads) / weights.sum()


def weakly_stationary(num_tasks, rng):
    """A combination of some of the tasks vanishes; the others are free."""
    grads, few = normal(num_tasks, rng), max(2, num_tasks // 2)
    grads[:few] -= grads[:few].mean(axis=0)
    return grads


def narrow(num_tasks, rng):
    """In all directions of a plane, with a small part in common."""
    plane = rng.standard_normal((num_tasks, 2)) @ rng.standard_normal((2, DIMENSION))
    return plane + 2.0 * _unit(rng) + 0.1 * normal(num_tasks, rng)


def scaled(num_tasks, rng, decades=3.0):
    """Lengths spread over so many powers of ten up and down."""
    return normal(num_tasks, rng) * 10.0 ** rng.uniform(
        -decades, decades, (num_tasks, 1)
    )


def duplicated(num_tasks, rng):
    grads, half = normal(num_tasks, rng), num_tasks // 2
    grads[num_tasks - half :] = grads[:half]
    return grads


def rank_one(num_tasks, rng):
    """All along one line, in both directions."""
    sides = np.where(np.arange(num_tasks) % 2, -1.0, 1.0)[:, None]
    return sides * rng.uniform(0.5, 2.0, (num_tasks, 1)) * _unit(rng)


def extreme(num_tasks, rng):
    """Lengths from 1e-10 to 1e15 in one matrix."""
    lengths = np.geomspace(1e-10, 1e15, num_tasks)
    return normal(num_tasks, rng) * lengths[:, None]


# Where a direction exists that improves every task, well away from none.
REGULAR = (normal, conflicting, agreeing, duplicated, narrow)
DEGENERATE = (
    low_rank,
    agreeing_low_rank,
    strongly_stationary,
    weakly_stationary,
    rank_one,
    scaled,
    extreme,
)


def sample(kind, num_tasks, seed=0):
    """A matrix that float32 holds exactly, as float64."""
    rng = np.random.default_rng([num_tasks, seed])
    return kind(num_tasks, rng).astype(np.float32).astype(np.float64)


def gramian(grads):
    """The float32 Gramian of a matrix, rounded once."""
    return (grads @ grads.T).astype(np.float32)


def _unit(rng):
    direction = rng.standard_normal(DIMENSION)
    return direction / np.linalg.norm(direction)
