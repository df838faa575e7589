"""TALL-masks and Consensus: closed forms, laws, selection and storage."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import merging
from mtjax.merging.compressed import CompressedTasks, apply_vector, task_vector
from mtjax.merging.masks import density_of, magnitude_mask, masked, pack_mask
from mtjax.merging.selection import select_coefficient
from mtjax.systems.tall_masks import (
    TallMasksConfig,
    agreement,
    agreement_histogram,
    consensus,
    consensus_merging,
    consensus_vector,
    tall_mask,
    tall_masks,
)

# 13 elements: not a multiple of 8.
SHAPES = {"bias": (3,), "kernel": (5, 2)}
TASKS = ("a", "b", "c")
THRESHOLDS = TallMasksConfig().thresholds
SUM = merging.task_arithmetic(1.0)
TIES = merging.ties(0.5, reduction="sum", scope="tensor")


def tree(flat):
    flat = jnp.asarray(flat, jnp.float32)
    return {"bias": flat[:3], "kernel": flat[3:].reshape(5, 2)}


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def whole_numbers(seed, tasks=TASKS):
    """A base and models whose sums and differences are exact in float32."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-9, 10, 13)
    vectors = {task: rng.integers(-9, 10, 13) for task in tasks}
    return tree(base), {t: tree(base + v) for t, v in vectors.items()}, vectors


def fixed(base, models, threshold=0.4, **rest):
    config = TallMasksConfig(thresholds=(threshold,))
    return tall_masks(base, models, config=config, **rest).compressed


BASE, MODELS, VECTORS = whole_numbers(0)
TOTAL = sum(VECTORS.values())


def test_one_model_comes_back_bit_by_bit():
    base, models, vectors = whole_numbers(1, ("a",))
    compressed = fixed(base, models)
    np.testing.assert_array_equal(flat(compressed.mask("a")), vectors["a"] != 0)
    np.testing.assert_array_equal(flat(compressed.restore("a")), flat(models["a"]))


def test_one_model_comes_back_up_to_one_rounding():
    rng = np.random.default_rng(2)
    base, model = tree(rng.normal(size=13)), tree(rng.normal(size=13))
    restored = fixed(base, {"a": model}).restore("a")
    largest = np.maximum(np.abs(flat(base)), np.abs(flat(model)))
    error = np.abs(flat(restored).astype(np.float64) - flat(model))
    assert (error <= 2 * np.spacing(largest)).all()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_disjoint_supports_come_back_exactly(threshold):
    owner = np.arange(13) % 3
    models = {
        task: tree(flat(BASE) + np.where(owner == i, VECTORS[task], 0))
        for i, task in enumerate(TASKS)
    }
    compressed = fixed(BASE, models, threshold)
    for task in TASKS:
        np.testing.assert_array_equal(
            flat(compressed.restore(task)), flat(models[task])
        )


@pytest.mark.parametrize("merger", [SUM, TIES], ids=["sum", "ties"])
def test_masks_against_numpy_and_monotone_in_the_threshold(merger):
    merged = merger.vector(BASE, MODELS)
    total = flat(merged).astype(np.float64)
    if merger is SUM:
        np.testing.assert_array_equal(total, TOTAL)
    for task, vector in VECTORS.items():
        own = task_vector(BASE, MODELS[task])
        np.testing.assert_array_equal(flat(own), vector)
        before = vector != 0  # the support, which is the mask of threshold 0
        for threshold in (0.0, *THRESHOLDS, 1.0, 3.0):
            found = flat(tall_mask(own, merged, threshold))
            # The sides are compared as in the paper, in float32.
            limit = np.float32(threshold) * np.abs(total - vector).astype(np.float32)
            np.testing.assert_array_equal(found, np.abs(vector) > limit)
            assert (found <= before).all()
            if threshold == 0:
                np.testing.assert_array_equal(found, before)
            before = found


def test_no_other_mask_has_a_smaller_error_than_that_of_one():
    rng = np.random.default_rng(3)
    own, total = rng.normal(size=(2, 10)).astype(np.float32)
    found = np.asarray(tall_mask(jnp.asarray(own), jnp.asarray(total), 1.0))
    choices = np.array(list(itertools.product([0, 1], repeat=10)))
    errors = np.abs(choices * total - own).sum(1)
    np.testing.assert_array_equal(choices[errors.argmin()], found)


def test_opposite_vectors_cannot_be_restored():
    models = {"a": MODELS["a"], "b": tree(flat(BASE) - VECTORS["a"])}
    support = VECTORS["a"] != 0
    compressed = fixed(BASE, models, 0.6)
    assert not flat(compressed.vector).any()
    np.testing.assert_array_equal(flat(compressed.mask("a")), support)
    np.testing.assert_array_equal(flat(compressed.restore("a")), flat(BASE))
    # Equality is not enough.
    assert not flat(fixed(BASE, models, 1.0).mask("a")).any()
    # Nothing is carried there: the histogram is empty.
    counts = agreement([compressed.mask(t) for t in "ab"])
    np.testing.assert_array_equal(agreement_histogram(counts, compressed.vector, 2), 0)


def test_equal_vectors_are_doubled():
    compressed = fixed(BASE, {"a": MODELS["a"], "b": MODELS["a"]}, 0.6)
    np.testing.assert_array_equal(flat(compressed.mask("a")), VECTORS["a"] != 0)
    error = flat(compressed.restore("a")) - flat(MODELS["a"])
    np.testing.assert_array_equal(error, VECTORS["a"])


def test_masks_use_the_whole_task_vector_with_a_magnitude_filter():
    filtered = merging.chain(merging.trim(0.5, "tensor"), SUM)
    compressed = fixed(BASE, MODELS, 0.4, merger=filtered)
    total = flat(filtered.vector(BASE, MODELS))
    for task, vector in VECTORS.items():
        limit = np.float32(0.4) * np.abs(total - vector).astype(np.float32)
        np.testing.assert_array_equal(
            flat(compressed.mask(task)), np.abs(vector) > limit
        )


# --- Consensus ------------------------------------------------------------------------


def test_counts_are_sums_of_masks():
    compressed = fixed(BASE, MODELS)
    masks = [compressed.mask(task) for task in TASKS]
    counts = agreement(masks)
    expected = np.sum([flat(mask) for mask in masks], axis=0)
    np.testing.assert_array_equal(flat(counts), expected)
    histogram = agreement_histogram(counts, compressed.vector, 3)
    carried = expected[TOTAL != 0]
    np.testing.assert_allclose(
        histogram, [np.mean(carried == c) for c in range(4)], rtol=1e-12
    )
    of_bias = agreement_histogram(counts, compressed.vector, 3, where="^bias$")
    inside = expected[:3][TOTAL[:3] != 0]
    np.testing.assert_allclose(of_bias, [np.mean(inside == c) for c in range(4)])


@pytest.mark.parametrize("merger", [SUM, TIES], ids=["sum", "ties"])
def test_consensus_by_agreement(merger):
    compressed = fixed(BASE, MODELS, merger=merger)
    by_agreement = [flat(consensus_vector(compressed, k)) for k in range(5)]
    np.testing.assert_array_equal(by_agreement[0], flat(merger.vector(BASE, MODELS)))
    assert not by_agreement[4].any()
    for more, fewer in itertools.pairwise(by_agreement):
        assert ((fewer != 0) <= (more != 0)).all()
    counts = agreement([compressed.mask(task) for task in TASKS])
    np.testing.assert_array_equal(
        by_agreement[2], flat(compressed.vector) * (flat(counts) >= 2)
    )
    np.testing.assert_array_equal(flat(consensus(counts, 2)), flat(counts) >= 2)


def by_distance(models):
    """An accuracy that is best at the model of the task."""
    return lambda params, task: float(
        1 / (1 + np.abs(flat(params) - flat(models[task])).sum())
    )


def test_consensus_model_is_the_base_or_the_merger_at_the_ends():
    compressed, accuracy = fixed(BASE, MODELS), by_distance(MODELS)
    single = dict.fromkeys(TASKS, 1.0)

    def model(min_agreement, coefficient):
        config = TallMasksConfig((0.4,), min_agreement, (coefficient,))
        return flat(consensus_merging(compressed, accuracy, single, config).params)

    np.testing.assert_array_equal(model(2, 0.0), flat(BASE))
    np.testing.assert_array_equal(model(4, 0.7), flat(BASE))
    arithmetic = merging.task_arithmetic(0.25)(BASE, MODELS)
    np.testing.assert_array_equal(model(0, 0.25), flat(arithmetic))


def test_order_of_tasks_does_not_matter():
    compressed = fixed(BASE, MODELS)
    renamed = dict(zip("xyz", (MODELS["c"], MODELS["a"], MODELS["b"])))
    other = fixed(BASE, renamed)
    np.testing.assert_array_equal(flat(other.vector), flat(compressed.vector))
    for new, old in zip("xyz", "cab"):
        np.testing.assert_array_equal(other.masks[new], compressed.masks[old])
    np.testing.assert_array_equal(
        flat(consensus_vector(other)), flat(consensus_vector(compressed))
    )


# --- Selection ------------------------------------------------------------------------


def test_thresholds_are_chosen_per_task_on_the_restored_model():
    accuracy = by_distance(MODELS)
    seen = []

    def recorded(params, task):
        seen.append((task, accuracy(params, task)))
        return seen[-1][1]

    found = tall_masks(BASE, MODELS, recorded)
    assert len(seen) == len(TASKS) * len(THRESHOLDS)
    for task in TASKS:
        own = {
            threshold: accuracy(fixed(BASE, MODELS, threshold).restore(task), task)
            for threshold in THRESHOLDS
        }
        assert found.accuracies[task] == own
        best = max(own.values())
        assert found.thresholds[task] == min(t for t in own if own[t] == best)
        np.testing.assert_array_equal(
            found.compressed.masks[task],
            fixed(BASE, MODELS, found.thresholds[task]).masks[task],
        )


def test_coefficient_maximises_the_normalised_accuracy():
    vector, accuracy = SUM.vector(BASE, MODELS), by_distance(MODELS)
    single = {"a": 0.5, "b": 1.0, "c": 2.0}
    found = select_coefficient(BASE, vector, accuracy, single)
    assert len(found.scores) == 21
    for alpha, score in found.scores.items():
        params = tree(flat(BASE) + np.float32(alpha) * TOTAL)
        ratios = [accuracy(params, task) / single[task] for task in TASKS]
        np.testing.assert_allclose(score, np.mean(ratios), rtol=1e-5)
    assert found.scores[found.coefficient] == max(found.scores.values())
    params = apply_vector(BASE, vector, found.coefficient)
    np.testing.assert_array_equal(flat(found.params), flat(params))


def test_magnitude_mask_takes_the_largest():
    vector = tree([0, 0, 9, -8, 1, 2, 3, 0, 0, 0, 0, 0, 0])
    mask = magnitude_mask(vector, 2 / 13)
    np.testing.assert_array_equal(np.flatnonzero(flat(mask)), [2, 3])
    # Zeros are never taken, even if they are among the largest.
    assert density_of(magnitude_mask(vector, 1.0)) == 5 / 13


# --- Storage and other leaves ---------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    """A base with layers, a head, a counter and leaves in bfloat16; three models."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

    def one(step):
        return {
            "layers": [{"kernel": draw(3, 3)}, {"kernel": draw(3, 2)}],
            "norm": draw(2).astype(jnp.bfloat16),
            "head": {"kernel": draw(2, 4)},
            "step": jnp.asarray(step),
        }

    base = one(0)
    # Near the base, so that tasks have something to share.
    near = lambda model: jax.tree.map(
        lambda b, m: b if b.ndim == 0 else (b + 0.1 * m).astype(b.dtype), base, model
    )
    models = {task: near(one(7)) for task in TASKS}
    return base, {t: {**m, "step": jnp.asarray(7)} for t, m in models.items()}


def not_head(path):
    return not path.startswith("head")


def test_heads_and_counters_are_those_of_the_base(mixed):
    base, models = mixed
    compressed = fixed(base, models, where=not_head)
    assert compressed.elements == 9 + 6 + 2
    restored = compressed.restore("b")
    assert jax.tree.structure(restored) == jax.tree.structure(base)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [
        x.dtype for x in jax.tree.leaves(base)
    ]
    np.testing.assert_array_equal(restored["head"]["kernel"], base["head"]["kernel"])
    assert int(restored["step"]) == 0
    kernel = lambda params: np.asarray(params["layers"][0]["kernel"])
    assert (kernel(restored) != kernel(base)).any()
    changed = consensus_vector(compressed, 1)
    assert changed["head"]["kernel"] is None
    assert changed["step"] is None


def test_saved_and_loaded_models_give_the_same_logits(mixed, tmp_path):
    base, models = mixed
    compressed = fixed(base, models, where=not_head)
    scaled = CompressedTasks(
        base, compressed.vector, compressed.masks, {"b": 1.5, "c": 0.3}
    )
    file = tmp_path / "tasks.safetensors"
    scaled.save(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    loaded = CompressedTasks.load(file, like=base)
    assert loaded.tasks == TASKS
    assert loaded.nbytes == scaled.nbytes
    x = jnp.ones((4, 3))

    def logits(params):
        first, second = (layer["kernel"] for layer in params["layers"])
        return (x @ first @ second + params["norm"][None]) @ params["head"]["kernel"]

    for task in TASKS:
        np.testing.assert_array_equal(loaded.masks[task], scaled.masks[task])
        np.testing.assert_array_equal(
            logits(loaded.restore(task)), logits(scaled.restore(task))
        )
    # Nested dictionaries need no `like`.
    plain = fixed(BASE, MODELS)
    plain.save(file)
    again = CompressedTasks.load(file)
    assert jax.tree.structure(again.base) == jax.tree.structure(BASE)
    np.testing.assert_array_equal(flat(again.restore("c")), flat(plain.restore("c")))


def test_bytes_follow_the_formula(mixed, tmp_path):
    compressed = fixed(BASE, MODELS)
    elements, tasks, bits = 13, 3, 32
    assert compressed.nbytes == 2 * bits * elements // 8 + tasks * -(-elements // 8)
    base, models = mixed
    whole = fixed(base, models, where=not_head)
    stored = sum(x.nbytes for x in jax.tree.leaves(base))
    assert whole.nbytes == stored + 4 * 17 + 3 * 3
    compressed.save(tmp_path / "tasks.safetensors")
    size = (tmp_path / "tasks.safetensors").stat().st_size
    assert compressed.nbytes < size < compressed.nbytes + 1000


def test_restoring_works_inside_jit():
    compressed = fixed(BASE, MODELS)
    restored = jax.jit(lambda: compressed.restore("a"))()
    np.testing.assert_array_equal(flat(restored), flat(compressed.restore("a")))


def test_random_masks_of_equal_density_do_not_restore():
    rng = np.random.default_rng(6)
    # Mostly apart, as task vectors are.
    vectors = {t: rng.normal(size=400) * (rng.random(400) < 0.2) for t in TASKS}
    model = lambda vector: {"w": jnp.asarray(vector, jnp.float32)}
    models = {t: model(vector) for t, vector in vectors.items()}
    compressed = fixed(model(np.zeros(400)), models)
    for task, vector in vectors.items():
        mask = compressed.mask(task)
        shuffled = {"w": jnp.asarray(rng.permutation(np.asarray(mask["w"])))}
        assert density_of(shuffled) == density_of(mask)
        taken, random = (flat(masked(compressed.vector, m)) for m in (mask, shuffled))
        size = np.abs(vector).sum()
        assert np.abs(taken - vector).sum() < 0.5 * size
        assert np.abs(random - vector).sum() > size


# --- Errors ---------------------------------------------------------------------------


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="`thresholds` must hold at least one"):
        TallMasksConfig(thresholds=())
    with pytest.raises(ValueError, match="`min_agreement` must not be negative, got -"):
        TallMasksConfig(min_agreement=-1)
    with pytest.raises(ValueError, match="`accuracy` must be given to choose"):
        tall_masks(BASE, MODELS)
    compressed, vector = fixed(BASE, MODELS), SUM.vector(BASE, MODELS)
    with pytest.raises(ValueError, match="`task` must be one of a, b, c, got 'd'"):
        compressed.restore("d")
    with pytest.raises(ValueError, match="`coefficients` must hold at least one"):
        select_coefficient(BASE, vector, by_distance(MODELS), {"a": 1.0}, ())
    with pytest.raises(ValueError, match=r"`single` must hold one positive .*'a': 0.0"):
        select_coefficient(BASE, vector, by_distance(MODELS), {"a": 0.0})
    short = pack_mask({"w": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"`masks` must hold 2 bytes .* for 13 elem"):
        CompressedTasks(BASE, vector, {"a": short})
    with pytest.raises(ValueError, match=r"`scales` must name tasks .* got"):
        CompressedTasks(BASE, vector, compressed.masks, {"d": 1.0})
    with pytest.raises(ValueError, match=r"`vector` must have the leaves .* 'kernel'"):
        CompressedTasks({"bias": BASE["bias"]}, vector, compressed.masks)
    file = tmp_path / "tasks.safetensors"
    compressed.save(file)
    with pytest.raises(ValueError, match=r"`like` must have the leaves .*kernel"):
        CompressedTasks.load(file, like={"bias": 0})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="`file` must be a complete file"):
        CompressedTasks.load(file)
