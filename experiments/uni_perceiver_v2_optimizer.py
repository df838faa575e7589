"""One task per step: does MT-AdamW make it as good as all tasks in every step?

An encoder is shared by classes of clothes, clean digits from noisy ones, and two views
of a character (contrastive: harder among more). Mixed batches with AdamW, one task per
step with AdamW and MT-AdamW; as many images per task.

Command:  mtjax data prepare NAME --from FOLDER --data-dir DATA  (for each of SOURCES)
          python experiments/uni_perceiver_v2_optimizer.py full --data-dir DATA
Machine:  two CPU cores.    Minutes: 10, beside other work.
Expect:   docs/studies/uni_perceiver_v2_optimizer.md: Δp +5 % (MT-AdamW), +2 % (AdamW).
"""

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
from rich.progress import track

import mtjax
from mtjax import training
from mtjax.analysis.plots import plot_curves
from mtjax.data import array_source, load_images, mixture
from mtjax.training.run_config import open_run_folder

TASKS = ("clothes", "digits", "match")
SOURCES = dict(zip(TASKS, ("fashion_mnist/five_classes", "mnist", "kmnist")))
METRICS = {"clothes": "accuracy", "digits": "rmse", "match": "top1"}
BETTER: Any = {t: {m: "lower" if m == "rmse" else "higher"} for t, m in METRICS.items()}
# Whether all tasks are in every step, whether it is MT-AdamW, what the digits' loss is
# multiplied by, and whether tasks are drawn equally often.
METHODS = {
    "mixed AdamW": (True, False, 1.0, False),
    "unmixed AdamW": (False, False, 1.0, False),
    "unmixed MT-AdamW": (False, True, 1.0, False),
    "unmixed AdamW, digits loss 100-fold": (False, False, 100.0, False),
    "unmixed MT-AdamW, digits loss 100-fold": (False, True, 100.0, False),
    "unmixed AdamW, equal ratios": (False, False, 1.0, True),
    "unmixed MT-AdamW, equal ratios": (False, True, 1.0, True),
}


@dataclass(frozen=True)
class Config:
    """What is compared, and for how long."""

    methods: tuple[str, ...] = tuple(METHODS)
    data_dir: Path | None = None  # folder of prepared data
    ratios: tuple[float, ...] = (0.6, 0.3, 0.1)  # of TASKS
    learning_rate: float = 1e-3  # of AdamW and MT-AdamW
    seeds: int = 3
    train_size: int = 3_500  # images per task
    test_size: int = 500
    steps: int = 500
    batch_size: int = 120  # divided by the ratios in mixed batches
    eval_every: int = 50  # steps between evaluations, each with a checkpoint


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(
    tuple(METHODS)[:3], seeds=1, train_size=200, test_size=50, steps=8, eval_every=2
)


def view(images, key):
    """Every image moved by up to three pixels, with a square cut out and noise."""
    moves, corners, noise = jax.random.split(key, 3)
    moves = jax.random.randint(moves, (len(images), 2), -3, 4)
    images = jax.vmap(lambda x, m: jnp.roll(x, m, (0, 1)))(images, moves)
    corners = jax.random.randint(corners, (len(images), 2, 1), 0, 20)
    away = jnp.arange(28)[None, None] - corners
    inside = (away >= 0) & (away < 8)
    images = jnp.where(inside[:, 0, :, None] & inside[:, 1, None], 0.0, images)
    return images + 0.2 * jax.random.normal(noise, images.shape)


class Model(nn.Module):
    """A shared encoder and a head per task."""

    @nn.compact
    def __call__(self, images):
        """The outputs of all heads; what a loss does not use is not computed."""
        h = images.reshape(len(images), -1)
        for i, width in enumerate((256, 128)):
            h = nn.gelu(nn.Dense(width, name=f"encoder_{i}")(h))
        sizes = {"clothes": 5, "digits": 28 * 28, "match": 64}
        outputs = {t: nn.Dense(size, name=t)(h) for t, size in sizes.items()}
        temperature = self.param("match_temperature", lambda key: jnp.log(0.2))
        z = outputs["match"] / jnp.linalg.norm(outputs["match"], axis=1, keepdims=True)
        return {**outputs, "match": z * jnp.exp(-0.5 * temperature)}


def outputs_of(params, task, rows, key):
    """What the losses and the metrics of a task look at."""
    images = rows["image"]
    if task == "match":  # cosines between two views, divided by the temperature
        views = [view(images, k) for k in jax.random.split(key)]
        one, two = (Model().apply(params, v)["match"] for v in views)
        return one @ two.T
    if task == "digits":
        images = images + 0.5 * jax.random.normal(key, images.shape)
    return Model().apply(params, images)[task]


def loss_of(task, outputs, rows):
    """Cross entropy, squared error, or contrastive loss in both directions."""
    if task == "digits":
        return jnp.mean((outputs - rows["image"].reshape(outputs.shape)) ** 2)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    if task == "clothes":
        return entropy(outputs, rows["label"]).mean()
    own = jnp.arange(len(outputs))
    return (entropy(outputs, own) + entropy(outputs.T, own)).mean() / 2


@jax.jit
def measure(params, data):
    """Metrics and losses on held-out images, always with the same noise."""
    found = {t: outputs_of(params, t, data[t], jax.random.key(0)) for t in TASKS}
    hits = lambda t, wanted: jnp.mean(jnp.argmax(found[t], -1) == wanted)
    losses = {t: loss_of(t, found[t], data[t]) for t in TASKS}
    return {
        "clothes/accuracy": hits("clothes", data["clothes"]["label"]),
        "digits/rmse": jnp.sqrt(losses["digits"]),
        "match/top1": hits("match", jnp.arange(len(found["match"]))),
        "loss": losses,
    }


class Trainer:
    """One method, compiled once for all seeds."""

    def __init__(self, name: str, data, config: Config):
        """Builds optimizer and step."""
        self.mixed, mt_adamw, digits_scale, equal = METHODS[name]
        self.data, self.config = data, config
        self.ratios = dict(zip(TASKS, (1 / 3,) * 3 if equal else config.ratios))
        self.params = lambda key: Model().init(key, jnp.zeros((1, 28, 28)))

        def loss(params, rows, *, key, task):
            found = loss_of(task, outputs_of(params, task, rows, key), rows)
            return found * (digits_scale if task == "digits" else 1.0)

        losses = {t: partial(loss, task=t) for t in TASKS}
        together = lambda p, x, *, key: {t: losses[t](p, x[t], key=key) for t in TASKS}
        rate, decay = config.learning_rate, {"weight_decay": 1e-2}
        self.tx = optax.adamw(rate, **decay)
        if mt_adamw:
            few, key = jax.tree.map(lambda x: x[:2], data["test"]), jax.random.key(0)
            split = mtjax.parameter_split(together, self.params(key), few, key=key)
            self.tx = mtjax.mt_adamw(rate, self.ratios, split=split, **decay)
        if self.mixed:
            self.tx = optax.chain(mtjax.constant(self.ratios), self.tx)
            self.step = training.make_train_step(together, self.tx, with_key=True)
        else:
            self.step = training.make_unmixed_step(losses, self.tx, with_key=True)

    def batches(self, seed: int):
        """Batches of one task or of all, in the same ratios."""
        size, order = self.config.batch_size, {"seed": seed, "order": "random"}
        sources = {t: array_source(x) for t, x in self.data["train"].items()}
        if not self.mixed:
            return mixture(sources, batch_size=size, weights=self.ratios, **order)
        sizes = {t: round(size * self.ratios[t]) for t in TASKS}
        return mixture(sources, batch_size=sizes, batches="per_task", **order)

    def train(self, seed: int, folder: Path) -> list[dict[str, float]]:
        """Trains with one seed, or goes on; returns one row per evaluation."""
        config = self.config
        names = ("eval_every", "save_every", "log_every")
        every = dict.fromkeys(names, config.eval_every)
        init_key, key = jax.random.split(jax.random.key(seed))
        with (
            training.Checkpoints(folder, config=config, keep=1) as checkpoints,
            closing(training.JsonlLogger(folder / "metrics.jsonl")) as logger,
        ):
            return training.fit(
                training.TrainState.create(self.params(init_key), self.tx, key=key),
                self.step,
                self.batches(seed),
                num_steps=config.steps,
                evaluate=lambda state: measure(state.params, self.data["test"]),
                checkpoints=checkpoints,
                logger=logger,
                progress=False,
                **every,
            )[1]


def load(config: Config) -> dict[str, Any]:
    """Images in [0, 1] and their labels, by part and task."""

    def part(part, size, task):
        found = load_images(SOURCES[task], part, data_dir=config.data_dir)
        images = (found["image"][:size] / 255).astype(np.float32)
        return {"image": images, "label": found["label"][:size].astype(np.int32)}

    sizes = {"train": config.train_size, "test": config.test_size}
    return {p: {t: part(p, n, t) for t in TASKS} for p, n in sizes.items()}


def summary(results: dict[str, list]) -> dict[str, list[dict[str, float]]]:
    """Last metrics of every run, change against the first method, and unrest."""
    nested = lambda row: {t: {m: row[f"{t}/{m}"]} for t, m in METRICS.items()}
    first = [run[-1] for run in next(iter(results.values()))]
    base = nested({key: np.mean([row[key] for row in first]) for key in first[0]})

    def columns(run):
        late = run[min(len(run) // 2, len(run) - 2) :]
        late = [[row[f"loss/{t}"] for t in TASKS] for row in late]
        unrest = np.abs(np.diff(np.log(late), axis=0)).mean()
        change = training.delta_m(nested(run[-1]), base, BETTER, baseline_name="first")
        found = {f"{t}, {m}": run[-1][f"{t}/{m}"] for t, m in METRICS.items()}
        return found | {"Δp, %": change.value, "unrest, %": 100 * float(unrest)}

    return {name: [columns(run) for run in runs] for name, runs in results.items()}


def main(config: Config, out: Path) -> dict[str, list]:
    """Trains everything; writes the results, a table and a figure."""
    data = load(config)
    open_run_folder(out, config)
    results: dict[str, list] = {name: [] for name in config.methods}
    for name in track(config.methods, "training"):
        trainer = Trainer(name, data, config)
        for seed in range(config.seeds):
            folder = "_".join([*name.replace(",", "").split(), str(seed)])
            results[name].append(trainer.train(seed, out / "runs" / folder))
    (out / "results.json").write_text(json.dumps(results))
    (out / "table.md").write_text(training.seed_table(summary(results)), "utf-8")
    keys = {f"{t}/{m}": m for t, m in METRICS.items()}
    of = lambda n, key: np.array([[row[key] for row in run] for run in results[n]])
    curves = {key: {n: of(n, key) for n in config.methods[:3]} for key in keys}
    figure = plot_curves(of(config.methods[0], "step")[0], curves, ylabels=keys)
    figure.savefig(out / "uni_perceiver_v2_optimizer.png", dpi=110)
    return results


def quick(config: Options = QUICK, out: Path = Path("runs/mt_adamw_quick")) -> None:
    """Seconds: a few steps."""
    main(config, out)


def full(config: Options = Config(), out: Path = Path("runs/mt_adamw")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
