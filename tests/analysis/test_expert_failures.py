"""The three symptoms, each at its limit."""

import numpy as np
import pytest

from mtjax.analysis.expert_failures import ExpertFailures, expert_failures

# Two shared experts, then one of each of two tasks.
OWN = np.array([[0, 0, 1, 0], [0, 0, 0, 1]], bool)
HEALTHY = np.array([[0.4, 0.3, 0.3, 0.0], [0.3, 0.4, 0.0, 0.3]])
ALIVE = np.full(4, 0.1)


def test_healthy():
    assert expert_failures(HEALTHY, ALIVE, OWN) == ExpertFailures((), (), ())


def test_collapse():
    found = expert_failures(HEALTHY, np.array([0.91, 0.9, 0.0, 1.0]), OWN)
    assert found.collapsed == (0, 3)
    # Held by one expert in all gates, which is no use by one task alone.
    weights = np.array([[0.96, 0.01, 0.03, 0.0], [0.97, 0.0, 0.0, 0.03]])
    found = expert_failures(weights, ALIVE, OWN)
    assert found == ExpertFailures((0,), (), (0, 1))


def test_degradation_is_of_shared_experts():
    weights = np.array([[0.6, 0.1, 0.3, 0.0], [0.2, 0.2, 0.0, 0.6]])
    assert expert_failures(weights, ALIVE, OWN).degraded == (0,)
    assert expert_failures(weights, ALIVE, OWN, used=0.7).degraded == ()
    weights[1] = [0.6, 0.2, 0.0, 0.2]
    assert expert_failures(weights, ALIVE, OWN).degraded == ()


def test_underfitting_needs_own_experts():
    weights = np.array([[0.56, 0.4, 0.04, 0.0], [0.3, 0.4, 0.0, 0.3]])
    assert expert_failures(weights, ALIVE, OWN).underfitted == (0,)
    assert expert_failures(weights, ALIVE, OWN, neglected=0.03).underfitted == ()
    none = np.zeros_like(OWN)
    assert expert_failures(weights, ALIVE, none).underfitted == ()


def test_shapes():
    with pytest.raises(
        ValueError, match=r"`own` must be of the same.*\(2, 4\), \(3,\)"
    ):
        expert_failures.__wrapped__(HEALTHY, ALIVE[:3], OWN)
