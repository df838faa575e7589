"""Census-Income (KDD) as the ranking problems of the mixture-of-experts papers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from mtjax.data.builders.prepare import SPECS
from mtjax.data.problems import official_parts
from mtjax.data.ranking import RankingProblem, ranking_problem
from mtjax.data.sources import as_arrays

_WEEKS = "weeks worked in year"
_FULL_YEAR = 50
_LABEL_SOURCES = ("marital stat", "education")
# Tasks of each group, and the columns that define or nearly define their labels.
_GROUPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "income": (("income", "never_married"), _LABEL_SOURCES),
    "education": (("degree", "never_married"), _LABEL_SOURCES),
    "home": (
        ("income", "full_year", "never_married", "degree"),
        (*_LABEL_SOURCES, _WEEKS),
    ),
    "chain": (
        ("labour_force", "full_year", "income_full_year"),
        (
            *(_WEEKS, "full or part time employment stat", "reason for unemployment"),
            "num persons worked for employer",  # 0 for all who did not work, and only
        ),
    ),
}
_DEGREES = ("Associates", "Bachelors", "Masters", "Prof", "Doctorate")


def census_ranking(
    group: str = "income",
    *,
    version: str = "original",
    data_dir: str | Path | None = None,
    seed: int = 0,
) -> RankingProblem:
    """Loads Census-Income (KDD) with one of the groups of tasks of the literature.

    ============= ======================================== =============================
    group         tasks                                    removed from the inputs
    ============= ======================================== =============================
    ``income``    income above 50,000; never married       marital status, education
    ``education`` degree; never married                    marital status, education
    ``home``      income; 50 weeks worked; never married;  and weeks worked
                  degree
    ``chain``     in the labour force; and 50 weeks        weeks worked, employment
                  worked; and income above 50,000          status, unemployment reason,
                                                           employer's size
    ============= ======================================== =============================

    The survey weight and the income are never inputs. A degree is an associate's,
    bachelor's, master's, professional or doctorate degree; some college is none. The
    kind of household and the tax filer status stay, as in the publications, although
    they tell much about marriage.

    Args:
      group: which tasks: ``"income"``, ``"education"``, ``"home"`` or ``"chain"``.
      version: ``"original"`` with all 40 features, or ``"nominal"`` with 299,285
        persons and the categories only, which has the first two groups.
      data_dir: folder of the prepared data; :func:`mtjax.data.default_data_dir` if
        None.
      seed: decides the random split.

    Returns:
      The problem. Numbers are ``log1p`` and standardised. With both official parts the
      second is cut into equal halves for validation and test, as in the publications;
      with one part it is 70/15/15.

    Raises:
      ValueError: if `group` or `version` is unknown, or `version` lacks the group.
      DataNotFoundError: if the data are not prepared; the message says how to.

    Example:
      >>> census_ranking("marriage")
      Traceback (most recent call last):
      ...
      ValueError: `group` must be one of ['income', 'education', 'home', 'chain']...

    References:
      Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts, 2018, section 6.
    """
    if group not in _GROUPS:
        raise ValueError(f"`group` must be one of {list(_GROUPS)}, got {group!r}.")
    if version not in ("original", "nominal"):
        raise ValueError(f"`version` must be 'original' or 'nominal', got {version!r}.")
    tasks, removed = _GROUPS[group]
    if version == "nominal" and _WEEKS in removed:
        raise ValueError(
            f"`version` must be 'original' for the group {group!r}, got 'nominal', "
            "which lacks the weeks worked."
        )
    dataset = f"census_income_kdd/{version}"
    sources = official_parts(dataset, data_dir)
    metadata = dict(next(iter(sources.values())).info.metadata)
    parts = [as_arrays(source) for source in sources.values()]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    table = census_columns(columns, metadata)
    inputs = [*metadata["numeric"], *metadata["categorical"]]
    kept = [name for name in inputs if name not in removed]
    numbers = [name for name in metadata["numeric"] if name in kept]
    return ranking_problem(
        f"{dataset}/{group}",
        table,
        _rows([len(part["income"]) for part in parts], seed),
        tasks=tasks,
        fields=[name for name in metadata["categorical"] if name in kept],
        numbers=numbers,
        log1p=numbers,
        description=f"Census-Income (KDD), {version}: {', '.join(tasks)}. Removed from "
        f"the inputs: survey weight, income, {', '.join(removed)}. "
        + (
            "Official training part; the official test part in equal halves."
            if len(parts) == 2
            else f"Random split 70/15/15, seed {seed}."
        ),
        licence=SPECS[dataset].licence,
    )


def census_columns(
    columns: Mapping[str, Shaped[np.ndarray, "n ..."]], metadata: Mapping[str, Any]
) -> dict[str, Shaped[np.ndarray, " n"]]:
    """Names the columns of the prepared census and makes the labels of all tasks.

    Args:
      columns: as prepared: ``categorical``, ``income``, ``never_married`` and, in the
        original, ``numeric``.
      metadata: the names of the columns and of the categories, stored beside them.

    Returns:
      Every column by name, a missing category as -1, and the labels that these columns
      define.
    """
    # Code 0 is a missing value in the prepared data.
    codes = columns["categorical"] - 1
    table = {name: codes[:, i] for i, name in enumerate(metadata["categorical"])}
    table |= {
        name: columns["numeric"][:, i] for i, name in enumerate(metadata["numeric"])
    }
    degrees = [
        code - 1
        for code, value in enumerate(metadata["categorical"]["education"])
        if value.startswith(_DEGREES)
    ]
    income = columns["income"]
    table |= {
        "income": income,
        "never_married": columns["never_married"],
        "degree": np.isin(table["education"], degrees),
    }
    if _WEEKS in table:
        full_year = table[_WEEKS] >= _FULL_YEAR
        table |= {
            "labour_force": table[_WEEKS] > 0,
            "full_year": full_year,
            "income_full_year": full_year & (income == 1),
        }
    return table


def _rows(sizes: list[int], seed: int) -> dict[str, Int[np.ndarray, " rows"]]:
    generator = np.random.default_rng(seed)
    if len(sizes) == 2:
        train, rest = np.arange(sizes[0]), sizes[0] + generator.permutation(sizes[1])
        half = sizes[1] // 2
        return {"train": train, "validation": rest[:half], "test": rest[half:]}
    mixed = generator.permutation(sizes[0])
    first, second = int(0.7 * sizes[0]), int(0.85 * sizes[0])
    train, validation, test = np.split(mixed, [first, second])
    return {"train": train, "validation": validation, "test": test}
