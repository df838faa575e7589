"""Sharpness of each task, in closed form and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mtjax.analysis import task_sharpness
from tests.balancing import model

CURVATURES = {"a": 1.0, "b": 4.0}


def bowls(params):
    return {
        t: 0.5 * h * jnp.sum(params["trunk"] ** 2) + params[t]
        for t, h in CURVATURES.items()
    }


PARAMS = {"trunk": jnp.array([3.0, 4.0]), "a": jnp.ones(()), "b": jnp.ones(())}


@pytest.mark.parametrize("rho_own", [None, 0.5])
def test_quadratic_in_closed_form(rho_own):
    """Uphill of h/2 |x|^2 a step of rho makes |x| longer by rho."""
    found = task_sharpness(bowls, PARAMS, rho_shared=0.1, rho_own=rho_own)
    own = 0.1 if rho_own is None else rho_own
    expected = [0.5 * h * (5.1**2 - 5.0**2) + own for h in CURVATURES.values()]
    np.testing.assert_allclose(found.rise, expected, rtol=1e-5)
    np.testing.assert_allclose(found.losses, [13.5, 51.0], rtol=1e-6)


def test_no_radius_no_rise():
    found = task_sharpness(bowls, PARAMS, rho_shared=0.0)
    np.testing.assert_array_equal(found.rise, 0.0)


def test_two_devices_measure_the_same_as_one():
    batch, params = model.batch(16), model.params()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def measured(axis_name, batch):
        fn = functools.partial(model.losses_fn, batch=batch)
        return task_sharpness(fn, params, axis_name=axis_name, adaptive=True)

    mapped = jax.shard_map(
        functools.partial(measured, "data"),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    found, expected = jax.jit(mapped)(batch), measured(None, batch)
    np.testing.assert_allclose(found.rise, expected.rise, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert bool(jnp.all(expected.rise > 0))


def test_negative_radius():
    with pytest.raises(ValueError, match="`rho_own` must not be negative"):
        task_sharpness(bowls, PARAMS, rho_own=-1.0)
