"""The tables of the experiment on SSL for item recommendation."""

from collections.abc import Sequence

import numpy as np

from experiments.retrieval_training import Results
from mtjax.training import seed_table


def label(name: str, alpha: float, *, few: bool = False) -> str:
    """Under which the results of a method with an alpha are kept."""
    return f"{name}{', few' * few} | {alpha}"


def chosen(
    results: Results, names: Sequence[str], *, few: bool = False
) -> tuple[Results, dict[str, str]]:
    """Every method with the alpha that is best on validation over all seeds."""
    best, alphas = {}, {}
    for name in names:
        means = {
            key: np.mean([run["validation"] for run in runs])
            for key, runs in results.items()
            if key.partition(" | ")[0] == f"{name}{', few' * few}"
        }
        if means:
            key = max(means, key=means.__getitem__)
            best[name], alphas[name] = results[key], key.partition(" | ")[2]
    return best, alphas


def report(
    results: Results, names: Sequence[str], slices: Sequence[str], ks: tuple[int, ...]
) -> str:
    """Test metrics, and their paired differences to the first method, in Markdown."""
    lines = []
    for few in (False, True):
        best, alphas = chosen(results, names, few=few)
        rows = {
            name: [_row(run, slices, ks) for run in runs]
            for name, runs in {**best, "popularity": results["popularity"]}.items()
        }
        gains = {
            name: [
                {x: row[x] - base[x] for x in row if "R@" in x}
                for row, base in zip(rows[name], rows[names[0]], strict=True)
            ]
            for name in best
        }
        picked = ", ".join(f"{name} {alpha}" for name, alpha in alphas.items())
        lines += ["Few of the pairs:" if few else "All pairs:", "", seed_table(rows)]
        lines += ["", f"Minus {names[0]}, paired by seed:", "", seed_table(gains)]
        lines += ["", f"Alphas, chosen on validation: {picked}.", ""]
    return "\n".join(lines)


def _row(run: dict, slices: Sequence[str], ks: tuple[int, ...]) -> dict[str, float]:
    metrics = run["metrics"]
    found = {f"{x} R@{ks[-1]}": metrics[f"{x} recall@{ks[-1]}"] for x in slices}
    # With one right item the average precision is the reciprocal rank.
    found[f"all MAP@{ks[0]}"] = metrics[f"all mrr@{ks[0]}"]
    return found | run.get("views", {})
