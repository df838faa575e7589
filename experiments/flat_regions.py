"""Task-based flat regions on overlaid images: do flatter minima generalise better?

Balancers alone ("erm") and inside `mtjax.task_sam`, which balances loss parts and flat
parts apart ("F") or whole sharpness-aware gradients ("direct"). Two tasks on a picture:
the class of the left and of the right image; few pictures, to have some overfitting.

Command:  mtjax data prepare fashion_mnist/five_classes --from FOLDER --data-dir DATA
          python experiments/flat_regions.py paper --data-dir DATA
          (`--data multi_mnist` needs no data folder; `quick` takes seconds)
Machine:  two CPU cores.    Minutes: 15 to 25.
Expect:   flatter, better calibrated, as accurate: see docs/studies/flat_regions.md.
"""

import functools
import itertools
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
import tyro
from rich.progress import track

import mtjax
from experiments.kept import kept
from mtjax import training
from mtjax.analysis import task_sharpness
from mtjax.analysis.plots import plot_groups
from mtjax.data import image_pairs, load_images, mnist_subset
from mtjax.nn import LeNet, SharedBottom
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder

Composite = Literal["multi_mnist", "multi_fashion", "fashion_and_mnist"]
TASKS = ("left", "right")
AGGREGATORS = {
    "equal": mtjax.equal,
    "mgda": mtjax.mgda,
    "pcgrad": mtjax.pcgrad,
    "cagrad": functools.partial(mtjax.cagrad, c=0.4),
    "imtl_g": mtjax.imtl_g,
}
VARIANTS = {"erm": "erm", "F": "decomposed", "direct": "direct"}
# What is measured: heading and factor. The first three are drawn.
COLUMNS = {
    "accuracy": ("test accuracy, %", 100.0),
    "sharpness": ("sharpness, nats", 1.0),
    "conflict_rate": ("conflicting batches, %", 100.0),
    "ece": ("calibration error, %", 100.0),
    "brier": ("Brier score", 1.0),
}


@dataclass(frozen=True)
class Config:
    """What is compared, and for how long."""

    data: tuple[Composite, ...] = get_args(Composite)
    data_dir: Path | None = None  # folder of prepared data, for clothes
    fashion: str = "fashion_mnist/five_classes"  # or all of it, "fashion_mnist"
    aggregators: tuple[str, ...] = tuple(AGGREGATORS)
    seeds: int = 3
    train_size: int = 2_000  # pictures
    test_size: int = 2_000  # pictures, of images that are in no training picture
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3  # of Adam
    rho: float = 0.3  # radius relative to the parameters, in training and measuring
    eval_every: int = 50  # steps between measurements of conflict
    save_every: int | None = None  # steps between checkpoints


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(("multi_mnist",), None, "", ("mgda",), 1, 64, 64, 4, 16, 2e-3, 0.3, 2, 2)


def main(config: Config, out: Path) -> list[dict[str, Any]]:
    """Trains all methods on all data; writes a table, its numbers and a figure."""
    pictures = {name: load(name, config) for name in config.data}
    open_run_folder(out, config)
    bench = Bench(config)
    methods = set(itertools.product(config.aggregators, VARIANTS))
    # The sum is linear: in parts or not is the same.
    methods = sorted(methods - {("equal", "direct")})
    rows = []
    for method in track(methods, "training"):
        train = bench.trainer(*method)
        for name, seed in itertools.product(config.data, range(config.seeds)):
            folder = out / name / "_".join([*method, str(seed)])
            trained = functools.partial(train, pictures[name], seed, folder / "run")
            found = kept(folder / "results.json", trained)
            labels = dict(zip(("data", "aggregator", "variant"), (name, *method)))
            rows.append({**labels, "seed": seed, **found})
    write_atomically(out / "results.json", json.dumps(rows, indent=1))
    write_atomically(out / "tables.md", "\n".join(table(rows, d) for d in config.data))
    panels = {
        text: {
            d: {a: dots(rows, c, d, a) for a in config.aggregators} for d in config.data
        }
        for c, (text, _) in list(COLUMNS.items())[:3]
    }
    plot_groups(panels).savefig(out / "flat_regions.png", dpi=120)
    return rows


def load(name: str, config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Training and test pictures of one composite."""
    clothes = functools.partial(load_images, config.fashion, data_dir=config.data_dir)
    sources = {
        "multi_mnist": (mnist_subset, mnist_subset),
        "multi_fashion": (clothes, clothes),
        "fashion_and_mnist": (clothes, mnist_subset),
    }
    sizes = {"train": config.train_size, "test": config.test_size}
    return {
        split: image_pairs(*(s(split) for s in sources[name]), size, image_size=18)
        for split, size in sizes.items()
    }


class Bench:
    """One network, its losses and measurements, compiled once for all composites."""

    def __init__(self, config: Config):
        """Compiles nothing yet."""
        self.config = config
        # Ten outputs for five classes of clothes too: all compile to one program.
        self.model = model = SharedBottom(LeNet(), dict.fromkeys(TASKS, 10))
        picture = jax.numpy.zeros((1, 18, 18, 1))
        self.init = jax.jit(lambda key: model.init(key, picture))
        self.predict = jax.jit(
            lambda p, x: {t: jax.nn.softmax(y) for t, y in model.apply(p, x).items()}
        )

    def losses(self, params, batch):
        """Mean loss of each task."""
        logits: Any = self.model.apply(params, batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels
        return {t: loss(logits[t], batch[t]).mean() for t in TASKS}

    def losses_of_batch(self, params, data, *, key):
        """The same on random pictures, which are the same at all points of a step."""
        rows = jax.random.randint(key, (self.config.batch_size,), 0, len(data["left"]))
        return self.losses(params, jax.tree.map(lambda x: x[rows], data))

    @functools.partial(jax.jit, static_argnums=0)
    def conflicts(self, params, data, key):
        """Whether the tasks' gradients on one batch conflict."""
        grad_fn = mtjax.value_and_task_grads(self.losses_of_batch)
        _, grads = grad_fn(params, data, key=key)
        return mtjax.conflict_statistics(grads).conflict_rate

    @functools.partial(jax.jit, static_argnums=0)
    def sharpness(self, params, data):
        """On the first 500 training pictures."""
        few = jax.tree.map(lambda x: x[:500], data)
        fn = functools.partial(self.losses, batch=few)
        return task_sharpness(fn, params, rho_shared=self.config.rho, adaptive=True)

    def trainer(self, aggregator: str, variant: str):
        """Makes `train(pictures, seed, folder)` of a method."""
        config, rho = self.config, self.config.rho
        base, mode = AGGREGATORS[aggregator](), VARIANTS[variant]
        balancer = mtjax.task_sam(base, rho_shared=rho, rho_own=rho, mode=mode)
        tx = optax.chain(balancer, optax.adam(config.learning_rate))
        step = training.make_train_step(self.losses_of_batch, tx, with_key=True)

        def train(pictures, seed: int, folder: Path) -> dict[str, Any]:
            data = jax.device_put(pictures["train"])
            probes = jax.random.split(jax.random.key(1), 8)
            init_key, key = jax.random.split(jax.random.key(seed))

            def evaluate(state):
                found = [self.conflicts(state.params, data, k) for k in probes]
                return {"conflict_rate": float(np.mean(found))}

            every = {"eval_every": config.eval_every, "save_every": config.save_every}
            start = training.TrainState.create(self.init(init_key), tx, key=key)
            logger = training.JsonlLogger(folder / "metrics.jsonl")
            with training.Checkpoints(folder, config=config) as saved, closing(logger):
                state, history = training.fit(
                    start,
                    step,
                    itertools.repeat(data),
                    num_steps=config.steps,
                    evaluate=evaluate,
                    checkpoints=saved,
                    logger=logger,
                    **every,
                )
            late = [h["conflict_rate"] for h in history[len(history) // 2 :]]
            found = self.measure(state.params, data, pictures["test"])
            return {"conflict_rate": float(np.mean(late)), **found}

        return train

    def measure(self, params, data, test) -> dict[str, list[float]]:
        """Test metrics and sharpness on training pictures, one number per task."""
        guesses = jax.device_get(self.predict(params, test["image"]))
        score = lambda m, guess: [m(test[t], guess(guesses[t])) for t in TASKS]
        found = self.sharpness(params, data)
        return {
            "accuracy": score(training.ACCURACY, lambda p: p.argmax(-1)),
            "ece": score(training.CALIBRATION_ERROR, lambda p: p),
            "brier": score(training.BRIER, lambda p: p),
            "sharpness": found.rise.tolist(),
            "train_loss": found.losses.tolist(),
        }


def number(row, column: str) -> float:
    """The mean over tasks, in the unit of the table."""
    return COLUMNS[column][1] * float(np.mean(row[column]))


def table(rows, data: str) -> str:
    """Means over seeds on one composite, in Markdown."""
    runs: dict[str, list[dict[str, float]]] = {}
    for row in (r for r in rows if r["data"] == data):
        cells = {text: number(row, c) for c, (text, _) in COLUMNS.items()}
        runs.setdefault(f"{row['aggregator']}, {row['variant']}", []).append(cells)
    return f"{data}\n\n{training.seed_table(runs)}\n"


def dots(rows, column: str, *where: str) -> dict[str, np.ndarray]:
    """Per variant, one number per seed."""
    here = [r for r in rows if (r["data"], r["aggregator"]) == where]
    return {
        v: np.array([number(r, column) for r in here if r["variant"] == v])
        for v in VARIANTS
    }


def quick(config: Options = QUICK, out: Path = Path("runs/flat_quick")) -> None:
    """Seconds: one balancer, a few steps."""
    main(config, out)


def paper(config: Options = Config(), out: Path = Path("runs/flat_regions")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
