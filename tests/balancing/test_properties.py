"""What is claimed of each balancer is what is measured, and what the page says."""

import pytest

from tests.balancing import property_table
from tests.balancing.catalogue import METHODS
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


def test_page_is_up_to_date():
    assert property_table.PAGE.read_text(encoding="utf-8") == property_table.page(), (
        "docs/balancers.md is stale: run `python -m tests.balancing.property_table`."
    )
