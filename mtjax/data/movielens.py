"""MovieLens as a ranking problem with histories, and as sequences of items."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, Shaped

from mtjax.data.builders.prepare import SPECS
from mtjax.data.event_history import past_items, past_mean, past_of
from mtjax.data.ranking import RankingProblem, ranking_problem, rows_by_time, time_cuts
from mtjax.data.sequences import SequenceProblem, sequence_problem
from mtjax.data.sources import DataNotFoundError, as_arrays, tfds_source
from mtjax.data.table_encoder import fit_table_encoder

_NAME = "movielens_latest_small"
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_WORD = re.compile(r"[^\W_]+")
_NO_GENRE = "(no genres listed)"


def movielens_ranking(
    *,
    data_dir: str | Path | None = None,
    length: int = 20,
    shares: tuple[float, float] = (0.8, 0.1),
) -> RankingProblem:
    """Loads ratings as impressions: will the user like, love or dislike the film?

    Tasks: ``like`` (4 stars or more), ``love`` (5) and ``dislike`` (2 or less); like
    and dislike conflict by construction. Fields: user, movie, decade, first genre.
    Numbers, all from strictly before the rating: how many ratings the user has given
    and the film has received, and their means. Besides, every split has

    - ``multi_hot["genres"]``, float32 of shape ``(n, genres)``;
    - ``history[kind]`` for the kinds ``rated``, ``liked`` and ``disliked``: int32 of
      shape ``(n, length)``, ids of the field ``movie``, oldest first, 0 behind them;
      the mask is ``history > 0``;
    - ``user`` and ``time``, the original numbers.

    Args:
      data_dir: folder of the prepared data; :func:`mtjax.data.default_data_dir` if
        None.
      length: longest history.
      shares: of training and validation.

    Returns:
      The problem. The split is at two moments that are the same for all users, so nine
      of ten test users are new: what is known about them are their earlier ratings.

    Raises:
      ValueError: if `length` or `shares` is out of range.
      DataNotFoundError: if the data are not prepared; the message says how to.
    """
    log, metadata = _log(data_dir)
    facts = _films(log["movie"], log["genres"], metadata)
    by_user = past_of(log["user"], log["timestamp"])
    by_movie = past_of(log["movie"], log["timestamp"])
    user_count, user_mean = past_mean(by_user, log["rating"])
    movie_count, movie_mean = past_mean(by_movie, log["rating"])
    table = {
        **{name: log[name] for name in ("user", "movie")},
        **{name: facts[name] for name in ("decade", "first_genre")},
        "user_count": user_count,
        "user_mean": user_mean,
        "movie_count": movie_count,
        "movie_mean": movie_mean,
        "like": log["rating"] >= 4.0,
        "love": log["rating"] == 5.0,
        "dislike": log["rating"] <= 2.0,
    }
    rows = rows_by_time(log["timestamp"], shares)
    fields = ("user", "movie", "decade", "first_genre")
    # Ids have to be known before the histories, which are written in them.
    ids = _train_ids(log["movie"], rows["train"])
    kinds = {"rated": None, "liked": table["like"], "disliked": table["dislike"]}
    return ranking_problem(
        _NAME,
        table,
        rows,
        tasks=("like", "love", "dislike"),
        fields=fields,
        numbers=("user_count", "user_mean", "movie_count", "movie_mean"),
        log1p=("user_count", "movie_count"),
        extras={
            "history": {
                kind: past_items(by_user, ids, length, chosen=chosen)
                for kind, chosen in kinds.items()
            },
            "multi_hot": {"genres": log["genres"].astype(np.float32)},
            "user": log["user"],
            "time": log["timestamp"],
        },
        description="Ratings of films: 4 stars or more, 5, 2 or less. Inputs are what "
        "was known strictly before the rating. Split by time at "
        f"{shares[0]:.0%} and {shares[0] + shares[1]:.0%} of the ratings.",
        licence=SPECS[_NAME].licence,
        facts={"genres": list(metadata["genres"])},
    )


def movielens_sequences(
    form: str = "sessions",
    *,
    data_dir: str | Path | None = None,
    length: int = 20,
    gap: int = 3600,
    shares: tuple[float, float] = (0.8, 0.1),
    cold_share: float = 0.1,
    max_words: int = 8,
    seed: int = 0,
) -> SequenceProblem:
    """Loads MovieLens as next-item problem, with a catalogue of the films' metadata.

    ``"sessions"``: the ratings of a user with pauses of at most `gap` seconds; every
    rating with an earlier one in its session is a target. A session belongs to
    training if it ends before the first moment of :func:`mtjax.data.time_cuts`, to
    validation if it ends before the second, else to the test.
    ``"users"``: the ratings of 4 stars or more of a user; the last is for the test, the
    one before for validation (leave one out), histories of training may be empty.

    Films: fields ``decade``, ``first_genre`` and ``decade_genre`` (the last two are the
    category levels), multi-hot ``genres``, words of the title. A history holds strictly
    earlier ratings only, so all ratings of one second have the same.

    Args:
      form: what a sequence is: ``"sessions"`` or ``"users"``.
      data_dir: folder of the prepared data; :func:`mtjax.data.default_data_dir` if
        None.
      length: longest history.
      gap: longest pause within a session, in seconds.
      shares: of training and validation, in ratings; for sessions only.
      cold_share: share of films that are removed from training, in [0, 1).
      max_words: how many words of a title are kept.
      seed: decides which films are cold.

    Returns:
      The problem; films that training lacks have ids from ``num_warm`` on.

    Raises:
      ValueError: if an argument is out of range.
      DataNotFoundError: if the data are not prepared; the message says how to.
    """
    if form not in ("sessions", "users"):
        raise ValueError(f"`form` must be 'sessions' or 'users', got {form!r}.")
    if not 0.0 <= cold_share < 1.0:
        raise ValueError(f"`cold_share` must be in [0, 1), got {cold_share}.")
    log, metadata = _log(data_dir)
    order = np.lexsort((log["movie"], log["timestamp"], log["user"]))
    if form == "users":
        order = order[log["rating"][order] >= 4.0]
    log = {name: values[order] for name, values in log.items()}
    if form == "sessions":
        groups = _sessions(log["user"], log["timestamp"], gap)
        cuts = time_cuts(log["timestamp"], shares)
        ends = np.zeros(groups[-1] + 1, np.int64)
        np.maximum.at(ends, groups, log["timestamp"])
        parts = np.searchsorted(cuts, ends, side="right")[groups]
        split = f"by time at {cuts[0]} and {cuts[1]} seconds, whole sessions"
    else:
        groups = log["user"]
        # The user's last row is 0, the one before it 1.
        ahead = np.searchsorted(groups, groups, side="right") - np.arange(len(groups))
        parts = np.select([ahead == 1, ahead == 2], [2, 1], 0)
        split = "each user's last is for the test, the one before for validation"
    films, first = np.unique(log["movie"], return_index=True)
    generator = np.random.default_rng(seed)
    cold = generator.choice(films, int(cold_share * len(films)), replace=False)
    facts = _films(films, log["genres"][first], metadata)
    return sequence_problem(
        f"{_NAME}/{form}",
        groups=groups,
        times=log["timestamp"],
        items=log["movie"],
        parts=parts,
        cold=cold,
        length=length,
        min_history=1 if form == "sessions" else 0,
        catalogue=films,
        fields={
            name: facts[name] for name in ("decade", "first_genre", "decade_genre")
        },
        levels=("first_genre", "decade_genre"),
        multi_hot={"genres": log["genres"][first]},
        texts={"title": ([_words(text) for text in facts["title"]], max_words)},
        extras={"user": log["user"]},
        description=f"{form} of films; split {split}; {len(cold)} cold films.",
        licence=SPECS[_NAME].licence,
    )


def _log(
    data_dir: str | Path | None,
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    source = tfds_source(_NAME, "train", data_dir=data_dir)
    metadata = source.info.metadata
    if "titles" not in metadata:
        raise DataNotFoundError(
            f"`data_dir` holds {_NAME!r} without the titles of films: an earlier "
            "version of mtjax prepared it. Remove the folder and prepare it again."
        )
    return as_arrays(source), metadata


def _films(
    movies: Int[np.ndarray, " n"],
    genres: Shaped[np.ndarray, "n genres"],
    metadata: Mapping[str, Any],
) -> dict[str, Shaped[np.ndarray, " n"]]:
    names = np.array(["", *metadata["genres"]])
    # Position 0 of the flags is "no genre listed", a missing value here.
    flags = genres.astype(bool) & (np.array(metadata["genres"]) != _NO_GENRE)
    first = np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, 0)
    titles = [metadata["titles"][str(movie)] for movie in movies]
    years = [_YEAR.search(title) for title in titles]
    decades = np.array([f"{year[1][:3]}0s" if year else "" for year in years])
    genre = names[first]
    pairs = np.array(
        [f"{d} {g}" if d and g else "" for d, g in zip(decades, genre, strict=True)]
    )
    return {
        "title": np.array([_YEAR.sub("", title) for title in titles]),
        "decade": decades,
        "first_genre": genre,
        "decade_genre": pairs,
    }


def _words(title: str) -> list[str]:
    return _WORD.findall(title.lower())


def _train_ids(
    items: Int[np.ndarray, " n"], train: Int[np.ndarray, " rows"]
) -> Int32[np.ndarray, " n"]:
    encoder = fit_table_encoder([{"item": items[train]}], fields=["item"])
    return encoder.categorical({"item": items})[:, 0]


def _sessions(
    users: Int[np.ndarray, " n"], times: Int[np.ndarray, " n"], gap: int
) -> Int[np.ndarray, " n"]:
    """Numbers the sessions of rows that are sorted by user and time."""
    if gap < 1:
        raise ValueError(f"`gap` must be at least one second, got {gap}.")
    starts: Bool[np.ndarray, " n"] = np.r_[
        False, (np.diff(users) != 0) | (np.diff(times) > gap)
    ]
    return np.cumsum(starts)
