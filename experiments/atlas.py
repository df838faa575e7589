"""aTLAS: one coefficient per block and task vector, to add tasks and to forget them.

One small ViT, fine-tuned on several image sets, is composed with labelled validation
images: for all tasks at once (beside tuned task arithmetic and AdaMerging), and to
forget one task. See also `atlas_few_shot.py`, and `atlas_test_time.py` without labels.

Command:  python experiments/atlas.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 10 per seed, and 20 for the models.
Expect:   aTLAS keeps 92.6 % of accuracy, TA 90.6; forgetting: 71 to 41 %, TA to 45.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress, track

from experiments import merge_bench_models as merge_bench
from experiments.atlas_shared import labelled
from experiments.merge_bench_measures import Measures, batches
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.coefficients import effective_coefficients
from mtjax.merging.disentanglement import disentanglement_error
from mtjax.systems import adamerging, atlas
from mtjax.systems.atlas import AtlasConfig

VARIANTS = {
    "isotropic": AtlasConfig("task"),
    "aTLAS": AtlasConfig(),
    "aTLAS, weights only": AtlasConfig(weights_only=True),
    "aTLAS, L1": AtlasConfig(penalty=0.5),
    "aTLAS x 4": AtlasConfig(partitions=4),
}
SHOWN = ("TA (tuned)", "isotropic", "aTLAS")  # one number per vector and array


@dataclass(frozen=True)
class Config:
    """What is composed, and how coefficients are learnt."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    seeds: int = 3  # of the fine-tunings and of the batches
    steps: int = 500  # of AdamW on the coefficients, in addition
    batch_size: int = 128  # labelled images, shared by the tasks
    learning_rate: float = 1e-2  # 1e-3 in the paper, of larger models and longer
    every: int = 50  # steps between looks at the validation accuracy
    negation_steps: int = 300
    negation_every: int = 10
    negation_rate: float = 5e-3
    keep: float = 0.95  # of the control's accuracy, when a task is forgotten
    adamerging_steps: int = 500
    scales: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))  # tried for TA


QUICK = Config(
    merge_bench.QUICK,
    seeds=1,
    steps=20,
    batch_size=16,
    every=10,
    negation_steps=20,
    adamerging_steps=5,
    scales=(0.2, 0.4),
)


def add(m: Measures, name: str, config: Config, seed: int) -> atlas.Composed:
    """Learns coefficients for all tasks on their validation images."""
    bench = m.bench
    parts = {task: bench.data[task]["validation"] for task in bench.tasks}
    accuracy = partial(bench.accuracy, split="validation")
    single = {task: accuracy(bench.models[task], task) for task in bench.tasks}
    with Progress() as progress:
        bar = progress.add_task(f"{name}, seed {seed}", total=config.steps)
        return atlas.fit(
            atlas.cross_entropies(bench.logits),
            bench.base,
            m.vectors,
            labelled(parts, config.batch_size, seed),
            VARIANTS[name],
            steps=config.steps,
            optimizer=atlas.atlas_optimizer(config.learning_rate),
            judge=atlas.addition_judge(accuracy, single),
            every=config.every,
            on_step=lambda *_: progress.advance(bar),
        )


def adapted(m: Measures, config: Config, seed: int) -> merge_bench.Params:
    """AdaMerging by layers, on unlabelled images."""
    stream = batches(m.split("stream"), config.batch_size // len(m.bench.tasks), seed)
    own = adamerging.AdaMergingConfig("layer")
    steps = config.adamerging_steps
    start = m.bench.logits, m.bench.base, m.vectors, stream, own
    return adamerging.fit(*start, steps=steps, optimizer=optax.adam(1e-3)).params


def forget(m: Measures, target: str, config: Config, seed: int) -> dict[str, Any]:
    """Forgets one task and keeps the next, by its own vector: learnt, or scaled."""
    bench, base = m.bench, m.bench.base
    control = bench.tasks[(bench.tasks.index(target) + 1) % len(bench.tasks)]
    vectors = merging.task_vectors(base, {target: bench.models[target]})
    accuracy = partial(bench.accuracy, split="validation")
    keep = base, target, [control], config.keep
    judge = atlas.negation_judge(accuracy, *keep)
    scaled = {0.0: base} | {s: merging.merge(base, vectors, -s) for s in config.scales}
    scores = {scale: judge(params) for scale, params in scaled.items()}
    allowed = {scale: score for scale, score in scores.items() if score is not None}
    models = {"base": base, "TA (tuned)": scaled[max(allowed, key=allowed.__getitem__)]}
    parts = {task: bench.data[task]["validation"] for task in (target, control)}
    for name in ("isotropic", "aTLAS"):
        models[name] = atlas.fit(
            atlas.cross_entropies(bench.logits, [target]),
            base,
            vectors,
            labelled(parts, config.batch_size, seed),
            VARIANTS[name],
            steps=config.negation_steps,
            optimizer=atlas.atlas_optimizer(config.negation_rate),
            judge=judge,
            every=config.negation_every,
        ).params
    found = {}
    for name, params in models.items():
        test = {task: 100 * bench.accuracy(params, task) for task in bench.tasks}
        rest = [x for task, x in test.items() if task not in (target, control)]
        found[name] = {"target": test[target], "control": test[control]}
        found[name]["others"] = float(np.mean(rest)) if rest else test[control]
    return found


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)
    tasks = sorted(bench.tasks)  # the order of the vectors
    scale, models = m.fixed(config.scales)
    models["AdaMerging, layer-wise"] = adapted(m, config, seed)
    learnt = {name: add(m, name, config, seed) for name in VARIANTS}
    models |= {name: found.params for name, found in learnt.items()}
    single = m.individual()
    rows = {name: m.accuracy(params, "test") for name, params in models.items()}
    for row in rows.values():
        row["normalised"] = 100 * float(np.mean([row[t] / single[t] for t in tasks]))
    rows["individual"] = single | {"normalised": 100.0}
    layers = {
        "TA (tuned)": merging.init_coefficients(bench.base, m.vectors, "layer", scale)
    }
    for name in SHOWN[1:]:
        values, how = learnt[name].coefficients, VARIANTS[name].granularity
        layers[name] = effective_coefficients(values, m.vectors, how)
    forgotten = [forget(m, t, config, seed) for t in track(tasks, f"negation, {seed}")]
    mean = lambda name, key: float(np.mean([row[name][key] for row in forgotten]))
    keys = ("target", "control", "others")
    return {
        "rows": rows,
        "negation": {n: {k: mean(n, k) for k in keys} for n in forgotten[0]},
        "negation by target": dict(zip(tasks, forgotten)),
        "disentanglement": {
            name: {"error, %": 100 * disentangled(m, tasks, layers[name])}
            for name in SHOWN
        },
        "tuned scale": scale,
        "steps": {name: found.step for name, found in learnt.items()},
        "scores": {name: [*found.scores.items()] for name, found in learnt.items()},
        "layers": {path: np.asarray(x).tolist() for path, x in layers["aTLAS"].items()},
    }


def disentangled(m: Measures, tasks: list[str], layers: dict[str, Any]) -> float:
    """The error of all pairs of task vectors, on the test images."""
    images = m.split("test")

    def only(*chosen):
        kept = np.array([task in chosen for task in tasks])
        rows = {path: np.asarray(x) * kept for path, x in layers.items()}
        return merging.merge_with_coefficients(m.bench.base, m.vectors, rows)

    logits_fn = lambda params, task, x: jnp.asarray(m.logits(params, {task: x})[task])
    alone, errors = {task: only(task) for task in tasks}, []
    for pair in combinations(tasks, 2):
        of = lambda table, pair=pair: {task: table[task] for task in pair}
        errors.append(
            disentanglement_error(logits_fn, of(alone), only(*pair), of(images))
        )
    return float(np.mean(errors))


def plot(results: list[dict[str, Any]]) -> Figure:
    """Validation score over steps, and the coefficients of all blocks."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in method_colors([*VARIANTS]).items():
        steps, values = np.mean([r["scores"][name] for r in results], axis=0).T
        left.plot(steps, 100 * values, "o-", markersize=3, color=color, label=name)
    left.set(xlabel="step", ylabel="normalised validation accuracy, %")
    left.legend(frameon=False)
    depths = merging.depth_of_blocks([*results[0]["layers"]])
    paths = sorted(depths, key=lambda path: depths[path])
    values = np.mean([[r["layers"][path] for path in paths] for r in results], axis=0)
    most = np.abs(values).max()
    picture = right.imshow(values, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    right.set_yticks(range(len(paths)), paths, fontsize=6)
    names = list(results[0]["negation by target"])
    right.set_xticks(range(len(names)), names, rotation=30)
    figure.colorbar(picture, ax=right, label="coefficient, aTLAS")
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Composes in all ways; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    parts = {
        "Addition, test accuracy, %": "rows",
        "Negation, test accuracy, %, mean over targets": "negation",
        "Disentanglement, pairs of vectors": "disentanglement",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    lines.append(
        f"Tuned scales: {', '.join(str(r['tuned scale']) for r in results)}.\n"
    )
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results).savefig(out / "atlas.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/atlas_quick")) -> None:
    """A minute: a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/atlas"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
