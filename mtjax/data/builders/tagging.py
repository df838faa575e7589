"""Sentences with tags of their tokens: slots, parts of speech; definitions.

Tags are stored as codes, one per token; `metadata` names them in order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.archives import read_lines
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_SNIPS = (
    *("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook"),
    *("SearchCreativeWork", "SearchScreeningEvent"),
)
# Intents and numbers of training, validation and test sentences.
_SLOTGATED = {"atis": (26, 4_478, 500, 893), "snips": (7, 13_084, 700, 700)}
_UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART"),
    *("PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel")


def _codes(values: Sequence[str], names: Mapping[str, int]) -> np.ndarray:
    return np.array([names[value] for value in values], dtype=np.int32)


def _numbered(values: set[str]) -> dict[str, int]:
    return {value: code for code, value in enumerate(sorted(values))}


def _read_snips(folder: Path) -> Original:
    def queries(kind: str) -> list[tuple[str, list[dict[str, str]]]]:
        found = []
        for intent in _SNIPS:
            member = f"2017-06-custom-intent-engines/{intent}/{kind.format(intent)}"
            lines = read_lines(
                folder, member, archive="snips.tar.xz", encoding="latin-1"
            )
            # One query has a sign outside of the basic plane as a surrogate pair.
            pairs = "\n".join(lines).encode("latin-1").decode("utf-8", "surrogatepass")
            text = pairs.encode("utf-16", "surrogatepass").decode("utf-16")
            found += [(intent, query["data"]) for query in json.loads(text)[intent]]
        return found

    def rows(
        queries: Sequence[tuple[str, list[dict[str, str]]]],
    ) -> Iterator[dict[str, Any]]:
        for intent, parts in queries:
            segments = [part["text"] for part in parts]
            yield {
                "text": "".join(segments),
                "intent": intent,
                "segments": segments,
                "slots": _codes([part.get("entity", "O") for part in parts], codes),
            }

    splits = {
        "train": queries("train_{}_full.json"),
        "validation": queries("validate_{}.json"),
    }
    slots = {
        part["entity"]
        for found in splits.values()
        for _, parts in found
        for part in parts
        if "entity" in part
    }
    codes = {"O": 0} | {name: code + 1 for name, code in _numbered(slots).items()}
    return Original(
        {split: rows(found) for split, found in splits.items()},
        {"slots": list(codes)},
    )


def _read_slotgated(folder: Path, *, part: str) -> Original:
    def sentences(split: str) -> list[tuple[list[str], list[str], str]]:
        texts, tags, intents = (
            read_lines(
                folder,
                f"{part}/{split}/{file}",
                archive="slotgated_atis_snips.tar.xz",
            )
            for file in ("seq.in", "seq.out", "label")
        )
        found = [
            (text.split(), slots.split(), intent.strip())
            for text, slots, intent in zip(texts, tags, intents, strict=True)
        ]
        for number, (tokens, slots, _) in enumerate(found, start=1):
            if len(tokens) != len(slots):
                raise DataFormatError(
                    f"{part!r} must have as many slots as tokens, got {len(slots)} "
                    f"and {len(tokens)} in line {number} of {split!r}."
                )
        return found

    def rows(
        sentences: Sequence[tuple[list[str], list[str], str]],
    ) -> Iterator[dict[str, Any]]:
        for tokens, slots, intent in sentences:
            yield {
                "tokens": tokens,
                "slots": _codes(slots, codes),
                "intent": intent,
            }

    files = {"train": "train", "validation": "valid", "test": "test"}
    splits = {split: sentences(file) for split, file in files.items()}
    # What occurs in training comes first, then what only the other splits have.
    slots: dict[str, None] = {}
    intents: dict[str, None] = {}
    for found in splits.values():
        slots |= dict.fromkeys(sorted({tag for _, tags, _ in found for tag in tags}))
        intents |= dict.fromkeys(sorted({intent for _, _, intent in found}))
    codes = {name: code for code, name in enumerate(slots)}
    return Original(
        {split: rows(found) for split, found in splits.items()},
        {"slots": list(slots)},
        {"intent": list(intents)},
    )


def _read_conllu(folder: Path, file: str) -> list[dict[str, Any]]:
    path = require(folder, file)
    sentences = []
    comments: dict[str, str] = {}
    words: list[list[str]] = []
    for number, line in enumerate([*read_lines(folder, file, archive=file), ""], 1):
        fields = line.split("\t")
        if line.startswith("#"):
            name, _, value = line.removeprefix("#").partition("=")
            comments[name.strip()] = value.strip()
        elif line and len(fields) != 10:
            raise DataFormatError(
                f"{str(path)!r} must have 10 fields in every row, got {len(fields)} "
                f"in line {number}."
            )
        # The others are contractions (1-2) and words left out (1.1).
        elif fields[0].isdigit():
            words.append(fields)
        elif not line and words:
            columns = dict(zip(_COLUMNS, zip(*words, strict=True), strict=False))
            sentences.append(
                {**columns, "idx": comments["sent_id"], "text": comments["text"]}
            )
            comments, words = {}, []
    return sentences


def _read_ud_english(folder: Path) -> Original:
    splits = {
        "validation": _read_conllu(folder, "en_ewt-ud-dev.conllu"),
        "test": _read_conllu(folder, "en_ewt-ud-test.conllu"),
    }
    codes = {
        column: _numbered(
            {tag for found in splits.values() for row in found for tag in row[column]}
        )
        for column in ("xpos", "deprel")
    }
    codes["upos"] = {tag: code for code, tag in enumerate(_UPOS)}

    def rows(sentences: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in sentences:
            yield {
                "idx": row["idx"],
                "text": row["text"],
                "tokens": list(row["form"]),
                "lemmas": list(row["lemma"]),
                "feats": list(row["feats"]),
                "head": np.array([int(head) for head in row["head"]], dtype=np.int32),
                **{name: _codes(row[name], tags) for name, tags in codes.items()},
            }

    return Original(
        {split: rows(found) for split, found in splits.items()},
        {name: list(tags) for name, tags in codes.items()},
    )


def _read_w00(folder: Path) -> Original:
    files = [require(folder, f"annotated.{kind}").name for kind in ("word", "meta")]

    def rows() -> Iterator[dict[str, Any]]:
        texts, facts = (read_lines(folder, file, archive=file) for file in files)
        for text, fact in zip(texts, facts, strict=True):
            label, section, *_ = fact.split(" $ ")
            yield {"text": text, "label": int(label), "section": section}

    return Original({"train": rows()})


def _per_token(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.Tensor(shape=(None,), dtype=np.int32) for name in names}


def _lists(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.Sequence(tfds.features.Text()) for name in names}


def _slotgated_features(intents: int) -> dict[str, tfds.features.FeatureConnector]:
    return {
        **_lists("tokens"),
        **_per_token("slots"),
        "intent": tfds.features.ClassLabel(num_classes=intents),
    }


_SLOTGATED_LICENCES = {
    "atis": "unclear (origin: Linguistic Data Consortium)",
    "snips": "CC0 1.0",
}
TAGGING: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="snips",
        description="Queries with one of seven intents, cut into segments with a code "
        "for the slot that each fills; 0 is none. Sorted by intent. Official splits.",
        licence="CC0 1.0",
        homepage="https://github.com/sonos/nlu-benchmark",
        citation="Snips voice platform: An embedded spoken language understanding "
        "system for private-by-design voice interfaces, 2018.",
        tasks=("intent", "slots"),
        splits={"train": 13_784, "validation": 700},
        features=lambda: {
            "text": tfds.features.Text(),
            "intent": tfds.features.ClassLabel(names=list(_SNIPS)),
            **_lists("segments"),
            **_per_token("slots"),
        },
        read=_read_snips,
    ),
    *(
        DatasetSpec(
            name=f"slotgated_atis_snips/{part}",
            description=f"Queries ({part.upper()}) in lower case with one intent and "
            "a slot of each token. Intents and slots that occur in training have the "
            "smaller codes. Published splits.",
            licence=_SLOTGATED_LICENCES[part],
            homepage="https://github.com/MiuLab/SlotGated-SLU",
            citation="Slot-gated modeling for joint slot filling and intent "
            "prediction, 2018.",
            tasks=("intent", "slots"),
            splits={"train": train, "validation": validation, "test": test},
            features=partial(_slotgated_features, intents),
            read=partial(_read_slotgated, part=part),
        )
        for part, (intents, train, validation, test) in _SLOTGATED.items()
    ),
    DatasetSpec(
        name="ud_english_ewt",
        description="Sentences of the web with lemma, parts of speech (universal and "
        "English), morphology and syntax of each word: `head` is the number of the "
        "word above, counted from 1, 0 for the root. Official splits without the "
        "training part.",
        licence="CC BY-SA 4.0",
        homepage="https://github.com/UniversalDependencies/UD_English-EWT",
        citation="A gold standard dependency corpus for English, 2014.",
        tasks=("upos", "xpos", "head", "deprel", "lemmas", "feats"),
        splits={"validation": 2_001, "test": 2_077},
        features=lambda: {
            "idx": tfds.features.Text(),
            "text": tfds.features.Text(),
            **_lists("tokens", "lemmas", "feats"),
            **_per_token("upos", "xpos", "head", "deprel"),
        },
        read=_read_ud_english,
    ),
    DatasetSpec(
        name="w00",
        description="Sentences of workshop papers, definitions or not, with the "
        "section they come from; tokens separated by spaces, without the tags of the "
        "tokens. No official split.",
        licence="unclear",
        homepage="https://github.com/uplink007/FinalProject",
        citation="Mining scientific terms and their definitions: A study of the ACL "
        "anthology, 2013.",
        tasks=("label",),
        splits={"train": 2_184},
        features=lambda: {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["other", "definition"]),
            "section": tfds.features.Text(),
        },
        read=_read_w00,
    ),
)
