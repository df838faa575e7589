"""The training loop: steps, logging, evaluation, early stop, checkpoints, resume."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mtjax.training.checkpoint import Checkpoints
from mtjax.training.logging import Logger, flatten_metrics
from mtjax.training.state import TrainState


@dataclass(frozen=True)
class EarlyStop:
    """Ends training when a metric has stopped improving.

    Attributes:
      metric: name in what ``evaluate`` returns, nested names joined with slashes.
      mode: ``"min"`` or ``"max"``.
      patience: number of evaluations in a row without improvement that end training,
        at least 1.
      min_delta: an improvement must be larger than this, at least 0, in the unit of the
        metric. ``nan`` is never an improvement.

    Example:
      >>> EarlyStop("loss", "min", patience=0)
      Traceback (most recent call last):
      ...
      ValueError: `patience` must be at least 1, got 0.
    """

    metric: str
    mode: Literal["min", "max"]
    patience: int = 5
    min_delta: float = 0.0

    def __post_init__(self):
        """Checks the ranges."""
        if self.mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max', got {self.mode!r}.")
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}.")
        if not self.min_delta >= 0.0:
            raise ValueError(f"`min_delta` must be at least 0, got {self.min_delta}.")

    def should_stop(self, history: list[dict[str, Any]]) -> bool:
        """Decides from all evaluations so far.

        Args:
          history: one flat mapping per evaluation, in order.

        Returns:
          Whether the last ``patience`` evaluations brought no improvement.

        Raises:
          ValueError: if ``metric`` is missing.
        """
        best, waited = math.inf, 0
        for row in history:
            if self.metric not in row:
                raise ValueError(
                    f"`metric` must be in what `evaluate` returns, got {self.metric!r} "
                    f"and {sorted(row)}."
                )
            value = row[self.metric] if self.mode == "min" else -row[self.metric]
            improved = value < best - self.min_delta
            best, waited = (value, 0) if improved else (best, waited + 1)
        return waited >= self.patience


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batches: Iterable[Any],
    *,
    num_steps: int,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    logger: Logger | None = None,
    log_every: int = 50,
    early_stop: EarlyStop | None = None,
    progress: bool = True,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains until ``num_steps`` steps have been taken.

    If ``checkpoints`` holds a checkpoint, the run goes on from the newest undamaged
    one, and ends with the same numbers as if it had never stopped: state, data
    iterator, evaluations and early stop are restored, and the logger forgets what came
    later. A run that was finished, or stopped early, returns at once.

    The device is never waited for longer than one step behind, and metrics are fetched
    only when they are logged, except for the count of skipped steps: when
    `make_train_step` skips one, a warning names the tasks whose losses are not finite,
    once per task.

    Args:
      state: the initial state; donated if the step donates.
      step_fn: what `make_train_step` returns, or a function around it that prepares the
        batch: ``lambda state, batch: step(state, shard_batch(batch, mesh))``.
      batches: batches in their order. If its iterator has ``get_state`` and
        ``set_state`` (grain) it is saved with the checkpoints and set back; any other
        iterable starts anew on resume and the batches already used are skipped, which
        is exact if it is deterministic.
      num_steps: total number of steps, those before a resume included.
      evaluate: ``evaluate(state) -> nested scalars``; the same on all processes.
      eval_every: steps between evaluations; there is always one after the last step.
      checkpoints: where to save. A checkpoint is also saved after the last step, and
        after each evaluation if it keeps the best one.
      save_every: steps between checkpoints.
      logger: gets ``{"train": metrics, "eval": evaluation}``, those parts that the step
        has. Only process 0 logs. Metrics that are not scalars are left out.
      log_every: steps between logged training metrics, which are those of that step
        alone.
      early_stop: when to end before ``num_steps``; needs ``evaluate``.
      progress: show a progress bar, if the output is a terminal or a notebook.

    Returns:
      The last state and the history: one flat mapping per evaluation, with its
      ``"step"``.

    Raises:
      ValueError: if an interval is less than 1, something that another argument needs
        is missing, or ``batches`` ends before ``num_steps``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.sgd(0.1)
      >>> state = TrainState.create({"w": jnp.ones(())}, tx, key=jax.random.key(0))
      >>> def step(state, batch):
      ...     return dataclasses.replace(state, step=state.step + 1), {"loss": batch}
      >>> import dataclasses
      >>> state, history = fit(
      ...     state, step, [0.1, 0.2], num_steps=2, evaluate=lambda state: {"acc": 0.5}
      ... )
      >>> history
      [{'step': 2, 'acc': 0.5}]
    """
    for name, every in (
        ("eval_every", eval_every),
        ("save_every", save_every),
        ("log_every", log_every),
    ):
        if every is not None and every < 1:
            raise ValueError(f"`{name}` must be at least 1, got {every}.")
    if evaluate is None and (eval_every is not None or early_stop is not None):
        raise ValueError("`eval_every` and `early_stop` need `evaluate`, got none.")
    if checkpoints is None and save_every is not None:
        raise ValueError("`save_every` needs `checkpoints`, got none.")

    iterator = iter(batches)
    step, history = int(state.step), []
    restored = None if checkpoints is None else checkpoints.restore(state)
    if restored is not None:
        state, saved = restored
        history = saved["history"]
        _forward(iterator, saved["batches"], int(state.step) - step)
        step = int(state.step)
    if jax.process_index() != 0:
        logger = None
    if logger is not None and checkpoints is not None:
        logger.rewind(step)
    stopped = early_stop is not None and early_stop.should_stop(history)

    with _progress_bar(progress) as bar:
        task = bar.add_task("training", total=num_steps, completed=step, info="")
        previous, watch = {}, _skip_watch(int(np.sum(state.skipped)))
        while step < num_steps and not stopped:
            batch = next(iterator, _END)
            if batch is _END:
                raise ValueError(
                    f"`batches` must last for {num_steps} steps, but ended after step "
                    f"{step}; repeat the data or lower `num_steps`."
                )
            state, metrics = step_fn(state, batch)
            step += 1
            # One step in flight keeps the device busy; more would pile up batches.
            jax.block_until_ready(previous)
            watch(step - 1, previous)
            previous = metrics
            row: dict[str, Any] = {}
            if step % log_every == 0:
                row["train"] = _scalars(jax.device_get(metrics))
            last = step == num_steps
            if evaluate is not None and (_due(step, eval_every) or last):
                row["eval"] = evaluate(state)
                history.append({"step": step, **flatten_metrics(row["eval"])})
                stopped = early_stop is not None and early_stop.should_stop(history)
            if row and logger is not None:
                logger.log(step, row)
            if checkpoints is not None and (
                _due(step, save_every)
                or last
                or stopped
                or ("eval" in row and checkpoints.keep_best is not None)
            ):
                loop_state = {"batches": _iterator_state(iterator), "history": history}
                checkpoints.save(state, loop_state, metrics=row.get("eval"))
            bar.update(task, completed=step)
            if "train" in row:
                bar.update(task, info=_describe(row["train"]))
        watch(step, previous)
    if checkpoints is not None:
        checkpoints.wait()
    return state, history


_END = object()


def _skip_watch(skipped: int) -> Callable[[int, Mapping[str, Any]], None]:
    """Warns of skipped steps when the metrics of a step tell of one more."""
    named: set[str] = set()

    def watch(step, metrics):
        nonlocal skipped
        # Several runs at once have an axis of runs.
        count = int(np.sum(metrics.get("skipped", skipped)))
        if count <= skipped:
            return
        skipped = count
        losses = jax.device_get(metrics.get("losses", {}))
        wrong = {t: np.ravel(x)[~np.isfinite(np.ravel(x))] for t, x in losses.items()}
        causes = {t: float(x[0]) for t, x in wrong.items() if x.size}
        # Tasks with a finite loss and an infinite gradient go by no name.
        new = (causes.keys() or {""}) - named
        if not new:
            return
        named.update(new)
        found = ", ".join(f"the loss of {t!r} is {x}" for t, x in causes.items())
        warnings.warn(
            f"Step {step} was skipped: "
            f"{found or 'an update is not finite although all losses are'}. Its batch "
            "changed nothing; later ones with the same cause are only counted.",
            RuntimeWarning,
            stacklevel=3,
        )

    return watch


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _iterator_state(iterator: Iterator[Any]) -> Any:
    if hasattr(iterator, "get_state") and hasattr(iterator, "set_state"):
        return iterator.get_state()
    return None


def _forward(iterator: Any, saved: Any, used: int) -> None:
    if saved is not None:
        iterator.set_state(saved)
        return
    for _ in itertools.islice(iterator, used):
        pass


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            kept[name] = _scalars(value)
        elif getattr(value, "shape", None) == () or isinstance(value, int | float):
            kept[name] = value
    return kept


def _describe(metrics: Mapping[str, Any]) -> str:
    losses = metrics.get("losses", {})
    parts = [f"{task} {float(loss):.4g}" for task, loss in losses.items()]
    return "  ".join(parts[:4] + ["…"] * (len(parts) > 4))


def _progress_bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    visible = console.is_terminal or console.is_jupyter
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
        disable=not (wanted and visible and jax.process_index() == 0),
    )
