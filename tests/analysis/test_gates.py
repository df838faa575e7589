"""Expert utilisation against what a module's arrays say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.analysis import expert_utilisation
from mtjax.analysis.plots import plot_gates
from mtjax.nn import MLP, PLE

X = jax.random.normal(jax.random.key(0), (12, 5))


def test_utilisation():
    model = PLE(tasks=("a", "b"), own=1, shared=1, widths=((4,), (3,)))
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    # The second task's expert of the last level has died.
    dead = params["level_1"]["task_experts"]["bias_0"].at[1].set(-100.0)
    params["level_1"]["task_experts"]["bias_0"] = dead
    # Batches of different sizes count by their examples.
    use = expert_utilisation(model, {"params": params}, [X[:8], X[8:]])
    _, state = model.apply({"params": params}, X, mutable=["intermediates"])
    shown = state["intermediates"]
    assert sorted(use.weights) == [
        "level_0/shared_gate",
        "level_0/task_gates",
        "level_1/task_gates",
    ]
    for path, weights in use.weights.items():
        level, name = path.split("/")
        expected = np.float64(shown[level][name]["gates"][0]).mean(0)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(use.zero_rate["level_1/task_experts"][1], 1.0)
    assert use.zero_rate["level_0/own_experts"].max() < 1
    for path in use.mean:
        level, name = path.split("/")
        outputs = np.float64(shown[level][name]["experts"][0])
        np.testing.assert_allclose(use.mean[path], outputs.mean((0, 2)), rtol=1e-5)
        np.testing.assert_allclose(
            use.variance[path], outputs.var((0, 2)), rtol=1e-4, atol=1e-7
        )
        zeros = (np.abs(outputs) < 1e-6).mean((0, 2))
        np.testing.assert_allclose(use.zero_rate[path], zeros, rtol=1e-6)
    figure = plot_gates(use.weights, gates=("a", "b"), title="gates")
    panels = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert sorted(panels) == sorted(use.weights)
    last = panels["level_1/task_gates"]
    assert [label.get_text() for label in last.get_yticklabels()] == ["a", "b"]
    drawn = last.get_images()[0].get_array()
    np.testing.assert_allclose(drawn, use.weights["level_1/task_gates"])
    figure.canvas.draw()


def test_nothing_to_measure():
    model = MLP((3,))
    params = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="must have gates or experts"):
        expert_utilisation(model, params, [X])
    with pytest.raises(ValueError, match="`batches` must hold an example"):
        expert_utilisation(model, params, [jnp.ones((0, 5))][:0])
