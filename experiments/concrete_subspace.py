"""Concrete Subspace: does a mask learnt from unlabelled images make merging better?

One small ViT, fine-tuned on several image sets, is merged by task arithmetic (TA) and
AdaMerging, with and without a mask that all tasks share, learnt on all or some of them.

Command:  python experiments/concrete_subspace.py paper --config.bench.data-dir DATA
Machine:  two CPU cores.    Minutes: 13 per seed, and 20 for the models.
Expect:   one seed: TA 77.9 %, AdaMerging 77.9; with a mask 78.3 and 78.5.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import track

from experiments import merge_bench_models as merge_bench
from experiments.merge_bench_measures import Measures, batches, with_mean
from experiments.merge_bench_seeds import per_seed, table
from mtjax import merging
from mtjax.analysis.plots import plot_curves
from mtjax.losses import entropy_loss
from mtjax.merging.coefficients import clamped_share
from mtjax.merging.match import named_leaves
from mtjax.systems import concrete_subspace as concrete
from mtjax.systems.adamerging import AdaMergingConfig, Adapted, collapsed, fit

ADAPTED = {f"{kind}-wise": AdaMergingConfig(kind) for kind in ("task", "layer")}


@dataclass(frozen=True)
class Config:
    """What is merged, and how masks and coefficients are learnt."""

    bench: merge_bench.Config = field(default_factory=merge_bench.Config)
    seeds: int = 3  # of the fine-tunings, the masks and the order of the stream
    meta_steps: int = 400  # on the mask
    points: int = 8  # of curves over meta steps; divides them
    steps: int = 300  # of AdaMerging
    batch_size: int = 16  # unlabelled images per task and step
    mask_rate: float = 5e-3  # of Adam on the mask's logits
    inner_rate: float = 0.1  # of Adam on coefficients in a meta step
    learning_rate: float = 1e-3  # of Adam in AdaMerging
    samples: int = 5  # masks to average the accuracy over, where they are drawn
    unseen: int = 2  # tasks left out, to see what a mask does to them
    scales: tuple[float, ...] = tuple(i / 20 for i in range(1, 21))  # tried for TA


QUICK = Config(merge_bench.QUICK, 1, 20, 2, 10, samples=2, unseen=1, scales=(0.3,))


class Learnt(NamedTuple):
    """A mask and how it came about; curves are over meta steps."""

    state: concrete.ConcreteState
    config: concrete.ConcreteConfig
    accuracy: list[float]  # on validation images
    entropy: list[float]  # mean over steps since the last point, sum over tasks


class Masks:
    """What is learnt from the unlabelled images of one bench."""

    def __init__(self, measures: Measures, config: Config, seed: int):
        """Takes models and images."""
        self.m, self.config, self.seed = measures, config, seed
        self.base, self.vectors = measures.bench.base, measures.vectors
        images, self.samples = measures.split("stream"), config.samples
        self.stream = lambda i: batches(images, config.batch_size, seed + i)

    def learn(self, name: str, *, rescale: bool = True) -> Learnt:
        """The mask for `TA`, or for AdaMerging of this granularity."""
        c, outer = self.config, optax.adam(self.config.mask_rate)
        inner = optax.adam(c.inner_rate) if name in ADAPTED else None
        start = ADAPTED.get(name, AdaMergingConfig("task"))
        how = concrete.ConcreteConfig(start, inner, outer, rescale=rescale)
        key, logits_fn = jax.random.key(self.seed), self.m.bench.logits
        step = jax.jit(lambda *now: concrete.meta_step(*now, logits_fn, how))
        state = concrete.init_state(self.base, self.vectors, how, key=key)
        rows, found = self.stream(0), Learnt(state, how, [], [])
        for _ in track(range(c.points), f"Concrete {name}, seed {self.seed}"):
            entropies = []
            for _ in range(c.meta_steps // c.points):
                pair = next(rows), next(rows)
                state, report = step(state, self.base, self.vectors, pair)
                entropies.append(float(sum(report["entropies"].values())))
            found = found._replace(state=state)
            found.entropy.append(float(np.mean(entropies)))
            validated = self.m.accuracy(self.merged(found), "validation")
            found.accuracy.append(validated["mean"])
        return found

    def mask(self, found: Learnt, kind: concrete.MaskKind = "expected", draw: int = 0):
        """The mask to merge with."""
        key = jax.random.key(10**6 * (self.seed + 1) + draw)  # not learnt with
        return concrete.draw_mask(found.state.logits, found.config, kind, key=key)

    def merged(self, found: Learnt, mask: Any = None) -> merge_bench.Params:
        """With the coefficients of the last meta step, if there were any."""
        mask, last = mask or self.mask(found), found.state.coefficients
        return concrete.masked_merge(self.base, self.vectors, mask, last, found.config)

    def under(self, found: Learnt | None) -> Any:
        """The task vectors under the mask, if there is one."""
        own = self.vectors
        return own if found is None else concrete.masked_vectors(own, self.mask(found))

    def adapt(self, name: str, found: Learnt | None = None, steps: int = 0) -> Adapted:
        """AdaMerging, under a mask if there is one."""
        data = self.m.bench.logits, self.base, self.under(found), self.stream(1000)
        tx = optax.adam(self.config.learning_rate)
        return fit(*data, ADAPTED[name], steps=steps or self.config.steps, optimizer=tx)

    def individual(self, found: Learnt) -> dict[str, float]:
        """Every task with nothing but its own vector under the mask."""
        bench, vectors = self.m.bench, self.under(found)
        own = dict(zip(sorted(bench.tasks), jnp.eye(len(bench.tasks))))
        of = lambda task: merging.merge(self.base, vectors, own[task])
        return with_mean({t: bench.accuracy(of(t), t) for t in bench.tasks})


def ablations(masks: Masks, found: Learnt) -> dict[str, dict[str, float]]:
    """Mean test accuracy of TA under the learnt mask and others."""
    rng, learnt = np.random.default_rng(masks.seed), masks.mask(found)
    draws = lambda kind: [masks.mask(found, kind, i) for i in range(masks.samples)]
    moved = lambda x: jnp.asarray(rng.permuted(np.ravel(x)).reshape(x.shape))
    noise = lambda x: jnp.asarray(rng.normal(0, x.std(), x.shape), jnp.float32)
    drawn = jax.tree.map(noise, found.state.logits)
    groups = {
        "expected": [learnt],
        "sample": draws("sample"),
        "hard": draws("hard"),
        "shuffled in every array": [jax.tree.map(moved, learnt)],
        "random logits": [concrete.draw_mask(drawn, found.config)],
        "learnt without rescaling": [masks.mask(masks.learn("TA", rescale=False))],
    }
    score = lambda mask: masks.m.accuracy(masks.merged(found, mask), "test")["mean"]
    mean = lambda group: {"mean": float(np.mean([score(mask) for mask in group]))}
    return {name: mean(group) for name, group in groups.items()}


def unseen(m: Measures, config: Config, seed: int) -> dict[str, dict[str, float]]:
    """Some tasks are neither merged nor looked at while learning."""
    seen = tuple(sorted(m.bench.tasks))[: -config.unseen]
    models = {t: m.bench.models[t] for t in seen}
    few = Measures(replace(m.bench, tasks=seen, models=models))
    masks, fixed = Masks(few, config, seed), few.fixed(config.scales)[1]
    layers, rest = masks.learn("layer-wise"), {*m.bench.tasks} - {*seen}
    compared = {name: fixed[name] for name in ("base", "TA (0.3)", "TIES")} | {
        "layer-wise": masks.adapt("layer-wise").params,
        "Concrete TA": masks.merged(masks.learn("TA")),
        "Concrete layer-wise": masks.adapt("layer-wise", layers).params,
    }
    found = {name: m.accuracy(params, "test") for name, params in compared.items()}
    mean = lambda row, tasks: float(np.mean([row[t] for t in tasks]))
    split = lambda row: {"seen": mean(row, seen), "unseen": mean(row, sorted(rest))}
    return {name: split(row) for name, row in found.items()}


def gates(found: Learnt) -> dict[str, dict[str, float]]:
    """By array: mean and quantiles, and how many are nearly closed."""
    rows = {}
    for path, logits in named_leaves(found.state.logits).items():
        x = np.asarray(jax.nn.sigmoid(logits), np.float64)
        numbers = [x.mean(), *np.quantile(x, (0.05, 0.5, 0.95)), 100 * (x < 0.4).mean()]
        rows[path] = dict(zip(("mean", "5 %", "50 %", "95 %", "below 0.4, %"), numbers))
    return rows


def run(bench: merge_bench.Bench, config: Config, seed: int) -> dict[str, Any]:
    """All numbers of one seed."""
    m = Measures(bench)
    masks, models = Masks(m, config, seed), m.fixed(config.scales)[1]
    same = 2 * config.meta_steps + config.steps  # gradients, as with a mask
    learnt = {name: masks.learn(name) for name in ("TA", *ADAPTED)}
    adapted = {}
    for name in ADAPTED:
        adapted |= {
            name: masks.adapt(name),
            f"{name}, as many gradients": masks.adapt(name, steps=same),
            f"Concrete {name}": masks.adapt(name, learnt[name]),
            f"Concrete {name}, no inner step": masks.adapt(name, learnt["TA"]),
        }
        models[f"Concrete {name}, meta steps only"] = masks.merged(learnt[name])
    models["Concrete TA"] = masks.merged(learnt["TA"])
    models |= {name: found.params for name, found in adapted.items()}
    rows = {}
    for name, params in models.items():
        logits = m.logits(params, m.split("stream"))
        entropies = [*map(entropy_loss, map(jnp.array, logits.values()))]
        rows[name] = m.accuracy(params, "test") | {
            "on the stream": m.accuracy(params, "stream")["mean"],
            "entropy": float(np.mean(entropies)),
            "collapsed tasks": sum(map(collapsed, logits.values())),
        }
    for name, found in adapted.items():
        last = {group: path[-1] for group, path in found.trajectory.items()}
        rows[name]["outside [0, 1], %"] = 100 * clamped_share(last)
    rows["individual"] = m.individual()
    rows |= {f"masked individual, {n}": masks.individual(x) for n, x in learnt.items()}
    return {
        "rows": rows,
        "ablations": ablations(masks, learnt["TA"]),
        "unseen": unseen(m, config, seed),
        "gates": {name: gates(x) for name, x in learnt.items()},
        "accuracy": {f"Concrete {name}": x.accuracy for name, x in learnt.items()},
        "entropy": {f"Concrete {name}": x.entropy for name, x in learnt.items()},
    }


def main(config: Config, out: Path, models: Path) -> list[dict[str, Any]]:
    """Learns and merges for every seed; writes tables and a figure."""
    results = per_seed(config, out, models, run)
    lines = [
        "Test accuracy, %, and entropy on the stream:",
        *("", table(results, "rows"), "", "TA under other masks, test accuracy, %:"),
        *("", table(results, "ablations"), "", "Tasks seen or not while merging:"),
        *("", table(results, "unseen"), "", "Gates of the mask for TA:"),
        *("", table([r["gates"] for r in results], "TA")),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {"accuracy": "validation, %", "entropy": "stream, nats, sum over tasks"}
    of = lambda p: {n: np.array([r[p][n] for r in results]) for n in results[0][p]}
    ends = config.meta_steps * np.arange(1, config.points + 1) / config.points
    figure = plot_curves(ends, {p: of(p) for p in names}, ylabels=names)
    figure.savefig(out / "concrete_subspace.png")
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/concrete_quick")) -> None:
    """A minute: a few steps."""
    main(config, out, out / "models")


def paper(
    config: Config = Config(),
    out: Path = Path("runs/concrete_subspace"),
    models: Path = Path("runs/merge_bench"),
) -> None:
    """The comparison of the documentation."""
    main(config, out, models)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
