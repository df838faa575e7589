"""Methods that decompose matrices end on machines with two cores (see `one_by_one`)."""

import os
import subprocess
import sys

import pytest

# Two threads are what jaxlib makes of two cores.
PROGRAM = """
import os, sys
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:2])
import jax
from mtjax import merging
from mtjax.systems.doge import DogeConfig, doge_merge

def trees(number):
    shapes = {f"layer_{i}": (64, 64 + 8 * (i % 3)) for i in range(12)}
    one = lambda key: {
        name: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return [one(key) for key in jax.random.split(jax.random.key(0), number)]

base, *models = trees(7)
methods = {
    "tsv_m": merging.tsv_m(),
    "iso_cts": merging.iso_cts(),
    "doge": lambda base, models: doge_merge(
        base, {str(i): m for i, m in enumerate(models)}, DogeConfig(steps=2)
    ),
}
jax.block_until_ready(jax.jit(methods[sys.argv[1]])(base, models))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux alone"
)
@pytest.mark.parametrize("method", ["tsv_m", "iso_cts", "doge"])
def test_all_matrices_in_one_program(method):
    environment = os.environ | {"XLA_FLAGS": ""}
    line = [sys.executable, "-c", PROGRAM, method]
    subprocess.run(line, env=environment, check=True, timeout=240)
