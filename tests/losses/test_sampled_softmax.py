"""Sampled and in-batch softmax: full softmax, unbiasedness, hits, devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtjax.losses.sampled_softmax import (
    in_batch_softmax_loss,
    log_frequencies,
    sampled_softmax_loss,
)
from mtjax.training import data_mesh, shard_batch

GENERATOR = np.random.default_rng(0)
QUERIES = jnp.array(GENERATOR.normal(size=(8, 4)), jnp.float32)
ITEMS = jnp.array(GENERATOR.normal(size=(50, 4)), jnp.float32)
# Items 3 and 7 come several times in the batch.
IDS = jnp.array([3, 7, 3, 11, 7, 7, 40, 49])
Q = np.random.default_rng(1).dirichlet(np.full(50, 0.5))


def log_sum_exp(x):
    return x.max() + np.log(np.exp(x - x.max()).sum())


def full_softmax(queries, items, ids, temperature=1.0):
    logits = np.float64(queries) @ np.float64(items).T / temperature
    own = logits[np.arange(len(ids)), ids]
    return np.mean([log_sum_exp(z) for z in logits] - own)


def test_full_softmax_if_every_item_is_drawn_once():
    order = GENERATOR.permutation(50)
    loss = sampled_softmax_loss(
        QUERIES,
        ITEMS[IDS],
        ITEMS[order],
        jnp.full(50, -np.log(50), jnp.float32),
        positive_ids=IDS,
        negative_ids=jnp.array(order),
        temperature=0.7,
    )
    expected = full_softmax(QUERIES, ITEMS, IDS, 0.7)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("draws", [1, 3])
def test_the_denominator_is_unbiased(draws):
    """Its expectation over all draws that are possible is the full one."""
    items, right, q = ITEMS[:4], 1, Q[:4] / Q[:4].sum()
    drawn = np.array(list(itertools.product(range(4), repeat=draws)))

    @jax.vmap
    def losses(ids):
        return sampled_softmax_loss(
            QUERIES[:1],
            items[right][None],
            items[ids],
            jnp.log(jnp.asarray(q, jnp.float32))[ids],
            positive_ids=jnp.array([right]),
            negative_ids=ids,
        )

    scores = np.float64(items) @ np.float64(QUERIES[0])
    estimates = np.exp(np.float64(losses(jnp.array(drawn))) + scores[right])
    chances = np.prod(q[drawn], axis=1)
    np.testing.assert_allclose(chances.sum(), 1.0)
    np.testing.assert_allclose(chances @ estimates, np.exp(scores).sum(), rtol=1e-5)
    assert np.std(estimates) > 0.1


def test_gradients_come_close_to_those_of_the_full_softmax():
    """Mean over 400 samples of 256 draws, with and without the correction."""
    log_q = jnp.log(jnp.asarray(Q, jnp.float32))
    drawn = jnp.array(GENERATOR.choice(50, size=(400, 256), p=Q))

    def loss(query, ids, log_q):
        return sampled_softmax_loss(
            query,
            ITEMS[IDS[:1]],
            ITEMS[ids],
            log_q,
            positive_ids=IDS[:1],
            negative_ids=ids,
        )

    @jax.jit
    def mean_gradient(log_q_of):
        grad = lambda ids: jax.grad(loss)(QUERIES[:1], ids, log_q_of[ids])
        return jnp.mean(jax.vmap(grad)(drawn), axis=0)[0]

    weights = np.exp(np.float64(ITEMS) @ np.float64(QUERIES[0]))
    expected = weights / weights.sum() @ np.float64(ITEMS) - np.float64(ITEMS[IDS[0]])
    corrected = np.linalg.norm(mean_gradient(log_q) - expected)
    plain = np.linalg.norm(
        mean_gradient(jnp.full(50, -np.log(50), jnp.float32)) - expected
    )
    assert corrected < 0.1 * plain
    assert corrected < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("with_q", [True, False])
def test_in_batch_pair_by_pair(with_ids, with_q):
    q = np.float64(QUERIES)
    items, log_q = np.float64(ITEMS[IDS]), np.log(Q)[np.asarray(IDS)]
    losses = []
    for b in range(8):
        kept = [j for j in range(8) if j == b or not (with_ids and IDS[j] == IDS[b])]
        z = np.array([q[b] @ items[j] / 0.5 - with_q * log_q[j] for j in kept])
        losses.append(log_sum_exp(z) - z[kept.index(b)])
    found = in_batch_softmax_loss(
        QUERIES,
        ITEMS[IDS],
        log_q=jnp.asarray(log_q, jnp.float32) if with_q else None,
        item_ids=IDS if with_ids else None,
        temperature=0.5,
    )
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_equal_frequencies_change_nothing():
    plain = in_batch_softmax_loss(QUERIES, ITEMS[IDS])
    equal = in_batch_softmax_loss(QUERIES, ITEMS[IDS], log_q=jnp.full(8, -3.0))
    np.testing.assert_allclose(equal, plain, rtol=1e-5)


def test_without_correction_of_the_right_item_it_is_the_sampled_loss():
    log_q = jnp.log(jnp.asarray(Q, jnp.float32))[IDS]
    found = in_batch_softmax_loss(
        QUERIES, ITEMS[IDS], log_q=log_q, item_ids=IDS, correct_positive=False
    )
    expected = []
    for b in range(8):
        others = np.delete(np.arange(8), b)
        expected.append(
            sampled_softmax_loss(
                QUERIES[b : b + 1],
                ITEMS[IDS[b : b + 1]],
                ITEMS[IDS[others]],
                log_q[others],
                positive_ids=IDS[b : b + 1],
                negative_ids=IDS[others],
            )
        )
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_what_never_occurs_is_finite():
    np.testing.assert_allclose(
        np.exp(log_frequencies(np.array([0, 3, 1]))), [1e-8, 0.75, 0.25], rtol=1e-5
    )
    floor = jnp.log(jnp.full(8, 1e-8))
    for loss in (
        functools.partial(in_batch_softmax_loss, QUERIES, ITEMS[IDS]),
        lambda log_q: sampled_softmax_loss(QUERIES, ITEMS[IDS], ITEMS[:8], log_q),
    ):
        options = {"log_q": jnp.full(8, -jnp.inf).at[0].set(-1.0)}
        other = {"log_q": floor.at[0].set(-1.0)}
        np.testing.assert_allclose(loss(**options), loss(**other), rtol=1e-5)


def test_a_batch_of_one_item_has_no_loss_and_no_gradient():
    same = jnp.zeros(8, int)
    loss, grads = jax.value_and_grad(
        lambda q: in_batch_softmax_loss(q, ITEMS[same], item_ids=same)
    )(QUERIES)
    assert loss == 0
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("correct_positive", [True, False])
@pytest.mark.parametrize("devices", [2, 8])
def test_negatives_of_all_devices(devices, correct_positive):
    log_q = jnp.log(jnp.asarray(Q, jnp.float32))[IDS]
    batch = (QUERIES, ITEMS[IDS], log_q, IDS)

    def loss(batch, axis_name=None):
        queries, items, log_q, ids = batch
        return in_batch_softmax_loss(
            queries,
            items,
            log_q=log_q,
            item_ids=ids,
            correct_positive=correct_positive,
            axis_name=axis_name,
        )

    def grads_of(loss):
        of_vectors = lambda vectors, rest: loss((*vectors, *rest))
        return jax.jit(jax.value_and_grad(of_vectors))

    expected = grads_of(loss)(batch[:2], batch[2:])
    mesh = data_mesh(jax.devices()[:devices])
    split = shard_batch(batch, mesh)
    mapped = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"),),
        out_specs=P(),
    )
    for found in (
        grads_of(mapped)(split[:2], split[2:]),
        grads_of(loss)(split[:2], split[2:]),
    ):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_errors():
    one, log_q = jnp.ones((1, 1)), jnp.zeros(1)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        in_batch_softmax_loss(one, one, temperature=0.0)
    with pytest.raises(ValueError, match="`temperature` must be positive, got -1"):
        sampled_softmax_loss(one, one, one, log_q, temperature=-1.0)
    with pytest.raises(ValueError, match="`positive_ids` and `negative_ids` must be"):
        sampled_softmax_loss(one, one, one, log_q, positive_ids=jnp.array([1]))
    with pytest.raises(ValueError, match="`log_q` must be given where"):
        in_batch_softmax_loss(one, one, correct_positive=False)
