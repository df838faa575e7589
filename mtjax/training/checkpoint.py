"""Checkpoints of whole runs with orbax: atomic, verified, resumable anywhere.

The only module that imports orbax (its v1 interface).

A run folder holds ``config.json`` and ``checkpoints/<step>/``. Orbax writes the arrays
into a temporary folder and renames it; then one file, ``commit.json``, is added to it
with the size and SHA-256 of every other file, the data-iterator states and the metrics.
A folder without that file was never finished; one whose files do not match it is
damaged. Neither is ever handed to orbax.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mtjax.training.commit import (
    COMMIT,
    decode_data_state,
    encode_data_state,
    find_problem,
    read_commit,
    write_atomically,
    write_commit,
)
from mtjax.training.logging import flatten_metrics
from mtjax.training.run_config import (
    check_same_config,
    config_to_json,
    differences,
)
from mtjax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: the run folder; made if missing. With several processes it must be on a
        file system that all of them see.
      config: dataclass or mapping that decides the result of the run, written to
        ``config.json`` and compared with it when the folder is opened again; ``None``
        neither writes nor compares.
      keep: number of newest checkpoints to keep, at least 1. Two or more leave
        something to fall back on when the newest one is damaged.
      keep_best: ``(metric, mode)``: also keep the checkpoint with the best value of
        this metric, among those saved with it; nested metric names are joined with
        slashes, ``mode`` is ``"min"`` or ``"max"``.

    Raises:
      ConfigMismatchError: if the folder holds another configuration; the message lists
        the fields.
      ValueError: if the folder has contents that no run wrote, or ``keep`` or
        ``keep_best`` is out of range.

    Example:
      >>> import tempfile, optax
      >>> import jax.numpy as jnp
      >>> params, tx = {"w": jnp.ones(2)}, optax.sgd(0.1)
      >>> state = TrainState.create(params, tx, key=jax.random.key(0))
      >>> with Checkpoints(tempfile.mkdtemp(), config={"lr": 0.1}) as checkpoints:
      ...     checkpoints.save(state, data_state={"next_index": 32})
      ...     restored, data_state = checkpoints.restore(state)
      >>> data_state
      {'next_index': 32}
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        config: Any = None,
        keep: int = 3,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
    ):
        """Opens the run folder or makes it."""
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}.")
        if keep_best is not None and keep_best[1] not in ("min", "max"):
            raise ValueError(
                f"`keep_best` must end with 'min' or 'max', got {keep_best[1]!r}."
            )
        self._keep, self.keep_best = keep, keep_best
        self._directory = Path(directory).resolve()
        self._folder = self._directory / "checkpoints"
        self._damaged: set[int] = set()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._open(config)

    def _open(self, config: Any) -> None:
        config_path = self._directory / "config.json"
        if self._directory.exists() and not self._folder.exists():
            foreign = sorted(
                path.name
                for path in self._directory.iterdir()
                if path.name != "metrics.jsonl"
                and not path.name.startswith("events.out.tfevents")
            )
            if foreign:
                raise ValueError(
                    "`directory` must be new, empty or the folder of an earlier run, "
                    f"got {self._directory}, which holds {foreign[:5]}; choose "
                    "another folder."
                )
        text = None if config is None else config_to_json(config)
        # All processes look at the folder before the first of them changes it.
        _barrier("checkpoints_open")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        _barrier("checkpoints_folder")
        if text is not None:
            if config_path.exists():
                check_same_config(config_path, config)
            elif self._steps():
                raise ValueError(
                    f"`directory` {self._directory} has checkpoints but no "
                    "config.json to compare `config` with; pass `config=None` or "
                    "choose another folder."
                )
            _barrier("checkpoints_config")
            if jax.process_index() == 0 and not config_path.exists():
                write_atomically(config_path, text)
        _barrier("checkpoints_opened")

    @property
    def directory(self) -> Path:
        """The run folder."""
        return self._directory

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, not known to be damaged."""
        return max(self._steps(), default=None)

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by ``keep_best``, the first one among equals."""
        if self.keep_best is None:
            return None
        metric, mode = self.keep_best
        sign = 1.0 if mode == "min" else -1.0
        values = {}
        for step in sorted(self._steps()):
            try:
                metrics = read_commit(self._path(step))["metrics"]
            except ValueError:
                continue
            value = metrics.get(metric, np.nan)
            if not np.isnan(value):
                values[step] = sign * value
        return min(values, key=lambda step: values[step], default=None)

    def save(
        self,
        state: TrainState,
        data_state: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint of ``state.step``, mostly in the background.

        Returns as soon as the arrays are copied to the host, so that the state may be
        donated right away; an earlier save is waited for first. All processes must call
        it. An error of the background part is raised by the next `save`, `wait` or
        `close`.

        Args:
          state: the state to save.
          data_state: what the data iterator needs to go on, such as the result of
            grain's ``get_state``: bytes, or anything JSON can hold. One per process.
          metrics: nested scalars to keep with it; what ``keep_best`` looks at.

        Raises:
          ValueError: if a checkpoint of this or a later step exists that `restore` did
            not find damaged, so that saving would mix two runs.
        """
        self.wait()
        step = int(state.step)
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise ValueError(
                f"`state` must be newer than the newest checkpoint, got step {step} "
                f"after step {latest} in {self._directory}; restore first, or choose "
                "another folder."
            )
        if jax.process_index() == 0:
            # What is left is damaged or was never finished.
            for path in self._folder.iterdir():
                if not path.name.isdigit() or int(path.name) not in self._steps():
                    shutil.rmtree(path, ignore_errors=True)
        self._damaged.clear()
        record = {
            "step": step,
            "leaves": _describe(state),
            "metrics": flatten_metrics(metrics or {}),
            "data_states": _gather_json(encode_data_state(data_state)),
        }
        _barrier("checkpoints_save")
        response = ocp.save_checkpointables_async(
            str(self._path(step)), {"state": state}
        )
        self._pending = self._thread.submit(self._commit, response.result, step, record)

    def _commit(
        self, finish: Callable[[], None], step: int, record: dict[str, Any]
    ) -> None:
        finish()
        if jax.process_index() != 0:
            return
        path = self._path(step)
        write_commit(path, record)
        kept = set(sorted(self._steps())[-self._keep :]) | {self.best}
        for old in self._steps() - kept:
            # Without its commit file a half-deleted checkpoint is an unfinished one.
            (self._path(old) / COMMIT).unlink()
            shutil.rmtree(self._path(old))

    def restore(
        self, template: TrainState, *, step: int | None = None
    ) -> tuple[TrainState, Any] | None:
        """Loads a checkpoint, the newest undamaged one by default.

        Checkpoints that are damaged or were never finished are passed over with a
        warning. All processes must call it.

        Args:
          template: a state of the same structure, shapes and dtypes, such as a freshly
            created one, or a `TrainState` of ``jax.ShapeDtypeStruct`` with shardings.
            Each array is put on the devices of its template, whatever devices it was
            saved from.
          step: load exactly this checkpoint, for instance ``best``.

        Returns:
          The state and the data state of this process (``None`` if none was saved), or
          ``None`` if there is no checkpoint to load.

        Raises:
          ValueError: if ``template`` does not fit the checkpoint (the message names the
            leaves), if ``step`` is given but cannot be loaded, or if data states were
            saved by another number of processes.
        """
        self.wait()
        chosen = _same_on_all(self._choose(step) if jax.process_index() == 0 else None)
        if step is None:
            newest = -1 if chosen is None else chosen
            self._damaged = {s for s in self._committed() if s > newest}
        if chosen is None:
            return None
        path = self._path(chosen)
        record = read_commit(path)
        _check_leaves(record["leaves"], _describe(template), path)
        data_states = record["data_states"]
        if len(data_states) != jax.process_count() and set(data_states) != {"null"}:
            raise ValueError(
                f"`template` is restored by {jax.process_count()} processes, but the "
                f"data-iterator states in {path} belong to {len(data_states)}; "
                "restart with that number of processes."
            )
        loaded = ocp.load_checkpointables(
            str(path), {"state": jax.tree.map(_abstract, template)}
        )
        mine = data_states[jax.process_index() % len(data_states)]
        return loaded["state"], decode_data_state(mine)

    def _choose(self, step: int | None) -> int | None:
        if step is not None:
            problem = find_problem(self._path(step))
            if problem is not None:
                raise ValueError(
                    f"`step` must be a finished checkpoint, got {step}: {problem}; "
                    f"there are {sorted(self._steps())}."
                )
            return step
        names = [p.name for p in self._folder.iterdir() if p.name.isdigit()]
        for candidate in sorted(map(int, names), reverse=True):
            problem = find_problem(self._path(candidate))
            if problem is None:
                return candidate
            warnings.warn(
                f"Skipping checkpoint {self._path(candidate)}: {problem}.",
                UserWarning,
                stacklevel=3,
            )
        return None

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk; raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        _barrier("checkpoints_wait")

    def close(self) -> None:
        """Waits like `wait` and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    def _committed(self) -> set[int]:
        return {
            int(path.name)
            for path in self._folder.iterdir()
            if path.name.isdigit() and (path / COMMIT).exists()
        }

    def _steps(self) -> set[int]:
        return self._committed() - self._damaged


def _abstract(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _check_leaves(saved: dict[str, str], given: dict[str, str], path: Path) -> None:
    lines = differences(saved, given)
    if lines:
        raise ValueError(
            f"`template` must fit the checkpoint {path}; these leaves differ:\n"
            + "\n".join(lines[:20])
            + "\nBuild the model and the optimizer as in the saved run."
        )


def _gather_json(text: str) -> list[str]:
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(raw.size)).reshape(-1)
    padded = np.pad(raw, (0, int(sizes.max()) - raw.size))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]


def _same_on_all(step: int | None) -> int | None:
    if jax.process_count() == 1:
        return step
    value = multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step))
    return None if int(value) < 0 else int(value)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
