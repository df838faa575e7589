"""The cost report: sane numbers, readable table."""

import jax
import jax.numpy as jnp
import pytest

import mtjax


def encode(params, x):
    for kernel in params["trunk"]:
        x = jnp.tanh(x @ kernel)
    return x


def heads(params, z, x):
    return {task: jnp.mean((z @ params[task]) ** 2) for task in "abcd"}


SHAPES = {"trunk": [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2} | {
    task: jax.ShapeDtypeStruct((64,), jnp.float32) for task in "abcd"
}
X = jax.ShapeDtypeStruct((32, 64), jnp.float32)


@pytest.fixture(scope="module")
def report():
    return mtjax.cost_report((encode, heads), SHAPES, X)


@pytest.fixture(scope="module")
def flops(report):
    return {(row.step, row.engine): row.flops for row in report.rows}


def test_rows(flops):
    assert list(flops) == [
        ("sum of losses", "jax.grad"),
        ("combine", "stacked"),
        ("gramian + combine", "stacked"),
        ("gramian + combine", "ghost"),
        ("gramian + combine", "representation"),
        ("stack", "stacked"),
    ]


def test_combine_costs_as_much_as_the_sum_of_losses(flops):
    plain = flops["sum of losses", "jax.grad"]
    assert plain <= flops["combine", "stacked"] * 1.001 < plain * 1.05


def test_order_of_the_costs(flops):
    combine = flops["combine", "stacked"]
    gramian = flops["gramian + combine", "stacked"]
    at_z = flops["gramian + combine", "representation"]
    ghost = flops["gramian + combine", "ghost"]
    assert combine < at_z < ghost < gramian
    assert combine < flops["stack", "stacked"] < gramian


def test_memory_is_reported(report):
    assert all(row.temporary_bytes > 0 for row in report.rows)


def test_table(report):
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("step", "engine", "GFLOP", "ratio", "temporary", "MB", "ratio")
    ]
    assert len(lines) == 1 + len(report.rows)
    assert lines[1].startswith("sum of losses      jax.grad ")
    assert lines[1].split()[-1] == "1.00"


def test_single_function_with_flags_and_aux():
    def losses_fn(params, x, *, power):
        z = x @ params["w"]
        return {"a": jnp.mean(z**power), "b": jnp.mean(z)}, z

    report = mtjax.cost_report(
        losses_fn, {"w": jnp.ones((64, 8))}, X, has_aux=True, power=2
    )
    assert {row.engine for row in report.rows} == {"jax.grad", "stacked", "ghost"}


def test_errors_are_those_of_value_and_task_grads():
    with pytest.raises(TypeError, match="`losses_fn` must return a dictionary"):
        mtjax.cost_report(lambda params, x: x.sum(), SHAPES, X)
