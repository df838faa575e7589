import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from mtjax.data import (
    DataNotFoundError,
    census_ranking,
    fit_table_encoder,
    movielens_ranking,
    prepare,
    ranking_problem,
    rows_by_time,
    time_cuts,
)
from mtjax.data import movielens as movielens_module
from mtjax.data import ranking_census as census_module

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def census_rows(first_rows):
    return first_rows("census_income_kdd/original", "test", 4_000)


@pytest.fixture
def census(census_rows, monkeypatch):
    parts = {"test": census_rows}
    monkeypatch.setattr(census_module, "official_parts", lambda *_: parts)
    return parts


@pytest.fixture(scope="module")
def rating_rows(first_rows):
    return first_rows("movielens_latest_small", "train", 4_000)


@pytest.fixture
def ratings(rating_rows, monkeypatch):
    monkeypatch.setattr(movielens_module, "tfds_source", lambda *_, **__: rating_rows)
    return rating_rows


def table(rows=60, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "shop": generator.integers(0, 9, rows),
        "city": generator.choice(np.array(["", "oslo", "rome", "a long name"]), rows),
        "price": generator.lognormal(size=rows),
        "age": np.where(generator.random(rows) < 0.2, np.nan, generator.random(rows)),
        "click": generator.integers(0, 2, rows),
        "buy": generator.choice([0.0, 1.0, np.nan], rows),
    }


def problem_of(data, **changes):
    rows = np.array_split(np.arange(len(data["click"])), [30, 45])
    options = {
        "tasks": ["click", "buy"],
        "fields": ["shop", "city"],
        "numbers": ["price", "age"],
        "log1p": ["price"],
    }
    splits = dict(zip(SPLITS, rows))
    return ranking_problem("shop", data, splits, **(options | changes))


def check(problem):
    for name in SPLITS:
        part = problem.split(name)
        rows = len(part["categorical"])
        assert part["categorical"].dtype == np.int32
        assert part["categorical"].shape == (rows, len(problem.fields))
        assert part["numeric"].dtype == np.float32
        assert part["numeric"].shape == (rows, len(problem.numbers))
        assert np.isfinite(part["numeric"]).all()
        sizes = list(problem.vocabulary_sizes.values())
        assert (part["categorical"] >= 0).all()
        assert (part["categorical"] < np.array(sizes)[None]).all()
        assert list(part["labels"]) == list(problem.tasks)
        for values in part["labels"].values():
            assert values.dtype == np.float32
            assert values.shape == (rows,)
            assert set(np.unique(values[~np.isnan(values)])) <= {0.0, 1.0}
    # Only a value that training does not have is unknown.
    assert not (problem.train["categorical"] == 1).any()
    assert problem.description
    assert problem.licence


def test_ids_and_numbers_are_those_of_scikit_learn():
    data = table()
    problem = problem_of(data)
    train, test = slice(0, 30), slice(45, 60)
    ordinal = OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=-1, dtype=np.int32
    )
    for column, name in enumerate(("shop", "city")):
        missing = data[name] == "" if name == "city" else np.zeros(60, bool)
        seen = data[name][train][~missing[train]]
        ordinal.fit(seen[:, None])
        expected = ordinal.transform(data[name][test][:, None])[:, 0] + 2
        expected[missing[test]] = 0
        np.testing.assert_array_equal(problem.test["categorical"][:, column], expected)
    numbers = np.stack([np.log1p(data["price"]), data["age"]], axis=1)
    expected = StandardScaler().fit(numbers[train]).transform(numbers[test])
    np.testing.assert_allclose(
        problem.test["numeric"], np.nan_to_num(expected), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        problem.train["labels"]["buy"], data["buy"][train].astype(np.float32)
    )


def test_training_does_not_see_the_other_rows():
    data = table()
    before = problem_of(data)
    data["shop"][40:] = np.arange(100, 120)
    data["city"][40:] = "a city with a long name that comes first"
    data["price"][40:] *= 1e6
    after = problem_of(data)
    for key in ("categorical", "numeric"):
        np.testing.assert_array_equal(before.train[key], after.train[key])
    assert before.vocabulary_sizes == after.vocabulary_sizes
    np.testing.assert_array_equal(after.test["categorical"], 1)


def test_chunks_give_the_same_encoder_as_one_table():
    data = table(1_000, seed=1)
    chunks = [
        {name: values[start : start + 130] for name, values in data.items()}
        for start in range(0, 1_000, 130)
    ]
    options = {
        "fields": ["shop", "city"],
        "numbers": ["price", "age"],
        "min_count": 110,
    }
    whole = fit_table_encoder([data], **options)
    parts = fit_table_encoder(chunks, **options)
    np.testing.assert_allclose(parts.numeric(data), whole.numeric(data), atol=1e-5)
    np.testing.assert_array_equal(parts.categorical(data), whole.categorical(data))
    shops, counts = np.unique(data["shop"], return_counts=True)
    rare = ~np.isin(data["shop"], shops[counts >= 110])
    np.testing.assert_array_equal(parts.categorical(data)[:, 0] == 1, rare)
    assert 0.0 < rare.mean() < 1.0


def test_large_numbers_keep_their_small_differences():
    values = 1e9 + np.arange(6.0)
    encoder = fit_table_encoder(
        [{"x": values[:3]}, {"x": values[3:]}], fields=[], numbers=["x"]
    )
    expected = (np.arange(6.0) - 2.5) / np.arange(6.0).std()
    np.testing.assert_allclose(
        encoder.numeric({"x": values})[:, 0], expected, rtol=1e-6
    )


def test_a_constant_number_and_an_empty_field_are_harmless():
    data = {"x": np.ones(4), "shop": np.array(["", "?", "", ""])}
    encoder = fit_table_encoder([data], fields=["shop"], numbers=["x"])
    np.testing.assert_array_equal(encoder.numeric(data), 0.0)
    np.testing.assert_array_equal(encoder.categorical(data), 0)
    unseen = {"shop": np.array(["a"]), "x": np.array([np.nan])}
    assert encoder.categorical(unseen).tolist() == [[1]]
    assert encoder.numeric(unseen).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": ["shop", "street"]}, "`table` must hold the column 'street'"),
        ({"tasks": ["like"]}, "`table` must hold the task 'like'"),
        ({"fields": ["shop", "click"]}, r"must not hold a task, got \['click'\]"),
        ({"tasks": ["shop"], "fields": ["city"]}, "must hold 0, 1 or NaN in the task"),
        ({"log1p": ["shop"]}, "`log1p` must name columns of `numbers`"),
        ({"min_count": 0}, "`min_count` must be at least 1"),
    ],
)
def test_bad_tables_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        problem_of(table(), **changes)


def test_bad_splits_and_inputs_are_explained():
    data = table()
    problem = problem_of(data)
    with pytest.raises(ValueError, match=r"`name` must be one of .*got 'dev'"):
        problem.split("dev")
    with pytest.raises(ValueError, match="`rows` must hold the splits"):
        ranking_problem(
            "x", data, {"train": np.arange(3)}, tasks=["click"], fields=["shop"]
        )
    with pytest.raises(ValueError, match="`chunks` must hold at least one"):
        fit_table_encoder([], fields=["shop"])
    with pytest.raises(ValueError, match="`table` must hold the column 'city'"):
        problem.encoder.categorical({"shop": data["shop"]})
    with pytest.raises(ValueError, match="must hold in 'shop' what training had"):
        problem.encoder.categorical(data | {"shop": data["city"]})


def test_no_moment_is_in_two_splits():
    times = np.array([3, 1, 1, 2, 2, 2, 5, 5, 4, 9])
    rows = rows_by_time(times, (0.5, 0.3))
    assert sorted(np.concatenate(list(rows.values()))) == list(range(10))
    assert times[rows["train"]].max() < times[rows["validation"]].min()
    assert times[rows["validation"]].max() < times[rows["test"]].min()
    for shares in ((0.0, 0.5), (0.9, 0.1)):
        with pytest.raises(ValueError, match="`shares` must be positive"):
            time_cuts(times, shares)


@pytest.mark.parametrize(
    ("group", "fields", "numbers"),
    [("income", 31, 7), ("education", 31, 7), ("home", 31, 6), ("chain", 31, 5)],
)
def test_census_inputs_lack_what_defines_the_labels(group, fields, numbers, census):
    problem = census_ranking(group)
    check(problem)
    assert (len(problem.fields), len(problem.numbers)) == (fields, numbers)
    forbidden = {
        "chain": {
            *("weeks worked in year", "full or part time employment stat"),
            "num persons worked for employer",
        },
        "home": {"weeks worked in year", "marital stat", "education"},
    }.get(group, {"marital stat", "education"})
    assert not forbidden & {*problem.fields, *problem.numbers}
    assert "instance weight" not in problem.numbers
    sizes = [len(problem.split(split)["numeric"]) for split in SPLITS]
    assert sizes == [2_800, 600, 600]


def test_census_chain_is_nested_and_labels_are_those_of_the_file(census):
    chain = census_ranking("chain").train["labels"]
    first, second, third = chain.values()
    assert (first >= second).all()
    assert (second >= third).all()
    assert first.mean() > second.mean() > third.mean() > 0.0
    # The same seed gives the same rows, so that groups can be compared.
    home = census_ranking("home").train["labels"]
    np.testing.assert_array_equal(second, home["full_year"])
    np.testing.assert_array_equal(third, home["income"] * second)
    again = census_ranking("home", seed=1).train["labels"]["income"]
    assert not np.array_equal(again, home["income"])


def test_census_with_both_official_parts_halves_the_second(census_rows, monkeypatch):
    parts = {"train": census_rows, "test": census_rows}
    monkeypatch.setattr(census_module, "official_parts", lambda *_: parts)
    problem = census_ranking("income")
    sizes = [len(problem.split(split)["numeric"]) for split in SPLITS]
    assert sizes == [4_000, 2_000, 2_000]


def test_census_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`version` must be 'original' for the group"):
        census_ranking("chain", version="nominal")
    with pytest.raises(DataNotFoundError, match="mtjax data prepare census_income_kdd"):
        census_ranking(data_dir=tmp_path)


def one_hot(problem, split):
    part = problem.split(split)
    encoder = OneHotEncoder(handle_unknown="ignore", dtype=np.float32)
    encoder.fit(problem.train["categorical"])
    flags = encoder.transform(part["categorical"])
    return scipy.sparse.hstack([flags, part["numeric"]]).tocsr()


@pytest.mark.slow
def test_census_matches_published_correlations_and_a_linear_model(originals, tmp_path):
    name = "census_income_kdd/original"
    prepare(name, originals(name), tmp_path, progress=False)
    income = census_ranking("income", data_dir=tmp_path)
    check(income)
    sizes = [len(income.split(split)["numeric"]) for split in SPLITS]
    assert sizes == [69_833, 14_964, 14_965]
    home = census_ranking("home", data_dir=tmp_path)
    labels = {
        task: np.concatenate([home.split(split)["labels"][task] for split in SPLITS])
        for task in home.tasks
    }
    for task, published in {"degree": 0.238, "income": 0.179}.items():
        found = abs(np.corrcoef(labels[task], labels["never_married"])[0, 1])
        assert round(found, 3) == published
    train, test = one_hot(income, "train"), one_hot(income, "test")
    for task, low in {"income": 0.93, "never_married": 0.99}.items():
        model = LogisticRegression(max_iter=300, solver="lbfgs", tol=1e-3)
        model.fit(train, income.train["labels"][task])
        scores = model.decision_function(test)
        assert roc_auc_score(income.test["labels"][task], scores) > low
    chain = census_ranking("chain", data_dir=tmp_path)
    rates = [
        np.concatenate([chain.split(split)["labels"][task] for split in SPLITS]).mean()
        for task in chain.tasks
    ]
    np.testing.assert_allclose(rates, [0.520, 0.367, 0.054], atol=5e-4)
    works, numbers = chain.test["labels"]["labour_force"], chain.test["numeric"]
    for name, column in zip(chain.numbers, numbers.T):  # none gives the label away
        assert 0.3 < roc_auc_score(works, column) < 0.7, name


@pytest.mark.slow
def test_nominal_census_has_all_persons(originals, tmp_path):
    name = "census_income_kdd/nominal"
    prepare(name, originals(name), tmp_path, progress=False)
    problem = census_ranking("education", version="nominal", data_dir=tmp_path)
    check(problem)
    parts = [problem.split(split)["labels"] for split in SPLITS]
    assert [len(part["degree"]) for part in parts] == [209_499, 44_893, 44_893]
    degree, never = (
        np.concatenate([part[task] for part in parts]) for task in problem.tasks
    )
    assert never.sum() == 129_628
    assert round(abs(np.corrcoef(degree, never)[0, 1]), 2) == 0.24


def test_movielens_inputs_are_strictly_from_the_past(ratings):
    problem = movielens_ranking(length=5)
    check(problem)
    times = [problem.split(split)["time"] for split in SPLITS]
    assert times[0].max() < times[1].min()
    assert times[1].max() < times[2].min()
    users, moments, stars = (
        np.array([row[key] for row in ratings])
        for key in ("user", "timestamp", "rating")
    )
    movies = np.array([row["movie"] for row in ratings])
    films = {
        movie: code + 2 for code, movie in enumerate(problem.encoder.values["movie"])
    }
    chosen = {"rated": stars > 0, "liked": stars >= 4, "disliked": stars <= 2}
    for part in (problem.train, problem.test):
        for row in np.random.default_rng(0).integers(0, len(part["user"]), 60):
            before = np.flatnonzero(
                (users == part["user"][row]) & (moments < part["time"][row])
            )
            before = before[np.argsort(moments[before], kind="stable")]
            for kind, mask in chosen.items():
                expected = [films.get(movies[i], 1) for i in before if mask[i]][-5:]
                padded = expected + [0] * (5 - len(expected))
                assert part["history"][kind][row].tolist() == padded
    first = problem.train["history"]["rated"].max(axis=1) == 0
    assert first.any()
    # Nothing in the past: the mean, which is zero after scaling.
    np.testing.assert_array_equal(problem.train["numeric"][first, 1], 0.0)


def test_movielens_labels_and_genres_are_consistent(ratings):
    problem = movielens_ranking()
    for split in SPLITS:
        part = problem.split(split)
        like, love, dislike = (part["labels"][task] for task in problem.tasks)
        assert (love <= like).all()
        assert not (like * dislike).any()
        genres = part["multi_hot"]["genres"]
        assert genres.shape == (len(like), len(problem.facts["genres"]))
        assert set(np.unique(genres)) == {0.0, 1.0}
    with pytest.raises(ValueError, match="`length` must be at least 1"):
        movielens_ranking(length=0)


def test_movielens_prepared_by_an_earlier_version_is_explained(ratings, monkeypatch):
    monkeypatch.delitem(ratings.info.metadata, "titles")
    with pytest.raises(DataNotFoundError, match="Remove the folder and prepare it"):
        movielens_ranking()
