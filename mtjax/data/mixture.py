"""Batches from several tasks: in chosen proportions, deterministic, resumable."""

import sys
import zlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import grain
import jax
import numpy as np

from mtjax.data.mixture_weights import mixture_weights
from mtjax.data.sources import Source
from mtjax.data.task_order import random_task, scheduled_task

Batches = Literal["single_task", "mixed", "per_task"]
Exhaustion = Literal["repeat", "stop_first", "stop_all", "once"]
Order = Literal["scheduled", "random"]


def mixture(
    sources: Mapping[str, Source | grain.MapDataset],
    *,
    batch_size: int | Mapping[str, int],
    weights: Literal["proportional", "uniform"]
    | Mapping[str, float | int] = "proportional",
    exponent: float = 1.0,
    cap: int | None = None,
    exhaustion: Exhaustion = "repeat",
    batches: Batches = "single_task",
    order: Order = "scheduled",
    drop_remainder: bool = True,
    shuffle: bool = True,
    seed: int = 0,
) -> "TaskMixture":
    """Mixes the sources of several tasks into one stream of batches.

    Which task comes next is scheduled by default, not drawn at random: after any number
    of draws, every task has had its share up to a fraction of one draw per task, and
    weights of 1:2:1 give exactly that in every block of four. What is random (by
    `seed`) is the order inside each source, anew in each pass over it.

    Args:
      sources: random-access sources, or grain datasets made of them (`map` and
        `random_map` are fine, `repeat` and `filter` are not), by task name.
      batch_size: examples per batch, or unless batches are mixed one number per task;
        for ``batches="per_task"`` the examples of each task.
      weights: see :func:`mixture_weights`. Shares of batches for ``"single_task"``, of
        examples for ``"mixed"``; ``"per_task"`` takes its shares from `batch_size`.
      exponent: see :func:`mixture_weights`.
      cap: see :func:`mixture_weights`.
      exhaustion: what happens at the end of a source. ``"repeat"``: it starts again,
        without end. ``"stop_first"``: the mixture ends. ``"stop_all"``: it starts
        again, and the mixture ends when every source has been read to its end.
        ``"once"``: it leaves the mixture, whose other weights keep their ratios, so
        that every example comes once.
      batches: ``"single_task"``: ``{task: batch}`` with one task; ``"per_task"``:
        ``{task: batch}`` with every task that has examples left; ``"mixed"``: one
        batch of all tasks with the field ``"task"``, int32 positions in the sorted
        list of names, for which all sources must have the same fields.
      order: ``"scheduled"``, as above, or ``"random"``: each task is drawn with the
        probability of its weight, by `seed`. No use with per-task batches.
      drop_remainder: whether to leave out batches that the end of a source makes
        shorter.
      shuffle: whether to shuffle each source.
      seed: decides the order inside each source, together with the name of the task;
        adding a task does not change the order of the others.

    Returns:
      A ``grain.IterDataset``: iterate over it, or transform it further. Its iterators
      have ``get_state()`` and ``set_state(state)`` and, if nothing was added, the
      property ``counts``. For slow sources, wrap it in
      ``grain.experimental.ThreadPrefetchIterDataset`` and ``close()`` its iterator.

    Raises:
      ValueError: if an argument breaks its rule or the sources do not fit together.

    Example:
      >>> from mtjax.data import array_source
      >>> short = array_source({"x": np.arange(4)})
      >>> sources = {"a": short, "b": array_source({"x": np.arange(8)})}
      >>> stream = iter(mixture(sources, batch_size=2, shuffle=False))
      >>> [{task: b["x"].tolist() for task, b in next(stream).items()} for _ in "123"]
      [{'b': [0, 1]}, {'a': [0, 1]}, {'b': [2, 3]}]
      >>> stream.counts
      {'a': 2, 'b': 4}
    """
    if not sources:
        raise ValueError("`sources` must hold at least one task, got none.")
    _check_choice("exhaustion", exhaustion, get_args(Exhaustion))
    _check_choice("batches", batches, get_args(Batches))
    _check_choice("order", order, get_args(Order))
    tasks = sorted(sources)
    sizes = {task: _checked_length(task, sources[task]) for task in tasks}
    if batches == "per_task" and isinstance(weights, Mapping):
        raise ValueError(
            "`weights` must not be given for per-task batches, got "
            f"{dict(weights)}. Give `batch_size` per task instead."
        )
    rule = "uniform" if batches == "per_task" else weights
    shares = mixture_weights(sizes, rule, exponent=exponent, cap=cap)
    rows = _batch_sizes(batch_size, tasks, batches)
    if batches == "mixed":
        _check_same_fields({task: sources[task][0] for task in tasks})
    datasets = {}
    for task in tasks:
        dataset = sources[task]
        if not isinstance(dataset, grain.MapDataset):
            dataset = grain.MapDataset.source(dataset)
        dataset = dataset.seed(_task_seed(seed, task))
        datasets[task] = (dataset.shuffle() if shuffle else dataset).repeat()
    return TaskMixture(
        datasets, sizes, shares, rows, exhaustion, batches, order, drop_remainder, seed
    )


class TaskMixture(grain.IterDataset):
    """The dataset that :func:`mixture` returns.

    Attributes:
      tasks: the sorted names; a position in this list is the ``"task"`` of an example.
      sizes: numbers of examples in one pass, by task.
      weights: shares of draws, by task.
      datasets: the endless dataset of each task, shuffled anew in each pass.
      rows: examples per batch, by task.
      exhaustion: the argument of :func:`mixture`.
      batches: the argument of :func:`mixture`.
      order: the argument of :func:`mixture`.
      drop_remainder: the argument of :func:`mixture`.
      seed_value: the argument `seed` of :func:`mixture`.
    """

    def __init__(
        self,
        datasets: Mapping[str, grain.MapDataset],
        sizes: Mapping[str, int],
        weights: Mapping[str, float | int],
        rows: Mapping[str, int],
        exhaustion: Exhaustion,
        batches: Batches,
        order: Order,
        drop_remainder: bool,
        seed: int,
    ):
        """Keeps checked arguments; use :func:`mixture`."""
        super().__init__()
        self.tasks = sorted(datasets)
        self.sizes = dict(sizes)
        self.weights = dict(weights)
        self.datasets = dict(datasets)
        self.rows = dict(rows)
        self.exhaustion = exhaustion
        self.batches = batches
        self.order = order
        self.drop_remainder = drop_remainder
        self.seed_value = seed

    def __iter__(self) -> "TaskMixtureIterator":
        """Returns an iterator at the beginning."""
        return TaskMixtureIterator(self)


class TaskMixtureIterator(grain.DatasetIterator):
    """One pass of a :class:`TaskMixture`; its state is a small JSON-like dict.

    Restoring a state into a mixture of the same weights continues exactly. Restoring
    it into one of other weights or tasks continues as follows: every source goes on
    after the last example that was drawn from it, with its count; a task that is new
    starts at its beginning; a task that is gone keeps its place in the state, for a
    later return; and the proportions start afresh.
    """

    def __init__(self, dataset: TaskMixture):
        """Starts at the beginning of `dataset`."""
        super().__init__()
        self._dataset = dataset
        self._drawn = dict.fromkeys(dataset.tasks, 0)
        self._credits = dict.fromkeys(dataset.tasks, 0.0)
        self._absent: dict[str, int] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each task drawn so far, those before a restart included."""
        return dict(self._drawn)

    def __next__(self) -> dict[str, Any]:
        """Returns the next batch."""
        self._assert_not_closed()
        shares = dict(self._credits)
        plan = self._plan(shares)
        if not plan:
            raise StopIteration
        drawn = dict(self._drawn)
        rows = []
        for task in plan:
            rows.append(self._read(task, drawn[task]))
            drawn[task] += 1
        tasks = self._dataset.tasks
        if self._dataset.batches == "mixed":
            batch = _stack("mixed", rows)
            batch["task"] = np.array([tasks.index(task) for task in plan], np.int32)
        else:
            batch = {
                task: _stack(task, [row for row, t in zip(rows, plan) if t == task])
                for task in sorted(set(plan))
            }
        # Only now: an iterator whose source failed can be asked again.
        self._drawn, self._credits = drawn, shares
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the state: plain numbers and names, ready for JSON."""
        return {
            "drawn": {**self._absent, **self._drawn},
            "credits": dict(self._credits),
            "weights": dict(self._dataset.weights),
            "sizes": dict(self._dataset.sizes),
            "seed": self._dataset.seed_value,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from `state`, also one of other weights or tasks (see above).

        Args:
          state: what :meth:`get_state` returned.

        Raises:
          ValueError: if the seed or the length of a source differ, with which the
            places in the state would mean other examples.
        """
        data = self._dataset
        if state["seed"] != data.seed_value:
            raise ValueError(
                f"`state` must have the seed of the mixture, {data.seed_value}, got "
                f"{state['seed']}. Build the mixture with the old seed."
            )
        for task in data.tasks:
            size = state["sizes"].get(task, data.sizes[task])
            if size != data.sizes[task]:
                raise ValueError(
                    f"`state` must have {data.sizes[task]} examples for task {task!r} "
                    f"like the source, got {size}. Give a changed source a new name."
                )
        drawn = {task: int(count) for task, count in state["drawn"].items()}
        self._drawn = {task: drawn.get(task, 0) for task in data.tasks}
        self._absent = {t: n for t, n in drawn.items() if t not in data.tasks}
        same = state["weights"] == data.weights
        self._credits = {t: state["credits"][t] if same else 0.0 for t in data.tasks}

    def _left(self, task: str) -> float | int:
        if self._dataset.exhaustion in ("repeat", "stop_all"):
            return float("inf")
        return self._dataset.sizes[task] - self._drawn[task]

    def _plan(self, shares: dict[str, float]) -> list[str]:
        """Returns the task of each row of the next batch; empty at the end."""
        data = self._dataset
        active = [task for task in data.tasks if data.weights[task] > 0.0]
        if data.exhaustion == "stop_all" and all(
            self._drawn[task] >= data.sizes[task] for task in active
        ):
            return []
        if data.batches == "mixed":
            return self._plan_mixed(active, shares)
        full = data.rows
        fewest = {task: full[task] if data.drop_remainder else 1 for task in active}
        if data.exhaustion == "once":
            active = [task for task in active if self._left(task) >= fewest[task]]
        if data.batches == "single_task" and active:
            active = [self._pick(active, shares, 0)]
        if any(self._left(task) < fewest[task] for task in active):
            return []
        return [
            task
            for task in active
            for _ in range(int(min(full[task], self._left(task))))
        ]

    def _plan_mixed(self, active: list[str], shares: dict[str, float]) -> list[str]:
        data = self._dataset
        rows = data.rows[data.tasks[0]]
        left = {task: self._left(task) for task in active}
        plan = []
        while len(plan) < rows:
            if data.exhaustion == "once":
                active = [task for task in active if left[task] > 0]
            if not active:
                break
            task = self._pick(active, shares, len(plan))
            if left[task] == 0:
                break
            left[task] -= 1
            plan.append(task)
        return [] if data.drop_remainder and len(plan) < rows else plan

    def _pick(self, active: list[str], shares: dict[str, float], planned: int) -> str:
        data = self._dataset
        if data.order == "scheduled":
            return scheduled_task(data.weights, shares, active)
        # The examples before it number the draws, so that nothing more has to be saved.
        draw = planned + sum(self._drawn.values()) + sum(self._absent.values())
        return random_task(data.weights, active, seed=data.seed_value, draw=draw)

    def _read(self, task: str, position: int) -> Any:
        row = self._dataset.datasets[task][position]
        if row is None:
            raise ValueError(
                f"`sources` must give an example at every position, task {task!r} gave "
                "None. Filter before making the source: grain's `filter` leaves holes."
            )
        return row


def _stack(name: str, rows: list[Any]) -> Any:
    def stack(path: Any, *leaves: Any) -> np.ndarray:
        # NumPy cuts texts of unequal lengths at trailing zeros; objects stay whole.
        if isinstance(leaves[0], bytes | str):
            return np.array(leaves, dtype=object)
        shapes = {np.shape(leaf) for leaf in leaves}
        if len(shapes) > 1:
            raise ValueError(
                f"`sources` must give equal shapes in a batch, {name} gave "
                f"{sorted(shapes)} for {jax.tree_util.keystr(path)}. Pad or crop them "
                "with `MapDataset.map`."
            )
        return np.stack(leaves)

    return jax.tree_util.tree_map_with_path(stack, *rows)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def _checked_length(task: str, source: Source | grain.MapDataset) -> int:
    length = len(source)
    if length < 1 or length >= sys.maxsize:
        raise ValueError(
            f"`sources` must be finite and not empty, got length {length} for task "
            f"{task!r}. The mixture repeats by itself: leave out `repeat`."
        )
    return length


def _batch_sizes(
    batch_size: int | Mapping[str, int], tasks: list[str], batches: Batches
) -> dict[str, int]:
    if isinstance(batch_size, Mapping):
        if batches == "mixed" or sorted(batch_size) != tasks:
            raise ValueError(
                "`batch_size` must be one number, or unless batches are mixed one for "
                f"each of {tasks}, got {dict(batch_size)} for {batches!r} batches."
            )
        rows = dict(batch_size)
    else:
        rows = dict.fromkeys(tasks, batch_size)
    if min(rows.values()) < 1:
        raise ValueError(f"`batch_size` must be at least one, got {batch_size}.")
    return rows


def _task_seed(seed: int, task: str) -> int:
    words = np.random.SeedSequence([seed, zlib.crc32(task.encode())])
    return int(words.generate_state(1)[0])


def _check_same_fields(examples: Mapping[str, Any]) -> None:
    """Checks that examples of all tasks can stand in one batch."""
    first, *others = examples
    for task in examples:
        if not isinstance(examples[task], dict) or "task" in examples[task]:
            raise ValueError(
                "`sources` of mixed batches must give dicts without the field 'task', "
                f"not so for task {task!r}. Rename the field with `MapDataset.map`."
            )
    expected = _fields(examples[first])
    for task in others:
        found = _fields(examples[task])
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise ValueError(
                    "`sources` of mixed batches must have the same fields: "
                    f"{key} is {expected.get(key, 'absent')} for task {first!r} and "
                    f"{found.get(key, 'absent')} for task {task!r}. Make them equal "
                    "with `MapDataset.map`, or use per-task or single-task batches."
                )


def _fields(example: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(example)
    return {
        jax.tree_util.keystr(path): "text"
        if isinstance(leaf, bytes | str)
        else f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}"
        for path, leaf in leaves
    }
