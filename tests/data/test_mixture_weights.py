import pytest

from mtjax.data import mixture_weights

SIZES = {"c": 1_000, "a": 10, "b": 100}


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("cap", [None, 50, 10_000])
def test_closed_form(exponent, cap):
    terms = {k: min(n, cap or n) ** exponent for k, n in SIZES.items()}
    expected = {k: terms[k] / sum(terms.values()) for k in sorted(terms)}
    found = mixture_weights(SIZES, exponent=exponent, cap=cap)
    assert found == pytest.approx(expected)
    assert list(found) == ["a", "b", "c"]


def test_uniform_and_explicit():
    third = pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert mixture_weights(SIZES, "uniform") == third
    explicit = mixture_weights(SIZES, {"a": 3, "b": 0, "c": 1})
    assert explicit == {"a": 0.75, "b": 0.0, "c": 0.25}


def test_huge_sizes_and_exponents_stay_finite():
    found = mixture_weights({"a": 10**12, "b": 10**6}, exponent=60.0)
    assert found == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("sizes", "keywords", "message"),
    [
        ({}, {}, "`sizes`"),
        ({"a": 0}, {}, "`sizes`"),
        (SIZES, {"exponent": -1.0}, "`exponent`"),
        (SIZES, {"exponent": float("nan")}, "`exponent`"),
        (SIZES, {"cap": 0}, "`cap`"),
        (SIZES, {"weights": {"a": 1.0}}, "`weights` must have the tasks"),
        (SIZES, {"weights": {"a": 0, "b": 0, "c": 0}}, "`weights` must be finite"),
        (SIZES, {"weights": {"a": -1, "b": 1, "c": 1}}, "`weights` must be finite"),
    ],
)
def test_errors_name_the_argument(sizes, keywords, message):
    with pytest.raises(ValueError, match=message):
        mixture_weights(sizes, **keywords)
