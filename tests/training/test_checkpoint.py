"""Checkpoints: round trips, damage, other configurations, other devices."""

import dataclasses
import enum
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError

import mtjax
from mtjax.training import (
    Checkpoints,
    ConfigMismatchError,
    TrainState,
    data_mesh,
    fully_sharded,
    replicate,
)


def make_state(step=0, seed=0):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (8, 16)), "b": jnp.ones(5, jnp.bfloat16)}
    tx = optax.chain(mtjax.famo(2), optax.adam(1e-3))
    state = TrainState.create(params, tx, model_state={"n": jnp.int32(3)}, key=key)
    return dataclasses.replace(state, step=jnp.int32(step))


def raw(state):
    return jax.tree.map(np.asarray, dataclasses.replace(state, key=state.step))


def assert_same(a, b):
    chex.assert_trees_all_equal(raw(a), raw(b))
    chex.assert_trees_all_equal_dtypes(raw(a), raw(b))
    assert jnp.array_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))


@pytest.fixture
def saved(tmp_path):
    """A run folder with checkpoints of the steps 1 and 2."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step, seed=step), data_state={"next": step})
    return tmp_path


def test_round_trip_of_every_field_and_of_the_data_state(tmp_path):
    data_state = {"next_index": np.int64(3), "inner": b"\x00\xff", "mix": [1, None]}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()) is None
        assert checkpoints.latest_step is None
        checkpoints.save(make_state(4, seed=9), data_state)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 4
        state, restored = checkpoints.restore(make_state())
    assert_same(state, make_state(4, seed=9))
    assert restored == {"next_index": 3, "inner": b"\x00\xff", "mix": [1, None]}
    assert type(state.opt_state[0]) is type(make_state().opt_state[0])


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = dataclasses.replace(make_state(1), params=jnp.zeros((1000, 1000)))
    overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = dataclasses.replace(state, params=overwrite(state.params))
        restored, _ = checkpoints.restore(state)
    assert not restored.params.any()


def test_template_may_be_abstract_or_deleted(saved):
    template = make_state()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template
    )
    jax.tree.map(lambda x: x.delete(), template)
    with Checkpoints(saved) as checkpoints:
        for each in (abstract, template):
            assert_same(checkpoints.restore(each)[0], make_state(2, seed=2))


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(make_state(step))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "00000003",
        "00000004",
    ]


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 2)])
def test_keeps_the_best(tmp_path, mode, best):
    values = {1: float("nan"), 2: 0.9, 3: 0.1, 4: 0.5, 5: 0.9}
    keep_best = ("a/loss", mode)
    with Checkpoints(tmp_path, keep=1, keep_best=keep_best) as checkpoints:
        assert checkpoints.best is None
        for step, value in values.items():
            checkpoints.save(make_state(step), metrics={"a": {"loss": value}})
        checkpoints.save(make_state(6))
        checkpoints.wait()
        assert checkpoints.best == best
        state, _ = checkpoints.restore(make_state(), step=checkpoints.best)
    assert int(state.step) == best
    names = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert names == [best, 6]


def test_steps_must_grow(saved):
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(ValueError, match="got step 2 after step 2"):
            checkpoints.save(make_state(2))
        checkpoints.save(make_state(3))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip])
@pytest.mark.parametrize("pattern", ["commit.json", "state/d/*", "state/_METADATA"])
def test_damaged_checkpoint_is_skipped_with_a_warning(saved, damage, pattern):
    newest = saved / "checkpoints" / "00000002"
    damage(next(newest.glob(pattern)))
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match="Skipping checkpoint .*00000002"):
            state, data_state = checkpoints.restore(make_state())
        assert_same(state, make_state(1, seed=1))
        assert data_state == {"next": 1}
        assert checkpoints.latest_step == 1
        # Saving the same step again replaces the damaged one.
        checkpoints.save(make_state(2, seed=7))
    with Checkpoints(saved) as checkpoints:
        assert_same(checkpoints.restore(make_state())[0], make_state(2, seed=7))


def test_damaged_newer_checkpoints_do_not_push_out_the_good_ones(saved):
    with Checkpoints(saved, keep=4) as checkpoints:
        checkpoints.save(make_state(5))
        checkpoints.save(make_state(9))
    for name in ("00000005", "00000009"):
        cut(saved / "checkpoints" / name / "commit.json")
    with Checkpoints(saved, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="Skipping"):
            checkpoints.restore(make_state())
        checkpoints.save(make_state(3))
    names = sorted(int(p.name) for p in (saved / "checkpoints").iterdir())
    assert names == [2, 3]


def test_nothing_good_is_left(saved):
    for path in saved.glob("checkpoints/*/commit.json"):
        path.unlink()
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match="never finished"):
            assert checkpoints.restore(make_state()) is None
        with pytest.raises(ValueError, match="never finished"):
            checkpoints.restore(make_state(), step=2)
        checkpoints.save(make_state(1))


def test_leftovers_of_a_killed_save_are_removed(saved):
    folder = saved / "checkpoints"
    shutil.copytree(folder / "00000002", folder / "00000003.orbax-checkpoint-tmp")
    shutil.copytree(folder / "00000002", folder / "00000003")
    (folder / "00000003" / "commit.json").unlink()
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match="00000003: it was never finished"):
            assert int(checkpoints.restore(make_state())[0].step) == 2
        checkpoints.save(make_state(3))
    assert sorted(p.name for p in folder.iterdir()) == [
        "00000001",
        "00000002",
        "00000003",
    ]


def test_failure_in_the_background_is_raised_later(tmp_path, monkeypatch):
    def fail(path, record):
        raise OSError("disk full")

    monkeypatch.setattr("mtjax.training.checkpoint.write_commit", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.close()


class Activation(enum.Enum):
    RELU = 1


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    tasks: tuple[str, ...] = ("a", "b")
    data_dir: Path = Path("data")
    activation: Activation = Activation.RELU
    inner: dict = dataclasses.field(default_factory=lambda: {"depth": 2, "x": np.pi})


def test_same_configuration_is_accepted(tmp_path):
    for _ in range(2):
        Checkpoints(tmp_path, config=Config()).close()
    Checkpoints(tmp_path).close()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tasks"] == ["a", "b"]
    assert saved["activation"] == "RELU"


def test_other_configuration_is_refused_field_by_field(tmp_path):
    Checkpoints(tmp_path, config=Config()).close()
    other = Config(lr=0.2, inner={"depth": 3, "width": 5})
    with pytest.raises(ConfigMismatchError) as error:
        Checkpoints(tmp_path, config=other)
    lines = str(error.value).splitlines()[1:-1]
    assert lines == [
        "  inner.depth: 2 there, 3 here",
        "  inner.width: missing there, 5 here",
        "  inner.x: 3.141592653589793 there, missing here",
        "  lr: 0.1 there, 0.2 here",
    ]


def test_nan_in_a_configuration_equals_itself(tmp_path):
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path, config={"clip": float("nan")})
        assert checkpoints.latest_step is None
        checkpoints.close()


def test_configuration_without_json_form(tmp_path):
    with pytest.raises(TypeError, match="`config` must hold"):
        Checkpoints(tmp_path, config={"fn": print})
    with pytest.raises(TypeError, match="`config` must be a dataclass or a mapping"):
        Checkpoints(tmp_path, config=[1])


def test_checkpoints_without_configuration_are_not_adopted(saved):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Checkpoints(saved, config={"lr": 1.0})


def test_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\]"):
        Checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_folder_in_which_only_loggers_have_written_is_accepted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "events.out.tfevents.1").write_text("")
    Checkpoints(tmp_path).close()
    assert (tmp_path / "checkpoints").is_dir()


def test_other_model_is_refused_leaf_by_leaf(saved):
    state = make_state()
    template = dataclasses.replace(
        state, params={"w": jnp.ones((8, 4)), "c": jnp.ones(2)}
    )
    checkpoints = Checkpoints(saved)
    with pytest.raises(ValueError, match="these leaves differ") as error:
        checkpoints.restore(template)
    checkpoints.close()
    lines = str(error.value).splitlines()[1:-1]
    assert lines == [
        "  .params['b']: bfloat16[5] there, missing here",
        "  .params['c']: missing there, float32[2] here",
        "  .params['w']: float32[8, 16] there, float32[8, 4] here",
    ]


@pytest.mark.parametrize(("field", "value"), [("keep", 0), ("keep_best", ("a", "up"))])
def test_arguments_out_of_range(tmp_path, field, value):
    # The type checker of the tests comes before the check of the class.
    with pytest.raises((ValueError, TypeCheckError), match=field):
        Checkpoints(tmp_path, **{field: value})


def test_from_eight_devices_to_four_to_one_to_fully_sharded(tmp_path):
    devices = jax.devices()
    eight, four = data_mesh(devices), data_mesh(devices[:4])
    original = make_state(1, seed=3)
    sharded = fully_sharded(original, eight, min_size=1)
    state = jax.device_put(original, sharded)
    assert len(state.params["w"].addressable_shards) == 8
    templates = [
        replicate(make_state(), four),
        make_state(),
        jax.device_put(make_state(), fully_sharded(make_state(), four, min_size=1)),
        jax.device_put(make_state(), sharded),
    ]
    for step, template in enumerate(templates, start=1):
        state = dataclasses.replace(state, step=state.step * 0 + step)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state)
            state, _ = checkpoints.restore(template)
        assert_same(state, dataclasses.replace(original, step=jnp.int32(step)))
        jax.tree.map(
            lambda a, b: chex.assert_equal(a.sharding, b.sharding), *(state, template)
        )
