"""Loggers for scalars: JSON lines, TensorBoard event files, Weights & Biases."""

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter


@runtime_checkable
class Logger(Protocol):
    """What `fit` asks of a logger."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes nested scalars that belong to one step."""
        ...

    def rewind(self, step: int) -> None:
        """Forgets what was logged after ``step``; called when a run resumes there."""
        ...

    def close(self) -> None:
        """Writes what is buffered and releases the files."""
        ...


def flatten_metrics(
    metrics: Mapping[str, Any], prefix: str = ""
) -> dict[str, float | int]:
    """Joins the keys of nested scalars with slashes.

    Args:
      metrics: nested mapping whose leaves are numbers or arrays of shape ``()``.
      prefix: put before every key.

    Returns:
      A flat dictionary of Python numbers, in the order of the mapping; booleans and
      integers stay what they are.

    Raises:
      ValueError: if a leaf is not a scalar.

    Example:
      >>> flatten_metrics({"losses": {"a": 1.0, "b": 2.0}, "skipped": 0})
      {'losses/a': 1.0, 'losses/b': 2.0, 'skipped': 0}
    """
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten_metrics(value, f"{prefix}{name}/"))
            continue
        item = value.item() if getattr(value, "size", None) == 1 else value
        if not isinstance(item, (bool, int, float)):
            raise ValueError(
                f"`metrics` must hold scalars, got {type(value).__name__} of shape "
                f"{getattr(value, 'shape', None)} under {prefix + name!r}; reduce it "
                "to a number first."
            )
        flat[prefix + name] = item
    return flat


class JsonlLogger:
    """Appends one JSON object per step to a file.

    Each line holds ``"step"`` and the flattened metrics, and is handed to the operating
    system at once, so that a killed process loses no line. JSON has no number for the
    non-finite values: they are written as the strings ``"nan"``, ``"inf"`` and
    ``"-inf"``, which Python's ``float`` reads back.

    Args:
      path: the file; missing folders are made. Lines of an earlier run are kept until
        `rewind`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> logger = JsonlLogger(path)
      >>> logger.log(1, {"losses": {"a": 0.5, "b": float("inf")}})
      >>> logger.close()
      >>> print(path.read_text().strip())
      {"step": 1, "losses/a": 0.5, "losses/b": "inf"}
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file for appending."""
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line; see `flatten_metrics` for the keys."""
        row = {
            name: value if math.isfinite(value) else str(float(value))
            for name, value in flatten_metrics(metrics).items()
        }
        line = json.dumps({"step": step, **row}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drops the lines after ``step``, and a last line that was cut off.

        The shorter file replaces the old one in one move. A resumed run therefore ends
        with the same file as a run that was never interrupted.
        """
        self._file.close()
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if line.endswith("\n") and row["step"] <= step:
                kept.append(line)
        draft = self._path.with_name(self._path.name + ".tmp")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes TensorBoard event files through tensorboardX, without TensorFlow.

    Args:
      directory: folder of the event files. Every start adds a file to it; after
        `rewind` TensorBoard hides what older files hold beyond that step.

    Example:
      >>> import tempfile
      >>> logger = TensorBoardLogger(tempfile.mkdtemp())
      >>> logger.log(1, {"losses": {"a": 0.5}})
      >>> logger.close()
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Notes the folder; the file is made with the first value."""
        self._directory = os.fspath(directory)
        self._num_files = 0
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one scalar per flattened name."""
        # Opened late, because the step to purge from is fixed when a file is opened.
        if self._writer is None:
            # File names hold seconds, and a second file in one would replace the first.
            self._writer = SummaryWriter(
                self._directory,
                purge_step=self._purge_step,
                filename_suffix=f".{os.getpid()}.{self._num_files}",
            )
            self._num_files += 1
        for name, value in flatten_metrics(metrics).items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Starts a new event file that hides everything after ``step``."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Writes the buffered events and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbLogger:
    """Sends scalars to Weights & Biases.

    The run is resumed under the same ``id``. Weights & Biases ignores a step that is
    not after its last one, so that nothing has to be done to rewind: the repeated
    steps have the same values.

    Args:
      **init: arguments of ``wandb.init``, such as ``project``, ``id`` and ``config``.

    Raises:
      ImportError: if wandb is not installed.
    """

    def __init__(self, **init: Any):
        """Starts or resumes the run."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                "`WandbLogger` needs the package wandb; install it with "
                "`pip install 'mtjax[wandb]'`."
            ) from error
        self._run = wandb.init(**{"resume": "allow", **init})

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the flattened scalars."""
        self._run.log(flatten_metrics(metrics), step=step)

    def rewind(self, step: int) -> None:
        """Does nothing, see the class."""
        del step

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


class _Combined:
    """Passes every call on to several loggers."""

    def __init__(self, loggers: tuple[Logger, ...]):
        self._loggers = loggers

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        flat = flatten_metrics(metrics)
        for logger in self._loggers:
            logger.log(step, flat)

    def rewind(self, step: int) -> None:
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def combine_loggers(*loggers: Logger) -> Logger:
    """Makes one logger that writes to all of the given ones.

    Args:
      *loggers: any number of loggers; with none, everything is discarded.

    Returns:
      The combined logger.

    Example:
      >>> logger = combine_loggers()
      >>> logger.log(1, {"loss": 0.5})
      >>> logger.close()
    """
    return _Combined(loggers)
