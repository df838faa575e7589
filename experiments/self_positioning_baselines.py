"""What Self Positioning is compared with: tasks alone, mixtures, RegMean."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from experiments.self_positioning_bench import (
    TASKS,
    Bench,
    Config,
    input_grams,
    mixed,
    trained,
)
from mtjax import merging

Length = Literal["total", "longest"]


def tuned(bench: Bench, number: dict[str, int]) -> Any:
    """The base after so many batches of every task."""
    return deque(trained(bench, mixed(bench, number)), maxlen=1)[0]


def single_models(
    bench: Bench, growth: Sequence[int] = ()
) -> tuple[dict[str, Any], list[Any]]:
    """One pass through each task alone, and the larger one after so many batches.

    Called first on a new bench it gives the same models every time.
    """
    passes, stages, single = number_of(bench), [], {}
    for i, params in enumerate(trained(bench, mixed(bench, passes | {"sts": 0})), 1):
        stages += [params] * (i in growth)
        single["intent"] = params
    single["sts"] = tuned(bench, passes | {"intent": 0})
    return single, stages


def number_of(bench: Bench) -> dict[str, int]:
    """Batches of one pass, by task."""
    return {task: bench.passes(task) for task in TASKS}


def shared_out(passes: dict[str, int], share: float, length: Length) -> dict[str, int]:
    """Batches of a mixture with a given share of the smaller task.

    Args:
      passes: batches of one pass, by task.
      share: of `sts`, above 0 and below 1.
      length: `"total"`: as many batches as both passes have together; `"longest"`: the
        task with the larger share has as many as the longest pass, which repeats the
        smaller one.

    Returns:
      Batches by task.
    """
    if length == "total":
        few = round(share * sum(passes.values()))
        return {"intent": sum(passes.values()) - few, "sts": few}
    scale = max(passes.values()) / max(share, 1 - share)
    return {"intent": round(scale * (1 - share)), "sts": round(scale * share)}


def more(config: Config, shares: Sequence[float], seed: int) -> dict[str, Any]:
    """Rows that were added later: RegMean, mixtures that repeat the smaller task."""
    bench = Bench(config, seed)
    single, _ = single_models(bench)
    grams = {task: input_grams(bench, single[task], task) for task in TASKS}
    models = {"RegMean": merging.regmean(single, grams)}
    for share in shares:
        number = shared_out(number_of(bench), share, "longest")
        models[f"joint, {share:.0%} sts, longest"] = tuned(bench, number)
    return {name: bench.scores(params, "test") for name, params in models.items()}
