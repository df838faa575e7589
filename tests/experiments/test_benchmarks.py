"""The benchmarks run without the peers, and say that these are missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def output_of(script, *arguments):
    # One device, as a user has it, and not the eight of the tests.
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, f"experiments/benchmarks/{script}.py", *arguments]
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


def rows(output):
    lines = [x.strip("| ").split(" | ") for x in output.splitlines() if x[:1] == "|"]
    assert len({len(x) for x in lines}) == 1, output
    return lines[2:]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "resnet", "vit"])
def test_step_time(model):
    output = output_of("step_time", "quick", "--model", model)
    for library in ("torchjd", "libmtl"):
        assert f"{library} is left out: no `--{library}-python`" in output
    total, uw, cagrad = rows(output)
    assert [total[0], uw[0], cagrad[0]] == ["plain sum", "uw", "cagrad"]
    assert [total[1], uw[1], cagrad[1]] == ["1", "1", "2.3, ghost 1.3"]
    assert all(float(cell) > 0 for row in (total, uw, cagrad) for cell in row[2:4])


@pytest.mark.slow
def test_aggregator_time():
    output = output_of("aggregator_time", "quick", "--limit-gb", "1e-5")
    assert "torchjd is left out: no `--torchjd-python`" in output
    assert [row[:3] for row in rows(output)] == [
        ["2", "1e+03", "cagrad"],
        ["2", "1e+03", "graddrop"],
    ]
    assert re.search(r"Skipped above 1e-05 GB: 4 x 1e\+03 \(0\.0 GB\)", output)


@pytest.mark.slow
def test_an_interpreter_without_the_peer_is_the_same_as_none():
    output = output_of("aggregator_time", "quick", "--torchjd-python", sys.executable)
    assert "torchjd is left out" in output
    assert len(rows(output)) == 4


@pytest.mark.slow
def test_embedding_updates():
    table = rows(output_of("embedding_updates", "quick"))
    assert {row[1] for row in table} == {"Adam", "lazy Adam"}
    assert all(float(row[2]) > 0 for row in table)


@pytest.mark.slow
def test_merge_throughput():
    output = output_of("merge_throughput", "quick")
    assert "mergekit is left out: give its command with --mergekit" in output
    table = rows(output)
    assert [row[0] for row in table] == [
        "linear",
        "task_arithmetic",
        "ties",
        "dare_ties",
    ]
    assert all(float(cell) > 0 for row in table for cell in row[2:])


@pytest.mark.slow
def test_ranking_throughput():
    output = output_of("ranking_throughput", "quick")
    assert "torch-rechub is left out: no `--rechub-python`" in output
    found = rows(output)
    assert [row[:4] for row in found] == [
        ["MMoE", "4", "16", "256"],
        ["PLE", "4", "16", "256"],
    ]
    assert all(float(cell.replace(",", "")) > 0 for row in found for cell in row[5:])
