"""Small synthetic corpora, each a pure function of its arguments and seed."""

import dataclasses
import string
from collections.abc import Sequence

import numpy as np

LETTERS = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A key-to-value lookup: `text` ends with `answer`, which only the key's line gives away.

    `depth` is where that line lies, from 0 (first line) to 1 (last line).
    """

    text: bytes
    answer: bytes
    depth: float


def random_text(length: int, *, seed: int, alphabet: str = LETTERS) -> bytes:
    """`length` characters drawn evenly from an ASCII alphabet."""
    _check_at_least("length", length, 0)
    if not alphabet or not alphabet.isascii():
        raise ValueError(f"alphabet is {alphabet!r}; it must be non-empty ASCII")
    letters = np.frombuffer(alphabet.encode(), np.uint8)
    return np.random.default_rng(seed).choice(letters, size=length).tobytes()


def repeated_documents(
    num_texts: int, copies: int, *, length: int = 32, seed: int = 0, alphabet: str = LETTERS
) -> tuple[bytes, ...]:
    """Random texts, each `copies` times in a row, as separate documents.

    Packed into one row, a copy can be predicted only by looking into the document before it:
    with documents kept apart its accuracy is chance.
    """
    _check_at_least("num_texts", num_texts, 1)
    _check_at_least("copies", copies, 1)
    texts = [
        random_text(length, seed=_mix(seed, number), alphabet=alphabet)
        for number in range(num_texts)
    ]
    return tuple(text for text in texts for _ in range(copies))


def lookup_document(
    num_lines: int,
    *,
    seed: int,
    key_length: int = 3,
    value_length: int = 3,
    depth: float = -1.0,
) -> Lookup:
    """Lines `key=value`, then the question `?key=` of one of them and its answer.

    Keys are distinct; the line asked for is drawn at random, or lies at `depth` in [0, 1].
    """
    _check_at_least("num_lines", num_lines, 1)
    _check_at_least("key_length", key_length, 1)
    _check_at_least("value_length", value_length, 1)
    if num_lines > len(LETTERS) ** key_length:
        raise ValueError(
            f"num_lines is {num_lines}; keys of {key_length} letters give at most"
            f" {len(LETTERS) ** key_length}"
        )
    if depth > 1:
        raise ValueError(f"depth is {depth}; it must be in [0, 1], or negative for any")
    generator = np.random.default_rng(seed)
    keys: dict[str, None] = {}
    while len(keys) < num_lines:
        keys.setdefault(_word(generator, key_length))
    values = [_word(generator, value_length) for _ in range(num_lines)]
    asked = int(generator.integers(num_lines)) if depth < 0 else round(depth * (num_lines - 1))
    names = list(keys)
    lines = [f"{key}={value}\n" for key, value in zip(names, values, strict=True)]
    text = "".join([*lines, f"?{names[asked]}={values[asked]}"])
    return Lookup(text.encode(), values[asked].encode(), asked / max(num_lines - 1, 1))


def lookup_documents(count: int, num_lines: int, *, seed: int = 0, **options) -> Sequence[Lookup]:
    """`count` lookups of `num_lines` lines; `options` as of `lookup_document`."""
    _check_at_least("count", count, 1)
    return tuple(
        lookup_document(num_lines, seed=_mix(seed, number), **options) for number in range(count)
    )


RECALL_CLASSES, RECALL_NOISE = 8, 8
RECALL_VOCABULARY = RECALL_CLASSES + RECALL_NOISE + 1


def recall_rows(
    rows: int, gap: int, *, length: int, seed: int | tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Batch [rows, length] of the recall task: one of 8 ids, `gap` ids of noise, a question.

    Ids 0-7 are the answers, 8-15 the noise, 16 the question, whose target is the first id and the
    only one that counts; after it the row is padding. Raises ValueError for rows too short.
    """
    _check_at_least("rows", rows, 1)
    _check_at_least("gap", gap, 0)
    _check_at_least("length", length, gap + 2)
    generator = np.random.default_rng(seed)
    tokens = np.zeros((rows, length), np.int32)
    tokens[:, 0] = generator.integers(RECALL_CLASSES, size=rows)
    noise = generator.integers(RECALL_NOISE, size=(rows, gap))
    tokens[:, 1 : gap + 1] = RECALL_CLASSES + noise
    tokens[:, gap + 1] = RECALL_VOCABULARY - 1
    index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    asked = index == gap + 1
    return {
        "tokens": tokens,
        "targets": np.where(asked, tokens[:, :1], 0).astype(np.int32),
        "segment_ids": (index <= gap + 1).astype(np.int32),
        "positions": index.copy(),
        "target_mask": asked,
        "target_bytes": asked.astype(np.int32),
    }


def _word(generator: np.random.Generator, length: int) -> str:
    return "".join(LETTERS[i] for i in generator.integers(len(LETTERS), size=length))


def _mix(seed: int, number: int) -> int:
    """A seed of its own for each document of a corpus."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def _check_at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"{name} is {value}; it must be at least {smallest}")
