"""Merging methods in NumPy and float64, on whole vectors, written from the papers."""

import numpy as np


def ties(vectors, density, *, mean=True):
    """`(models, elements)` to one vector."""
    size = vectors.shape[1]
    keep = max(1, int(np.ceil(density * size)))
    kept = np.zeros_like(vectors)
    for row, out in zip(vectors, kept):
        order = np.argsort(-np.abs(row), kind="stable")[:keep]
        out[order] = row[order]
    signs = np.sign(kept.sum(0))
    signs[signs == 0] = 1 if signs.sum() >= 0 else -1
    out = np.zeros(size)
    for j in range(size):
        column = kept[:, j]
        agreeing = column[column * signs[j] > 0]
        if len(agreeing):
            out[j] = agreeing.mean() if mean else agreeing.sum()
    return out


def breadcrumbs(vector, density, outliers):
    """One task vector of one parameter without its smallest and largest elements."""
    order = np.argsort(-np.abs(vector))
    above = int(outliers * len(vector))
    inside = order[above : above + max(1, int(np.ceil(density * len(vector))))]
    out = np.zeros_like(vector)
    out[inside] = vector[inside]
    return out


def pcb(vectors, density):
    """`(models, elements)` to one vector, without the scale."""
    models, size = vectors.shape

    def quantile(row, fraction):
        return np.sort(row)[::-1][min(size, max(1, int(np.ceil(fraction * size)))) - 1]

    def to_unit(row):
        return (row - row.min()) / (row.max() - row.min())

    scores = []
    for row in vectors:
        sizes = np.abs(row)
        sizes = np.clip(sizes, quantile(sizes, 1 - 1e-4), quantile(sizes, 1e-4))
        inside = np.exp(models * to_unit(sizes) ** 2)
        score = inside * np.tanh(row * vectors.sum(0))
        scores.append(to_unit(np.maximum(score, quantile(score, density))))
    scores = np.array(scores)
    return (scores * vectors).sum(0) / np.maximum(scores.sum(0), 1e-12)


def slerp(first, second, fraction):
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    return (
        np.sin((1 - fraction) * angle) * first + np.sin(fraction * angle) * second
    ) / np.sin(angle)


def karcher(points):
    """Gradient descent on the sphere, to the end."""
    lengths = np.linalg.norm(points, axis=1)
    units = points / lengths[:, None]
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    for _ in range(500):
        logs = []
        for unit in units:
            cosine = unit @ mean
            angle = np.arccos(np.clip(cosine, -1, 1))
            logs.append((unit - cosine * mean) * angle / np.sin(angle))
        step = np.mean(logs, axis=0)
        mean = mean + step
        mean /= np.linalg.norm(mean)
    return mean * lengths.mean()


def polar(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def tsv(matrices):
    """Task vectors `(models, m, n)` to one."""
    kept = max(1, min(matrices.shape[1:]) // len(matrices))
    parts = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    left = np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1)
    right = np.concatenate([v[:kept] for _, _, v in parts])
    values = np.concatenate([s[:kept] for _, s, _ in parts])
    return polar(left) @ np.diag(values) @ polar(right)


def wudi_loss(merged, matrices):
    """The interference that WUDI minimises, rows being outputs."""
    return sum(np.sum(((merged - m) @ m.T) ** 2) / np.sum(m**2) for m in matrices)
