"""Merging files: the numbers of memory, in any layout, whole or not at all."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from mtjax.merging import (
    merge_checkpoints,
    orbax_files,
    reading,
    task_arithmetic,
    ties,
    writing,
)
from tests.merging.catalogue import KEY, METHODS, models_like

SHAPES = {"layers.0.weight": (130, 400), "layers.1.weight": (130, 400), "norm": (8,)}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 14)  # four pieces per matrix


def save(folder, tree, files=1):
    """Writes a checkpoint as Hugging Face does, over so many files."""
    folder.mkdir()
    tree = {path: np.asarray(x) for path, x in tree.items()}
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {path: names[i % files] for i, path in enumerate(tree)}
    for name in names:
        part = {path: x for path, x in tree.items() if where[path] == name}
        save_file(part, folder / name)
    if files > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def trees():
    return models_like(SHAPES, 3)


@pytest.fixture
def folders(tmp_path, trees):
    base, models = trees
    names = "abc"[: len(models)]
    models = [
        save(tmp_path / n, m, files=i + 1)
        for i, (n, m) in enumerate(zip(names, models))
    ]
    return save(tmp_path / "base", base, files=2), models


def loaded(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_files_give_the_numbers_of_memory(method, tmp_path, folders, trees):
    base, models = folders
    number = method.models[-1]
    out = tmp_path / "out"
    plan = merge_checkpoints(method.merger, models[:number], out, base=base, key=KEY)
    expected = method.merger(trees[0], trees[1][:number], key=KEY)
    found = loaded(out)
    assert sorted(found) == sorted(expected)
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=1e-5, atol=2e-6)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert plan.reader.whole == (not method.merger.elementwise) or plan.reader.whole


def test_names_types_heads_and_counters(tmp_path, trees):
    base, (model, *_) = trees
    base |= {"head": jnp.ones((2, 5)), "steps": jnp.arange(3)}
    model |= {"head": jnp.ones((2, 7)), "steps": jnp.arange(3) + 1}
    half = {p: np.asarray(x, jnp.bfloat16) for p, x in model.items()}
    half["steps"] = np.asarray(model["steps"])
    save(tmp_path / "base", base)
    save(tmp_path / "a", half)
    out = tmp_path / "merged.safetensors"
    plan = merge_checkpoints(
        task_arithmetic(1.0),
        {"a": tmp_path / "a"},
        out,
        base=tmp_path / "base",
        where="layers|norm|steps",
        dtype=jnp.float16,
    )
    found = load_file(out)
    assert found["norm"].dtype == np.float16
    np.testing.assert_array_equal(found["head"], base["head"])
    np.testing.assert_array_equal(found["steps"], base["steps"])
    np.testing.assert_allclose(
        found["norm"], half["norm"].astype(np.float32), rtol=1e-3
    )
    assert plan.kept == ("head", "steps")
    assert {note.kind for note in plan.notes} == {"precision"}
    assert "copy 2" in plan.describe()


def test_orbax_and_safetensors_mix(tmp_path, trees):
    base, models = trees
    nested = lambda tree: {
        "layers": {str(i): {"weight": tree[f"layers.{i}.weight"]} for i in range(2)},
        "norm": tree["norm"],
    }
    ocp.save(tmp_path / "base", nested(base))
    ocp.save(tmp_path / "a", nested(models[0]))
    save(tmp_path / "b", models[1], files=3)
    inputs = [tmp_path / "a", tmp_path / "b"]
    merger = task_arithmetic(0.5)
    merge_checkpoints(merger, inputs, tmp_path / "out", base=tmp_path / "base")
    found = ocp.load(tmp_path / "out")
    expected = nested(merger(base, models[:2]))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    # Without a base the first model says what the layout is.
    single = tmp_path / "single.safetensors"
    merge_checkpoints(merger, inputs, single, base=tmp_path / "base")
    np.testing.assert_allclose(load_file(single)["norm"], expected["norm"], rtol=1e-5)


def test_an_interrupted_merge_into_orbax_goes_on(tmp_path, trees, monkeypatch):
    base, models = trees
    for name, tree in (("base", base), ("a", models[0])):
        ocp.save(tmp_path / name, tree)
    merge = lambda: merge_checkpoints(
        task_arithmetic(),
        [tmp_path / "a"],
        tmp_path / "out",
        base=tmp_path / "base",
        identity="x",
    )
    with monkeypatch.context() as patched:
        patched.setattr(orbax_files._Later, "read", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writing.Output, "write", lambda *_: 1 / 0)  # all is there
    merge()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "base", "out"]
    found = ocp.load(tmp_path / "out")
    expected = task_arithmetic()(base, models[:1])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_type_that_no_file_holds_is_an_error(tmp_path):
    tree = {"w": np.ones(3, np.float32), "phase": np.ones(2, np.complex64)}
    for name in ("base", "a"):
        ocp.save(tmp_path / name, tree)
    with pytest.raises(ValueError, match="'phase' has the type complex64"):
        merge_checkpoints(
            task_arithmetic(),
            [tmp_path / "a"],
            tmp_path / "out",
            base=tmp_path / "base",
        )
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("merger", [task_arithmetic(), ties(scope="tensor")])
def test_float64_stays_float64(merger, tmp_path, trees):
    wide = lambda tree: {path: np.asarray(x, np.float64) for path, x in tree.items()}
    base, models = trees
    paths = [save(tmp_path / f"{i}", wide(tree)) for i, tree in enumerate(models)]
    merge_checkpoints(
        merger, paths, tmp_path / "out", base=save(tmp_path / "base", wide(base))
    )
    found = loaded(tmp_path / "out")
    assert {x.dtype for x in found.values()} == {np.dtype(np.float64)}
    chex.assert_trees_all_close(found, wide(merger(base, models)), rtol=1e-5, atol=1e-6)


def test_float32_becomes_float64_on_demand(tmp_path, folders, trees):
    base, models = folders
    merger, out = task_arithmetic(), tmp_path / "out"
    merge_checkpoints(merger, models, out, base=base, dtype=np.float64)
    found = loaded(out)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float64)}
    expected = {path: np.asarray(x, np.float64) for path, x in merger(*trees).items()}
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_large_outputs_are_cut_into_files(tmp_path, folders, trees, monkeypatch):
    monkeypatch.setattr(writing, "SHARD", 300_000)
    base, models = folders
    merge_checkpoints(ties(), models, tmp_path / "out", base=base)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == 4 * (2 * 130 * 400 + 8)
    chex.assert_trees_all_close(
        loaded(tmp_path / "out"), ties()(*trees), rtol=1e-5, atol=1e-6
    )
    # What was written can be merged again.
    again = tmp_path / "again"
    merge_checkpoints(task_arithmetic(1.0), [tmp_path / "out"], again, base=base)
    chex.assert_trees_all_close(loaded(again), loaded(tmp_path / "out"), rtol=1e-5)


def test_an_interrupted_merge_goes_on(tmp_path, folders, trees, monkeypatch):
    base, models = folders
    out, merger, written = tmp_path / "out", task_arithmetic(), []
    write = writing.Output.write

    def stops(self, path, values, begin):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append((path, begin))
        write(self, path, values, begin)

    monkeypatch.setattr(writing.Output, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(merger, models, out, base=base, identity="x")
    assert not out.exists()
    monkeypatch.setattr(writing.Output, "write", write)

    def merge(identity):
        seen = []
        monkeypatch.setattr(
            writing.Output, "write", lambda s, *a: (seen.append(a[0]), write(s, *a))
        )
        plan = merge_checkpoints(merger, models, out, base=base, identity=identity)
        assert not (tmp_path / "out.partial").exists()
        return seen, plan

    seen, plan = merge("x")
    assert written[0][0] == plan.merged[0]
    assert plan.merged[0] not in seen  # was complete
    chex.assert_trees_all_close(loaded(out), merger(*trees), rtol=1e-5, atol=1e-6)


def test_an_attempt_at_something_else_is_not_used(
    tmp_path, folders, trees, monkeypatch
):
    base, models = folders
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(writing.Output, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_checkpoints(
                task_arithmetic(9.0), models, out, base=base, identity="x"
            )
    merge_checkpoints(task_arithmetic(), models, out, base=base, identity="y")
    chex.assert_trees_all_close(
        loaded(out), task_arithmetic()(*trees), rtol=1e-5, atol=1e-6
    )


def test_a_missing_array_is_an_error_or_unchanged(tmp_path, trees):
    base, models = trees
    tied = {path: x for path, x in models[0].items() if path != "norm"}
    save(tmp_path / "base", base)
    save(tmp_path / "a", tied)
    arguments = (task_arithmetic(1.0), [tmp_path / "a"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"norm: missing, float32\[8\]"):
        merge_checkpoints(*arguments, base=tmp_path / "base")
    merge_checkpoints(*arguments, base=tmp_path / "base", missing="unchanged")
    np.testing.assert_array_equal(loaded(tmp_path / "out")["norm"], base["norm"])


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def damage_header_length(file):
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def damage_shape(file):
    text = b'{"w":{"dtype":"F32","shape":[1099511627776,64],"data_offsets":[0,4]}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")


def damage_text(file):
    file.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_header_length, damage_shape, damage_text]
)
def test_a_damaged_file_is_an_error_before_anything_is_read(damage, tmp_path, folders):
    base, models = folders
    damage(models[0] / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        merge_checkpoints(ties(), models, tmp_path / "out", base=base)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../base/model-00001-of-00002.safetensors", "outside of its folder"),
        ("/etc/passwd", "outside of its folder"),
        ("model-00009-of-00009.safetensors", "does not exist"),
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(name, message, tmp_path, folders):
    base, models = folders
    index = models[1] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["norm"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(ties(), models, tmp_path / "out", base=base)


def test_refusals(tmp_path, folders):
    base, models = folders
    with pytest.raises(ValueError, match="must be new"):
        merge_checkpoints(ties(), models, models[0], base=base)
    with pytest.raises(ValueError, match="does not exist"):
        merge_checkpoints(ties(), [tmp_path / "no"], tmp_path / "out", base=base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        merge_checkpoints(ties(), [tmp_path / "empty"], tmp_path / "out", base=base)
    ocp.save(tmp_path / "listed", {"a": [jnp.ones(2), jnp.ones(2)]})
    with pytest.raises(ValueError, match="dictionaries alone"):
        merge_checkpoints(ties(), [tmp_path / "listed"], tmp_path / "out", base=base)
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_writes_nothing(tmp_path, folders):
    base, models = folders
    plan = merge_checkpoints(ties(), models, tmp_path / "out", base=base, dry_run=True)
    assert not list(tmp_path.glob("out*"))
    assert plan.bytes_written == 4 * (2 * 130 * 400 + 8)
    assert plan.bytes_read == (ties().passes + 1) * 4 * plan.bytes_written
    assert jax.tree.leaves(plan.merged)
