import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from mtjax.data import DataNotFoundError, load_problem, prepare, problem_names
from mtjax.data.tables import encode_inputs, scale_targets, split_rows

SPLITS = ("train", "validation", "test")


def check(problem):
    names = [task.name for task in problem.tasks]
    assert names == sorted(names)
    for split in SPLITS:
        part = getattr(problem, split)
        assert part["inputs"].dtype == np.float32
        assert np.isfinite(part["inputs"]).all()
        assert sorted(part["targets"]) == names
        for values in part["targets"].values():
            assert values.shape == part["inputs"].shape[:1]
            assert np.isfinite(values).all()
    assert problem.description
    assert problem.licence


def test_multi_mnist_needs_no_data_folder(tmp_path):
    problem = load_problem("multi_mnist", tmp_path)
    check(problem)
    assert problem.train["inputs"].shape == (20_000, 18, 18, 1)
    assert [task.name for task in problem.tasks] == ["left", "right"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("energy_efficiency", (537, 77, 154)),
        ("mulan_mtr/sf1", (225, 33, 65)),
        ("mulan_mtr/osales", (447, 64, 128)),
    ],
)
def test_problems_are_complete_and_the_same_every_time(name, sizes, prepared):
    problem, again = load_problem(name, prepared), load_problem(name, prepared)
    check(problem)
    for split, size in zip(SPLITS, sizes):
        part = getattr(problem, split)
        assert len(part["inputs"]) == size
        np.testing.assert_array_equal(part["inputs"], getattr(again, split)["inputs"])


def test_adult_has_no_leak_and_sensible_labels(prepared):
    problem = load_problem("adult", prepared)
    check(problem)
    sizes = [len(getattr(problem, split)["inputs"]) for split in SPLITS]
    assert sizes == [29_304, 3_257, 16_281]
    model = LogisticRegression(max_iter=200)
    expected = {"income": (0.83, 0.95), "married": (0.75, 0.95)}
    for task, (low, high) in expected.items():
        model.fit(
            problem.train["inputs"][:2_000], problem.train["targets"][task][:2_000]
        )
        scores = model.decision_function(problem.test["inputs"])
        assert low < roc_auc_score(problem.test["targets"][task], scores) < high


def test_energy_targets_are_scaled_and_predictable(prepared):
    problem = load_problem("energy_efficiency", prepared)
    load = next(task for task in problem.tasks if task.name == "heating_load")
    target = problem.train["targets"]["heating_load"]
    assert abs(target.mean()) < 1e-5
    assert abs(target.std() - 1.0) < 1e-5
    assert 9.0 < load.std < 11.0
    model = Ridge().fit(problem.train["inputs"], target)
    error = model.predict(problem.test["inputs"]) - problem.test["targets"][load.name]
    assert np.sqrt(np.mean(error**2)) < 0.4


def test_parkinsons_persons_stay_on_one_side(prepared):
    problem = load_problem("parkinsons_telemonitoring", prepared)
    check(problem)
    # Age and sex are constant for a person: no combination may cross the splits
    # unless two persons share it.
    sizes = [len(getattr(problem, split)["inputs"]) for split in SPLITS]
    assert sum(sizes) == 5_875
    assert problem.train["inputs"].shape[1] == 19


def test_missing_inputs_are_filled_and_marked(prepared):
    problem = load_problem("mulan_mtr/osales", prepared)
    assert problem.train["inputs"].shape[1] > 401
    check(problem)


@pytest.mark.slow
def test_census_matches_the_published_difficulty(originals, tmp_path):
    name = "census_income_kdd/original"
    prepare(name, originals(name), tmp_path, progress=False)
    problem = load_problem("census_income_kdd", tmp_path)
    check(problem)
    model = LogisticRegression(max_iter=1_000)
    for task, low in {"income": 0.93, "never_married": 0.985}.items():
        train = slice(0, 20_000)
        model.fit(problem.train["inputs"][train], problem.train["targets"][task][train])
        scores = model.decision_function(problem.test["inputs"])
        assert roc_auc_score(problem.test["targets"][task], scores) > low


def test_groups_are_never_split():
    groups = np.repeat(np.arange(20), 7)
    rows = split_rows([140], groups, seed=0)
    owners = [set(groups[chosen]) for chosen in rows.values()]
    assert set().union(*owners) == set(range(20))
    assert sum(map(len, owners)) == 20


def test_official_test_part_stays_whole():
    rows = split_rows([50, 30], None, seed=0)
    np.testing.assert_array_equal(rows["test"], np.arange(50, 80))
    assert len(rows["validation"]) == 5


def test_statistics_come_from_the_training_rows():
    columns = {
        "numeric": np.array([[1.0], [3.0], [100.0], [np.nan]], np.float32),
        "categorical": np.array([[0], [1], [2], [1]], np.int32),
    }
    metadata = {"numeric": ["size"], "categorical": {"colour": ["?", "red", "blue"]}}
    train_rows = np.array([0, 1])
    inputs = encode_inputs(columns, metadata, drop=[], train_rows=train_rows)
    np.testing.assert_allclose(inputs[:, 0], [-1, 1, 98, 0])
    np.testing.assert_array_equal(inputs[:, 1:], [[1, 0], [0, 1], [0, 0], [0, 1]])
    with pytest.raises(ValueError, match="`drop` must name columns"):
        encode_inputs(columns, metadata, drop=["shape"], train_rows=train_rows)


def test_missing_targets_stay_missing_and_constants_finite():
    values = np.array([1.0, np.nan, 5.0], np.float32)
    scaled, mean, std = scale_targets(values, np.arange(3))
    assert (mean, std) == (3.0, 2.0)
    np.testing.assert_array_equal(scaled, np.array([-1, np.nan, 1], np.float32))
    assert scale_targets(np.ones(3, np.float32), np.arange(3))[2] == 1.0


def test_missing_data_and_unknown_names(tmp_path):
    with pytest.raises(DataNotFoundError, match="mtjax data prepare adult"):
        load_problem("adult", tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'parkinsons_telemonitoring'"):
        load_problem("parkinson")
    assert len(problem_names()) == 20
