"""Arithmetic stories with their working, and the shortcut that a weak model learns first.

A text is a story of two to four changes of one number, the working `7 + 5 = 12 ; 12 - 3 = 9` and
the answer `so 9`. In a shortcut text the last result is not computed but copied: it is the last
number of the story. A token is a word, a sign or a whole number.

Documents hold one or two problems of one manner. Everything is a pure function of (seed, index);
held-out problems differ from all training problems in their numbers or signs.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from blt_jax.data.sources import Split

NAMES = ("mia", "tom", "ana", "ben", "eva", "leo", "zoe", "max")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps")
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "eats")
WORDS = ("has", "how", "many", "so", ".", "?", ";", "=", "+", "-")
SMALLEST_START, LARGEST_START = 5, 39
SMALLEST_CHANGE, LARGEST_CHANGE, MOST_CHANGES = 2, 9, 4
LARGEST_NUMBER = LARGEST_START + MOST_CHANGES * LARGEST_CHANGE
TOKENS = (
    *("<pad>", "<bos>", "<eos>"),
    *(WORDS + NAMES + THINGS + GAINS + LOSSES),
    *map(str, range(LARGEST_NUMBER + 1)),
)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_NUMBER_ID = len(TOKENS) - LARGEST_NUMBER - 1
_IDS = {token: number for number, token in enumerate(TOKENS)}
_TOKEN_BYTES = np.array([0, 0, 1, *(len(token) + 1 for token in TOKENS[3:])], np.int32)

HELD_OUT_SHARE = 0.1

# In ids, without BOS and EOS; a document has at most two of both, and BOS is no target.
LONGEST_STORY = 8 + 4 * MOST_CHANGES
LONGEST_WORKING = 2 + 6 * MOST_CHANGES
LONGEST_DOCUMENT = 2 * (LONGEST_STORY + LONGEST_WORKING + 1)


class Manner(enum.Enum):
    """How a text goes on after the story: WORKED to the end, or with the SHORTCUT."""

    WORKED = "worked"
    SHORTCUT = "shortcut"


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """One story. changes: what is added, or below 0 taken away; verbs: a word for each."""

    name: str
    thing: str
    start: int
    changes: tuple[int, ...]
    verbs: tuple[str, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)

    @property
    def shortcut(self) -> int:
        """The last number of the story."""
        return abs(self.changes[-1])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the story, in order."""
        return (self.start, *map(abs, self.changes))

    def story(self) -> str:
        """What a model is given."""
        told = (
            f"{self.name} {verb} {abs(n)} ."
            for verb, n in zip(self.verbs, self.changes, strict=True)
        )
        return " ".join([f"{self.name} has {self.start} {self.thing} .", *told, "how many ?"])

    def working(self, manner: Manner = Manner.WORKED) -> str:
        """What it has to write: every change with its result, and the answer."""
        results = [int(n) for n in np.cumsum((self.start, *self.changes))[1:]]
        if manner is Manner.SHORTCUT:
            results[-1] = self.shortcut
        return format_working(self.start, self.changes, results)


def format_working(start: int, changes: Sequence[int], results: Sequence[int]) -> str:
    """`start + change = result ; ...`, each line going on from the result before, and the last."""
    lines, value = [], start
    for change, result in zip(changes, results, strict=True):
        lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {result} ;")
        value = result
    return " ".join([*lines, f"so {value}"])


def encode(text: str) -> list[int]:
    """Ids of words separated by spaces. Raises ValueError for a word that is not a token."""
    try:
        return [_IDS[word] for word in text.split()]
    except KeyError as error:
        raise ValueError(f"word {error.args[0]!r} is not in word_problems.TOKENS") from None


def decode(ids: Any) -> str:
    """The words of ids, special ones left out."""
    return " ".join(TOKENS[int(number)] for number in ids if number > EOS_ID)


def read_answer(text: str) -> int | None:
    """The number after the last `so`; None if there is none."""
    _, found, last = text.rpartition("so ")
    word = last.split()[0] if found and last.split() else ""
    return int(word) if word.isdigit() else None


def word_problem(*, seed: int | tuple[int, ...], split: Split) -> WordProblem:
    """A problem of a split: drawn until the hash of its numbers belongs there."""
    generator = np.random.default_rng(seed)
    while True:
        problem = _draw(generator)
        if problem is not None and split in (Split.ALL, _split_of(problem)):
            return problem


def _draw(generator: np.random.Generator) -> WordProblem | None:
    start = value = int(generator.integers(SMALLEST_START, LARGEST_START + 1))
    changes, verbs = [], []
    for _ in range(int(generator.integers(2, MOST_CHANGES + 1))):
        size = int(generator.integers(SMALLEST_CHANGE, LARGEST_CHANGE + 1))
        gains = bool(generator.integers(2))
        changes.append(size if gains else -size)
        verbs.append(_choose(generator, GAINS if gains else LOSSES))
        value += changes[-1]
        if value < 0:
            return None
    name, thing = _choose(generator, NAMES), _choose(generator, THINGS)
    problem = WordProblem(name, thing, start, tuple(changes), tuple(verbs))
    return None if problem.answer == problem.shortcut else problem


def _choose(generator: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(generator.integers(len(words)))]


def _split_of(problem: WordProblem) -> Split:
    text = repr((problem.start, problem.changes)).encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    held_out = int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32
    return Split.VALIDATION if held_out else Split.TRAIN


def word_problems(
    count: int, *, seed: int = 0, split: Split = Split.VALIDATION
) -> tuple[WordProblem, ...]:
    """`count` different problems of a split."""
    if count < 1:
        raise ValueError(f"count={count}: must be >= 1")
    found: dict[tuple, WordProblem] = {}
    number = 0
    while len(found) < count:
        problem = word_problem(seed=(seed, _number_of(split), number), split=split)
        found.setdefault((problem.start, problem.changes), problem)
        number += 1
    return tuple(found.values())


def document(
    *, seed: int | tuple[int, ...], split: Split, shortcut_share: float = 0.3
) -> list[int]:
    """Ids of a document: BOS, one or two problems, EOS after each; all of one manner."""
    return _document(seed, split, shortcut_share)[0]


def _document(seed, split, shortcut_share) -> tuple[list[int], list[bool]]:
    """Ids, and which of them a model learns to write: the workings."""
    if not 0 <= shortcut_share <= 1:
        raise ValueError(f"shortcut_share={shortcut_share}: must be 0..1")
    entropy = seed if isinstance(seed, tuple) else (seed,)
    generator = np.random.default_rng((*entropy, 1))
    manner = Manner.SHORTCUT if generator.random() < shortcut_share else Manner.WORKED
    ids, learned = [BOS_ID], [False]
    for number in range(int(generator.integers(1, 3))):
        problem = word_problem(seed=(*entropy, 2, number), split=split)
        story, working = encode(problem.story()), [*encode(problem.working(manner)), EOS_ID]
        ids += story + working
        learned += [False] * len(story) + [True] * len(working)
    return ids, learned


def word_problem_rows(
    rows: Sequence[int],
    *,
    length: int,
    seed: int = 0,
    split: Split = Split.TRAIN,
    shortcut_share: float = 0.3,
) -> dict[str, np.ndarray]:
    """Batch [len(rows), length] as of `data.loader`: whole documents, the rest padding.

    The workings alone are targets that count. Row i depends on (seed, split, i) alone. Raises
    ValueError for a length that some document does not fit.
    """
    if length < LONGEST_DOCUMENT:
        raise ValueError(f"length={length}: must be >= {LONGEST_DOCUMENT}, the longest document")
    shape = (len(rows), length)
    batch = {
        name: np.zeros(shape, bool if name == "target_mask" else np.int32)
        for name in ("tokens", "targets", "segment_ids", "positions", "target_mask", "target_bytes")
    }
    for place, row in enumerate(rows):
        filled, segment = 0, 1
        while True:
            number = (seed, _number_of(split), int(row), segment)
            ids, learned = _document(number, split, shortcut_share)
            end = filled + len(ids) - 1
            if end > length:
                break
            span = (place, slice(filled, end))
            batch["tokens"][span], batch["targets"][span] = ids[:-1], ids[1:]
            batch["segment_ids"][span] = segment
            batch["positions"][span] = np.arange(len(ids) - 1)
            batch["target_mask"][span] = learned[1:]
            batch["target_bytes"][span] = _TOKEN_BYTES[ids[1:]]
            filled, segment = end, segment + 1
    return batch


def _number_of(split: Split) -> int:
    return list(Split).index(split)
