"""Twin-Merging on the models of a merge-bench: accuracies and analyses."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments import merge_bench_models as merge_bench
from experiments.merge_bench_data import parts, taken
from experiments.merge_bench_measures import Measures, with_mean
from experiments.merge_bench_models import Bench
from experiments.text_merge_bench_models import TextBench
from mtjax.losses import entropy_loss
from mtjax.merging.compressed import apply_vector, task_vector
from mtjax.merging.experts import Experts, dense
from mtjax.merging.sparse import Sparse
from mtjax.nn.side_branches import apply_mixed
from mtjax.systems import twin_merging
from mtjax.systems.twin_merging import RouterConfig, TaskRouter, TwinMergingConfig

Row = dict[str, float]
DEFAULT = TwinMergingConfig()


@dataclass(frozen=True, eq=False)
class Twin:
    """Shared expert, router and accuracies for the tasks of one bench.

    Attributes:
      bench: the models; images or sentences.
      config: of the router.
      scales: tried for the shared expert, which is task arithmetic.
      key: of the router, and of random elements.
    """

    bench: Bench | TextBench
    config: RouterConfig
    scales: tuple[float, ...]
    key: jax.Array

    @cached_property
    def measures(self) -> Measures:
        """Of the bench."""
        return Measures(self.bench)

    @cached_property
    def scale(self) -> float:
        """The best one on validation images."""
        return self.measures.best_scale(self.scales)

    @cached_property
    def shared(self) -> Any:
        """Parameters of the shared expert."""
        return self.measures.scaled(self.scale)

    @cached_property
    def own(self) -> Row:
        """Accuracies of the fine-tuned models, in per cent."""
        return self.measures.individual()

    @cached_property
    def router(self) -> TaskRouter:
        """For all tasks."""
        return self.fit(self.bench.tasks)

    @cached_property
    def _infer(self):
        return jax.jit(self.infer)

    @cached_property
    def _see(self):
        return jax.jit(self.bench.encode)

    def see(self, task: str, split: str) -> np.ndarray:
        """What the shared expert makes of a task's inputs, which the router sees."""
        inputs = self.bench.inputs(task, split)
        return np.concatenate([self._see(self.shared, x) for x in parts(inputs)])

    def fit(self, tasks: Sequence[str]) -> TaskRouter:
        """A router for some of the tasks."""
        train, rest = (
            {t: self.see(t, split) for t in tasks} for split in ("train", "validation")
        )
        return twin_merging.fit_router(train, rest, self.config, key=self.key)

    def experts(self, config: TwinMergingConfig = DEFAULT) -> Experts:
        """Compressed vectors of all tasks."""
        args = self.bench.base, self.bench.models, config
        return twin_merging.twin_merge(*args, shared=self.shared, key=self.key)

    def infer(self, experts: Experts, router: TaskRouter, inputs):
        """What all heads say, and task and class where nobody names the task."""
        z, weights = twin_merging.infer(self.bench.encode, experts, router, inputs)
        heads = self.bench.heads
        logits = {t: merge_bench.outputs(heads[t], z) for t in self.bench.tasks}
        return logits, twin_merging.routed_classes(logits, weights)

    def row(self, accuracies: Mapping[str, Any], size: int) -> Row:
        """In per cent, and relative to the fine-tuned models; size in bytes."""
        found = with_mean(accuracies)
        ratios = [found[t] / self.own[t] for t in self.bench.tasks]
        return found | {"normalised": 100 * float(np.mean(ratios)), "MB": size / 1e6}

    def fixed(self, params: Mapping[str, Any], size: int = 0) -> Row:
        """Of parameters by task."""
        found = {t: self.bench.accuracy(p, t) for t, p in params.items()}
        return self.row(found, size)

    def of_shared(self) -> Row:
        """Of the shared expert alone."""
        one = nbytes(self.bench.base)
        return self.fixed(dict.fromkeys(self.bench.tasks, self.shared), one)

    def weighted(self, experts: Experts, uniform: bool = False) -> Row:
        """With weights that know the task, or with equal ones."""
        number = len(experts.tasks)
        rows = np.full((number, number), 1 / number) if uniform else np.eye(number)
        mixed = jax.jit(Experts.mixed)
        mixtures = {
            task: mixed(experts, jnp.asarray(row, jnp.float32))
            for task, row in zip(experts.tasks, rows)
        }
        return self.fixed(mixtures, experts.nbytes)

    def learned(self, experts: Experts) -> dict[str, Row]:
        """With the router: of the true `heads`, of `routed heads`, the `router`'s."""
        # Every number of elements would be compiled anew.
        plain = jax.tree.map(dense, experts, is_leaf=lambda x: isinstance(x, Sparse))
        right: dict[str, Row] = {"heads": {}, "routed heads": {}, "router": {}}
        for place, task in enumerate(experts.tasks):
            true, found = self.bench.data[task]["test"]["labels"], []
            for x in parts(self.bench.inputs(task, "test")):
                logits, (chosen, classes) = self._infer(plain, self.router, x)
                found.append(jnp.stack([logits[task].argmax(-1), chosen, classes]))
            named, chosen, classes = np.concatenate(found, axis=1)
            same = chosen == place
            right["heads"][task] = np.mean(named == true)
            right["routed heads"][task] = np.mean(same & (classes == true))
            right["router"][task] = np.mean(same)
        size = experts.nbytes + nbytes(self.router.variables)
        return {name: self.row(x, size) for name, x in right.items()}


def nbytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def first(bench: Bench, number: int) -> Bench:
    """The same models of the first tasks."""
    tasks = bench.tasks[:number]
    return replace(bench, tasks=tasks, models={t: bench.models[t] for t in tasks})


def entropies(twin: Twin) -> Row:
    """Of the router's weights in nats, on its tasks and on one it has never seen."""
    *known, new = twin.bench.tasks
    router = twin.fit(known)

    def entropy(task):
        weights = twin_merging.route(router, jnp.asarray(twin.see(task, "test")))
        return float(entropy_loss(jnp.log(weights)))

    mean = float(np.mean([entropy(task) for task in known]))
    return {"known tasks": mean, "new task": entropy(new)}


def with_one_vector(twin: Twin) -> Row:
    """The shared expert, alone and with the vector of the task."""
    found = {"shared": twin.of_shared(), "with a vector": twin.weighted(twin.experts())}
    return {name: row["normalised"] for name, row in found.items()}


def shorter(twin: Twin, config: merge_bench.Config) -> Row:
    """The same after fine-tunings of another length."""
    models = {}
    for task in track(twin.bench.tasks, f"{config.steps} steps"):
        head, data = twin.bench.heads[task], twin.bench.data[task]["train"]
        args = config, twin.bench.base, head, data, twin.key
        models[task] = merge_bench.finetune(*args)
    return with_one_vector(replace(twin, bench=replace(twin.bench, models=models)))


def disjoint(twin: Twin, left: str, right: str) -> Row:
    """Some leaves of a task's vector, alone and beside other leaves of another's."""
    bench = twin.bench
    half = lambda t, where: task_vector(bench.base, bench.models[t], where=where)
    alone = {t: apply_vector(bench.base, half(t, left)) for t in bench.tasks}
    share = lambda params, task: 1e4 * bench.accuracy(params, task) / twin.own[task]
    pairs = itertools.permutations(bench.tasks, 2)
    both = [share(apply_vector(alone[a], half(b, right)), a) for a, b in pairs]
    return {
        f"{left} of the task": float(np.mean([share(p, t) for t, p in alone.items()])),
        f"with {right} of another": float(np.mean(both)),
    }


def costs(twin: Twin, experts: Experts) -> dict[str, Row]:
    """Time and memory of one batch, without the router."""
    images = taken(twin.bench.inputs(twin.bench.tasks[0], "test"), slice(100))
    number, encode = len(experts.tasks), twin.bench.encode
    weights = jnp.full((len(images), number), 1 / number)
    one = lambda w, x: encode(experts.mixed(w), x[None])[0]
    ways = {
        "shared expert": lambda w, x: encode(twin.shared, x),
        "side branches": partial(apply_mixed, encode, experts),
        "merged for each image": jax.vmap(one),
    }
    found = {}
    for name, way in ways.items():
        program = jax.jit(way).lower(weights, images).compile()
        program(weights, images)
        start = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(program(weights, images))
        ms = 1e3 * (time.perf_counter() - start) / 5
        found[name] = {"ms per 100 images": ms}
        if (memory := program.memory_analysis()) is not None:
            found[name]["temporary MB"] = memory.temp_size_in_bytes / 1e6
    return found
