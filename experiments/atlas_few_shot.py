"""aTLAS with few labels: task vectors of other tasks as a basis for a new one.

One image set is held out completely: base and task vectors come from the others.
Coefficients are learnt from 1 to 16 labelled images per class, with a frozen head of
class means; beside other things to train, random bases, budgets of task vectors and
adapters.

Command:  python experiments/atlas_few_shot.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 20 per seed.
Expect:   with 4 images per class aTLAS 44 %, with four partitions 47, class means 44,
          all parameters 63: a small base lacks the features.
"""

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from experiments import merge_bench_models as merge_bench
from experiments.atlas_few_shot_task import Config, Task, cross_entropy
from experiments.atlas_shared import tune
from experiments.merge_bench_data import load_data
from experiments.merge_bench_models import features, outputs
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.merging.bases import feature_scores, random_vectors, select, sensitivities
from mtjax.nn.cache_adapter import blended_probe, cache_logits, cache_of
from mtjax.systems import atlas
from mtjax.systems.atlas import AtlasConfig

NORMS = "LayerNorm|norm/"


FULL = Config()
QUICK = Config(
    merge_bench.QUICK,
    "digits_270",
    seeds=1,
    shots=(1, 2),
    budget_shots=2,
    budgets=(1,),
    steps=5,
    batch_size=16,
)


def methods(task: Task, vectors: Any) -> dict[str, float]:
    """Test accuracy of everything that may be trained."""
    base, c = task.bench.base, task.config
    of_head, of_norms, of_all = c.other_rates
    other = partial(tune, steps=c.steps)
    count = len(next(iter(jax.tree.leaves(vectors))))
    noise = random_vectors(base, count, key=jax.random.key(task.seed))
    length = lambda x: jnp.mean(jnp.linalg.norm(x.reshape(count, -1), axis=1))
    alike = lambda x, like: x * length(like) / jnp.maximum(length(x), 1e-12)
    both = {"encoder": base, "head": task.head}
    of_both = lambda p, x: outputs(
        p["head"], features(task.bench.model, p["encoder"], x)
    )
    headed = lambda p, b: cross_entropy(of_both(p, b["images"]), b["labels"])
    train = task.objective, base, task.batches()
    models = {
        "class means": base,
        "LayerNorm": other(*train, where=NORMS, learning_rate=of_norms),
        "full": other(*train, where="", learning_rate=of_all),
        "isotropic": task.compose(vectors, AtlasConfig("task")),
        "aTLAS": task.compose(vectors),
        "aTLAS x 4": task.compose(vectors, AtlasConfig(partitions=4)),
        "random basis": task.compose(noise),
        "random basis, scaled": task.compose(jax.tree.map(alike, noise, vectors)),
    }
    found = {name: task.accuracy(task.logits, p) for name, p in models.items()}
    start = headed, both, task.batches()
    found["head"] = task.accuracy(
        of_both, other(*start, where="^head", learning_rate=of_head)
    )
    for name in ("class means", "aTLAS"):
        found[f"{name} + LP++"] = with_probe(task, models[name])
    found["aTLAS + Tip-Adapter"] = with_cache(task, vectors)
    return found


def with_probe(task: Task, params: merge_bench.Params) -> float:
    """LP++ on frozen features, after the encoder is learnt."""
    one = lambda z: jnp.concatenate([z, jnp.ones((len(z), 1))], axis=1)
    kernel = jnp.concatenate([task.head["kernel"], task.head["bias"][None]])
    shots = one(task.encode(params, task.images))
    probe = blended_probe(shots, jnp.asarray(task.labels), kernel).kernel
    encode = partial(features, task.bench.model)
    return task.accuracy(lambda p, x: one(encode(p, x)) @ probe, params)


def with_cache(task: Task, vectors: Any) -> float:
    """A Tip-Adapter whose keys are learnt together with the coefficients."""
    base, c = task.bench.base, task.config
    cache = cache_of(
        task.encode(base, task.images), jnp.asarray(task.labels), task.classes
    )
    settings = {"alpha": c.alpha, "beta": c.beta}

    def logits(params, keys, images):
        z = features(task.bench.model, params, images)
        return outputs(task.head, z) + cache_logits(
            z, cache._replace(keys=keys), **settings
        )

    def loss_fn(values, frozen, batch):
        of = lambda p, b: cross_entropy(
            logits(p, values["keys"], b["images"]), b["labels"]
        )
        loss = atlas.atlas_loss(values["coefficients"], frozen[0], frozen[1], batch, of)
        return loss, loss

    start = {"coefficients": atlas.zero_coefficients(base, vectors), "keys": cache.keys}
    kinds: dict[Hashable, optax.GradientTransformation] = {
        "coefficients": task.optimizer(),
        "keys": optax.adamw(1e-3),
    }
    tx = optax.partition(kinds, {kind: kind for kind in kinds})
    given = loss_fn, start, (base, vectors), task.batches()
    best = merging.learn(*given, steps=c.steps, optimizer=tx).variables
    params = atlas.compose(base, vectors, best["coefficients"])
    return task.accuracy(logits, params, best["keys"])


def budgets(task: Task, vectors: Any) -> dict[str, dict[str, float]]:
    """Test accuracy with few task vectors, chosen in four ways."""
    bench, rows = task.bench, {}
    names = sorted(bench.tasks)
    known = {
        t: task.encode(bench.base, bench.data[t]["train"]["images"][:300])
        for t in names
    }
    batch = {"images": task.images, "labels": task.labels}
    steep = sensitivities(task.objective, bench.base, vectors, [batch])
    scores = {
        "random": (np.random.default_rng(task.seed).random(len(names)), False),
        "feature": (feature_scores(task.encode(bench.base, task.images), known), False),
        "gradient, whole": (steep, False),
        "gradient, blockwise": (steep, True),
    }
    for name, (score, blockwise) in scores.items():
        rows[name] = {}
        for budget in task.config.budgets:
            few = select(vectors, score, budget, blockwise=blockwise)
            found = task.accuracy(task.logits, task.compose(few))
            rows[name][f"{budget} vectors"] = found
    return rows


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    source = config.bench.images_per_task, config.bench.data_dir
    data = load_data((config.held_out,), *source)[config.held_out]
    vectors = merging.task_vectors(bench.base, bench.models)
    make = partial(Task, bench, data, seed=seed, c=config)
    rows: dict[str, dict[str, float]] = {}
    for shots in track(config.shots, f"shots, seed {seed}"):
        for name, x in methods(make(shots=shots), vectors).items():
            rows.setdefault(name, {})[f"{shots} shots"] = x
    return {"rows": rows, "budgets": budgets(make(shots=config.budget_shots), vectors)}


def plot(results: list[dict[str, Any]], shots: tuple[int, ...]) -> Figure:
    """Accuracy over the number of shots."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, color in method_colors([*results[0]["rows"]]).items():
        values = np.mean([[*r["rows"][name].values()] for r in results], axis=0)
        ax.plot(shots, values, "o-", markersize=3, color=color, label=name)
    ax.set(xlabel="labelled images per class", ylabel="test accuracy, %", xscale="log")
    ax.set_xticks(shots, [str(k) for k in shots])
    ax.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    return figure


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Learns in all ways for every seed; writes tables and a figure."""
    own = models / f"without_{config.held_out}"
    results = per_seed(replace(config, bench=config.others), out, own, run)
    parts = {
        "Test accuracy, %, by labelled images per class": "rows",
        f"The same with few task vectors, {config.budget_shots} shots": "budgets",
    }
    lines = [f"{title}:\n\n{table(results, part)}\n" for title, part in parts.items()]
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    plot(results, config.shots).savefig(out / "atlas_few_shot.png", dpi=110)
    return results


def quick(
    config: Config = QUICK, out: Path = Path("runs/atlas_few_shot_quick")
) -> None:
    """A minute: two numbers of shots, a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = FULL,
    out: Path = Path("runs/atlas_few_shot"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
