"""Sinusoidal tasks: their directions, and the correlation that follows from them."""

import numpy as np
import pytest

from mtjax.data import sinusoid_tasks

ALPHAS, BETAS = (1.0, 2.0), (0.5, 1.0)


def correlation(p, c, noise):
    """Of the targets: moments of sines of normals, as parts of complex exponentials."""
    # y = s + sum sin(a s + b), and E exp(i (u s1 + v s2)) is known for normal s.
    chance = lambda u, v, rho: np.exp(-(c**2) * (u**2 + v**2 + 2 * rho * u * v) / 2)
    sines = [(a, b) for a, b in zip(ALPHAS, BETAS)]
    mean = sum(np.sin(b) * chance(a, 0, 0) for a, b in sines)

    def product(rho):
        total = c**2 * rho
        for a, b in sines:
            # E s1 sin(a s2 + b) is rho c^2 a E cos(a s2 + b), by Stein's lemma.
            total += 2 * rho * c**2 * a * np.cos(b) * chance(a, 0, 0)
            for d, e in sines:
                total += 0.5 * np.cos(b - e) * chance(a, -d, rho)
                total -= 0.5 * np.cos(b + e) * chance(a, d, rho)
        return total - mean**2

    return product(p) / (product(1.0) + noise**2)


@pytest.mark.parametrize("p", [-0.3, 0.5, 0.9, 1.0])
def test_correlation_of_the_targets(p):
    n, c, noise = 200_000, 0.8, 0.1
    tasks = sinusoid_tasks(
        n, p, features=5, scale=c, alphas=ALPHAS, betas=BETAS, noise=noise, seed=3
    )
    gram = tasks.weights @ tasks.weights.T
    np.testing.assert_allclose(gram, c**2 * np.array([[1, p], [p, 1]]), atol=1e-12)
    found = np.corrcoef(np.float64(tasks.targets).T)[0, 1]
    assert found == pytest.approx(correlation(p, c, noise), abs=5 / np.sqrt(n))


def test_what_is_drawn():
    tasks = sinusoid_tasks(50_000, 0.5, features=4, noise=0.0)
    again = sinusoid_tasks(50_000, 0.9, features=4, noise=0.0)
    s = np.float64(tasks.inputs) @ tasks.weights.T
    expected = s + np.sin(s) + np.sin(2 * s + 1) + np.sin(3 * s + 2)
    np.testing.assert_allclose(tasks.targets, expected, atol=1e-5)
    np.testing.assert_array_equal(tasks.inputs, again.inputs)
    np.testing.assert_array_equal(tasks.targets[:, 0], again.targets[:, 0])
    noisy = sinusoid_tasks(50_000, 0.5, features=4)
    noise = noisy.targets - tasks.targets
    assert noise.var() == pytest.approx(0.01, rel=0.03)
    assert not np.array_equal(
        tasks.inputs, sinusoid_tasks(50_000, 0.5, features=4, seed=1).inputs
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "`n` must be at least 1"),
        ({"cosine": 1.5}, r"`cosine` must be in \[-1, 1\], got 1.5"),
        ({"features": 1}, "`features` at least 2"),
        ({"alphas": (1.0,)}, "`betas` must be as many as `alphas`, got 3 and 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinusoid_tasks(**({"n": 4, "cosine": 0.5} | arguments))
