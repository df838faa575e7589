"""Rep-MTL on overlaid images: do saliencies of their own make shared tasks better?

Two tasks name what is in the upper left and in the lower right of a picture, a third
paints the left image without the other one. Equal weighting (EW) alone, with each of
the two regularisers and with both, beside one model per task, on logarithms of losses.

Command:  python experiments/rep_mtl.py paper
Machine:  two CPU cores.    Minutes: 15.
Expect:   entropy falls (TSR), alignment rises (CSA), but EW alone is best here: Δp -6 %
          (EW), -18 (TSR), -22 (CSA), -28 (both).
"""

import functools
import itertools
import json
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import track

import mtjax
from mtjax import training
from mtjax.analysis import mean_power_law_alpha
from mtjax.analysis.plots import plot_curves
from mtjax.data import image_pairs, load_images, mnist_subset
from mtjax.systems import rep_mtl
from mtjax.training import ACCURACY, MAE, TrainState
from mtjax.training.run_config import open_run_folder

METRICS = {"left": ACCURACY, "right": ACCURACY, "paint": MAE}
# Which of the two regularisers: TSR, CSA.
VARIANTS = {"EW": (0, 0), "TSR": (1, 0), "CSA": (0, 1), "TSR+CSA": (1, 1)}
CURVES = {
    "left/accuracy": "test accuracy",
    "paint/mae": "test error per pixel",
    "saliency/entropy": "entropy over tasks, nats",
    "saliency/cosine_gap": "positive minus negative cosine",
}


@dataclass(frozen=True)
class Config:
    """What is trained, and for how long."""

    data: Literal["digits", "clothes", "mixed"] = "digits"  # mixed: digits left
    data_dir: Path | None = None  # folder of prepared data, for clothes
    fashion: str = "fashion_mnist/five_classes"  # or all of it, "fashion_mnist"
    variants: tuple[str, ...] = tuple(VARIANTS)  # step times relative to the first
    weight: float = 0.9  # of each regulariser
    temperature: float = 0.1  # of the contrast between samples
    seeds: int = 3
    train_size: int = 20_000  # pictures
    test_size: int = 2_000  # of images that are in no training picture
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3  # of Adam
    eval_every: int = 100  # steps between evaluations, each with a checkpoint


Options = tyro.conf.OmitArgPrefixes[Config]
QUICK = Config(variants=("EW", "TSR+CSA"), seeds=1, train_size=500, steps=20)


class Heads(nn.Module):
    """Smooth heads: classes of the two images, and the left one painted."""

    classes: dict[str, int]

    @nn.compact
    def __call__(self, z):
        """Logits and pixels."""
        outputs = {}
        for task, size in self.classes.items():
            h = nn.gelu(nn.Dense(64, name=f"{task}_hidden")(z.reshape(len(z), -1)))
            outputs[task] = nn.Dense(size, name=f"{task}_output")(h)
        h = nn.gelu(nn.Conv(16, (3, 3), name="paint_hidden")(z))
        # A square of 4x4 pixels from every place of the 9x9 grid.
        squares = nn.Dense(16, name="paint_output")(h).reshape(-1, 9, 9, 4, 4)
        painted = squares.transpose(0, 1, 3, 2, 4).reshape(-1, 36, 36, 1)
        return {**outputs, "paint": painted}


class Method:
    """One way to train some of the tasks; compiled once for all seeds."""

    def __init__(self, data, tasks: tuple[str, ...], switches, config: Config):
        """Builds model, objective and step."""
        self.config, self.data, self.tasks = config, data, tasks
        gelu_conv = lambda *a: nn.Sequential([nn.Conv(*a, strides=2), nn.gelu])
        encoder = nn.Sequential([gelu_conv(16, (5, 5)), gelu_conv(32, (3, 3))])
        names = [task for task in ("left", "right") if task in tasks]
        heads = Heads({task: int(data["train"][task].max()) + 1 for task in names})

        encode = lambda params, batch: encoder.apply(params["encoder"], batch["image"])

        def losses_of(params, z, batch):
            outputs = heads.apply(params["heads"], z)
            entropy = optax.softmax_cross_entropy_with_integer_labels
            losses = {t: entropy(outputs[t], batch[t]).mean() for t in names}
            paint = jnp.abs(outputs["paint"] - batch["left_image"]).mean()
            return losses | ({"paint": paint} if "paint" in tasks else {})

        def init(key):
            z, params = encoder.init_with_output(key, data["test"]["image"][:1])
            own = heads.init(jax.random.fold_in(key, 1), z)
            return {"encoder": params, "heads": own}

        def look(params, batch):
            logs = lambda z: jax.tree.map(jnp.log, losses_of(params, z, batch))
            saliencies = rep_mtl.representation_saliency(logs, encode(params, batch))
            same, other, mask = rep_mtl.affinity_cosines(saliencies)
            gap = jnp.mean(same) - jnp.mean(other, where=mask)
            return {"entropy": rep_mtl.tsr_loss(saliencies), "cosine_gap": gap}

        weights = [config.weight * switch for switch in switches]
        terms = rep_mtl.RepMTLConfig(*weights, temperature=config.temperature)
        pair = rep_mtl.rep_mtl_objective((encode, losses_of), terms)
        self.tx = optax.chain(mtjax.equal(), optax.adam(config.learning_rate))
        self.step = training.make_train_step(pair, self.tx, has_aux=True)
        self.init, self.look = jax.jit(init), jax.jit(look)
        self.predict = jax.jit(lambda p, x: heads.apply(p["heads"], encode(p, x)))

    def fresh_state(self, seed: int) -> TrainState:
        """The state before the first step."""
        init_key, key = jax.random.split(jax.random.key(seed))
        return TrainState.create(self.init(init_key), self.tx, key=key)

    def evaluate(self, params: Any) -> dict[str, Any]:
        """Test metrics, and the two quantities that are regularised."""
        test, flat = self.data["test"], lambda x: x.reshape(len(x), -1)
        found = jax.device_get(self.predict(params, {"image": test["image"]}))
        decide = lambda t, y: flat(y) if t == "paint" else y.argmax(-1)
        metrics = training.score(
            {t: [METRICS[t]] for t in self.tasks},
            {**test, "paint": flat(test["left_image"])},
            {t: decide(t, y) for t, y in found.items()},
        )
        if len(self.tasks) > 1:
            few = {name: x[: self.config.batch_size] for name, x in test.items()}
            metrics["saliency"] = jax.device_get(self.look(params, few))
        return metrics

    def train(self, seed: int, folder: Path) -> list[dict[str, float]]:
        """Trains with one seed, or goes on; returns one row per evaluation."""
        config = self.config
        with (
            training.Checkpoints(folder, config=config, keep=1) as checkpoints,
            closing(training.JsonlLogger(folder / "metrics.jsonl")) as logger,
        ):
            state, history = training.fit(
                self.fresh_state(seed),
                self.step,
                batches(self.data["train"], config, seed),
                num_steps=config.steps,
                evaluate=lambda state: self.evaluate(state.params),
                checkpoints=checkpoints,
                logger=logger,
                progress=False,
                eval_every=config.eval_every,
                save_every=config.eval_every,
                log_every=config.eval_every,
            )
        if len(self.tasks) > 1:
            whose = lambda path: re.search("encoder|left|right|paint", path)[0]
            alphas = mean_power_law_alpha(state.params, whose)
            history[-1].update({f"exponent/{p}": alpha for p, alpha in alphas.items()})
        return history


def batches(train: dict[str, np.ndarray], config: Config, seed: int):
    """The same batches for every method; drawn with replacement, without end."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(config.train_size, size=config.batch_size)
        yield {name: array[rows] for name, array in train.items()}


def load(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Training pictures, and test pictures of other images."""
    clothes = functools.partial(load_images, config.fashion, data_dir=config.data_dir)
    left = clothes if config.data == "clothes" else mnist_subset
    right = mnist_subset if config.data == "digits" else clothes
    make = functools.partial(image_pairs, image_size=36, clean=True)
    sizes = {"train": config.train_size, "test": config.test_size}
    return {split: make(left(split), right(split), n) for split, n in sizes.items()}


def main(config: Config, out: Path) -> dict[str, list]:
    """Trains everything; writes the results, a table and a figure."""
    data = load(config)
    open_run_folder(out, config)
    methods = {f"{t} alone": Method(data, (t,), (0, 0), config) for t in METRICS}
    for name in config.variants:
        methods[name] = Method(data, tuple(METRICS), VARIANTS[name], config)
    results = {name: [] for name in methods}
    for name, seed in track([*itertools.product(methods, range(config.seeds))]):
        folder = out / "runs" / f"{name.replace(' ', '_')}_{seed}"
        results[name].append(methods[name].train(seed, folder))
    batch = next(batches(data["train"], config, seed=0))
    take = lambda method: lambda state: method.step(state, batch)[0]
    times = training.step_milliseconds(
        {v: (take(methods[v]), methods[v].fresh_state(0)) for v in config.variants}
    )
    compare(results, times)
    (out / "results.json").write_text(json.dumps(results))
    last = {name: [run[-1] for run in runs] for name, runs in results.items()}
    (out / "table.md").write_text(training.seed_table(last), encoding="utf-8")
    of = lambda v, key: np.array([[row[key] for row in run] for run in results[v]])
    curves = {key: {v: of(v, key) for v in times} for key in CURVES}
    steps = of(config.variants[0], "step")[0]
    plot_curves(steps, curves, ylabels=CURVES).savefig(out / "rep_mtl.png", dpi=110)
    return results


def compare(results: dict[str, list], times: dict[str, float]) -> None:
    """Adds change against single-task models and step time to the last rows."""
    key = lambda t: f"{t}/{METRICS[t].name}"
    of = lambda value: {t: {METRICS[t].name: value(t)} for t in METRICS}
    better = of(lambda t: METRICS[t].direction)
    alone = of(lambda t: np.mean([run[-1][key(t)] for run in results[f"{t} alone"]]))
    for name, time in times.items():
        for *_, last in results[name]:
            own = of(lambda t, last=last: last[key(t)])
            change = training.delta_m(own, alone, better, baseline_name="alone")
            last["Δp, %"] = change.value
        # Measured once, not per seed.
        results[name][0][-1]["step time"] = time / next(iter(times.values()))


def quick(config: Options = QUICK, out: Path = Path("runs/rep_mtl_quick")) -> None:
    """Seconds: a few steps."""
    main(config, out)


def paper(config: Options = Config(), out: Path = Path("runs/rep_mtl")) -> None:
    """The comparison of the documentation."""
    main(config, out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "paper": paper})
