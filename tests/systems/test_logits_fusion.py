"""Dynamic Logits Fusion: the objective, its minimum, identities, masks, decoding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.special import log_softmax, softmax

from mtjax.nn.decoder import Decoder
from mtjax.nn.decoding import CachedModel, generate, padded
from mtjax.systems.logits_fusion import (
    DynamicFusion,
    StaticFusion,
    dynamic_logits_fusion,
    kl_objective,
    routing,
    shifts_of,
    static_logits_fusion,
)

BATCH, VOCAB = 6, 17
SEARCHES = ("grid", "bisect", "coordinate")
fusion = jax.jit(dynamic_logits_fusion, static_argnums=3)
static = jax.jit(static_logits_fusion, static_argnums=3)


def draw(experts, seed=0, spread=1.5):
    """Logits of a large model, a small one, and experts that differ from it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=(*shape, BATCH, VOCAB)).astype(np.float32)
    large, small = 2 * normal(), normal()
    return tuple(map(jnp.asarray, (large, small, small + spread * normal(experts))))


def run(logits, search="grid", **options):
    return fusion(*logits, DynamicFusion(search, **options))


def in_float64(alpha, large, small, experts):
    """Fused log-probabilities and the objective, for one position."""
    large, small, experts = (np.asarray(x, np.float64) for x in (large, small, experts))
    kl = lambda a, b: np.sum(softmax(a) * (log_softmax(a) - log_softmax(b)))
    fused = large + np.tensordot(np.asarray(alpha, np.float64), experts - small, 1)
    total = 0.0
    for expert in experts:
        total += (kl(fused, large) - kl(expert, small)) ** 2
        total += (kl(large, fused) - kl(small, expert)) ** 2
    return log_softmax(fused), total


def minimum(logits, position):
    """The best weight of a single expert, by brute force."""
    large, small, expert = (
        np.asarray(x, np.float64).reshape(BATCH, VOCAB)[position] for x in logits
    )
    kl = lambda a, b: np.sum(np.exp(a) * (a - b), axis=-1)
    alphas = np.linspace(0, 2, 2001)
    log_p, log_q, log_e = map(log_softmax, (large, small, expert))
    log_f = log_softmax(large + alphas[:, None] * (expert - small), axis=-1)
    scores = (kl(log_f, log_p) - kl(log_e, log_q)) ** 2
    scores += (kl(log_p, log_f) - kl(log_q, log_e)) ** 2
    return alphas[np.argmin(scores)], scores.min()


@pytest.mark.parametrize("experts", [1, 3])
def test_distribution_and_objective_by_hand(experts):
    logits = draw(experts)
    alpha = tuple(np.linspace(0.3, 1.4, experts).tolist())
    fused = static(*logits, alpha)
    for i in range(BATCH):
        log_p, total = in_float64(alpha, *(x[..., i, :] for x in logits))
        np.testing.assert_allclose(fused.logits[i], log_p, atol=2e-5)
        np.testing.assert_allclose(fused.trace.objective[i], total, rtol=1e-4)
    np.testing.assert_array_equal(
        fused.trace.alpha, np.broadcast_to(np.float32(alpha), (BATCH, experts)).T
    )


def test_the_grid_finds_the_best_expert_and_weight():
    logits = draw(3, seed=1)
    fused = run(logits)
    for i in range(BATCH):
        at = [x[..., i, :] for x in logits]
        scores = np.array(
            [
                [in_float64(a * np.eye(3)[t], *at)[1] for a in np.linspace(0, 2, 21)]
                for t in range(3)
            ]
        )
        t, point = np.unravel_index(np.argmin(scores), scores.shape)
        np.testing.assert_allclose(fused.trace.alpha[:, i], 0.1 * point * np.eye(3)[t])
        np.testing.assert_allclose(
            fused.trace.objective[i], scores.min(), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_sums_and_ends(search, seed):
    logits = draw(1, seed, spread=(0.3, 1.0, 3.0)[seed])
    fused = run(logits, search)
    alpha, objective = fused.trace
    assert ((alpha >= 0) & (alpha <= 2)).all()
    np.testing.assert_allclose(np.exp(fused.logits).sum(axis=-1), 1, rtol=1e-5)
    for end in (0.0, 1.0, 2.0):
        there = static(*logits, (end,)).trace.objective
        assert (objective <= there * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("search", ["grid", "bisect"])
def test_as_good_as_brute_force(search):
    logits = draw(1, seed=3)
    alpha, objective = run(logits, search).trace
    within = {"grid": 0.1, "bisect": 2e-3}[search]
    for i in range(BATCH):
        best, least = minimum(logits, i)
        assert abs(float(alpha[0, i]) - best) <= within
        assert objective[i] >= least - 1e-5
        if search == "bisect":
            np.testing.assert_allclose(objective[i], least, rtol=1e-3, atol=1e-5)


def test_bisection_ends_where_the_slope_is_zero():
    logits = draw(1, seed=4)
    alpha = run(logits, "bisect", halvings=22).trace.alpha
    shifts = shifts_of(*logits)
    inside = np.asarray((alpha > 0.01) & (alpha < 1.99))[0]
    assert inside.sum() >= 3
    slope = jax.grad(lambda a: kl_objective(a, shifts).sum())
    at = lambda a: np.asarray(slope(a))[0, inside]
    assert (np.abs(at(alpha)) < 0.02 * np.abs(at(alpha + 0.1))).all()
    assert (at(alpha - 0.05) < 0).all()
    assert (at(alpha + 0.05) > 0).all()


def test_both_divergences_grow_with_the_weight():
    logits = draw(1, seed=5)
    shifts = shifts_of(*logits)
    kl = lambda a, b: np.sum(np.exp(a) * (a - b), axis=-1)
    base = np.asarray(shifts.large, np.float64)
    at = lambda a: log_softmax(base + a * np.float64(shifts.differences[0]), axis=-1)
    path = [at(a) for a in np.linspace(0, 2, 41)]
    for values in ([kl(p, base) for p in path], [kl(base, p) for p in path]):
        assert (np.diff(values, axis=0) > 0).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_experts_that_learnt_nothing(search):
    large, small, _ = draw(1)
    fused = run((large, small, small[None]), search)
    np.testing.assert_array_equal(fused.trace.alpha, 0)
    np.testing.assert_allclose(fused.logits, jax.nn.log_softmax(large), atol=1e-6)
    np.testing.assert_allclose(fused.trace.objective, 0, atol=1e-12)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_large_model_like_the_small_one_becomes_the_expert(search):
    _, small, experts = draw(1)
    fused = run((small, small, experts), search)
    np.testing.assert_allclose(fused.trace.alpha, 1, atol=2e-3)
    np.testing.assert_allclose(fused.trace.objective, 0, atol=1e-5)
    np.testing.assert_allclose(fused.logits, jax.nn.log_softmax(experts[0]), atol=0.01)


@pytest.mark.parametrize("search", SEARCHES)
def test_constants_change_nothing(search):
    logits = draw(1 if search == "bisect" else 2)
    fused = run(logits, search)
    for i, constant in enumerate([7.0, -30.0, 100.0]):
        moved = [*logits]
        # Another constant at every position.
        added = constant * jnp.arange(1, 1 + BATCH).reshape(-1, 1) / BATCH
        moved[i] += added if i < 2 else added[None]
        again = run(moved, search)
        chex.assert_trees_all_close(again.logits, fused.logits, atol=2e-3)
        np.testing.assert_allclose(again.trace.alpha, fused.trace.alpha, atol=2e-3)


def test_a_doubled_expert_is_one_expert():
    large, small, expert = draw(1)
    one = run((large, small, expert))
    two = run((large, small, jnp.concatenate([expert, expert])))
    chex.assert_trees_all_close(one.logits, two.logits, atol=1e-5)
    np.testing.assert_array_equal(two.trace.alpha[0], one.trace.alpha[0])
    np.testing.assert_array_equal(two.trace.alpha[1], 0)
    chex.assert_trees_all_close(
        two.trace.objective, 2 * one.trace.objective, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("search", SEARCHES)
def test_positions_do_not_know_of_each_other(search):
    """One call for all is a call for each: no weight is kept from an earlier one."""
    logits = draw(1 if search == "bisect" else 3, seed=6)
    fused = run(logits, search)
    for i in range(BATCH):
        alone = run([x[..., [i] * BATCH, :] for x in logits], search)
        expected = jax.tree.map(lambda x, i=i: x[..., [i] * BATCH], fused.trace)
        chex.assert_trees_all_close(alone.trace, expected, rtol=1e-4, atol=1e-6)


def test_any_leading_axes():
    logits = draw(2, seed=6)
    fused = run(logits)
    split = lambda x: x.reshape(*x.shape[:-2], 2, 3, VOCAB)
    again = run([split(x) for x in logits])
    np.testing.assert_array_equal(
        again.trace.alpha, fused.trace.alpha.reshape(-1, 2, 3)
    )
    alone = run([x[..., 0, :] for x in logits])
    np.testing.assert_allclose(alone.logits, fused.logits[0], atol=1e-4)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("model", range(3))
def test_masked_tokens_might_as_well_not_exist(search, model):
    """Minus infinity in one model counts for all."""
    logits = draw(1 if search == "bisect" else 2, seed=7)
    gone = jnp.zeros(VOCAB, bool).at[jnp.array([0, 5, 16])].set(True)
    masked = [*logits]
    mask = gone.reshape(*(1,) * (masked[model].ndim - 1), -1)
    masked[model] = jnp.where(mask, -jnp.inf, masked[model])
    fused = run(masked, search)
    expected = run([x[..., ~gone] for x in logits], search)
    np.testing.assert_allclose(fused.logits[:, ~gone], expected.logits, atol=1e-4)
    np.testing.assert_array_equal(fused.logits[:, gone], -jnp.inf)
    chex.assert_trees_all_close(fused.trace, expected.trace, rtol=1e-3, atol=1e-5)


def test_nan_is_not_taken_for_a_mask():
    large, small, experts = draw(1)
    fused = run((large.at[2, 3].set(jnp.nan), small, experts))
    assert jnp.isnan(fused.logits[2]).any()
    assert jnp.isfinite(jnp.delete(fused.logits, 2, axis=0)).all()


def test_a_sharper_large_model_needs_more_weight_than_there_is():
    _, small, experts = draw(1, seed=8, spread=1.0)
    of = lambda c: run((c * small, small, experts), "bisect").trace.alpha
    sharp = np.stack([of(c)[0] for c in (1.0, 3.0, 6.0, 30.0)])
    np.testing.assert_allclose(sharp[0], 1, atol=2e-3)
    assert (np.diff(sharp.mean(axis=1)) > 0).all()
    # The bound of the search is reached.
    assert (sharp[-1] == 2).mean() > 0.5


def test_coordinates_are_never_worse_than_one_expert():
    logits = draw(3, seed=9)
    single, joint = run(logits), run(logits, "coordinate")
    assert (joint.trace.objective <= single.trace.objective + 1e-6).all()
    assert (joint.trace.objective < single.trace.objective - 1e-3).any()
    assert ((joint.trace.alpha > 0).sum(axis=0) > 1).any()
    # No weight can be bettered by itself.
    settled = run(logits, "coordinate", rounds=8).trace
    shifts = shifts_of(*logits)
    for t in range(3):
        for value in np.linspace(0, 2, 21):
            moved = settled.alpha.at[t].set(value)
            assert (kl_objective(moved, shifts) >= settled.objective - 1e-5).all()


def test_experts_without_a_say_take_their_share():
    """One of three is different: a third of its divergences becomes the target."""
    large, small, expert = draw(1, seed=11)
    fused = run((large, small, jnp.stack([small, expert[0], small])))
    np.testing.assert_array_equal(fused.trace.alpha[::2], 0)
    shifts = shifts_of(large, small, expert)
    third = shifts._replace(forward=shifts.forward / 3, backward=shifts.backward / 3)
    grid = jnp.linspace(0, 2, 21).reshape(-1, 1, 1) * jnp.ones((1, 1, BATCH))
    scores = np.stack([kl_objective(alpha, third) for alpha in grid])
    found = fused.trace.alpha[1]
    np.testing.assert_allclose(found, grid[scores.argmin(axis=0), 0, 0], atol=1e-6)
    assert found.mean() < 0.8 * run((large, small, expert)).trace.alpha.mean()


def test_bounds_of_each_expert():
    logits = draw(2, seed=10)
    free = run(logits, "coordinate").trace.alpha
    assert (free[0] > 0.25).any()
    bounds = {"low": (0.0, 0.5), "high": (0.25, 1.0), "points": 6}
    alpha = run(logits, "coordinate", **bounds).trace.alpha
    assert ((alpha[0] >= 0) & (alpha[0] <= 0.25)).all()
    assert ((alpha[1] >= 0.5) & (alpha[1] <= 1)).all()
    alpha = run(logits, **bounds).trace.alpha
    chosen = alpha > 0
    assert (chosen.sum(axis=0) <= 1).all()
    assert (alpha[1][chosen[1]] >= 0.5).all()


def test_bfloat16_is_computed_in_float32():
    logits = [x.astype(jnp.bfloat16) for x in draw(1)]
    fused, expected = run(logits), run([x.astype(jnp.float32) for x in logits])
    chex.assert_trees_all_equal(fused, expected)
    assert fused.logits.dtype == jnp.float32


def test_routing():
    alpha = jnp.array([[[0.5, 0.0, 0.0, 1.0]], [[0.1, 2.0, 0.0, 0.0]]])
    mask = jnp.array([[True, True, True, True]])
    np.testing.assert_allclose(routing(alpha, mask), [0.5, 0.25])
    np.testing.assert_allclose(routing(alpha, mask.at[0, 3].set(False)), [1 / 3, 1 / 3])


@pytest.fixture(scope="module")
def ensemble():
    """Large model, small one and two experts."""
    found = []
    for seed, (width, experts) in enumerate([(12, 0), (8, 2)]):
        decoder = Decoder(VOCAB, width, depth=1, heads=1, hidden=8)
        tokens = jnp.zeros((1, 2), jnp.int32)
        base = jax.jit(decoder.init)(jax.random.key(seed), tokens)["params"]
        base["output"]["kernel"] *= 3
        rng = np.random.default_rng(seed)
        move = lambda x, rng=rng: x + 0.5 * rng.normal(size=x.shape).astype(np.float32)
        tuned = [jax.tree.map(move, base) for _ in range(experts)]
        found += [
            CachedModel(params, decoder.start, decoder.advance)
            for params in (base, *tuned)
        ]
    return tuple(found)


def test_decoding_notes_the_weights_of_every_token(ensemble):
    """As the naive loop: whole sequences read again, one sequence after the other."""
    prompts, length = [[3, 1, 4], [5]], 3
    found = generate(
        ensemble, *padded(prompts, left=True), DynamicFusion(), steps=length
    )

    @jax.jit
    def fused(tokens):
        logits = [
            m.advance(m.params, m.start(1, 8), tokens)[0].squeeze(0) for m in ensemble
        ]
        return dynamic_logits_fusion(logits[0], logits[1], jnp.stack(logits[2:]))

    for i, row in enumerate(prompts):
        row = list(row)
        for step in range(length):
            tokens = np.zeros((1, 8), np.int32)
            tokens[0, : len(row)] = row
            logits, trace = jax.device_get(fused(jnp.asarray(tokens)))
            at = len(row) - 1
            row.append(int(logits[at].argmax()))
            assert found.tokens[i, step] == row[-1]
            np.testing.assert_allclose(
                found.notes.alpha[:, i, step], trace.alpha[:, at], atol=1e-6
            )
            np.testing.assert_allclose(
                found.notes.objective[i, step], trace.objective[at], rtol=1e-2
            )
    assert found.notes.alpha.max() > 0


def test_ways_to_combine_an_ensemble():
    large, small, experts = draw(2)
    logits = jnp.concatenate([large[None], small[None], experts])
    chex.assert_trees_all_close(
        StaticFusion((0.5, 1.5))(logits), static(large, small, experts, (0.5, 1.5))
    )
    chex.assert_trees_all_close(
        jax.jit(DynamicFusion())(logits), run((large, small, experts)), atol=1e-5
    )


def test_shapes_and_numbers_must_fit():
    large, small, experts = draw(2)
    for wrong in ((small[:, :-1], experts), (small, experts[:, :, :-1])):
        with pytest.raises((ValueError, TypeCheckError), match="vocab"):
            dynamic_logits_fusion(large, *wrong)
    with pytest.raises(ValueError, match="'bisect', got 2; 'grid' and 'coordinate'"):
        dynamic_logits_fusion(large, small, experts, DynamicFusion("bisect"))
    with pytest.raises(ValueError, match=r"at least one expert, .* got 0"):
        dynamic_logits_fusion(large, small, experts[:0])
    with pytest.raises(ValueError, match="each of 2 experts, got"):
        static_logits_fusion(large, small, experts, [1.0])
    with pytest.raises(ValueError, match=r"`high` must .* 2 experts, got \(1.0,\)"):
        dynamic_logits_fusion(large, small, experts, DynamicFusion(high=(1.0,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": -0.1}, "`low` must be at least 0 and at most `high`, got -0.1"),
        ({"high": (1.0, 0.5), "low": 0.75}, "`low` must be at least 0 and at most"),
        ({"points": 1}, "`points` must be at least 2"),
        ({"rounds": 0}, "`rounds` and `halvings` at least 1"),
        ({"halvings": 0}, "`rounds` and `halvings` at least 1"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicFusion(**options)
