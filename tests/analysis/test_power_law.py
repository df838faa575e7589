import numpy as np
import pytest

from mtjax.analysis import mean_power_law_alpha, power_law_alpha, power_law_fit


def pareto(alpha, size, seed, smallest=1.0):
    return smallest * np.random.default_rng(seed).random(size) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_pareto_samples(alpha):
    found = [power_law_fit(pareto(alpha, 2_000, seed)).alpha for seed in range(5)]
    # The estimate has a standard error of (alpha - 1) / sqrt(n), more for short tails.
    np.testing.assert_allclose(np.mean(found), alpha, rtol=0.06)


def test_what_is_no_power_law_is_left_out():
    tail = pareto(2.5, 1_000, 1, smallest=3.0)
    body = np.random.default_rng(0).uniform(0.0, 2.0, 2_000)
    fit = power_law_fit(np.concatenate([body, tail]))
    assert fit == power_law_fit(tail)
    assert fit.smallest >= 3.0
    assert fit.alpha == pytest.approx(2.5, rel=0.1)
    assert fit.distance < 0.03


def test_scale_and_zeros_do_not_matter():
    values = pareto(3.0, 300, 2)
    fit, other = power_law_fit(values), power_law_fit(np.append(1e-6 * values, 0.0))
    assert other.alpha == pytest.approx(fit.alpha)
    assert other.smallest == pytest.approx(1e-6 * fit.smallest)


def test_the_chosen_tail_has_the_smallest_distance():
    values = np.sort(pareto(2.2, 60, 3))
    fit = power_law_fit(values)
    for start in range(len(values) - 1):
        tail = values[start:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        fitted = 1 - (tail / tail[0]) ** (1 - alpha)
        after = np.searchsorted(tail, tail, side="right") / len(tail)
        before = np.searchsorted(tail, tail, side="left") / len(tail)
        distance = max(np.abs(after - fitted).max(), np.abs(fitted - before).max())
        assert fit.distance <= distance + 1e-12
        if tail[0] == fit.smallest:
            assert fit.alpha == pytest.approx(alpha)


def test_kernels_are_matrices_of_outputs():
    rng = np.random.default_rng(4)
    spectrum = pareto(2.5, 200, 5)
    left, _ = np.linalg.qr(rng.normal(size=(250, 200)))
    right, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    matrix = (left * np.sqrt(spectrum)) @ right.T
    expected = power_law_fit(spectrum).alpha
    assert power_law_alpha(matrix) == pytest.approx(expected, rel=1e-6)
    kernel = matrix.reshape(5, 5, 10, 200)
    assert power_law_alpha(kernel) == pytest.approx(expected, rel=1e-6)


def test_groups_are_means_over_layers():
    rng = np.random.default_rng(6)
    kernels = [rng.normal(size=(30, 20)) for _ in range(3)]
    params = {
        "encoder": [{"kernel": k, "bias": np.ones(20)} for k in kernels[:2]],
        "head": {"kernel": kernels[2]},
        "other": {"kernel": kernels[2]},
    }
    keep = {"encoder": "backbone", "head": "head"}
    found = mean_power_law_alpha(params, lambda path: keep.get(path.partition("/")[0]))
    alphas = [power_law_alpha(k) for k in kernels]
    assert found == pytest.approx({"backbone": np.mean(alphas[:2]), "head": alphas[2]})


def test_errors():
    with pytest.raises(ValueError, match="two different positive numbers, got 3"):
        power_law_fit(np.ones(3))
    with pytest.raises(ValueError, match="`values` must hold"):
        power_law_fit(np.zeros(3))
    with pytest.raises(ValueError, match=r"`kernel` must have .* got shape \(3,\)"):
        power_law_alpha.__wrapped__(np.ones(3))
