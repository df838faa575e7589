"""Writes docs/balancers.md: `python -m tests.balancing.property_table`."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from mtjax import TaskGradients
from tests.balancing.catalogue import METHODS, jitted, task_names
from tests.balancing.properties import SIZES, measure

PAGE = Path(__file__).parents[2] / "docs" / "balancers.md"

INTRODUCTION = """\
# Balancers

<!-- Written by `python -m tests.balancing.property_table`; do not edit. -->

Every balancer is an optax transform that stands before the optimizer, as in
`optax.chain(mtjax.pcgrad(), optax.adamw(1e-3))`. K is the number of tasks, and `log`
stands for `mtjax.scale_by_weighting(mtjax.scale_invariant())`: an aggregator behind it
gets the gradients of the [logarithms of the losses](guide/composition.md).
"""

COST = """\
## Cost

Counted on the views of the gradients that a method asks for, with the engine `stacked`;
other engines make the Gramian cheaper. "Forward" is one more evaluation of the losses.
The losses of further batches and of held-out data come on top.
"""

PROPERTIES = """\
## Properties

Measured by the tests on sampled gradient matrices, not copied from papers.

- **Hurts no task**: the update conflicts with no task's gradient wherever a direction
  exists that improves all tasks.
- **Stops**: the update vanishes at Pareto-stationary points, where some positive
  combination of all gradients does. "Also where some tasks are" means that it stops all
  tasks as soon as a few of them leave no common direction.
- **All losses times c**: the power of c in the update; at 0 the learning rate alone
  sets the step.
- **One loss times c**: what that changes.
- **Order**: whether the order of the tasks matters.
- **Random**: whether the update depends on a key.
- **Own parameters**: what moves the parameters that one task alone reaches.
- **Linear**: whether the update is linear in the gradients, given the losses.
- **Weighted sum**: whether the update is a weighted sum of the gradients.
- **One task**: what becomes of a single gradient of norm 2 in the first step.
"""

COLUMNS = {
    "conflict": "Hurts no task",
    "stationary": "Stops",
    "scale_all": "All losses times c",
    "scale_one": "One loss times c",
    "order": "Order",
    "random": "Random",
    "own": "Own parameters",
    "linear": "Linear",
    "span": "Weighted sum",
}


def page() -> str:
    """The whole page, measured now."""
    methods = {m.factory: None for m in METHODS}
    ideas = [[f"`{f.__name__}`", _idea(f), _paper(f)] for f in methods]
    costs = [[f"`{m.label}`", _extra(m), _cost(m)] for m in METHODS]
    properties = [
        [f"`{m.label}`", *(measure(m)[c] for c in COLUMNS), f"times {one_task(m):.3g}"]
        for m in METHODS
    ]
    return "\n".join(
        [
            INTRODUCTION,
            _table(["Balancer", "Idea", "Paper"], ideas),
            COST,
            _table(["Call", "Needs", "Cost of a step"], costs),
            PROPERTIES,
            _table(["Call", *COLUMNS.values(), "One task"], properties),
        ]
    )


def calls(method, size=SIZES[0]) -> tuple[tuple[str, ...], int]:
    """The views of the gradients that one step asks for, and its re-evaluations."""
    asked = []
    evaluations = 0
    rows = jnp.eye(size)
    names = task_names(size)

    class Engine:
        name = "counting"

        def pull(self, weights):
            asked.append("pull")
            return weights @ rows

        def stack(self):
            asked.append("stack")
            return rows

        def gramian(self):
            asked.append("gramian")
            return rows @ rows.T

        def inner(self, direction):
            asked.append("inner")
            return rows @ direction

    def losses_fn(params):
        nonlocal evaluations
        evaluations += 1
        return dict.fromkeys(names, jnp.ones(()))

    split = TaskGradients.from_stacked(rows, names).split
    tx = method.make(size)
    params = jnp.zeros(size)

    def update():
        grads = TaskGradients(split, Engine())
        return tx.update(
            grads,
            tx.init(params),
            params,
            losses=dict.fromkeys(names, jnp.ones(())),
            losses_fn=losses_fn,
            validation_losses_fn=lambda params: dict.fromkeys(names, params.sum()),
            resampled=[grads, grads],
        )

    jax.eval_shape(update)
    return tuple(asked), evaluations


def one_task(method) -> float:
    """The factor on a single gradient of norm 2 in the first step."""
    updates, _ = jitted(method, 1)(jnp.array([[0.0, 2.0, 0.0]]))
    return float(updates[1]) / 2.0


def _cost(method):
    counts = []
    for size in (2, 3):
        views, evaluations = calls(method, size)
        per_task = sum(view in ("gramian", "stack") for view in views)
        backward = size * per_task + views.count("pull")
        counts.append((backward, evaluations + views.count("inner")))
    backward, forward = (_in_terms_of_tasks(*pair) for pair in zip(*counts))
    cost = f"{backward} backward" + (f", {forward} forward" if forward else "")
    if method.held_out:
        cost += f", {method.held_out} on held-out data"
    return cost + (", K gradients in memory" if "stack" in views else "")


def _in_terms_of_tasks(of_two, of_three):
    """What grows linearly with the number of tasks, from two values."""
    per_task, fixed = of_three - of_two, 3 * of_two - 2 * of_three
    terms = [f"{per_task if per_task > 1 else ''}K"] * bool(per_task)
    return " + ".join(terms + [str(fixed)] * bool(fixed))


def _extra(method):
    needs = ["`losses`"] if method.losses else []
    if method.resampled:
        needs.append(f"{method.resampled} `resampled`")
    needs += ["`losses_fn`"] * bool(method.evaluations)
    needs += ["`validation_losses_fn`"] * bool(method.held_out)
    needs += ["`params`"] * bool(method.evaluations or method.held_out)
    return ", ".join(needs) or "none"


def _idea(factory):
    return factory.__doc__.splitlines()[0].strip()


def _paper(factory):
    found = re.search(r"References:\s+(.+?),\s+(\d{4})\b", factory.__doc__, re.DOTALL)
    return "none" if found is None else f"{' '.join(found[1].split())} ({found[2]})"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
