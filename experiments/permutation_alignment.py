"""Two trainings from different starts: is there a wall of loss between the two models?

Six networks are trained twice on digits, from different seeds. On the straight line
between the two models the loss is measured as they are, after aligning all groups of
units, and after aligning only those inside MLPs; the middle is what averaging gives.

Command:  python experiments/permutation_alignment.py paper
          (`quick` takes seconds; no data folder is needed)
Machine:  two CPU cores.    Minutes: 20 for all but the ViT, on a busy machine; that
          takes 4 on a GPU.
Expect:   1 to 2 % of the wall in test loss are left for the widest MLP and LeNet, a
          tenth to a quarter for the others, all of it for the ViT:
          docs/studies/permutation_alignment.md.
"""

import itertools
import json
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from rich.progress import track

import mtjax
from experiments.kept import kept
from mtjax import training
from mtjax.analysis.plots import method_colors
from mtjax.data import mnist_subset
from mtjax.merging.align import align
from mtjax.merging.permutation_groups import permutation_groups
from mtjax.nn import MLP, LeNet, ViT
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder


class NormedBlocks(nn.Module):
    """Residual blocks of MLPs with LayerNorm: a transformer without attention."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, images):
        """Pixels to features, three blocks."""
        x = nn.Dense(self.width, name="stem")(flat(images))
        for i in range(3):
            h = nn.relu(nn.Dense(self.hidden, name=f"mlp_in_{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width, name=f"mlp_out_{i}")(h)
        return nn.LayerNorm()(x)


def flat(images):
    """Pixels side by side."""
    return images.reshape(len(images), -1)


NETWORKS = {
    **{f"MLP, width {w}": nn.Sequential([flat, MLP((w,) * 3)]) for w in (32, 128, 512)},
    "LeNet": LeNet((32, 64), 128),
    "residual MLP": NormedBlocks(128, 512),
    "ViT": ViT(),
}
WAYS = ("as trained", "MLP units aligned", "all aligned")
INSIDE = "mlp_in.*/bias"  # one parameter of every group of MLP units in blocks


@dataclass(frozen=True)
class Config:
    """What is trained, and where the line is measured."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    seeds: int = 3  # pairs of models
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3  # of Adam, falls as a cosine
    points: int = 25  # on the line, an odd number: both ends and the middle
    images: int = 2_500  # of the training and of the test part, for measuring
    save_every: int | None = None  # steps between checkpoints


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(("MLP, width 32", "residual MLP"), 1, 4, 16, 1e-3, 3, 50, 2)


def main(config: Config, out: Path) -> list[dict[str, Any]]:
    """Trains and aligns all pairs; writes a table, its numbers and a figure."""
    open_run_folder(out, config)
    data = {split: load(split) for split in ("train", "test")}
    rows = []
    runs = itertools.product(config.networks, range(config.seeds))
    for network, seed in track([*runs], "pairs"):
        folder = out / network.replace(", ", "_").replace(" ", "_") / str(seed)
        aligned = partial(pair, NETWORKS[network], data, config, seed, folder)
        found = kept(folder / "results.json", aligned)
        rows.append({"network": network, "seed": seed, **found})
    write_atomically(out / "results.json", json.dumps(rows, indent=1))
    write_atomically(out / "table.md", table(rows))
    plot(rows).savefig(out / "permutation_alignment.png", dpi=110)
    return rows


def load(split: str) -> dict[str, np.ndarray]:
    """Digits with values in [0, 1]."""
    digits = mnist_subset(split)
    images = digits["image"][..., None].astype(np.float32) / 255
    return {"image": images, "label": digits["label"].astype(np.int32)}


def loss_and_accuracy(model, params, batch):
    """Mean cross-entropy and share of right classes."""
    logits = model.apply({"params": params}, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), jnp.mean(logits.argmax(-1) == batch["label"])


def pair(encoder, data, config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Two models of a network, and the line between them in all ways."""
    model = nn.Sequential([encoder, nn.Dense(10)])
    first, second = (
        train(model, data["train"], config, 2 * seed + i, folder / f"model_{i}")
        for i in (0, 1)
    )
    apply = lambda params, images: model.apply({"params": params}, images)
    groups = permutation_groups(apply, first, data["test"]["image"][:1])
    inside = groups.having(INSIDE)
    some = {way: g for way, g in zip(WAYS[1:], (inside, groups)) if len(g)}
    aligned = lambda g: align(first, second, g, key=jax.random.key(seed)).params
    ends = {"as trained": second} | {way: aligned(g) for way, g in some.items()}
    few = {s: jax.tree.map(lambda x: x[: config.images], data[s]) for s in data}
    measure = jax.jit(partial(loss_and_accuracy, model))

    def line(end):
        between = lambda t: jax.tree.map(lambda a, b: (1 - t) * a + t * b, first, end)
        path = [between(t) for t in np.linspace(0, 1, config.points)]
        values = {s: np.array([measure(p, few[s]) for p in path]) for s in few}
        return {
            "cosine": cosine(first, end),
            "loss": {split: x[:, 0].tolist() for split, x in values.items()},
            "accuracy": {split: x[:, 1].tolist() for split, x in values.items()},
        }

    lines = {way: line(end) for way, end in ends.items()}
    return {"groups": [group.size for group in groups], "lines": lines}


def train(model, digits, config: Config, seed: int, folder: Path):
    """One model; everything random depends on the seed."""
    data = jax.device_put(digits)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    tx = optax.chain(mtjax.equal(), optax.adam(schedule))

    def losses(params, data, *, key):
        rows = jax.random.randint(key, (config.batch_size,), 0, len(data["label"]))
        batch = jax.tree.map(lambda x: x[rows], data)
        return {"digit": loss_and_accuracy(model, params, batch)[0]}

    step = training.make_train_step(losses, tx, with_key=True)
    init_key, key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, data["image"][:1])["params"]
    logger = training.JsonlLogger(folder / "metrics.jsonl")
    with training.Checkpoints(folder, config=config) as saved, closing(logger):
        state, _ = training.fit(
            training.TrainState.create(params, tx, key=key),
            step,
            itertools.repeat(data),
            num_steps=config.steps,
            checkpoints=saved,
            save_every=config.save_every,
            logger=logger,
        )
    return state.params


def cosine(first, second) -> float:
    """Between all parameters of two models."""
    a, b = (ravel_pytree(params)[0] for params in (first, second))
    return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def barrier(losses) -> float:
    """How far the loss rises above the straight line between its ends."""
    chord = np.linspace(losses[0], losses[-1], len(losses))
    return float(np.max(losses - chord))


def table(rows) -> str:
    """Means over pairs, in Markdown."""
    runs: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        for way, line in row["lines"].items():
            accuracy = 100 * np.array(line["accuracy"]["test"])
            cells = {
                "barrier, test": barrier(line["loss"]["test"]),
                "barrier, training": barrier(line["loss"]["train"]),
                "test accuracy of both, %": accuracy[[0, -1]].mean(),
                "of the average, %": accuracy[len(accuracy) // 2],
                "cosine": line["cosine"],
            }
            runs.setdefault(f"{row['network']}: {way}", []).append(cells)
    return training.seed_table(runs) + "\n"


def plot(rows) -> Figure:
    """Test loss along the line: all pairs."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    columns = -(-len(networks) // 2)
    figure = Figure(figsize=(3.4 * columns + 1, 5.6), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).ravel()
    colors = method_colors(WAYS)
    for ax, network in zip(axes, networks):
        for row in (row for row in rows if row["network"] == network):
            for way, line in row["lines"].items():
                losses = line["loss"]["test"]
                ax.plot(np.linspace(0, 1, len(losses)), losses, color=colors[way])
        ax.set(title=network, xlabel="share of the second model", ylabel="test loss")
    for ax in axes[len(networks) :]:
        ax.remove()
    handles = {way: axes[0].plot([], [], color=colors[way])[0] for way in WAYS}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return figure


def quick(config: Options = QUICK, out: Path = Path("runs/alignment_quick")) -> None:
    """Seconds: two networks, a few steps."""
    main(config, out)


def paper(
    config: Options = Config(), out: Path = Path("runs/permutation_alignment")
) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
