"""Every method against its paper's formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mtjax import merging
from mtjax.merging import chain
from mtjax.systems.tall_masks import TallMasksConfig, consensus_vector, tall_masks
from tests.merging import references
from tests.merging.catalogue import KEY, models_like

SHAPES = {"layers_0/kernel": (9, 7), "layers_1/bias": (7,)}
BASE, MODELS = models_like(SHAPES, 3)
PATHS = list(SHAPES)


def flat(tree):
    return np.concatenate([np.asarray(tree[p], np.float64).ravel() for p in PATHS])


VECTORS = np.stack([flat(m) - flat(BASE) for m in MODELS])
MATRICES = np.stack(
    [np.asarray(m[PATHS[0]], np.float64) - BASE[PATHS[0]] for m in MODELS]
)


def vector(merger, models=MODELS, base=BASE, **rest):
    """What the method adds to the base, as one vector."""
    return flat(merger.vector(base, models, **rest))


def matrix(merger, models=MODELS):
    return np.asarray(merger.vector(BASE, models)[PATHS[0]], np.float64)


def close(found, expected, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_average_and_task_arithmetic():
    close(vector(merging.average()), VECTORS.mean(0))
    close(vector(merging.average([1, 0, 3])), np.array([1, 0, 3]) / 4 @ VECTORS)
    close(vector(merging.task_arithmetic(0.3)), 0.3 * VECTORS.sum(0))
    # The mean is task arithmetic with 1/T; negation forgets; analogies.
    close(vector(merging.task_arithmetic(1 / 3)), vector(merging.average()))
    close(vector(merging.task_arithmetic(-0.5), MODELS[:1]), -0.5 * VECTORS[0])
    close(
        vector(merging.task_arithmetic([1, 1, -1])),
        VECTORS[0] + VECTORS[1] - VECTORS[2],
    )


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(density):
    close(vector(merging.ties(density)), references.ties(VECTORS, density))
    close(
        vector(merging.ties(density, 0.3, reduction="sum")),
        0.3 * references.ties(VECTORS, density, mean=False),
    )


def test_ties_per_tensor_thresholds_each_parameter():
    found = merging.ties(0.3, scope="tensor").vector(BASE, MODELS)
    for path in PATHS:
        rows = np.stack([np.ravel(m[path] - BASE[path]) for m in MODELS])
        trimmed = np.array([references.ties(row[None], 0.3) for row in rows])
        signs = np.sign(trimmed.sum(0))
        agreeing = np.where(trimmed * signs > 0, trimmed, 0)
        count = np.maximum((agreeing != 0).sum(0), 1)
        close(np.ravel(found[path]), agreeing.sum(0) / count)


def test_ties_of_agreeing_vectors_is_their_sum():
    models = [jax.tree.map(lambda b, s=s: b + s * jnp.abs(b), BASE) for s in (1, 2, 3)]
    close(
        vector(merging.ties(1.0, 1.0, reduction="sum"), models),
        6 * np.abs(flat(BASE)),
    )


def test_elements_that_cancel_take_the_sign_of_the_majority():
    base = {"w": jnp.zeros(5)}
    models = [{"w": jnp.array([sign, -1, -1, -1, 2])} for sign in (1.0, -1.0)]
    found = merging.ties(1.0)(base, models)["w"]
    np.testing.assert_array_equal(found, [-1, -1, -1, -1, 2])
    positive = chain(merging.elect_sign("positive"), merging.disjoint_mean())
    np.testing.assert_array_equal(positive(base, models)["w"], [1, -1, -1, -1, 2])


def test_dare_is_right_on_average_and_drops_its_share():
    base, (model,) = {"w": jnp.zeros(40_000)}, [{"w": jnp.ones(40_000)}]
    for rate in (0.0, 0.5, 0.9):
        merger = chain(merging.dare(rate), merging.task_arithmetic(1.0))
        found = np.asarray(merger(base, [model], key=KEY)["w"])
        values = np.unique(found)
        assert abs((found == 0).mean() - rate) < 0.01
        assert abs(found.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / 40_000) + 1e-7
        close(values[-1], 1 / (1 - rate), rtol=1e-4)
    # Models draw numbers of their own.
    two = chain(merging.dare(0.5), merging.task_arithmetic([1.0, -1.0]))
    assert np.any(np.asarray(two(base, [model, model], key=KEY)["w"]) != 0)


def test_magprune_drops_small_elements_more_often():
    sizes = jnp.arange(1.0, 101.0)
    base, model = {"w": jnp.zeros((100, 64))}, {"w": jnp.tile(sizes[:, None], (1, 64))}
    merger = chain(merging.magprune(0.5, 0.6), merging.task_arithmetic(1.0))
    keys = jax.random.split(KEY, 40)
    found = np.stack([merger(base, [model], key=key)["w"] for key in keys])
    rates = (found == 0).mean(axis=(0, 2))  # of every input, smallest first
    expected = 0.2 + 0.6 * np.arange(99, -1, -1) / 100
    np.testing.assert_allclose(rates, expected, atol=5 * np.sqrt(0.25 / 2560))
    error = np.abs(found.mean(axis=(0, 2)) / np.asarray(sizes) - 1)
    assert error.max() < 6 * np.sqrt(0.8 / 0.2 / 2560)


def test_breadcrumbs():
    found = merging.breadcrumbs(0.6, 0.1, 1.0).vector(BASE, MODELS)
    for path in PATHS:
        rows = np.stack([np.ravel(m[path] - BASE[path]) for m in MODELS])
        expected = sum(references.breadcrumbs(row, 0.6, 0.1) for row in rows)
        close(np.ravel(found[path]), expected)
    # No outliers to drop: the largest stay (`[: -0]` would drop all).
    close(vector(merging.breadcrumbs(1.0, 0.0, 0.3)), 0.3 * VECTORS.sum(0))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_pcb(density):
    close(
        vector(merging.pcb(density, 1.0)),
        references.pcb(VECTORS, density),
        rtol=1e-3,
        atol=1e-5,
    )


def test_magmax():
    largest = np.abs(VECTORS).argmax(0)
    close(
        vector(merging.magmax(0.5)),
        0.5 * np.take_along_axis(VECTORS, largest[None], 0)[0],
    )


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_consensus(kept):
    total = VECTORS.sum(0)
    votes = np.abs(VECTORS) > 0.6 * np.abs(total[None] - VECTORS)
    expected = np.where(votes.sum(0) >= kept, 0.5 * total, 0)
    assert 0 < np.count_nonzero(expected) < total.size or kept in (0, 3)
    close(vector(merging.consensus(0.6, kept, scale=0.5)), expected)
    # Behind a method that leaves something out, masks compare with whole vectors.
    trimmed = vector(merging.ties(0.4, 1.0, reduction="sum"))
    votes = np.abs(VECTORS) > 0.6 * np.abs(trimmed[None] - VECTORS)
    merger = chain(
        merging.ties(0.4, 1.0, reduction="sum"), merging.consensus(0.6, kept)
    )
    close(vector(merger), np.where(votes.sum(0) >= kept, trimmed, 0))


def test_consensus_is_that_of_tall_masks():
    config = TallMasksConfig(thresholds=(0.4,))
    models = {f"{i}": model for i, model in enumerate(MODELS)}
    found = tall_masks(BASE, models, config=config)
    expected = consensus_vector(found.compressed, 2)
    chex.assert_trees_all_close(merging.consensus().vector(BASE, models), expected)


def test_model_stock():
    for path in PATHS:
        rows = np.stack([np.ravel(m[path] - BASE[path]) for m in MODELS]).astype(float)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = max((units @ units.T)[np.triu_indices(3, 1)].mean(), 0)
        expected = 3 * cosine / (1 + 2 * cosine) * rows.mean(0)
        found = merging.model_stock().vector(BASE, MODELS)[path]
        close(np.ravel(found), expected)


def test_delta_guided():
    sizes = np.abs(VECTORS)
    expected = (sizes / sizes.sum(0) * VECTORS).sum(0)
    close(vector(merging.delta_guided()), expected)
    inverse = (1 / sizes / (1 / sizes).sum(0) * VECTORS).sum(0)
    close(vector(merging.delta_guided(rule="inverse")), inverse, rtol=1e-4)
    scaled = np.exp(sizes / sizes.max(0) / 0.5)
    softmax = (scaled / scaled.sum(0) * VECTORS).sum(0)
    close(vector(merging.delta_guided(rule="softmax", temperature=0.5)), softmax)
    found = merging.delta_guided("tensor").vector(BASE, MODELS)
    for path in PATHS:
        rows = np.stack([np.ravel(m[path] - BASE[path]) for m in MODELS])
        norms = np.linalg.norm(rows, axis=1)
        close(np.ravel(found[path]), norms / norms.sum() @ rows)
    # Who did not change counts for nothing, or, inversely, for everything.
    close(vector(merging.delta_guided(), [BASE, MODELS[0]]), VECTORS[0])
    still = vector(merging.delta_guided(rule="inverse"), [BASE, MODELS[0]])
    close(still, 0 * still, atol=1e-6)


def test_slerp():
    first, second = (flat(m) for m in MODELS[:2])
    for fraction in (0.0, 0.3, 1.0):
        merged = merging.slerp(fraction)(None, MODELS[:2])
        close(flat(merged), references.slerp(first, second, fraction))
        close(
            vector(merging.slerp(fraction, on="task_vectors"), MODELS[:2]),
            references.slerp(*VECTORS[:2], fraction),
        )


def test_slerp_keeps_the_length_and_is_a_line_for_parallel_vectors():
    angles = [0.0, 1.0]
    models = [{"w": jnp.array([np.cos(a), np.sin(a)])} for a in angles]
    found = np.asarray(merging.slerp(0.25)(None, models)["w"])
    close(found, [np.cos(0.25), np.sin(0.25)])
    parallel = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([2.0, 4.0])}]
    close(merging.slerp(0.25)(None, parallel)["w"], [1.25, 2.5])
    zero = [{"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 4.0])}]
    close(merging.slerp(0.25)(None, zero)["w"], [0.5, 1.0])


def test_karcher():
    points = np.stack([flat(m) for m in MODELS])
    close(flat(merging.karcher()(None, MODELS)), references.karcher(points), rtol=1e-4)
    units = points[:2] / np.linalg.norm(points[:2], axis=1, keepdims=True)
    middle = references.slerp(*units, 0.5) * np.linalg.norm(points[:2], axis=1).mean()
    close(flat(merging.karcher()(None, MODELS[:2])), middle, rtol=1e-4)


def test_lines_scales_by_depth():
    merger = chain(merging.task_arithmetic(1.0), merging.lines(0.9))
    found = merger.vector(BASE, MODELS)
    for path, factor in zip(PATHS, (1 / 3, 1 / 3 + 0.9)):
        rows = sum(np.asarray(m[path] - BASE[path]) for m in MODELS)
        close(found[path], factor * rows)
    flat_scale = chain(merging.task_arithmetic(1.0), merging.lines(0.0, alpha=0.4))
    close(vector(flat_scale), 0.4 * VECTORS.sum(0))
    # Behind another method the first factor makes up for what that took away.
    merger = chain(merging.ties(), merging.lines(0.0))
    expected = references.ties(VECTORS, 0.2)
    share = np.abs(VECTORS.sum(0)).sum() / np.abs(expected).sum() / 3
    close(vector(merger), share * expected)


def test_tsv():
    close(matrix(merging.tsv_m()), references.tsv(MATRICES), atol=1e-5)
    close(matrix(merging.tsv_m(), MODELS[:1]), MATRICES[0], atol=1e-5)


def test_iso_c_has_a_flat_spectrum():
    found = np.linalg.svd(matrix(merging.iso_c()), compute_uv=False)
    total = np.linalg.svd(MATRICES.sum(0), compute_uv=False)
    close(found, np.full(7, total.mean()))
    left = np.linalg.svd(MATRICES.sum(0), full_matrices=False)
    close(matrix(merging.iso_c(1.5)), 1.5 * total.mean() * left[0] @ left[2], atol=1e-5)


def test_iso_cts_has_a_flat_spectrum_and_reserves_directions():
    merged = matrix(merging.iso_cts(common=0.5))  # 4 common, 1 of each task
    values = np.linalg.svd(merged, compute_uv=False)
    close(values, np.full(7, values.mean()), rtol=1e-4)
    close(matrix(merging.iso_cts(common=1.0)), matrix(merging.iso_c()), atol=1e-5)


def test_knots_leaves_task_arithmetic_as_it_is():
    close(vector(merging.knots(merging.task_arithmetic(0.4))), 0.4 * VECTORS.sum(0))
    aligned = vector(merging.knots(merging.ties()))
    assert not np.allclose(aligned, vector(merging.ties()), atol=1e-2)


def test_knots_merges_in_the_common_basis():
    side = np.concatenate([m.T for m in MATRICES], axis=1)  # rows are outputs
    u = np.linalg.svd(side)[0]
    turned = np.stack([u.T @ m.T for m in MATRICES])
    largest = np.take_along_axis(turned, np.abs(turned).argmax(0)[None], 0)[0]
    close(matrix(merging.knots(merging.magmax())), (u @ largest).T, atol=1e-5)


def test_wudi_finds_the_minimum():
    exact = matrix(merging.wudi()).T
    rows = [m.T for m in MATRICES]
    least = references.wudi_loss(exact, rows)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = exact + 1e-2 * rng.standard_normal(exact.shape)
        assert references.wudi_loss(other, rows) > least
    close(matrix(merging.wudi(), MODELS[:1]), MATRICES[0], atol=1e-5)
    descended = matrix(merging.wudi(2000, learning_rate=1e-2)).T
    assert references.wudi_loss(descended, rows) < least * 1.01
    start = sum(rows)
    close(matrix(merging.wudi(0)).T, start)
    assert references.wudi_loss(start, rows) > 2 * least


def test_the_axis_of_outputs_can_be_said():
    turn = lambda trees: [{"w": t[PATHS[0]].T} for t in trees]
    for factory in (merging.wudi, merging.tsv_m):
        found = factory(out_axis=0).vector(turn([BASE])[0], turn(MODELS))["w"]
        close(found, matrix(factory()).T, atol=1e-5)


def test_a_convolution_is_a_matrix_with_a_row_per_output():
    shape = {"kernel": (3, 3, 2, 5)}
    base, models = models_like(shape, 2)
    found = merging.iso_c().vector(base, models)["kernel"]
    flat_trees = [{"kernel": t["kernel"].reshape(18, 5)} for t in (base, *models)]
    expected = merging.iso_c().vector(flat_trees[0], flat_trees[1:])["kernel"]
    close(found, expected.reshape(3, 3, 2, 5))
    torch = lambda t: {"kernel": jnp.transpose(t["kernel"], (3, 2, 0, 1))}
    found = merging.iso_c(out_axis=0).vector(torch(base), [torch(m) for m in models])
    close(np.linalg.norm(found["kernel"]), np.linalg.norm(expected), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: merging.trim(0.0), "`density`"),
        (lambda: merging.trim(0.5, "layer"), "`scope`"),
        (lambda: merging.ties(reduction="median"), "`reduction`"),
        (lambda: merging.elect_sign("negative"), "`tie`"),
        (lambda: merging.dare(1.0), "`drop_rate`"),
        (lambda: merging.magprune(0.1, 0.5), "`drop_rate`"),
        (lambda: merging.breadcrumbs(0.95, 0.1), "`density`"),
        (lambda: merging.pcb(2.0), "`density`"),
        (lambda: merging.average([1, -1]), "`weights`"),
        (lambda: merging.karcher([1, 0]), "`weights`"),
        (lambda: merging.slerp(on="biases"), "`on`"),
        (lambda: merging.iso_cts(common=0), "`common`"),
        (lambda: merging.wudi(-1), "`steps`"),
        (lambda: merging.delta_guided("layer"), "`granularity`"),
        (lambda: merging.delta_guided(rule="most"), "`rule`"),
        (lambda: merging.delta_guided(temperature=0.0), "`temperature`"),
    ],
)
def test_parameters_are_checked_at_once(make, message):
    # In tests annotations are checked too, and find some of them first.
    with pytest.raises((ValueError, TypeCheckError), match=message.strip("`")):
        make()


def test_one_value_per_model_is_needed():
    for merger in (
        merging.average([1, 2]),
        merging.task_arithmetic([1, 2]),
        merging.karcher([1, 2]),
    ):
        with pytest.raises(ValueError, match=r"one value per model \(3\), got 2"):
            merger(BASE, MODELS)
    with pytest.raises(ValueError, match="two models"):
        merging.slerp()(BASE, MODELS)
    with pytest.raises(ValueError, match="must combine the models"):
        merging.trim(0.5)(BASE, MODELS)
