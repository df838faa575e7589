"""Decoding with caches: as without them, padded prompts, ends, drawing, scoring."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.decoder import Decoder
from mtjax.nn.decoding import CachedModel, generate, nucleus, padded, score

PROMPTS = [[1, 2, 3, 4], [5], [6, 7]]


class Notes(NamedTuple):
    first: jax.Array  # (batch,)
    both: jax.Array  # (models, batch)


def mixture(logits):
    """Twice the first model and once the second, with notes."""
    return 2 * logits[0] + logits[1], Notes(logits[0, :, 0], logits[:, :, 1])


@pytest.fixture(scope="module")
def models():
    """Two models of different size that are sure of what they say."""
    found = []
    for seed, decoder in enumerate(
        [Decoder(12, 12, 1, 2, 16), Decoder(12, 8, 1, 1, 16)]
    ):
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = jax.jit(decoder.init)(jax.random.key(seed), tokens)["params"]
        params["output"]["kernel"] *= 4
        found.append(CachedModel(params, decoder.start, decoder.advance))
    return tuple(found)


@jax.jit
def read(models, tokens):
    """Logits of all models at all places, without caches or padding."""
    decoders = [model.advance.__self__ for model in models]
    of = lambda d, m: d.apply({"params": m.params}, tokens)
    return jnp.stack([of(d, m) for d, m in zip(decoders, models)])


def whole(models, row):
    """Logits of all models at the end of a sequence."""
    # Always one length, for one program: what follows a token does not matter to it.
    tokens = np.full((1, 16), 11, np.int32)
    tokens[0, : len(row)] = row
    return np.asarray(read(models, tokens))[:, :, len(row) - 1]


@pytest.fixture(scope="module")
def by_hand(models):
    """Eight greedy tokens after each prompt, and the notes at each."""
    sequences, notes = [], []
    for prompt in PROMPTS:
        row, own = list(prompt), []
        for _ in range(8):
            logits, note = mixture(whole(models, row))
            own.append(note)
            row.append(int(jnp.argmax(logits[0])))
        sequences.append(row[len(prompt) :])
        notes.append(jax.tree.map(lambda *x: np.stack(x, axis=-1), *own))
    together = lambda *x: np.concatenate(x, axis=-2)
    return np.array(sequences), jax.tree.map(together, *notes)


@pytest.fixture(scope="module")
def written(models):
    return generate(models, *padded(PROMPTS, left=True), mixture, steps=8)


def test_caches_and_padding_change_nothing(by_hand, written):
    tokens, notes = by_hand
    np.testing.assert_array_equal(written.tokens, tokens)
    assert written.mask.all()
    assert isinstance(written.notes, Notes)
    assert written.notes.both.shape == (2, 3, 8)
    for ours, expected in zip(written.notes, notes):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_sequence_ends_by_itself(models, by_hand, written):
    tokens, _ = by_hand
    end = int(tokens[0, 2])
    expected = np.ones((3, 8), bool)
    for row, own in zip(tokens, expected):
        (places,) = np.nonzero(row == end)
        own[places[0] + 1 if len(places) else 8 :] = False
    assert not expected.all(axis=1)[0]
    found = generate(models, *padded(PROMPTS, left=True), mixture, steps=8, end=end)
    np.testing.assert_array_equal(found.mask, expected)
    np.testing.assert_array_equal(found.tokens, np.where(expected, tokens, 0))
    for ended, endless in zip(found.notes, written.notes):
        np.testing.assert_allclose(ended, np.where(expected, endless, 0), atol=1e-5)


def test_scores_are_those_of_whole_sequences(models, by_hand):
    answers = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    found = score(
        models, *padded(PROMPTS, left=True), *padded(answers, left=False), mixture
    )
    assert found.notes.both.shape == (2, 3, 5)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        for j, token in enumerate(answer):
            logits, note = mixture(whole(models, [*prompt, *answer[:j]]))
            expected = jax.nn.log_softmax(logits)[0, token]
            np.testing.assert_allclose(found.log_probs[i, j], expected, atol=1e-4)
            assert found.greedy[i, j] == (jnp.argmax(logits[0]) == token)
            np.testing.assert_allclose(
                found.notes.both[:, i, j], note.both[:, 0], atol=1e-4
            )
        np.testing.assert_array_equal(found.log_probs[i, len(answer) :], 0)
        assert not found.greedy[i, len(answer) :].any()


def test_scoring_does_not_look_ahead(models):
    prompts, mask = padded(PROMPTS, left=True)
    answers = np.full((3, 4), 3, np.int32)
    other = answers.copy()
    other[:, 2] = 8
    of = lambda x: score(models, prompts, mask, x, np.ones((3, 4), bool), mixture)
    first, second = of(answers), of(other)
    # The distribution at the changed token, and the notes of it, come before it.
    np.testing.assert_array_equal(first.notes.both[..., :3], second.notes.both[..., :3])
    np.testing.assert_array_equal(first.log_probs[:, :2], second.log_probs[:, :2])
    assert (first.notes.first[:, 3] != second.notes.first[:, 3]).all()


def test_what_was_written_is_scored_as_likeliest(models, written):
    found = score(
        models, *padded(PROMPTS, left=True), written.tokens, written.mask, mixture
    )
    assert found.greedy.all()
    np.testing.assert_allclose(found.notes.both, written.notes.both, atol=1e-4)


def test_one_model_alone(models):
    prompts = padded(PROMPTS, left=True)
    alone = generate(models[:1], *prompts, steps=3)
    assert alone.notes == ()
    row = [*PROMPTS[2], *alone.tokens[2, :2].tolist()]
    assert alone.tokens[2, 2] == jnp.argmax(whole(models[:1], row)[0])
    with pytest.raises(ValueError, match=r"`combine` must be given .* for 2"):
        generate(models, *prompts, steps=3)


def fixed(logits):
    """Whatever models say: 0.5, 0.3 and 0.2."""
    p = jnp.array([0.5, 0.3, 0.2] + [0.0] * 9)
    return jnp.broadcast_to(jnp.log(p)[None], logits.shape[1:]), ()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.2]),
        (0.5, 1.0, [25 / 38, 9 / 38, 4 / 38]),  # squares
        (1.0, 0.7, [5 / 8, 3 / 8, 0]),
        (1.0, 0.5, [1, 0, 0]),
        (0.0, 1.0, [1, 0, 0]),
    ],
)
def test_temperature_and_top_p_come_after_the_combination(
    models, key, temperature, top_p, expected
):
    prompts = np.ones((100, 1), np.int32)
    draw = functools.partial(generate, models[1:], prompts, prompts > 0, fixed)
    found = draw(steps=20, temperature=temperature, top_p=top_p, key=key)
    shares = np.bincount(np.ravel(found.tokens), minlength=3) / 2000
    np.testing.assert_allclose(shares, expected, atol=0.04)  # 3.6 deviations
    if 0 < min(expected) < 1:
        assert len({tuple(row) for row in found.tokens.tolist()}) > 90
        again = draw(steps=20, temperature=temperature, top_p=top_p, key=key)
        np.testing.assert_array_equal(again.tokens, found.tokens)


def test_nucleus_keeps_at_least_one():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]))
    kept = lambda top_p: np.isfinite(nucleus(logits, top_p)).tolist()
    assert kept(0.01) == [[False, True, False], [False, False, True]]
    assert kept(0.65) == [[False, True, True], [True, True, True]]
    assert kept(1.0) == [[True] * 3] * 2


def test_wrong_arguments(models):
    prompts, mask = padded(PROMPTS, left=True)
    run = functools.partial(generate, models, prompts, mask, mixture)
    for options in (
        {"steps": 0},
        {"steps": 1, "temperature": -1.0},
        {"steps": 1, "top_p": 0.0},
    ):
        with pytest.raises(ValueError, match="`steps` must be at least 1"):
            run(**options)
    with pytest.raises(ValueError, match="`key` must be given to draw"):
        run(steps=1, temperature=1.0)
    for wrong in (mask[:, ::-1], np.zeros_like(mask)):
        with pytest.raises(ValueError, match="`mask` must be False only before"):
            generate(models, prompts, wrong, mixture, steps=1)
        with pytest.raises(ValueError, match="`mask` must be False only before"):
            score(models, prompts, wrong, prompts, mask, mixture)
    with pytest.raises(ValueError, match=r"none empty, got lengths \[1, 0\]"):
        padded([[1], []], left=True)


def test_vocabularies_must_be_one(models):
    decoder = Decoder(13, 8, 1, 1, 8)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)["params"]
    other = CachedModel(params, decoder.start, decoder.advance)
    with pytest.raises(ValueError, match=r"one vocabulary, got \[12, 13\] tokens"):
        generate((models[0], other), *padded(PROMPTS, left=True), mixture, steps=1)
