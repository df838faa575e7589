"""AdaMerging: how far do coefficients learnt from unlabelled images close the gap?

One small ViT, fine-tuned on several image sets, is merged by fixed recipes and by
AdaMerging, which learns from an unlabelled stream; also with noise or blur.

Command:  python experiments/adamerging.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 12, and 20 for the models.
Expect:   accuracy 78.5 % layer-wise, 76.9 task-wise, 78.1 for task arithmetic with a
          scale that was tuned on labels; under noise 70.9 against 69.3.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.stats import spearmanr

from experiments import merge_bench_models as merge_bench
from experiments.merge_bench_measures import (
    Inputs,
    Measures,
    batches,
    corrupted,
    mean_entropy,
)
from experiments.merge_bench_models import Params
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.coefficients import clamped_share
from mtjax.systems import adamerging
from mtjax.systems.adamerging import AdaMergingConfig

VARIANTS: dict[
    str, tuple[Literal["task", "layer"], bool]
] = {  # granularity, and whether task vectors are TIES-processed
    "task-wise": ("task", False),
    "task-wise++": ("task", True),
    "layer-wise": ("layer", False),
    "layer-wise++": ("layer", True),
}


@dataclass(frozen=True)
class Config:
    """What is merged, and how coefficients are learnt."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    seeds: int = 3  # of the fine-tunings and of the order of the stream
    steps: int = 500  # of Adam on the coefficients
    batch_size: int = 16  # unlabelled images per task and step
    learning_rate: float = 1e-3
    value: float = 0.3  # of all coefficients at the start
    clamp: bool = True  # coefficients to [0, 1]
    normalise: bool = False  # entropies by the logarithm of the number of classes
    scales: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))  # tried for TA
    noise: float = 8.0  # standard deviation; pixels are in 0..255
    blur: float = 1.0  # standard deviation in pixels


QUICK = Config(merge_bench.QUICK, seeds=1, steps=10, scales=(0.2, 0.4))


def adapt(
    measures: Measures,
    vectors: Params,
    inputs: Inputs,
    config: AdaMergingConfig,
    title: str,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> adamerging.Adapted:
    """Learns coefficients of task vectors on unlabelled images or sentences."""
    with Progress() as progress:
        bar = progress.add_task(f"{title}, seed {seed}", total=steps)
        return adamerging.fit(
            measures.bench.logits,
            measures.bench.base,
            vectors,
            batches(inputs, batch_size, seed),
            config,
            steps=steps,
            optimizer=optax.adam(learning_rate),
            on_step=lambda *_: progress.advance(bar),
        )


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)
    stream, test = m.split("stream"), m.split("test")
    scale, models = m.fixed(config.scales)

    def learn(name, images):
        granularity, processed = VARIANTS[name]
        return adapt(
            m,
            adamerging.ties_vectors(m.vectors) if processed else m.vectors,
            images,
            AdaMergingConfig(granularity, config.value, config.clamp, config.normalise),
            name,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=seed,
        )

    adapted = {name: learn(name, stream) for name in VARIANTS}
    models |= {name: found.params for name, found in adapted.items()}
    rows = {}
    for name, params in models.items():
        logits = m.logits(params, stream)
        rows[name] = m.accuracy(params, "test") | {
            "entropy": mean_entropy(logits),
            "collapsed tasks": sum(map(adamerging.collapsed, logits.values())),
        }
    for name, found in adapted.items():
        last = {group: path[-1] for group, path in found.trajectory.items()}
        rows[name]["outside [0, 1], %"] = 100 * clamped_share(last)
    rows["individual"] = m.individual()
    models["layer-wise, same stream"] = models["layer-wise"]
    names = ("TA (0.3)", "TA (tuned)", "layer-wise", "layer-wise, same stream")
    robust = {name: {} for name in names}
    for kind, amount in {
        "clean": 0,
        "noise": config.noise,
        "blur": config.blur,
    }.items():
        if kind != "clean":
            shown = corrupted(stream, kind, amount, 2 * seed)
            models[names[-1]] = learn("layer-wise", shown).params
        shown = corrupted(test, kind, amount, 2 * seed + 1)
        for name, row in robust.items():
            row[kind] = m.accuracy(models[name], "test", shown)["mean"]
    layers = adapted["layer-wise"].effective
    places = [*merging.depth_of_blocks([*layers]).values()]
    means = [float(row.mean()) for row in layers.values()]
    return {
        "rows": rows,
        "robust": robust,
        "tuned scale": scale,
        "layers": {path: np.asarray(row).tolist() for path, row in layers.items()},
        "correlation with depth": float(spearmanr(places, means)[0]),
        "entropies": {
            n: sum(a.entropies.values()).tolist() for n, a in adapted.items()
        },
    }


def plot(results: list[dict[str, Any]]) -> Figure:
    """Entropy over steps, and the coefficients of all layers."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in method_colors([*VARIANTS]).items():
        curve = np.mean([result["entropies"][name] for result in results], axis=0)
        smooth = np.convolve(curve, np.ones(10) / 10, "valid")
        left.plot(smooth, color=color, label=name)
    left.set(xlabel="step", ylabel="entropy, sum over tasks, nats")
    left.legend(frameon=False)
    depths = merging.depth_of_blocks([*results[0]["layers"]])
    paths = sorted(depths, key=lambda path: depths[path])
    values = np.mean([[r["layers"][path] for path in paths] for r in results], axis=0)
    picture = right.imshow(values, aspect="auto", cmap="viridis")
    right.set_yticks(range(len(paths)), paths, fontsize=6)
    tasks = sorted({*results[0]["rows"]["individual"]} - {"mean"})
    right.set_xticks(range(len(tasks)), tasks, rotation=30)
    figure.colorbar(picture, ax=right, label="coefficient, layer-wise")
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Merges in all ways for every seed; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    of = lambda key: ", ".join(f"{r[key]:.2f}" for r in results)
    lines = [
        "Test accuracy, %, and entropy on the stream:",
        *("", table(results, "rows"), "", "Mean test accuracy, %:"),
        *("", table(results, "robust"), ""),
        f"Tuned scales: {of('tuned scale')}.",
        f"Rank correlation of coefficients with depth: {of('correlation with depth')}.",
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(results).savefig(out / "adamerging.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/adamerging_quick")) -> None:
    """Seconds: a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/adamerging"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
