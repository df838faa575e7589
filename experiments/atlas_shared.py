"""What the three experiments of aTLAS share: labelled batches, views, other tuning."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from scipy.ndimage import map_coordinates

from mtjax.losses.sharpness_aware import sharpness_aware
from mtjax.merging import repeat_step
from mtjax.merging.match import named_leaves, nested


def labelled(
    parts: Mapping[str, Mapping[str, np.ndarray]], size: int, seed: int
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Labelled batches without end, drawn with replacement.

    Args:
      parts: `images` and `labels` by task.
      size: of a batch, shared by all tasks.
      seed: of the draw.

    Yields:
      `inputs` and `labels` by task.
    """
    each = size // len(parts)
    if each < 1:
        raise ValueError(
            f"`size` must be at least the number of tasks, {len(parts)}, got {size}."
        )
    rng = np.random.default_rng(seed)
    while True:
        batch = {}
        for task, part in parts.items():
            rows = rng.integers(len(part["labels"]), size=each)
            batch[task] = {
                "inputs": part["images"][rows],
                "labels": part["labels"][rows],
            }
        yield batch


def views(
    images: np.ndarray, rng: np.random.Generator, *, strength: float = 1.0
) -> np.ndarray:
    """Images moved, turned, resized and partly erased at random; none is mirrored.

    Args:
      images: `(n, height, width)` in 0..255.
      rng: of the draw.
      strength: 1 for strong views, up to 20 degrees, 20 % and 3 pixels with a patch of
        8 pixels erased; 0.3 for weak ones, of which nothing is erased.

    Returns:
      float32 of the same shape.
    """
    number, height, width = images.shape
    draw = lambda most: rng.uniform(-most, most, number) * strength
    turn, size = np.deg2rad(draw(20)), 1 + draw(0.2)
    center = np.array([height - 1, width - 1]) / 2
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    y, x = y - center[0], x - center[1]
    of = lambda values: values[:, None, None]
    rows = of(size * np.cos(turn)) * y - of(size * np.sin(turn)) * x + of(draw(3))
    columns = of(size * np.sin(turn)) * y + of(size * np.cos(turn)) * x + of(draw(3))
    planes = np.broadcast_to(of(np.arange(number)), rows.shape)
    places = [planes, rows + center[0], columns + center[1]]
    moved = map_coordinates(images.astype(np.float32), places, order=1)
    if strength >= 1:
        side = 8
        tops, lefts = rng.integers(0, [[height - side], [width - side]], (2, number))
        inside = lambda place, start: (place >= of(start)) & (place < of(start) + side)
        grid = np.arange(height)[None, :, None], np.arange(width)[None, None]
        moved[inside(grid[0], tops) & inside(grid[1], lefts)] = 0
    return moved


def tune(
    objective: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    where: str,
    steps: int,
    learning_rate: float,
    rho: float = 0.0,
) -> Any:
    """Ordinary fine-tuning of some parameters, with AdamW and a cosine.

    Args:
      objective: of parameters and a batch.
      params: dictionaries in dictionaries.
      batches: one per step.
      where: a regular expression that chooses parameters by their path.
      steps: how many.
      learning_rate: at the start.
      rho: radius of sharpness-aware minimisation.

    Returns:
      The parameters.
    """
    flat = named_leaves(params)
    chosen = {path: x for path, x in flat.items() if re.search(where, path)}
    rest = {path: x for path, x in flat.items() if path not in chosen}
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    def loss_fn(now, frozen, batch):
        loss = objective(nested(frozen | now), batch)
        return loss, loss

    worst = sharpness_aware(loss_fn, rho) if rho else loss_fn

    def step(state, frozen, batch):
        now, opt_state = state
        slopes, loss = jax.grad(worst, has_aux=True)(now, frozen, batch)
        updates, opt_state = tx.update(slopes, opt_state, now)
        return (optax.apply_updates(now, updates), opt_state), loss

    (found, _), _ = repeat_step(
        step, (chosen, tx.init(chosen)), rest, batches, steps=steps
    )
    return nested(rest | found)
