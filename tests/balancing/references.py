"""The methods once more, in float64 and from their definitions, on whole gradients."""

import numpy as np
from scipy.optimize import brentq, minimize, nnls


def shortest_in_hull(grads):
    """The shortest vector in the convex hull of the rows."""
    lengths = np.linalg.norm(grads, axis=1)
    unit = lengths.min()
    # Least squares with the sum of the weights as one more equation: its solution is
    # a multiple of the shortest vector's weights.
    system = np.vstack([(grads / lengths[:, None]).T, unit / lengths])
    target = np.append(np.zeros(grads.shape[1]), 1.0)
    weights = nnls(system, target, maxiter=10_000)[0] / lengths
    return weights @ grads / weights.sum()


def surgery(grads, orders):
    """PCGrad's sum, given for each task the order of the others."""
    total = np.zeros(grads.shape[1])
    for task, order in enumerate(orders):
        g = grads[task].copy()
        for other in order:
            product = g @ grads[other]
            if other != task and product < 0:
                g -= product / (grads[other] @ grads[other]) * grads[other]
        total += g
    return total


def conflict_averse(grads, c):
    """CAGrad before rescaling: its primal problem, by sequential programming."""
    mean = grads.mean(axis=0)
    unit = np.linalg.norm(mean)
    basis = np.linalg.svd(grads, full_matrices=False)[2]
    rows, center = grads @ basis.T / unit, basis @ mean / unit
    solution = minimize(
        lambda x: -x[-1],
        np.append(center, (rows @ center).min()),
        jac=lambda x: np.append(np.zeros(len(center)), -1.0),
        constraints=[
            {
                "type": "ineq",
                "fun": lambda x: rows @ x[:-1] - x[-1],
                "jac": lambda x: np.hstack([rows, -np.ones((len(rows), 1))]),
            },
            {
                "type": "ineq",
                "fun": lambda x: c**2 - np.sum((x[:-1] - center) ** 2),
                "jac": lambda x: np.append(-2.0 * (x[:-1] - center), 0.0),
            },
        ],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return unit * solution.x[:-1] @ basis


def bargain(grads):
    """Nash-MTL before clipping: the minimum in log(weight times norm)."""
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    matrix = units @ units.T
    product = lambda u: np.exp(u) * (matrix @ np.exp(u))
    solution = minimize(
        lambda u: 0.5 * np.exp(u) @ matrix @ np.exp(u) - u.sum(),
        np.zeros(len(grads)),
        jac=lambda u: product(u) - 1.0,
        hess=lambda u: np.outer(np.exp(u), np.exp(u)) * matrix + np.diag(product(u)),
        method="trust-exact",
        options={"gtol": 1e-9, "maxiter": 1000},
    )
    np.testing.assert_allclose(product(solution.x), 1.0, atol=1e-6)
    return np.exp(solution.x) @ units


def hull_weights(gramian):
    """MGDA's weights, by least squares as above, on a factor of the Gramian."""
    lengths = np.sqrt(np.diag(gramian))
    values, vectors = np.linalg.eigh(gramian / np.outer(lengths, lengths))
    factor = (vectors * np.sqrt(np.maximum(values, 0.0))).T
    system = np.vstack([factor, lengths.min() / lengths])
    target = np.append(np.zeros(len(gramian)), 1.0)
    weights = nnls(system, target, maxiter=100_000)[0] / lengths
    return weights / weights.sum()


def conflict_averse_weights(gramian, c, selection=None):
    """CAGrad's weights before rescaling: the hull of the gradients plus rho u_0."""
    selection = c if selection is None else selection
    gain = gramian.mean(axis=0)
    length = np.sqrt(gain.mean())
    lengths = np.sqrt(np.diag(gramian))

    def correction(rho):
        mixed = rho / length * (gain[:, None] + gain[None, :])
        weights = hull_weights(gramian + mixed + rho**2)
        return weights, np.sqrt(weights @ gramian @ weights)

    log_rho = brentq(
        lambda log_rho: log_rho + np.log(selection / correction(np.exp(log_rho))[1]),
        np.log(lengths.min()) - 12.0,
        np.log(lengths.max() / selection) + 1.0,
        xtol=1e-12,
    )
    weights, norm = correction(np.exp(log_rho))
    return 1 / len(gramian) + c * length / norm * weights


def imbalance_sensitive_weights(gramian, c):
    """IMGrad's weights before rescaling."""
    shortest = hull_weights(gramian)
    square = shortest @ gramian @ shortest
    gain = gramian.mean(axis=0)
    gamma = shortest @ gain / np.sqrt(square * gain.mean())
    return conflict_averse_weights(gramian, c, c * gamma / (1.5 - gamma))


def dual_cone_weights(gramian, wanted, reg_eps):
    """DualProj's weights: its dual problem, by least squares."""
    matrix = gramian / np.trace(gramian) + reg_eps * np.eye(len(gramian))
    factor = np.linalg.cholesky(matrix).T
    return wanted + nnls(factor, -factor @ wanted, maxiter=100_000)[0]


def mean_projection(gramian, reg_eps):
    """UPGrad's weights: every unit vector's dual problem."""
    wanted = np.eye(len(gramian)) / len(gramian)
    return sum(dual_cone_weights(gramian, u, reg_eps) for u in wanted)


def fair_weights(gramian, alpha):
    """FairGrad's weights: the minimum of its convex function of weight times norm."""
    gramian = np.asarray(gramian, np.float64)
    norms = np.sqrt(np.diag(gramian))
    matrix = gramian / np.outer(norms, norms)
    rates = norms ** (1 / alpha - 1)
    beta = rates ** (alpha / (1 + alpha))
    for _ in range(500):
        right = rates * beta ** (-1 / alpha)
        hessian = matrix + np.diag(right / beta / alpha)
        # Scaled to a unit diagonal: the entries may differ by many powers of ten.
        unit = 1.0 / np.sqrt(np.diag(hessian))
        step = unit * np.linalg.solve(
            hessian * np.outer(unit, unit), unit * (right - matrix @ beta)
        )
        beta = beta + step / (1 + (1 + 1 / alpha) * np.abs(step / beta).max())
    # The sums cancel where gradients do, so the sides differ by the rounding of their
    # terms; what a Newton step still changes is what the weights miss.
    assert np.abs(step / beta).max() < 1e-7
    return beta / norms


def adam(slope, moments, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """The change by Adam, and its moments: first, second, count."""
    first, second, count = moments
    first, second = b1 * first + (1 - b1) * slope, b2 * second + (1 - b2) * slope**2
    count += 1
    step = first / (1 - b1**count) / (np.sqrt(second / (1 - b2**count)) + eps)
    return -learning_rate * step, (first, second, count)
