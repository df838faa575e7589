"""More aggregators in float64, from their definitions, on whole gradients."""

import numpy as np
from scipy.optimize import minimize, nnls


def vaccine(grads, orders, rho_bar, beta):
    """GradVac's sum and its averages, given for each task the order of the others."""
    rho_bar = rho_bar.copy()
    targets = rho_bar.copy()
    total = np.zeros(grads.shape[1])
    for i, order in enumerate(orders):
        g = grads[i].copy()
        for j in order:
            if i == j:
                continue
            length, other = np.linalg.norm(g), np.linalg.norm(grads[j])
            rho, target = g @ grads[j] / length / other, targets[i, j]
            if rho < target:
                sines = np.sqrt(1 - rho**2), np.sqrt(1 - target**2)
                factor = length * (target * sines[0] - rho * sines[1])
                g += factor / (other * sines[1]) * grads[j]
                # What the formula is for.
                cosine = g @ grads[j] / np.linalg.norm(g) / other
                np.testing.assert_allclose(cosine, target, atol=1e-9)
            rho_bar[i, j] = (1 - beta) * rho_bar[i, j] + beta * rho
        total += g
    return total, rho_bar


def equal_projections(grads):
    """IMTL-G, solved for the weights of all tasks but the first."""
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    differences = grads[0] - grads[1:]
    unit_differences = units[0] - units[1:]
    others = np.linalg.solve(
        unit_differences @ differences.T, unit_differences @ grads[0]
    )
    return (1 - others.sum()) * grads[0] + others @ grads[1:]


def conflict_free(grads, preference):
    """ConFIG, with the pseudo-inverse of the unit gradients themselves."""
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    direction = np.linalg.pinv(units) @ preference
    direction /= np.linalg.norm(direction)
    return np.sum(grads @ direction) * direction


def aligned(grads, preference, scale_mode):
    """Aligned-MTL, by a singular value decomposition, and the aligned gradients."""
    left, singular, right = np.linalg.svd(grads, full_matrices=False)
    # What a float32 Gramian can tell from zero.
    visible = np.sqrt(len(grads) * np.finfo(np.float32).eps)
    rank = np.sum(singular > visible * singular[0])
    left, singular, right = left[:, :rank], singular[:rank], right[:rank]
    scale = {
        "min": singular[-1],
        "median": np.sort(singular)[(rank - 1) // 2],
        "rmse": np.sqrt(np.mean(singular**2)),
    }[scale_mode]
    rows = scale * left @ right
    return preference @ rows, rows


def krum(grads, n_byzantine, n_selected):
    """The mean of the selected gradients."""
    scores = []
    for g in grads:
        distances = np.sort(np.sum((grads - g) ** 2, axis=1))[1:]
        scores.append(distances[: len(grads) - n_byzantine - 2].sum())
    return grads[np.argsort(scores)[:n_selected]].mean(axis=0)


def best_in_cone(grads, c):
    """The least improvement of any task along the best unit vector of the cone.

    By duality: the least over weights of the best improvement of the weighted sum.
    """
    scale = np.linalg.norm(grads, axis=1).max()
    grads = grads / scale
    axis = grads.mean(axis=0) / np.linalg.norm(grads.mean(axis=0))
    along = grads @ axis
    rest = grads - np.outer(along, axis)
    sine = np.sqrt(1 - c**2)

    def reach(weights):
        a, b = weights @ along, np.linalg.norm(weights @ rest)
        return np.hypot(a, b) if sine * a >= c * b else c * a + sine * b

    solutions = [
        minimize(
            reach,
            start / start.sum(),
            bounds=[(0, 1)] * len(grads),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-14},
        ).fun
        for start in np.random.default_rng(0).uniform(size=(3, len(grads)))
    ]
    return scale * min(solutions)


def prioritised(grads, norms, tau):
    """PCD's direction for the first row, given the norms that normalise the rows.

    The shortest change of the first that keeps the promises to the others, by Lawson
    and Hanson's least-distance programming. None if they contradict each other.
    """
    units = grads / norms[:, None]
    rows, wanted = units[1:], tau * np.sum(units[1:] ** 2, axis=1)
    system = np.vstack([rows.T, wanted - rows @ units[0]])
    target = np.append(np.zeros(grads.shape[1]), 1.0)
    multipliers, distance = nnls(system, target, maxiter=10_000)
    if distance < 1e-6:
        return None
    rest = system @ multipliers - target
    direction = units[0] - rest[:-1] / rest[-1]
    return np.linalg.norm(grads[0]) * direction / np.linalg.norm(direction)
