"""DOGE: what do its correction, its projection and its coefficients each bring?

One small ViT, fine-tuned on several image sets, is merged by task arithmetic (TA), TIES
and DOGE, whole and with one part taken away; each with its scale chosen on validation
images. Then AdaMerging with and without DOGE's corrections in front.

Command:  python experiments/doge.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 6 per seed, and 20 for the models.
Expect:   DOGE keeps 92 % of the individual models' accuracy, TA 91; 91 without the
          projection or the correction, 77 without trimming.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from experiments.adamerging import adapt
from experiments.merge_bench_measures import Measures
from experiments.merge_bench_models import QUICK as QUICK_BENCH
from experiments.merge_bench_models import Bench, Params
from experiments.merge_bench_models import Config as BenchConfig
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.match import named_leaves
from mtjax.merging.matrices import to_matrices
from mtjax.systems import doge
from mtjax.systems.adamerging import AdaMergingConfig
from mtjax.systems.doge import DogeConfig

# What is taken away or exchanged, with the scale that `Config.scales` multiplies.
VARIANTS: dict[str, dict[str, Any]] = {
    "DOGE": {},
    "DOGE, exact": {"solver": "exact"},
    "DOGE, steps projected": {"project_update": True},
    "no projection": {"project": False},
    "no correction": {"steps": 0},
    "equal coefficients": {"coefficients": "constant"},
    "no trimming": {"density": 1.0},
}
AM = "DOGE AM"


DEFAULT = DogeConfig(coefficients="relative", learning_rate=1e-3)


@dataclass(frozen=True)
class Config:
    """What is merged, and what is tried."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    seeds: int = 3  # of the fine-tunings
    doge: DogeConfig = DEFAULT  # its scale is tuned
    scales: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)
    published: tuple[float, ...] = (0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)  # norms
    steps: int = 500  # of AdaMerging
    batch_size: int = 16
    learning_rate: float = 1e-3


QUICK = Config(
    QUICK_BENCH,
    seeds=1,
    doge=replace(DEFAULT, steps=20),
    scales=(0.2, 0.6),
    published=(0.07, 0.5),
    steps=5,
)


# Compiled once for all scales.
@functools.partial(jax.jit, static_argnums=0)
def merged(
    config: DogeConfig, base: Params, models: dict[str, Params], scale
) -> Params:
    """DOGE with another scale."""
    return doge.doge_merge(base, models, replace(config, scale=scale))


def tuned(
    measures: Measures, config: DogeConfig, scales: Sequence[float]
) -> tuple[float, Params, dict[float, float]]:
    """The best scale on validation images, its model, and the accuracy of all."""
    base, models = measures.bench.base, measures.bench.models
    best, scores = (-1.0, 0.0, base), {}
    for scale in scales:
        params = merged(config, base, models, scale)
        scores[scale] = measures.accuracy(params, "validation")["mean"]
        if scores[scale] > best[0]:
            best = scores[scale], scale, params
    return best[1], best[2], scores


def look_inside(measures: Measures, config: DogeConfig) -> dict[str, Any]:
    """The objective over steps, and how much of a correction is in the subspace."""
    correct = jax.jit(functools.partial(doge.correction, config=config))
    curves, inside, total = [], 0.0, 0.0
    for vectors in named_leaves(measures.vectors).values():
        if vectors.ndim < 3:
            continue
        rows = to_matrices(vectors, config.out_axis)
        delta, losses = correct(rows)
        rank, number = min(rows.shape[1:]), len(rows)
        shared = int(rank / config.divisor)
        basis = doge.shared_subspace(rows, max(1, rank // number), shared)
        inside += float(jnp.sum(jnp.square(basis.T @ delta[0])))
        total += float(jnp.sum(jnp.square(delta)))
        curves.append(np.asarray(losses / jnp.maximum(losses[0], 1e-30)))
    return {"objective": np.mean(curves, 0).tolist(), "inside, %": 100 * inside / total}


def run(bench: Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)
    own = m.individual()
    scale, models = m.fixed(config.scales)
    chosen, sweeps, insides = {"TA (tuned)": scale}, {}, {}
    for name, changes in track([*VARIANTS.items()], f"DOGE, seed {seed}"):
        variant = replace(config.doge, **changes)
        best, models[name], sweeps[name] = tuned(m, variant, config.scales)
        chosen[name] = best
        if variant.steps and variant.solver == "adam":
            insides[name] = look_inside(m, replace(variant, scale=best))
    norm = replace(config.doge, coefficients="norm")
    _, _, sweeps["DOGE, norms"] = tuned(m, norm, config.published)

    treated = doge.matrices(bench.base)
    plain = merging.task_vectors(bench.base, bench.models, where=treated)
    apart = replace(config.doge, scale=chosen["DOGE"], per_task=True)
    learning = {
        "AdaMerging": m.vectors,
        "AdaMerging, matrices": plain,
        AM: doge.corrected(apart).changed(plain),
    }
    for name, vectors in learning.items():
        models[name] = adapt(
            m,
            vectors,
            m.split("stream"),
            AdaMergingConfig("layer"),
            name,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=seed,
        ).params
    rows = {}
    for name, params in models.items():
        test = m.accuracy(params, "test")
        ratios = m.ratios(test, own)
        rows[name] = test | {
            "normalised": float(np.mean(ratios)),
            "spread": float(np.std(ratios)),  # over tasks
        }
    rows["individual"] = own | {"normalised": 100.0, "spread": 0.0}
    return {
        "rows": rows,
        "chosen": {name: {"scale": s} for name, s in chosen.items()},
        "sweeps": {n: {str(s): a for s, a in x.items()} for n, x in sweeps.items()},
        "inside": {n: {"inside, %": x["inside, %"]} for n, x in insides.items()},
        "objective": {name: x["objective"] for name, x in insides.items()},
    }


def plot(results: list[dict[str, Any]]) -> Figure:
    """Validation accuracy over the scale, and the objective over steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    mean: Callable = lambda part, name: np.mean([r[part][name] for r in results], 0)
    for name, color in method_colors([*VARIANTS]).items():
        scales = [float(s) for s in results[0]["sweeps"][name]]
        curves = [[*r["sweeps"][name].values()] for r in results]
        left.semilogx(scales, np.mean(curves, 0), "o-", color=color, label=name)
        if name in results[0]["objective"]:
            right.plot(mean("objective", name), color=color, label=name)
    left.set(xlabel="scale", ylabel="mean validation accuracy, %")
    right.set(xlabel="step of Adam", ylabel="objective, relative to the start")
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Merges in all ways for every seed; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    parts = {
        "Test accuracy, %": "rows",
        "Scales, chosen on validation images": "chosen",
        "Share of the correction inside the shared subspace": "inside",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    norms = table(
        [{"sweep": {"DOGE": r["sweeps"]["DOGE, norms"]}} for r in results], "sweep"
    )
    lines.append(f"Validation accuracy, %, by the published scale:\n\n{norms}\n")
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results).savefig(out / "doge.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/doge_quick")) -> None:
    """Two minutes: small models of four turned digits."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/doge"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
