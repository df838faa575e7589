"""Dynamic Logits Fusion: do small experts steer a large language model?

Two models of bytes, a large and a small one, read the same texts; small experts are
fine-tuned to calculate, complete words and name intents. The large model is steered by
the expert of the task, or by all of them when nobody says which task a prompt is of.

Command:  python experiments/logits_fusion.py paper --config.models.data-dir DATA
Machine:  two CPU cores.    Minutes: 10 per seed.
Expect:   exact match 35 % with dynamic weights, 33 with weight 1, 37 by the experts
          themselves; with all experts at once 5.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments import logits_fusion_models as texts
from experiments.kept import kept
from experiments.logits_fusion_models import TASKS, Examples
from experiments.merge_bench_seeds import table
from mtjax import merging
from mtjax.analysis.plots import method_colors
from mtjax.nn import decoding
from mtjax.nn.decoding import CachedModel
from mtjax.systems.logits_fusion import DynamicFusion, StaticFusion, routing
from mtjax.training.run_config import open_run_folder

STATIC = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Config:
    """Models, and how they are put together."""

    models: texts.Config = field(default_factory=texts.Config)
    seeds: int = 3  # of all models
    unseen: int = 100  # pieces of a text that no expert was trained for
    piece: int = 64  # bytes of a piece, to read and then to predict
    ta_scale: float = 0.4  # of the experts merged into one


QUICK = Config(
    texts.Config(
        large_size=(16, 2),
        small_size=(8, 1),
        window=32,
        batch_size=8,
        large_steps=40,
        small_steps=40,
        large_tune_steps=20,
        small_tune_steps=20,
        tune_batch_size=8,
        replay=4,
        context=24,
        examples=20,
    ),
    seeds=1,
    unseen=4,
    piece=16,
)


@dataclass(frozen=True)
class Way:
    """Models and how they decide together; `combine` is None for a single one."""

    models: tuple[CachedModel, ...]
    combine: Callable | None = None

    def exact(self, part: Examples) -> tuple[float, decoding.Generated]:
        """Per cent of answers that are written without a mistake."""
        steps = part.answers.shape[1]
        found = decoding.generate(
            self.models,
            part.prompts,
            part.mask,
            self.combine,
            steps=steps,
            end=ord("\n"),
        )
        right = (np.asarray(found.tokens) == part.answers).all(axis=1)
        return 100 * float(right.mean()), found

    def nats(self, part: Examples) -> float:
        """Cross-entropy of a byte of the answers."""
        scores = decoding.score(self.models, *part, self.combine)
        return -float(scores.log_probs.sum()) / float(part.answer_mask.sum())

    def milliseconds(self, part: Examples) -> float:
        """To write one byte of all answers, the fastest of three."""
        times, steps = [], part.answers.shape[1]
        given = self.models, part.prompts, part.mask, self.combine
        for _ in range(4):  # the first one compiles
            begin = time.perf_counter()
            jax.block_until_ready(decoding.generate(*given, steps=steps))
            times.append(1000 * (time.perf_counter() - begin) / steps)
        return min(times[1:])


def measured(ways: dict[str, dict[str, Way]], parts: dict[str, Examples]):
    """Exact match by way and task, nats per byte on average, and what was written."""
    rows, written = {}, {}
    for name, by_task in ways.items():
        exact, nats = {}, []
        for task, way in by_task.items():
            exact[task], written[name, task] = way.exact(parts[task])
            nats.append(way.nats(parts[task]))
        mean = float(np.mean([*exact.values()]))
        rows[name] = exact | {"mean": mean, "nats per byte": float(np.mean(nats))}
    return rows, written


def run(models: texts.Models, config: Config) -> dict[str, Any]:
    """All numbers of one seed."""
    decoders = {size: config.models.model(size) for size in ("large", "small")}
    of = lambda size, params: CachedModel(
        params, decoders[size].start, decoders[size].advance
    )
    large, small = of("large", models.large), of("small", models.small)
    experts = {task: of("small", models.experts[task]) for task in TASKS}
    some = lambda task: texts.pairs(task, "test", config.models)[
        : config.models.examples
    ]
    pairs = {task: some(task) for task in TASKS}
    # One shape for all tasks, for one program.
    longest = max(len(answer) for rows in pairs.values() for _, answer in rows)
    shape = config.models.context, longest
    parts = {task: texts.encoded(rows, *shape) for task, rows in pairs.items()}

    same = lambda *way: dict.fromkeys(TASKS, Way(*way))
    steered = lambda how: {t: Way((large, small, experts[t]), how) for t in TASKS}
    single = {"large": same((large,))}
    single |= {"small expert": {t: Way((experts[t],)) for t in TASKS}}
    single |= {f"static, {a}": steered(StaticFusion((a,))) for a in STATIC}
    single |= {"dynamic": steered(DynamicFusion())}
    single |= {"dynamic, bisect": steered(DynamicFusion("bisect"))}
    tuned = {t: Way((of("large", models.tuned[t]),)) for t in TASKS}
    single |= {"large, fine-tuned": tuned}
    rows, written = measured(single, parts)

    everyone = (large, small, *experts.values())
    combined = merging.task_arithmetic(config.ta_scale)(models.small, models.experts)
    merged, thirds = of("small", combined), (1 / len(TASKS),) * len(TASKS)
    mixed = {
        "large": same((large,)),
        "small": same((small,)),
        "static, 1/3 each": same(everyone, StaticFusion(thirds)),
        "static, 1 each": same(everyone, StaticFusion((1.0,) * len(TASKS))),
        "dynamic, one expert": same(everyone, DynamicFusion()),
        "dynamic, coordinate": same(everyone, DynamicFusion("coordinate")),
        "small TA": same((merged,)),
        "dynamic, small TA": same((large, small, merged), DynamicFusion()),
    }
    mixed_rows, mixed_written = measured(mixed, parts)
    unseen = unseen_text(config)
    for name, by_task in mixed.items():
        mixed_rows[name]["unseen text, nats"] = by_task[TASKS[0]].nats(unseen)

    routed, alphas = {}, {}
    for task in TASKS:
        found = mixed_written["dynamic, one expert", task]
        shares = routing(found.notes.alpha, found.mask)
        routed[task] = dict(zip(TASKS, (100 * np.asarray(shares)).tolist()))
        found = written["dynamic", task]
        count = np.maximum(np.asarray(found.mask).sum(axis=0), 1)
        alphas[task] = (np.asarray(found.notes.alpha[0]).sum(axis=0) / count).tolist()
    times = {
        name: {"ms per byte": single[name][TASKS[-1]].milliseconds(parts[TASKS[-1]])}
        for name in ("large", "small expert", "static, 1.0", "dynamic")
    }
    return {
        "single": rows,
        "mixed": mixed_rows,
        "routing": routed,
        "alpha": alphas,
        "times": times,
    }


def unseen_text(config: Config) -> Examples:
    """Pieces of Shakespeare: the bases know his other texts, the experts do not."""
    (row,) = texts.rows("tiny_shakespeare", "test", config.models)
    n = config.piece
    cuts = np.linspace(0, len(row["text"]) - 2 * n, config.unseen).astype(int)
    return texts.encoded(
        [(row["text"][i : i + n], row["text"][i + n : i + 2 * n]) for i in cuts]
    )


def plot(results: Sequence[dict[str, Any]]) -> Figure:
    """Exact match of all ways, and weights along the answers."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [*results[0]["single"]]
    for i, (name, color) in enumerate(method_colors(names).items()):
        values = [np.mean([r["single"][name][t] for r in results]) for t in TASKS]
        places = np.arange(len(TASKS)) + (i - len(names) / 2) / (len(names) + 2)
        left.bar(places, values, 1 / (len(names) + 2), color=color, label=name)
    left.set_xticks(range(len(TASKS)), TASKS)
    left.set(ylabel="exact match, %")
    left.legend(frameon=False, fontsize=7)
    for task, color in method_colors(TASKS).items():
        curve = np.mean([r["alpha"][task] for r in results], axis=0)
        right.plot(curve, color=color, label=task, marker=".")
    right.set(xlabel="byte of the answer", ylabel="weight of the expert, mean")
    right.legend(frameon=False)
    return figure


def main(config: Config, out: Path) -> list[dict[str, Any]]:
    """Trains and measures seed by seed; writes tables and a figure."""
    open_run_folder(out, config)
    results = []
    for seed in range(config.seeds):
        prepare = partial(texts.prepare, config.models, seed, out / f"models_{seed}")
        measure = lambda prepare=prepare: run(prepare(), config)
        results.append(kept(out / f"seed_{seed}.json", measure))
    titles = {
        "single": "The expert of the task is known; exact match, %:",
        "mixed": "The task is not known; exact match, %:",
        "routing": "Bytes of answers (lines) at which an expert weighs most, %:",
        "times": "Time to write a byte of all answers:",
    }
    parts = [f"{title}\n\n{table(results, x)}\n" for x, title in titles.items()]
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    plot(results).savefig(out / "logits_fusion.png", dpi=110)
    return results


def quick(config: Config = QUICK, out: Path = Path("runs/logits_fusion_quick")) -> None:
    """Two minutes: models that have hardly learnt."""
    main(config, out)


def paper(config: Config = Config(), out: Path = Path("runs/logits_fusion")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
