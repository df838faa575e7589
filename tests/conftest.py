"""Strictness for every test: eight simulated devices, no silent rank promotion."""

import itertools
import os

import chex
import jax
import pytest
from jaxtyping import install_import_hook

# Read when the backend starts, and by the processes that tests start. Programs run once
# or a few times: compiling them with little optimisation and without the emitters of
# fusions takes a third of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")

# Runtime checks of every jaxtyping annotation, in tests only.
install_import_hook("mtjax", "beartype.beartype")


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


def pytest_runtest_teardown(item, nextitem):
    # Every compiled program takes some of the memory maps that a process may have, of
    # which Linux allows 65,530: beyond them the compiler crashes.
    if nextitem is None or nextitem.path != item.path or next(_TESTS) % 200 == 199:
        jax.clear_caches()


_TESTS = itertools.count()


@pytest.fixture
def key():
    return jax.random.key(0)
