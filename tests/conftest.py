"""Strictness for every test: eight simulated devices, no silent rank promotion."""

import os

import chex
import jax
import pytest
from jaxtyping import install_import_hook

# Read when the backend starts, and by the processes that tests start.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")

# Runtime checks of every jaxtyping annotation, in tests only.
install_import_hook("mtjax", "beartype.beartype")


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


@pytest.fixture
def key():
    return jax.random.key(0)
