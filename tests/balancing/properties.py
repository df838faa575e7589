"""What a balancer does, measured on sampled gradient matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import mtjax
from tests.balancing import matrices
from tests.balancing.catalogue import jitted, task_names
from tests.balancing.method import Method

# Two tasks, and enough of them that orders and subsets matter.
SIZES = (2, 6)
SEEDS = range(4)
MEASUREMENTS = {}


def measurement(function):
    MEASUREMENTS[function.__name__] = function
    return function


@functools.cache
def measure(method: Method) -> dict[str, str]:
    return {name: function(method) for name, function in MEASUREMENTS.items()}


@measurement
def conflict(method):
    """Whether the update conflicts with no task's gradient."""
    good = [
        all(
            _worst_cosine(_run(method, grads), grads) > -1e-3
            for kind in matrices.REGULAR
            for grads in _samples(kind, size)
        )
        for size in SIZES
    ]
    return {(True, True): "yes", (True, False): "of two tasks"}.get(tuple(good), "no")


@measurement
def stationary(method):
    """Whether the update vanishes where no direction improves all tasks."""

    def vanishes(kind):
        return all(
            np.linalg.norm(_run(method, grads))
            < 0.02 * np.linalg.norm(grads, axis=1).mean()
            for size in SIZES
            for grads in _samples(kind, size)
        )

    if not vanishes(matrices.strongly_stationary):
        return "no"
    # With two tasks there is no difference between the two kinds.
    some = all(
        np.linalg.norm(_run(method, grads))
        < 0.02 * np.linalg.norm(grads, axis=1).mean()
        for grads in _samples(matrices.weakly_stationary, SIZES[-1])
    )
    return "also where some tasks are" if some else "yes"


@measurement
def scale_all(method):
    """The power of c that the update is multiplied by if all losses are."""
    grads = matrices.sample(matrices.normal, SIZES[-1])
    before, after = _run(method, grads), _run(method, grads, np.full(SIZES[-1], 64.0))
    for power in (0, 1):
        if np.allclose(after, before * 64.0**power, rtol=1e-3, atol=1e-4):
            return str(power)
    return "other"


@measurement
def scale_one(method):
    """What multiplying one loss changes."""
    size = SIZES[-1]
    factors = np.where(np.arange(size) == 1, 64.0, 1.0)
    same_update, same_direction = True, True
    for grads in _samples(matrices.normal, size):
        before, after = _run(method, grads), _run(method, grads, factors)
        same_update &= np.allclose(after, before, rtol=1e-3, atol=1e-4)
        cosine = after @ before / np.linalg.norm(after) / np.linalg.norm(before)
        same_direction &= cosine > 1 - 1e-5
    if same_update:
        return "same update"
    return "same direction" if same_direction else "changes"


@measurement
def order(method):
    """Whether the order of the tasks matters."""
    for seed in SEEDS:
        grads = matrices.sample(matrices.conflicting, SIZES[-1], seed)
        turn = np.random.default_rng(seed).permutation(SIZES[-1])
        before, after = _run(method, grads), _run(method, grads, turn=turn)
        if not np.allclose(after, before, rtol=1e-3, atol=1e-3):
            return "matters"
    return "no matter"


@measurement
def random(method):
    """Whether the update depends on the key."""
    grads = matrices.sample(matrices.conflicting, SIZES[-1])
    updates = [_run(method, grads, key=jax.random.key(i)) for i in range(2)]
    return "no" if np.array_equal(*updates) else "yes"


@measurement
def own(method):
    """What moves parameters that one task alone reaches."""
    size = SIZES[0]
    names = task_names(size)
    rows = jnp.asarray(matrices.sample(matrices.normal, size), jnp.float32)
    tx = method.make(size)

    def losses_fn(params, factor):
        return {
            t: factor ** (i + 1)
            * (2.0 + i + rows[i] @ params["trunk"] + params["own"][t])
            for i, t in enumerate(names)
        }

    params = {"trunk": jnp.zeros(rows.shape[1]), "own": dict.fromkeys(names, 0.0)}
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def update(state, factor):
        now = functools.partial(losses_fn, factor=factor)
        losses, grads = mtjax.value_and_task_grads(now)(params)
        return tx.update(
            grads,
            state,
            params,
            losses=losses,
            losses_fn=now,
            validation_losses_fn=now,
            resampled=[grads, grads],
        )

    state = tx.init(params)
    for factor in (1.0, 0.5, 0.3):
        updates, state = update(state, factor)
    moved = np.array([updates["own"][t] for t in names])
    gradients = factor ** np.arange(1, size + 1)
    return "own gradient" if np.allclose(moved, gradients) else "weighted"


@measurement
def linear(method):
    """Whether the update is linear in the gradients, at given losses."""
    first, second = (
        matrices.sample(matrices.conflicting, SIZES[-1], i) for i in (0, 1)
    )
    updates = [_run(method, first, last=g) for g in (first, second, first + second)]
    good = np.allclose(updates[0] + updates[1], updates[2], rtol=1e-3, atol=1e-3)
    return "yes" if good else "no"


@measurement
def span(method):
    """Whether the update is a weighted sum of the gradients."""
    grads = matrices.sample(matrices.conflicting, SIZES[-1])
    if "stack" in method.calls:
        # Who sees the gradients themselves may treat one array unlike another.
        arrays = dict(enumerate(np.hsplit(grads, 2)))
        updates, _ = jitted(method, SIZES[-1])(arrays)
        update = np.concatenate([updates[i] for i in arrays]).astype(np.float64)
    else:
        update = _run(method, grads)
    rest = update - grads.T @ np.linalg.lstsq(grads.T, update)[0]
    return "yes" if np.linalg.norm(rest) < 1e-4 * np.linalg.norm(update) else "no"


def _samples(kind, size):
    return (matrices.sample(kind, size, seed) for seed in SEEDS)


def _run(method, grads, factors=None, *, turn=None, last=None, key=None):
    """The third update on three batches that differ in their losses alone."""
    size = len(grads)
    factors = np.ones(size) if factors is None else factors
    turn = np.arange(size) if turn is None else turn
    update = jitted(method, size)
    rng = np.random.default_rng(0)
    state = None
    for i in range(3):
        losses = rng.uniform(0.5, 2.0, size) * factors
        after = losses * rng.uniform(0.8, 1.0, size)
        used = grads if i < 2 or last is None else last
        updates, state = update(
            (used * factors[:, None])[turn],
            state,
            losses[turn],
            after=after[turn],
            key=key,
        )
    return np.asarray(updates, np.float64)


def _worst_cosine(update, grads):
    lengths = np.linalg.norm(grads, axis=1) * np.linalg.norm(update)
    return np.min(grads @ update / lengths)
