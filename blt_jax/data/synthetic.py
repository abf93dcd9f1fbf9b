"""Small synthetic corpora, each a pure function of its arguments and seed."""

import dataclasses
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import Split

LETTERS = string.ascii_lowercase


class GeneratedBatches:
    """Batches without end of generated rows; row i depends on the seed, the split and i alone.

    make(numbers, seed): batch of the rows with these numbers, from a seed of the config and split.
    rows: which rows of every batch are made, None for all. distinct: how many rows there are, in
    the same order again and again; 0 for new ones in every batch.
    """

    def __init__(
        self,
        config: DataConfig,
        make: Callable[[Sequence[int], tuple[int, ...]], dict[str, np.ndarray]],
        rows: Sequence[int] | None = None,
        distinct: int = 0,
    ):
        self._config, self._make, self._next = config, make, 0
        self._distinct = distinct
        self._rows = range(config.batch_size) if rows is None else rows

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._next * self._config.batch_size
        self._next += 1
        seed = (self._config.seed, int(self._config.split is Split.TRAIN))
        numbers = [first + row for row in self._rows]
        if self._distinct:
            numbers = [number % self._distinct for number in numbers]
        return self._make(numbers, seed)

    def get_state(self) -> Any:
        return self._next

    def set_state(self, state: Any) -> None:
        self._next = state


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


LISTOPS_OPERATORS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
}
LISTOPS_VOCABULARY = 10 + len(LISTOPS_OPERATORS) + 1
"""Digits, the operators with their opening bracket, the closing bracket."""


def listops_row(
    length: int, *, depth: int, values: int, seed: int | tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Ids of a nested expression of length / 4 to `length` ids, and its value 0 to 9.

    An operator has 2 to `values` arguments, each a digit with probability 1/4, and always inside of
    `depth` operators, else an expression. Ids 0-9 are digits, 10-13 MIN, MAX, the median (rounded
    down) and the sum modulo 10, each with its opening bracket, 14 the closing one. Expressions of
    other lengths are drawn again. Raises ValueError for sizes that have none.
    """
    _check_at_least("length", length, 4)
    _check_at_least("depth", depth, 1)
    _check_at_least("values", values, 2)
    generator, operators = np.random.default_rng(seed), list(LISTOPS_OPERATORS.values())
    ids: list[int] = []

    def argument(outside: int) -> int:
        if outside and (outside >= depth or generator.random() < 0.25):
            ids.append(int(generator.integers(10)))
            return ids[-1]
        operator = int(generator.integers(len(operators)))
        ids.append(10 + operator)
        count = int(generator.integers(2, values + 1))
        found = [argument(outside + 1) for _ in range(count) if len(ids) <= length]
        ids.append(LISTOPS_VOCABULARY - 1)
        return int(operators[operator](found)) if found else 0

    for _ in range(100_000):
        ids.clear()
        value = argument(0)
        if length // 4 <= len(ids) <= length:
            return np.array(ids, np.int32), value
    raise ValueError(
        f"no expression of depth={depth} and values={values} has {length // 4} to {length} ids"
    )


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """transitions [N, N]: probability of symbol j after symbol i; start [N]: of the first one."""

    transitions: np.ndarray
    start: np.ndarray


def byte_bigrams(texts: Iterable[bytes], num_symbols: int) -> Bigrams:
    """Bigrams of the most frequent bytes, most frequent first; other bytes are left out.

    Raises ValueError for fewer different bytes than symbols.
    """
    counts = np.zeros((256, 256), np.int64)
    for text in texts:
        codes = np.frombuffer(text, np.uint8).astype(np.int64)
        pairs = 256 * codes[:-1] + codes[1:]
        counts += np.bincount(pairs, minlength=2**16).reshape(256, 256)
    frequency = counts.sum(1)
    if np.count_nonzero(frequency) < num_symbols:
        raise ValueError(
            f"num_symbols is {num_symbols}; the texts have {np.count_nonzero(frequency)} bytes"
        )
    chosen = np.argsort(-frequency, kind="stable")[:num_symbols]
    kept = counts[np.ix_(chosen, chosen)] + 1e-3  # a symbol that nothing follows goes anywhere
    return Bigrams(kept / kept.sum(1, keepdims=True), frequency[chosen] / frequency[chosen].sum())


def backcopy_rows(
    numbers: Sequence[int],
    seed: tuple[int, ...],
    *,
    length: int,
    bigrams: Bigrams,
    triggers: tuple[int, ...],
    bos: bool = True,
) -> dict[str, np.ndarray]:
    """The bigram-backcopy task (after arXiv 2410.13835): batch [rows, length] of rows `numbers`.

    Symbols 1..N follow each other by their bigrams, but after a trigger comes the symbol that
    stood before it. bos: rows begin with id 0. `follows_trigger` marks targets that are copies.
    """
    _check_at_least("length", length, 2)
    if not triggers or min(triggers) < 1 or max(triggers) > len(bigrams.start):
        raise ValueError(f"triggers are {triggers}; they must be 1..{len(bigrams.start)}")
    is_trigger = np.isin(np.arange(len(bigrams.start)), np.asarray(triggers) - 1)
    # A row that began with two triggers would repeat the second for ever.
    start = np.where(is_trigger, 0, bigrams.start)
    after = np.cumsum(bigrams.transitions, axis=1)
    uniform = np.stack([np.random.default_rng((*seed, i)).random(length + 1) for i in numbers])
    symbols = np.zeros(uniform.shape, np.int32)
    symbols[:, 0] = _draw(np.cumsum(start / start.sum())[None, :], uniform[:, 0])
    for t in range(1, length + 1):
        last = symbols[:, t - 1]
        drawn = _draw(after[last], uniform[:, t])
        symbols[:, t] = drawn if t == 1 else np.where(is_trigger[last], symbols[:, t - 2], drawn)
    copies = np.zeros(uniform.shape, bool)
    copies[:, 2:] = is_trigger[symbols[:, 1:-1]]
    ids = symbols + 1
    if bos:
        ids = np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)
        copies = np.concatenate([np.zeros_like(copies[:, :1]), copies[:, :-1]], axis=1)
    return {**_row(ids), "follows_trigger": copies[:, 1:]}


def _draw(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index drawn per row from cumulative probabilities [rows or 1, N] and uniform numbers."""
    below = cumulative < uniform[:, None]
    return np.minimum(below.sum(1), cumulative.shape[1] - 1).astype(np.int32)


def _row(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Batch of one document per row in which every target counts, from ids [rows, length + 1]."""
    tokens = ids[:, :-1]
    return {
        "tokens": tokens,
        "targets": ids[:, 1:],
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "target_mask": np.ones(tokens.shape, bool),
        "target_bytes": np.ones_like(tokens),
    }


EVENT, VALUE = 4, 2
"""Ids of a line or a question of `key_value_rows`, and how many of them, its last, are a value."""


def key_value_rows(
    numbers: Sequence[int],
    seed: tuple[int, ...],
    *,
    lines: int,
    num_symbols: int,
    distance: int = 0,
) -> dict[str, np.ndarray]:
    """Lines "! key value" in turn with questions "? key value": batch [rows, 2 EVENT lines].

    Each line is followed by a question about the line `distance` lines back (0: the last one), or
    with distance < 0 about any of the row. A key is one symbol, which none of the last
    num_symbols / 2 lines had, a value any two. Only answers count: once a key is found again, the
    second id of its value is found in the same way. Ids: 0 "!", 1 "?", then the symbols.
    """
    _check_at_least("lines", lines, 1)
    _check_at_least("num_symbols", num_symbols, max(4, 2 * (distance + 1)))
    rows = [
        _key_value_ids(np.random.default_rng((*seed, i)), lines, num_symbols, distance)
        for i in numbers
    ]
    batch = _row(np.stack([np.append(row, 0) for row in rows]).astype(np.int32))
    # A target stands one place earlier than its id.
    place = np.arange(2 * EVENT * lines)
    asked = np.broadcast_to((place + 1) % (2 * EVENT) >= 2 * EVENT - VALUE, batch["tokens"].shape)
    return {
        **batch,
        "target_mask": asked & (place // (2 * EVENT) >= distance)[None],
        "target_bytes": asked.astype(np.int32),
    }


def _key_value_ids(generator, lines, num_symbols, distance) -> np.ndarray:
    known, free = [], list(range(num_symbols))
    values = generator.integers(num_symbols, size=(lines, VALUE))
    ids = []
    for number in range(lines):
        if number > num_symbols // 2:
            free.append(known[number - num_symbols // 2 - 1][0])
        known.append((free.pop(int(generator.integers(len(free)))), *values[number]))
        back = distance
        if distance < 0:
            back = int(generator.integers(min(number + 1, num_symbols // 2)))
        ids += [-2, *known[number], -1, *known[max(number - back, 0)]]
    return np.asarray(ids) + 2


def _word(generator: np.random.Generator, length: int) -> str:
    return "".join(LETTERS[i] for i in generator.integers(len(LETTERS), size=length))


def _mix(seed: int, number: int) -> int:
    """A seed of its own for each document of a corpus."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def _check_at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"{name} is {value}; it must be at least {smallest}")
