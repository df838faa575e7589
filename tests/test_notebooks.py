"""The notebooks run, say what is true, and are committed clean and with outputs."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip(
    "nbformat", reason="needs `pip install mtjax[notebooks]`"
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))

# Run after the last cell, with the names of the notebook.
CLAIMS = {
    "quickstart": """
assert -1.0 <= cosine.min() and cosine.max() <= 1.0
assert accuracy(params_sum)["left"] > 0.85
assert accuracy(params_balanced)["left"] > 0.85
drowned, rescued = results["sum, other units"], results["nash_mtl, other units"]
assert rescued["left"] > drowned["left"] + 0.1
""",
    "compose_optimizers": """
import scipy.optimize

far = {name: distance_to(front, path[:, -1]) for name, path in paths.items()}
for name in ("mgda", "upgrad", "nash_mtl"):
    assert far[name].max() < 0.1, (name, far[name])
for name in ("pcgrad", "cagrad", "uw"):  # from the third start it hangs on rounding
    assert far[name][:2].max() < 0.1, (name, far[name])
assert far["equal"][0] > 1.0
assert (abs(paths["uw"][:2, -1, 0]) > 6.9).all()

# Points of the front are stationary: some convex combination of gradients vanishes.
jacobian = jax.vmap(jax.jacobian(lambda p: jnp.stack(list(losses_fn(p).values()))))
for grads in np.asarray(jacobian(jnp.asarray(front[::400], jnp.float32))):
    shortest = scipy.optimize.minimize_scalar(
        lambda w: np.linalg.norm(w * grads[0] + (1 - w) * grads[1]),
        bounds=(0, 1),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert shortest.fun < 1e-4

ends = {choice: path[:, -1] for choice, path in paths2.items()}
for choice, points in ends.items():
    assert distance_to(front2, points).max() < 0.01, choice
for weighting in ("none", "uw"):
    for name in ("equal", "cagrad"):
        assert np.ptp(position(ends[weighting, "none", name])) < 0.02
assert np.ptp(position(ends["none", "none", "mgda"])) > 0.5
for name in ("equal", "cagrad"):
    assert np.ptp(position(ends["none", "0.1", name])) > 0.3
""",
    "gradient_conflict": """
ends = {name: path[:, -1] for name, path in paths.items()}
for points in ends.values():  # on the front, the line between the centres
    assert abs(points[:, 1]).max() < 1e-2 and abs(points[:, 0]).max() < 1
assert (abs(ends["equal"][:, 0]) > 0.95).all()
for name in ("pcgrad", "mgda", "imtl_g"):
    assert abs(ends[name][1, 0]) < 0.4

recorded = {name: records for name, (_, records) in trained.items()}
assert (recorded["equal"]["between tasks"][:, 0] < 0).mean() > 0.4
lengths = np.median(recorded["equal"]["length"], axis=0)
assert lengths[2] > 6 * lengths[:2].max()
against = {n: (r["with update"] < -1e-3).any(-1).mean() for n, r in recorded.items()}
assert against["equal"] > 0.05 and against["pcgrad"] < 0.02
assert against["mgda"] == against["imtl_g"] == 0
assert np.ptp(recorded["imtl_g"]["with update"], axis=-1).max() < 0.02
assert min(scores["imtl_g"][:2]) > max(scores["equal"][:2]) + 0.03
assert scores["mgda"][2] > scores["equal"][2]
""",
    "model_merging": """
assert (own > table[0] + 0.1).all()  # fine-tuning helped each task
assert (alone[0] < alone[12])[2]  # a negative coefficient forgets
mean = {name: row.mean() for name, row in result.items()}
assert mean["base"] + 0.03 < mean["average"] < 1
assert mean["average"] - 0.02 < mean["task arithmetic"] < mean["TSV-M"] - 0.02
assert mean["EMR"] > mean["TSV-M"] + 0.03
assert entropy[-20:].mean() < entropy[:20].mean()
assert mean["AdaMerging"] < mean["TSV-M"]
""",
    "multi_task_ranking": """
auc = {n: {t: m["roc_auc"] for t, m in row.items()} for n, row in table.items()}
for row in auc.values():
    for task in ("click", "buy"):
        assert ideal[task]["roc_auc"] - 0.03 < row[task] < ideal[task]["roc_auc"] + 0.01
assert auc["shared bottom"]["return"] > auc["PLE"]["return"] + 0.01
own = panels["PLE"]
assert own.shape == (3, 8) and (own[0, 2:6] == 0).all() and (own[:, 6:] > 0).all()
assert cosines("shared bottom")[1][0, 2] > 0.2
wrong = {way: np.mean(pairs, axis=0) for way, pairs in errors.items()}
assert (wrong["entire space"] < wrong["after clicks"] - 0.003).all()
assert all(x.shape == (100,) for x in alone)
""",
}


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 2 <= len(code) <= 15
    assert "%pip install -q mtjax" in code[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" for output in outputs)
    # Warnings, and with them paths of a machine, go to this stream.
    assert all(output.get("name") != "stderr" for output in outputs)


def test_every_notebook_has_claims_to_check():
    assert {path.stem for path in NOTEBOOKS} == set(CLAIMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
def test_notebook_runs(path, monkeypatch):
    nbclient = pytest.importorskip(
        "nbclient", reason="needs `pip install mtjax[notebooks]`"
    )
    pytest.importorskip("ipykernel", reason="needs `pip install mtjax[notebooks]`")
    # The kernel runs like a reader's: one device, the library from this checkout.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    )
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[path.stem]))
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert images
