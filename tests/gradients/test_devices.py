"""Eight devices give the same numbers as one."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtjax


def all_views(problem, grad_fn):
    def views(params, x):
        losses, grads = grad_fn(params, x)
        return {
            "losses": losses,
            "gramian": grads.gramian(),
            "combine": grads.combine(problem.weights),
            "scale": grads.scale(problem.weights).combine(),
            "stack": grads.stack(),
        }

    return views


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="session", params=["stacked", "ghost", "representation"])
def engine(request):
    return request.param


@pytest.fixture(scope="session")
def expected(problem, engine):
    grad_fn = mtjax.value_and_task_grads(problem.pair, engine=engine)
    return jax.jit(all_views(problem, grad_fn))(problem.params, problem.x)


def assert_close(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_jit_with_one_sharded_parameter(problem, engine, expected, mesh):
    grad_fn = mtjax.value_and_task_grads(problem.pair, engine=engine)
    params = jax.device_put(problem.params, NamedSharding(mesh, P()))
    params["trunk"]["kernel"] = jax.device_put(
        params["trunk"]["kernel"], NamedSharding(mesh, P(None, "data"))
    )
    x = jax.device_put(problem.x, NamedSharding(mesh, P("data")))
    assert_close(jax.jit(all_views(problem, grad_fn))(params, x), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(problem, engine, expected, mesh, check_vma):
    assert_shard_map_agrees(problem, engine, expected, mesh, check_vma)


def test_shard_map_with_vmapped_pullbacks(problem, engine, expected, mesh, monkeypatch):
    monkeypatch.setattr("mtjax.gradients.stacked._MAX_UNROLLED_ON_CPU", 0)
    assert_shard_map_agrees(problem, engine, expected, mesh, check_vma=True)


def assert_shard_map_agrees(problem, engine, expected, mesh, check_vma):
    grad_fn = mtjax.value_and_task_grads(problem.pair, engine=engine, axis_name="data")
    views = jax.shard_map(
        all_views(problem, grad_fn),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(views)(problem.params, problem.x), expected)


def test_pmap(problem, engine, expected):
    grad_fn = mtjax.value_and_task_grads(problem.pair, engine=engine, axis_name="data")
    views = jax.pmap(all_views(problem, grad_fn), axis_name="data", in_axes=(None, 0))
    found = views(problem.params, problem.x.reshape(8, 2, 6))
    assert_close(found, jax.tree.map(lambda v: jnp.stack([v] * 8), expected))


@pytest.mark.parametrize("check_vma", [True, False])
def test_losses_that_are_the_same_on_every_device(problem, mesh, check_vma):
    """A constant, a penalty on parameters, and a mean that the user took already."""

    def losses_fn(params, x, axis_name=None):
        mean = problem.losses_fn(params, x)["b"]
        mean = mean if axis_name is None else jax.lax.pmean(mean, axis_name)
        penalty = jnp.sum(params["trunk"]["kernel"] ** 2)
        return {"constant": 1.0, "mean": mean, "penalty": penalty}

    def views(axis_name):
        grad_fn = mtjax.value_and_task_grads(losses_fn, axis_name=axis_name)

        def run(params, x):
            losses, grads = grad_fn(params, x, axis_name=axis_name)
            return losses, grads.gramian(), grads.combine([3.0, 0.5, 2.0])

        return run

    found = jax.jit(
        jax.shard_map(
            views("data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )(problem.params, problem.x)
    assert_close(found, jax.jit(views(None))(problem.params, problem.x))


def test_aux_stays_each_devices_own(problem, mesh):
    def with_aux(params, x):
        return problem.losses_fn(params, x), jnp.mean(x, keepdims=True)

    grad_fn = mtjax.value_and_task_grads(with_aux, has_aux=True, axis_name="data")

    def run(params, x):
        (losses, aux), _ = grad_fn(params, x)
        return losses, aux

    on_devices = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))
    )
    losses, aux = jax.jit(on_devices)(problem.params, problem.x)
    np.testing.assert_allclose(
        aux[:, 0], problem.x.reshape(8, -1).mean(1), rtol=1e-4, atol=1e-6
    )
    chex.assert_trees_all_close(
        losses, problem.losses_fn(problem.params, problem.x), rtol=1e-5
    )


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["rows", "columns"])
def test_gramian_gathers_no_sharded_leaf(mesh, spec, pullbacks):
    """Inner products of a sharded leaf need one sum of (tasks, tasks) numbers."""

    def losses_fn(params, x):
        z = x @ params
        return {"a": jnp.mean(z**2), "b": jnp.mean(jnp.sin(z)), "c": jnp.mean(z)}

    def gramian(params, x):
        return mtjax.value_and_task_grads(losses_fn)(params, x)[1].gramian()

    params = jax.device_put(jnp.ones((512, 256)), NamedSharding(mesh, spec))
    x = jax.device_put(jnp.ones((8, 512)), NamedSharding(mesh, P()))
    text = jax.jit(gramian).lower(params, x).compile().as_text()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", text)
    sizes = [np.prod([int(d) for d in shape.split(",")]) for shape in gathered]
    assert max(sizes, default=0) < 512 * 256
