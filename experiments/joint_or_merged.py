"""One model for all tasks: trained jointly, merged, or merged and then tuned?

All start from the base of the merge-bench and keep its heads. Joint training sees the
data of all tasks at once, with a plain sum or a balancer; merging only sees the
fine-tuned models; tuning is a short joint training from a merged model, or from the
base for comparison. Learning rates and factors are chosen on validation images.

Command:  python experiments/joint_or_merged.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: about 25 per seed.
Expect:   of the individual models' accuracy joint training keeps 98 %, merging 91, and
          merging with a tenth of that training after it 96.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import track

import mtjax
from experiments.merge_bench_measures import Measures
from experiments.merge_bench_models import QUICK as QUICK_BENCH
from experiments.merge_bench_models import Bench
from experiments.merge_bench_models import Config as BenchConfig
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors

BALANCERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "joint, sum": lambda tasks: mtjax.equal(),
    "joint, uw": lambda tasks: mtjax.uw(tasks),
    "joint, pcgrad": lambda tasks: mtjax.pcgrad(),
    "joint, nash_mtl": lambda tasks: mtjax.nash_mtl(tasks),
}
MERGERS = {
    "task_arithmetic": merging.task_arithmetic(1.0),
    "ties": merging.ties(density=0.2),
    "iso_c": merging.iso_c(),
    "wudi": merging.wudi(),
}
TUNED_FROM = ("base", "task_arithmetic", "iso_c")


@dataclass(frozen=True)
class Config:
    """How long and how fast is trained."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    seeds: int = 3  # of the models, and of batches
    steps: int = 600  # of joint training: images of every task as in its fine-tuning
    tuning_steps: int = 60  # from a merged model
    batch_size: int = 64  # images per task
    learning_rates: tuple[float, ...] = (2e-4, 6e-4)  # of AdamW, fall like a cosine
    factors: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0)  # of merged vectors
    steps_per_call: int = 10  # in one scan; 1 for encoders that convolve


QUICK = Config(
    QUICK_BENCH,
    seeds=1,
    steps=20,
    tuning_steps=10,
    batch_size=16,
    learning_rates=(2e-3,),
    factors=(0.3, 1.0),
)


def train(bench: Bench, config: Config, start, balancer, rate: float, steps: int, seed):
    """The encoder after joint training on all tasks, heads frozen."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    size, tasks = config.batch_size, bench.tasks
    tx = optax.chain(
        balancer(len(tasks)),
        optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.01),
    )

    def step(state, data, batch):
        params, opt_state = state
        draw = lambda task: {k: x[batch[task]] for k, x in data[task].items()}
        drawn = {task: draw(task) for task in tasks}
        of = lambda p, t: entropy(
            bench.logits(p, t, drawn[t]["images"]), drawn[t]["labels"]
        )
        losses_fn = lambda p: {task: of(p, task).mean() for task in tasks}
        losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, losses=losses, losses_fn=losses_fn
        )
        return (optax.apply_updates(params, updates), opt_state), losses

    rng = np.random.default_rng(seed)
    data = {t: jax.tree.map(jnp.asarray, bench.data[t]["train"]) for t in tasks}
    rows = (
        {t: rng.integers(len(data[t]["labels"]), size=size) for t in tasks}
        for _ in range(steps)
    )
    (params, _), _ = merging.repeat_step(
        step,
        (start, tx.init(start)),
        data,
        rows,
        steps=steps,
        steps_per_call=config.steps_per_call,
    )
    return params


def best_of(measures: Measures, choices: dict[float, Callable[[], Any]]):
    """The choice with the best validation accuracy, its model, and its seconds."""
    best = (-1.0, 0.0, None, 0.0)
    for choice, make in choices.items():
        start = time.perf_counter()
        params = jax.block_until_ready(make())
        seconds = time.perf_counter() - start
        score = measures.accuracy(params, "validation")["mean"]
        best = max(best, (score, choice, params, seconds), key=lambda x: x[0])
    return best[1:]


def run(bench: Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m, base, images = Measures(bench), bench.base, config.batch_size * len(bench.tasks)
    found = {"base": (None, base, 0.0)}
    for name, merger in track([*MERGERS.items()], f"merging, seed {seed}"):
        vector = merger.vector(base, bench.models)
        at = functools.partial(merging.apply_vector, base, vector)
        choices = {f: functools.partial(at, f) for f in config.factors}
        found[name] = best_of(m, choices)
    jobs = [(n, base, b, config.steps) for n, b in BALANCERS.items()]
    jobs += [
        (f"{name}, tuned", found[name][1], BALANCERS["joint, sum"], config.tuning_steps)
        for name in TUNED_FROM
    ]
    for name, start, balancer, steps in track(jobs, f"training, seed {seed}"):
        choices = {
            rate: functools.partial(
                train, bench, config, start, balancer, rate, steps, seed
            )
            for rate in config.learning_rates
        }
        found[name] = best_of(m, choices)
    own = m.individual()
    rows = {}
    seen = {name: steps * images / 1000 for name, _, _, steps in jobs}
    for name, (choice, params, seconds) in found.items():
        test = m.accuracy(params, "test")
        rows[name] = test | {
            "normalised": float(np.mean(m.ratios(test, own))),
            "thousand images": seen.get(name, 0.0),
            "seconds": seconds,
        }
        if choice is not None:
            rows[name]["chosen"] = choice
    rows["individual"] = own | {"normalised": 100.0}
    return {"rows": rows}


def plot(results: list[dict[str, Any]]) -> Figure:
    """Normalised accuracy of all models, seeds as dots."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    values = {
        name: [r["rows"][name]["normalised"] for r in results]
        for name in results[0]["rows"]
        if name != "individual"
    }
    kinds = {"joint": "joint training", "tuned": "merged or base, then tuned"}
    colors = method_colors(["merged, no data", *kinds.values()])
    for name in sorted(values, key=lambda n: np.mean(values[n])):
        kind = next((k for w, k in kinds.items() if w in name), "merged, no data")
        axes.barh(name, np.mean(values[name]), color=colors[kind], alpha=0.8)
        axes.scatter(values[name], [name] * len(results), color="black", s=8, zorder=3)
    for kind, color in colors.items():
        axes.scatter([], [], marker="s", color=color, alpha=0.8, label=kind)
    low = min(min(x) for x in values.values())
    axes.set(
        xlabel="accuracy relative to the individual models, %", xlim=(low - 3, None)
    )
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Trains and merges for every seed; writes a table and a figure."""
    if config.bench.encoder == "cnn":
        config = replace(config, steps_per_call=1)
    results = per_seed(config, out, models, run)
    (out / "table.md").write_text(table(results, "rows") + "\n", encoding="utf-8")
    plot(results).savefig(out / "joint_or_merged.png", dpi=110)
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/joint_or_merged_quick")
) -> None:
    """Two minutes: small models of four turned digits."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/joint_or_merged"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
