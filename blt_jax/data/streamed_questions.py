"""Texts of questions that a model answers one after the other in one stream (arXiv 2309.17453,
sections 4.3 and 4.4): StreamEval's lines, and multiple choice as of ARC.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from blt_jax.data.sources import json_records
from blt_jax.data.tokenizers import Tokenizer

LINE = "line {index}: REGISTER_CONTENT is <{value}>\n"
LINE_QUESTION = "What is the REGISTER_CONTENT in line {index}? It is <"
LINE_ENDING = ">\n"
CHOICE_QUESTION = "Question: {question}\n{choices}\nAnswer:"
CHOICE = "{label}. {text}"
CHOICE_ENDING = "\n\n"


@dataclasses.dataclass(frozen=True)
class StreamedQuestion:
    """text: what the stream goes on with; answer: what the model is to write after it; ending: what
    follows the answer."""

    text: str
    answer: str
    ending: str


def line_questions(
    seed: int,
    stream: int,
    *,
    questions: int,
    distance: int,
    every: int = 10,
    line: str = LINE,
    question: str = LINE_QUESTION,
    ending: str = LINE_ENDING,
) -> list[StreamedQuestion]:
    """StreamEval: after every `every` new lines a question about the line `distance` lines before
    the newest one.

    The first text has `distance` lines more, so that every question has an answer. Values are
    numbers of five digits, different within the stream. Line numbers count from 1. A pure function
    of (seed, stream). Raises ValueError for numbers below 1 (distance and stream: below 0), for
    more lines than there are values and for templates without {index} or {value}.
    """
    for name, value, least in (
        ("questions", questions, 1),
        ("every", every, 1),
        ("distance", distance, 0),
        ("stream", stream, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be >= {least}")
    check_template("line", line, ("index", "value"))
    check_template("question", question, ("index",))
    total = distance + every * questions
    if total > 90_000:
        raise ValueError(
            f"questions={questions}, every={every}, distance={distance}: {total} lines, there are "
            "values for 90000"
        )
    values = 10_000 + np.random.default_rng((seed, stream)).permutation(90_000)[:total]
    lines = [line.format(index=i, value=value) for i, value in enumerate(values, 1)]
    result, start = [], 0
    for number in range(questions):
        end = distance + every * (number + 1)
        asked = question.format(index=end - distance)
        text, answer = "".join(lines[start:end]) + asked, str(values[end - distance - 1])
        result.append(StreamedQuestion(text, answer, ending))
        start = end
    return result


def choice_questions(
    path: str,
    count: int = 0,
    *,
    question: str = CHOICE_QUESTION,
    choice: str = CHOICE,
    ending: str = CHOICE_ENDING,
) -> list[StreamedQuestion]:
    """Multiple choice from JSON lines in either layout of ARC, the first `count` (0: all); the
    answer is a space and the label.

    Raises as `json_records`, and ValueError for a line of another layout, labels that are not
    different texts, an answer that is no label, and templates without their fields.
    """
    check_template("question", question, ("question", "choices"))
    check_template("choice", choice, ("label", "text"))
    result = []
    for where, entry in json_records(path, count):
        try:
            asked, pairs, label = _arc(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no question of ARC ({error!r})") from error
        labels = [name for name, _ in pairs]
        if not all(isinstance(name, str) for name in labels) or len(set(labels)) < len(labels):
            raise ValueError(f"{where} has choices {labels}: must be different texts")
        if label not in labels:
            raise ValueError(f"{where} has answer {label!r}, choices {labels}")
        choices = "\n".join(choice.format(label=name, text=text) for name, text in pairs)
        text = question.format(question=asked, choices=choices)
        result.append(StreamedQuestion(text, f" {label}", ending))
    return result


def check_template(name: str, template: str, fields: Sequence[str]) -> None:
    """Raises ValueError unless a format string has these fields and no others."""
    try:
        found = {
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        }
    except ValueError as error:
        raise ValueError(f"{name}={template!r}: {error}") from error
    if found != set(fields):
        wanted = " and ".join(f"{{{field}}}" for field in fields)
        raise ValueError(f"{name}={template!r}: must have {wanted}, and no other field")


def _arc(entry: dict[str, Any]) -> tuple[str, list[tuple[str, str]], str]:
    """Question, (label, text) of the choices, label of the answer; as published by its authors
    (question.stem, question.choices) or as lists of labels and texts beside the question."""
    asked = entry["question"]
    if isinstance(asked, str):
        choices = entry["choices"]
        pairs = list(zip(choices["label"], choices["text"], strict=True))
    else:
        pairs = [(c["label"], c["text"]) for c in asked["choices"]]
        asked = asked["stem"]
    return asked, pairs, entry["answerKey"]


def encode_stream(
    tokenizer: Tokenizer, questions: Sequence[StreamedQuestion]
) -> tuple[Int32[np.ndarray, "T"], Int32[np.ndarray, "T"]]:
    """The ids of all questions with their true answers, and of every id the number of the question
    (1..) whose answer it belongs to, 0 for the others. BOS comes first.

    Every question is encoded by itself (SentencePiece puts a space in front of each). An id of both
    text and answer counts as answer: a model that continues text has to write it. Raises ValueError
    for an empty answer and for one that shares an id with its ending.
    """
    ids, owners = [np.asarray([tokenizer.bos_id])], [np.zeros(1)]
    for number, asked in enumerate(questions, 1):
        if not asked.answer:
            raise ValueError(f"question {number} has no answer")
        parts = (asked.text, asked.text + asked.answer, asked.text + asked.answer + asked.ending)
        text, answered, whole = (np.asarray(tokenizer.encode(part)) for part in parts)
        start, end = _common(text, whole), _common(answered, whole)
        owner = np.zeros(len(whole))
        owner[start:end] = number
        if start >= end or not tokenizer.decode(whole[:end]).endswith(asked.answer.encode()):
            raise ValueError(
                f"question {number}: the answer {asked.answer!r} and its ending {asked.ending!r} "
                "share an id of the tokenizer"
            )
        ids.append(whole)
        owners.append(owner)
    return np.concatenate(ids).astype(np.int32), np.concatenate(owners).astype(np.int32)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first ids are the same."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
