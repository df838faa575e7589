"""What tasks pick: means over all examples, and what cannot be told."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtjax.analysis.pattern_selection import pattern_selection
from mtjax.systems.apem import APEM, APEMConfig

CONFIG = APEMConfig(groups=2, tower=(), dropout=0.0)
FIELDS = jax.random.normal(jax.random.key(1), (6, 5, 4))


def test_means_over_examples_of_batches_of_any_size():
    model = APEM(("a", "b", "c"), CONFIG)
    variables = jax.jit(model.init)(jax.random.key(0), FIELDS)
    found = pattern_selection(model, variables, [FIELDS[:4], FIELDS[4:]])
    run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    _, state = run(variables, FIELDS)
    state = state["intermediates"]
    alpha = np.float64(state["selector"]["gates"][0])
    np.testing.assert_allclose(found.weights, alpha.mean(0), rtol=1e-5)
    apart = lambda s, t: np.abs(alpha[:, s] - alpha[:, t]).sum(1).mean() / 2
    expected = [[apart(s, t) for t in range(3)] for s in range(3)]
    np.testing.assert_allclose(found.apart, expected, rtol=1e-4, atol=1e-7)
    assert found.apart[0, 1] > 0.01
    for block in range(2):
        read = state["extractor"][f"groups_read_{block}"]["attention"][0]
        own = alpha[:, :, 2 * block : 2 * block + 2]
        expected = np.mean(own @ np.float64(read).mean(1), axis=0)
        np.testing.assert_allclose(found.fields[block], expected, rtol=1e-4)
    np.testing.assert_allclose(found.fields.sum((0, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize("options", [{"extractor": "mlp"}, {"carry": "patterns"}])
def test_models_whose_patterns_are_not_of_fields(options):
    model = APEM(("a",), replace(CONFIG, **options))
    variables = jax.jit(model.init)(jax.random.key(0), FIELDS)
    with pytest.raises(ValueError, match="`model` must select patterns of groups"):
        pattern_selection(model, variables, [FIELDS])


def test_no_batch():
    with pytest.raises(ValueError, match="`batches` must hold an example"):
        pattern_selection(APEM(("a",), CONFIG), {}, [])
