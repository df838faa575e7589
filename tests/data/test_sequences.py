import numpy as np
import pytest

from mtjax.data import (
    DataFormatError,
    DataNotFoundError,
    diginetica_sequences,
    movielens_sequences,
    negative_probabilities,
    past_items,
    past_mean,
    past_of,
    prepare,
    sample_negatives,
    sequence_problem,
)
from mtjax.data import movielens as movielens_module

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rating_rows(first_rows):
    return first_rows("movielens_latest_small", "train", 6_000)


@pytest.fixture
def ratings(rating_rows, monkeypatch):
    monkeypatch.setattr(movielens_module, "tfds_source", lambda *_, **__: rating_rows)
    return rating_rows


@pytest.fixture(scope="module")
def shop(originals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    name = "diginetica_sample"
    prepare(name, originals(name), folder, progress=False)
    return folder


def events(rows=200, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 12, rows)
    return {
        "groups": groups,
        "times": generator.integers(0, 9, rows),
        "items": generator.integers(0, 30, rows) * 7,
        "parts": np.digitize(groups, [7, 9]),
    }


def check(problem):
    items = problem.items
    rows = len(items.item_ids)
    assert items.item_ids[:2].tolist() == [-1, -1]
    assert len(np.unique(items.item_ids[2:])) == rows - 2
    for values in (
        items.categorical,
        *items.multi_hot.values(),
        *items.tokens.values(),
    ):
        assert len(values) == rows
        assert not values[:2].any()
    for split in SPLITS:
        part = problem.split(split)
        assert part["history"].dtype == np.int32
        assert part["target"].dtype == np.int32
        assert (part["target"] >= 2).all()
        assert (part["target"] < rows).all()
        filled = part["history"] > 0
        assert (filled[:, :-1] >= filled[:, 1:]).all()
        assert not (part["history"] == 1).any()
    train = problem.train
    assert train["target"].max() < items.num_warm
    assert train["history"].max() < items.num_warm
    np.testing.assert_array_equal(
        items.train_counts, np.bincount(train["target"], minlength=rows)
    )
    return [set(problem.split(split)["group"].tolist()) for split in SPLITS]


def test_past_is_what_a_double_loop_finds():
    data = events()
    generator = np.random.default_rng(1)
    chosen = generator.random(200) < 0.4
    values = generator.random(200)
    items = np.arange(1, 201)
    past = past_of(data["groups"], data["times"])
    histories = past_items(past, items, 3, chosen=chosen)
    number, mean = past_mean(past, values)
    for row in range(200):
        before = [
            other
            for other in np.argsort(data["times"], kind="stable")
            if data["groups"][other] == data["groups"][row]
            and data["times"][other] < data["times"][row]
        ]
        expected = [items[other] for other in before if chosen[other]][-3:]
        assert histories[row].tolist() == expected + [0] * (3 - len(expected))
        assert number[row] == len(before)
        if before:
            np.testing.assert_allclose(mean[row], values[before].mean())
        else:
            assert np.isnan(mean[row])


def test_past_of_nothing_is_empty():
    none = np.zeros(0, np.int64)
    past = past_of(none, none)
    assert past_items(past, none, 3).shape == (0, 3)
    alone = past_of(np.array([1, 2]), np.array([0, 0]))
    nobody = np.zeros(2, bool)
    assert not past_items(alone, np.array([5, 6]), 2, chosen=nobody).any()


def test_training_does_not_depend_on_later_items():
    data = events()
    names = np.unique(data["items"]).astype(str)
    before = sequence_problem("x", **data, length=4, fields={"name": names})
    later = data["parts"] == 2
    data["items"] = np.where(later, data["items"] * 0 + 3, data["items"])
    names = np.unique(data["items"]).astype(str)
    after = sequence_problem("x", **data, length=4, fields={"name": names})
    check(before)
    check(after)
    for key, values in before.train.items():
        np.testing.assert_array_equal(values, after.train[key])
    warm = before.items.num_warm
    assert after.items.num_warm == warm
    np.testing.assert_array_equal(
        before.items.categorical[:warm], after.items.categorical[:warm]
    )
    # The item 3 is new in the test: it has an id but no known name.
    new = int(np.flatnonzero(after.items.item_ids == 3)[0])
    assert new >= warm
    assert after.items.categorical[new].tolist() == [1]


def test_cold_items_are_in_no_training_row_but_remain_targets():
    data = events()
    cold = np.unique(data["items"])[:5]
    problem = sequence_problem("x", **data, length=4, cold=cold)
    check(problem)
    trained = problem.items.item_ids[: problem.items.num_warm]
    assert not np.isin(cold, trained).any()
    targets = problem.items.item_ids[problem.test["target"]]
    assert np.isin(targets, cold).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_history": 2}, "`min_history` must be 0 or 1, got 2"),
        ({"levels": ["genre"]}, "`levels` must name `fields`"),
        ({"catalogue": np.arange(50)}, "`catalogue` must hold every item"),
        ({"parts": np.full(200, 2)}, "`parts` must leave events for training"),
        ({"length": 0}, "`length` must be at least 1, got 0"),
        ({"texts": {"title": ([["a"]] * 30, 0)}}, "`texts` must keep at least one"),
    ],
)
def test_bad_sequences_are_explained(changes, message):
    options = {**events(), "length": 4, **changes}
    with pytest.raises(ValueError, match=message):
        sequence_problem("x", **options)


def test_movielens_sessions_are_split_by_time_and_never_cut(ratings):
    problem = movielens_sequences("sessions")
    groups = check(problem)
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]
    assert problem.train["time"].max() < problem.validation["time"].max()
    first_test = problem.test["time"].max()
    assert problem.train["time"].max() < first_test
    assert (problem.train["history"][:, 0] > 0).all()
    assert (problem.test["target"] >= problem.items.num_warm).any()
    items = problem.items
    assert items.levels == ("first_genre", "decade_genre")
    sizes = [items.vocabulary_sizes[name] for name in items.fields]
    assert (items.categorical < np.array(sizes)[None]).all()
    assert items.tokens["title"].max() < items.vocabulary_sizes["title"]
    # A decade and a genre decide their pair.
    pairs = np.unique(items.categorical[2 : items.num_warm], axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 2]))
    assert items.multi_hot["genres"].sum(axis=1)[2:].min() >= 1.0


def test_movielens_users_leave_their_last_film_out(ratings):
    problem = movielens_sequences("users", length=10, cold_share=0.0)
    check(problem)
    stars = {
        (int(row["user"]), int(row["movie"])): (int(row["timestamp"]), row["rating"])
        for row in ratings
    }
    liked = {}
    for (user, _), (time, rating) in stars.items():
        if rating >= 4.0:
            liked.setdefault(user, []).append(time)
    test = problem.test
    assert sorted(test["user"]) == sorted(liked)
    for user, time in zip(test["user"], test["time"]):
        assert time == max(liked[int(user)])
    # Without a history there still is the user.
    assert (problem.train["history"].max(axis=1) == 0).any()


def test_movielens_arguments_are_checked():
    with pytest.raises(ValueError, match="`form` must be 'sessions' or 'users'"):
        movielens_sequences("items")
    with pytest.raises(ValueError, match="`cold_share` must be in"):
        movielens_sequences(cold_share=1.0)


def test_diginetica_is_split_by_day(shop):
    problem = diginetica_sequences(data_dir=shop)
    groups = check(problem)
    assert (
        not (groups[0] & groups[1]) | (groups[1] & groups[2]) | (groups[0] & groups[2])
    )
    sizes = [len(problem.split(split)["target"]) for split in SPLITS]
    assert sizes == [8_012, 130, 277]
    assert problem.items.num_warm == len(problem.items.item_ids)
    everything = diginetica_sequences(data_dir=shop, min_views=0)
    assert len(everything.items.item_ids) == 7_139 + 2
    often = diginetica_sequences(data_dir=shop, min_views=5)
    assert len(often.items.item_ids) == 290


def test_diginetica_reads_the_original_metadata(shop, tmp_path):
    item = diginetica_sequences(data_dir=shop).items.item_ids[2]
    (tmp_path / "product-categories.csv").write_text(f"itemId;categoryId\n{item};77\n")
    (tmp_path / "products.csv").write_text(
        f"itemId;pricelog2;product.name.tokens\n{item};9;4,8,4\n1;5;3\n"
    )
    items = diginetica_sequences(data_dir=shop, products=tmp_path).items
    assert items.fields == ("category", "price")
    assert items.levels == ("category",)
    assert items.categorical[2].tolist() == [2, 2]
    assert not items.categorical[3:].any()
    assert items.tokens["name"][2].tolist() == [2, 3, 2] + [0] * 9
    (tmp_path / "products.csv").write_text("itemId;price\n")
    with pytest.raises(DataFormatError, match="must have the columns"):
        diginetica_sequences(data_dir=shop, products=tmp_path)


def test_diginetica_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`test_days` and `validation_days`"):
        diginetica_sequences(test_days=0)
    with pytest.raises(DataNotFoundError, match="mtjax data prepare diginetica"):
        diginetica_sequences(data_dir=tmp_path)


def test_negatives_follow_their_probabilities():
    counts = np.array([0, 0, 8, 1, 0, 27])
    np.testing.assert_allclose(
        negative_probabilities(counts), np.array([0, 0, 1, 1, 0, 1]) / 3
    )
    chances = negative_probabilities(counts, strategy="popularity", power=1 / 3)
    np.testing.assert_allclose(chances, np.array([0, 0, 2, 1, 0, 3]) / 6)
    positives = np.full(3_000, 2)
    drawn = sample_negatives(
        positives, counts, 4, strategy="popularity", power=1 / 3, seed=0
    )
    # Without the positive, the other two have 1/4 and 3/4; five standard errors.
    share = np.mean(drawn == 5)
    assert set(np.unique(drawn)) == {3, 5}
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / drawn.size)
    again = sample_negatives(
        positives, counts, 4, strategy="popularity", power=1 / 3, seed=0
    )
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([0, 1, 2], {"number": 0}, "`number` must be at least 1"),
        ([0, 1, 0], {"number": 1}, "at least two items"),
        ([0, 0], {"number": 1}, "must have an item that occurs"),
        ([1, 1], {"number": 1, "strategy": "hard"}, "`strategy` must be"),
        ([1, 1], {"number": 1, "power": -1.0}, "`power` must not be negative"),
    ],
)
def test_bad_negatives_are_explained(counts, options, message):
    with pytest.raises(ValueError, match=message):
        sample_negatives(np.array([1]), np.array(counts), **options, seed=0)
