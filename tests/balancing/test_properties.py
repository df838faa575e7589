"""What is claimed of each balancer is what is measured, and what the page says."""

import jax
import jax.numpy as jnp
import pytest

from tests.balancing import matrices, property_table
from tests.balancing.catalogue import METHODS, jitted
from tests.balancing.properties import measure

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)


@each_method
def test_claims_are_what_is_measured(method):
    assert measure(method) == method.claims


@each_method
def test_asks_for_no_more_views_than_claimed(method):
    assert property_table.calls(method) == (method.calls, method.evaluations)


@each_method
def test_one_task_gives_its_gradient_up_to_the_claimed_factor(method):
    assert property_table.one_task(method) == pytest.approx(method.one_task, rel=1e-5)


@each_method
def test_multiplies_matrices_in_full_precision_on_every_device(method):
    grads = jnp.asarray(matrices.sample(matrices.normal, 6), jnp.float32)
    program = jax.jit(lambda g: jitted(method, 6)(g)).lower(grads).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products or method.calls == ("stack",)
    assert all("[HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_page_is_up_to_date():
    assert property_table.PAGE.read_text(encoding="utf-8") == property_table.page(), (
        "docs/balancers.md is stale: run `python -m tests.balancing.property_table`."
    )
