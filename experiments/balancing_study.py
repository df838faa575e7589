"""All balancers on three real problems, each with the learning rate that suits it.

Two overlaid digits, two questions about people, three metals in the soil. Small dense
networks with one hidden layer per head; every method gets the same grid of learning
rates, of which the validation part chooses one, and the test part is looked at once.
Learning rates and seeds of a method are trained side by side as one program; what is
finished is not trained again.

Command:  mtjax data prepare census_income_kdd/original --from FOLDER --data-dir DATA
          mtjax data prepare mulan_mtr/jura --from FOLDER --data-dir DATA
          python experiments/balancing_study.py full --data-dir DATA
          (`quick` takes seconds and needs no data folder)
Machine:  two CPU cores.   Minutes: 45.    Expect: docs/studies/balancing.md.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import tyro
from rich.progress import track

from mtjax import study, training
from mtjax.analysis.plots import plot_effects, plot_tradeoff
from mtjax.data import Problem, load_problem
from mtjax.study import METHODS, Summary
from mtjax.study.methods import check_methods
from mtjax.study.setting import Setting, metric_of
from mtjax.study.summary import SINGLE, summarise
from mtjax.study.sweep import Sweep
from mtjax.study.tuning import tuned_lanes
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder

PLAIN = "equal"  # the plain sum, which all others are compared with
Cell = dict[str, Any]  # what is known of one method on one problem


@dataclass(frozen=True)
class Config:
    """What is compared, and for how long."""

    data: tuple[str, ...] = ("multi_mnist", "census_income_kdd", "mulan_mtr/jura")
    data_dir: Path | None = None  # folder of prepared data, for tables
    methods: tuple[str, ...] = tuple(METHODS)
    learning_rates: tuple[float, ...] = (1.25e-4, 5e-4, 2e-3, 8e-3)  # of Adam
    seeds: int = 5
    steps: int = 500
    batch_size: int = 64
    epochs: int = 20  # at least, for methods that act once per epoch
    drawn: tuple[str, ...] = study.Config.methods  # in the plot of two tasks

    def __post_init__(self):
        """Checks the names of the methods."""
        check_methods(self.methods)
        if PLAIN not in self.methods:
            raise ValueError(f"`methods` must contain {PLAIN!r}, got {self.methods}.")


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(("multi_mnist",), None, (PLAIN, "uw", "mgda"), (1e-3, 1e-2), 2, 2, 16)


def main(config: Config, out: Path) -> dict[str, Summary]:
    """Trains all methods on all problems; writes tables, their numbers and figures."""
    problems = {name: load(name, config) for name in config.data}
    open_run_folder(out, config)
    summaries, tables = {}, []
    for name, problem in problems.items():
        stem = name.replace("/", "_")
        cells = train_all(problem, config, out / stem)
        lanes = {m: cell["lanes"] for m, cell in cells.items() if "lanes" in cell}
        tuned = tuned_lanes(problem.tasks, lanes)
        summaries[name] = summary = summarised(problem, cells, tuned, config)
        tables.append(f"## {name}\n\n{table(summary, cells, tuned, config)}\n")
        tradeoff(summary, config).savefig(out / f"tradeoff_{stem}.png", dpi=120)
    rank = mean_ranks(summaries, config)
    order = sorted(config.methods, key=lambda method: rank[method])
    tables.append(f"## All\n\n{comparison(summaries, order, rank)}\n")
    write_atomically(out / "tables.md", "\n".join(tables))
    numbers = {name: summary.as_json() for name, summary in summaries.items()}
    write_atomically(out / "results.json", json.dumps(numbers, indent=1))
    effects = {
        name: {m: (deltas, half_width(deltas)) for m, deltas in delta_ms(s).items()}
        for name, s in summaries.items()
    }
    options = {"order": order, "reference": PLAIN, "xlabel": "Δm, %"}
    plot_effects(effects, **options).savefig(out / "delta_m.png", dpi=120)
    return summaries


def load(name: str, config: Config) -> Problem:
    """The problem with flat inputs: pictures go to a dense network too."""
    problem = load_problem(name, config.data_dir)
    splits = {s: getattr(problem, s) for s in ("train", "validation", "test")}
    for split, part in splits.items():
        flat = part["inputs"].reshape(len(part["inputs"]), -1)
        splits[split] = part | {"inputs": flat}
    return dataclasses.replace(problem, **splits)


def train_all(problem: Problem, config: Config, folder: Path) -> dict[str, Cell]:
    """Trains every method, and every task alone, that is not finished in the folder."""
    alone = {
        f"{SINGLE} {t.name}": Setting(problem, (t,), config.batch_size)
        for t in problem.tasks
    }
    together = Setting(problem, tuple(problem.tasks), config.batch_size)
    settings = alone | dict.fromkeys(config.methods, together)
    epoch = min(together.size // config.batch_size, config.steps // config.epochs)

    @lru_cache(maxsize=2)  # that of the plain sum is used for timing again
    def sweep(name: str) -> Sweep:
        method = PLAIN if name in alone else name
        grid = {"learning_rates": config.learning_rates, "seeds": config.seeds}
        return Sweep(settings[name], method, steps_per_epoch=max(1, epoch), **grid)

    cells = {}
    for name in track(settings, folder.name):
        path = folder / f"{name}.json"
        if not path.exists():
            try:
                cell = {"lanes": sweep(name).results(config.steps)}
                if name in config.methods:
                    cell["step_ratio"] = relative_time(sweep(name), sweep(PLAIN))
            except Exception as error:  # is shown in the table, in its place
                if name in (*alone, PLAIN):  # nothing can be compared without it
                    raise
                cell = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(cell))
        cells[name] = json.loads(path.read_text())
    return cells


def relative_time(sweep: Sweep, plain: Sweep) -> float:
    """Time of a step of all lanes over that of the plain sum, taken in turns."""
    if sweep is plain:
        return 1.0
    timed = (
        (name, (partial(s.advance, steps=2), s.fresh_state()))
        for name, s in (("one", sweep), ("plain", plain))
    )
    milliseconds = training.step_milliseconds(dict(timed))
    return milliseconds["one"] / milliseconds["plain"]


def summarised(problem: Problem, cells, tuned, config: Config) -> Summary:
    """The numbers of the table, at the chosen learning rates."""

    def run(lane):
        parts = ((t, k, v) for t, m in lane["validation"].items() for k, v in m.items())
        scores = {f"{task}/{metric}": value for task, metric, value in parts}
        conflict = {k: lane[k] for k in ("cosine", "conflict_rate") if k in lane}
        history = [{"step": config.steps, **scores, **conflict}]
        return {"history": history, "test": lane["test"]}

    results = {name: [run(lane) for lane in lanes] for name, lanes in tuned.items()}
    methods = tuple(m for m in config.methods if m in tuned)
    ratios = {m: cells[m]["step_ratio"] for m in methods}
    return summarise(problem.tasks, methods, results, ratios)


def table(summary: Summary, cells, tuned, config: Config) -> str:
    """One line per method; those that failed say why."""
    headers = [h.replace("\n", " ") for h in summary.headers()]
    lines = [[*headers, "learning rate", "skipped steps"]]
    for row in summary.rows:
        lanes = tuned.get(row.method)
        rate = f"{lanes[0]['learning_rate']:g}" if lanes else ""
        skipped = str(sum(lane["skipped"] for lane in lanes)) if lanes else ""
        lines.append([*summary.cells(row), rate, skipped])
    failed = [name for name in config.methods if "error" in cells[name]]
    return markdown([*lines, *([name, cells[name]["error"]] for name in failed)])


def mean_ranks(summaries: dict[str, Summary], config: Config) -> dict[str, float]:
    """Mean rank of Δm over problems; methods that failed come last."""
    missing = np.array(np.nan)
    found = {
        m: {n: {"Δm": delta_ms(s).get(m, missing).mean()} for n, s in summaries.items()}
        for m in config.methods
    }
    return training.mean_rank(found, {n: {"Δm": "higher"} for n in summaries})


def comparison(summaries, order: list[str], rank: dict[str, float]) -> str:
    """Δm minus that of the plain sum with the same seeds, and mean rank of Δm."""
    lines = [["method", "looks at", *summaries, "mean rank of Δm ↓"]]
    for name in order:
        line = [name, METHODS[name].kind]
        for deltas in map(delta_ms, summaries.values()):
            if name in deltas:
                difference = deltas[name] - deltas[PLAIN]
                mean, half = difference.mean(), half_width(difference)
                clear = " *" if abs(mean) > half else ""
                line.append(f"{mean:+.2f} ± {half:.2f}{clear}")
            else:
                line.append("failed")
        lines.append([*line, f"{rank[name]:.1f}"])
    return markdown(lines)


def delta_ms(summary: Summary) -> dict[str, np.ndarray]:
    """Δm of every method, `(seeds,)`."""
    return {r.method: np.array(r.delta_m.values) for r in summary.rows if r.delta_m}


def half_width(values: np.ndarray) -> float:
    """Half of Student's 95 % interval of the mean."""
    n = len(values)
    return scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tradeoff(summary: Summary, config: Config):
    """The first two tasks on the test part, for a few methods that colours tell."""
    x, y = summary.tasks[:2]
    points = {
        row.method: tuple(np.array(row.metrics[t.name].values) for t in (x, y))
        for row in summary.rows
    }
    single = tuple(values.mean() for values in points.pop(SINGLE))
    few = {m: points[m] for m in config.drawn if m in points}
    xlabel, ylabel = (f"{t.name}: test {metric_of(t).name}" for t in (x, y))
    return plot_tradeoff(few, xlabel=xlabel, ylabel=ylabel, baseline=single)


def quick(config: Options = QUICK, out: Path = Path("runs/balancing_quick")) -> None:
    """Seconds: three methods, a few steps."""
    main(config, out)


def full(config: Options = Config(), out: Path = Path("runs/balancing_study")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
