"""Texts to continue, questions to answer and reviews of several hundred words."""

import gzip
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.archives import read_lines
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

# Tasks with another number of examples than 250.
_BIG_BENCH_ROWS = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}
_BIG_BENCH = (
    *("boolean_expressions", "causal_judgement", "date_understanding"),
    *("disambiguation_qa", "dyck_languages", "formal_fallacies", "geometric_shapes"),
    *("hyperbaton", "logical_deduction_five_objects"),
    *("logical_deduction_seven_objects", "logical_deduction_three_objects"),
    *("movie_recommendation", "multistep_arithmetic_two", "navigate"),
    *("object_counting", "penguins_in_a_table", "reasoning_about_colored_objects"),
    *("ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences"),
    *("tracking_shuffled_objects_five_objects",),
    *("tracking_shuffled_objects_seven_objects",),
    *("tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting"),
)
_SHAKESPEARE_CHARACTERS = 1_115_394
# Split: the file and its number of tokens, the ends of lines among them.
_WIKITEXT = {"validation": ("valid.txt", 217_646), "test": ("test.txt", 245_569)}


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _texts(
    rows: Iterable[dict[str, Any]], names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {name: row[name] for name in names}


def _read_gsm8k(folder: Path) -> Original:
    def rows(path: Path) -> Iterator[dict[str, Any]]:
        for row in _read_json_lines(path):
            result = row["answer"].rpartition("#### ")[2]
            yield {
                "question": row["question"],
                "answer": row["answer"],
                "result": int(result.replace(",", "")),
            }

    return Original(
        {split: rows(require(folder, f"{split}.jsonl")) for split in ("train", "test")}
    )


def _read_big_bench(folder: Path, *, task: str) -> Original:
    archive = "big_bench_hard.tar.xz"
    lines = read_lines(folder, f"bbh/{task}.json", archive=archive)
    examples = json.loads("\n".join(lines))["examples"]
    return Original({"test": _texts(examples, ("input", "target"))})


def _read_nq_open(folder: Path) -> Original:
    files = {
        "validation": "NQ-open.dev.jsonl",
        "efficientqa_validation": "NQ-open.efficientqa.dev.1.1.jsonl",
        "efficientqa_test": "NQ-open.efficientqa.test.1.1.jsonl",
    }
    return Original(
        {
            split: _texts(
                _read_json_lines(require(folder, file)), ("question", "answer")
            )
            for split, file in files.items()
        }
    )


def _read_hh_rlhf(folder: Path) -> Original:
    def rows(path: Path) -> Iterator[dict[str, Any]]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    path = require(folder, "harmless-base-test.jsonl.gz")
    return Original({"test": _texts(rows(path), ("chosen", "rejected"))})


def _read_shakespeare(folder: Path) -> Original:
    path = require(folder, "input.txt")
    text = path.read_bytes().decode()
    if len(text) != _SHAKESPEARE_CHARACTERS:
        raise DataFormatError(
            f"{str(path)!r} must have {_SHAKESPEARE_CHARACTERS} characters, got "
            f"{len(text)}. The original file is cut short or altered; get it again."
        )
    first = int(len(text) * 0.9)
    second = first + int((len(text) - first) * 0.5)
    parts = {
        "train": text[:first],
        "validation": text[first:second],
        "test": text[second:],
    }
    return Original({split: [{"text": part}] for split, part in parts.items()})


def _read_wikitext(folder: Path) -> Original:
    splits = {}
    for split, (file, expected) in _WIKITEXT.items():
        path = require(folder, file)
        lines = read_lines(folder, file, archive=file)
        tokens = sum(len(line.split()) + 1 for line in lines)
        if tokens != expected:
            raise DataFormatError(
                f"{str(path)!r} must have {expected} tokens, got {tokens}. The "
                "original file is cut short or altered; get it again."
            )
        splits[split] = [{"text": line} for line in lines]
    return Original(splits)


def _read_review_polarity(folder: Path) -> Original:
    path = require(folder, "review_polarity.tar.gz")

    def rows() -> Iterator[dict[str, Any]]:
        with tarfile.open(path) as tar:
            members = sorted(tar.getmembers(), key=lambda member: member.name)
            for member in members:
                parts = member.name.split("/")
                file = tar.extractfile(member)
                if file is None or parts[0] != "txt_sentoken":
                    continue
                yield {
                    "text": file.read().decode().strip(),
                    "label": ("neg", "pos").index(parts[1]),
                    # cv000 to cv099 are the first of ten folds, and so on.
                    "fold": int(parts[2][2]),
                }

    return Original({"train": rows()})


def _text_features(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.Text() for name in names}


LANGUAGE: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="gsm8k",
        description="Word problems of school mathematics; `answer` is a worked "
        "solution, `result` the number it ends with. Official splits.",
        licence="MIT",
        homepage="https://github.com/openai/grade-school-math",
        citation="Training verifiers to solve math word problems, 2021.",
        tasks=("answer", "result"),
        splits={"train": 7_473, "test": 1_319},
        features=lambda: {
            **_text_features("question", "answer"),
            "result": tfds.features.Scalar(np.int64),
        },
        read=_read_gsm8k,
    ),
    *(
        DatasetSpec(
            name=f"big_bench_hard/{task}",
            description=f"Prompts and short answers ({task}), one of 27 tasks of "
            "reasoning. For evaluation only, hence one split.",
            licence="MIT",
            homepage="https://github.com/suzgunmirac/BIG-Bench-Hard",
            citation="Challenging BIG-Bench tasks and whether chain-of-thought can "
            "solve them, 2022.",
            tasks=("target",),
            splits={"test": _BIG_BENCH_ROWS.get(task, 250)},
            features=partial(_text_features, "input", "target"),
            read=partial(_read_big_bench, task=task),
        )
        for task in _BIG_BENCH
    ),
    DatasetSpec(
        name="nq_open",
        description="Questions with all answers that count as right. The official "
        "validation split, and those of the EfficientQA contest without the "
        "additional judgments.",
        licence="CC BY-SA 3.0",
        homepage="https://github.com/google-research-datasets/natural-questions",
        citation="Latent retrieval for weakly supervised open domain question "
        "answering, 2019.",
        tasks=("answer",),
        splits={
            "validation": 3_610,
            "efficientqa_validation": 1_800,
            "efficientqa_test": 1_769,
        },
        features=lambda: {
            "question": tfds.features.Text(),
            "answer": tfds.features.Sequence(tfds.features.Text()),
        },
        read=_read_nq_open,
    ),
    DatasetSpec(
        name="hh_rlhf",
        description="Pairs of dialogues that differ at the end; people preferred "
        "`chosen` for being harmless. Texts can be offensive. Official test split of "
        "the part harmless-base, the only one here.",
        licence="MIT",
        homepage="https://github.com/anthropics/hh-rlhf",
        citation="Training a helpful and harmless assistant with reinforcement "
        "learning from human feedback, 2022.",
        tasks=("chosen",),
        splits={"test": 2_312},
        features=partial(_text_features, "chosen", "rejected"),
        read=_read_hh_rlhf,
    ),
    DatasetSpec(
        name="tiny_shakespeare",
        description="One text of 1,115,394 characters in three pieces, one example "
        "each: the first 90 % for training, then twice 5 %, as TFDS cuts it.",
        licence="unclear (text in the public domain; the repository states none)",
        homepage="https://github.com/karpathy/char-rnn",
        citation="The unreasonable effectiveness of recurrent neural networks, 2015.",
        tasks=("text",),
        splits={"train": 1, "validation": 1, "test": 1},
        features=partial(_text_features, "text"),
        read=_read_shakespeare,
    ),
    DatasetSpec(
        name="wikitext2",
        description="Lines of Wikipedia articles, empty ones too, tokens separated by "
        "spaces and rare words replaced. Official splits without the training part.",
        licence="unclear in the copy (CC BY-SA of Wikipedia, second-hand statement)",
        homepage="https://github.com/pytorch/examples",
        citation="Pointer sentinel mixture models, 2016.",
        tasks=("text",),
        splits={"validation": 3_760, "test": 4_358},
        features=partial(_text_features, "text"),
        read=_read_wikitext,
    ),
    DatasetSpec(
        name="review_polarity",
        description="Film reviews with their polarity, version 2.0, and the fold of "
        "the official cross-validation. All negatives first, no official split.",
        licence="unclear (research set)",
        homepage="https://www.cs.cornell.edu/people/pabo/movie-review-data",
        citation="A sentimental education: Sentiment analysis using subjectivity "
        "summarization based on minimum cuts, 2004.",
        tasks=("label",),
        splits={"train": 2_000},
        features=lambda: {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            "fold": tfds.features.Scalar(np.int32),
        },
        read=_read_review_polarity,
    ),
)
