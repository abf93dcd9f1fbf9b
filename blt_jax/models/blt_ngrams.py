"""Byte n-gram embeddings of the Byte Latent Transformer (arXiv 2412.09871, section 3.2.1).

Every byte's embedding is enriched by one embedding for each n-gram that ends at it:
e_i = (x_i + sum over functions f and sizes n of E_{f,n}[id(g_{i,n})]) / (number of sizes + 1).

Rolling polynomial hash              hash_ids; hash_ids_host is the int64 form used as its oracle
Appendix (most frequent n-grams)     build_ngram_tables, NgramTables.lookup
Paper and release differ in the order of the powers, the division, the n-grams that do not fit
before the start of a text, and whether n-grams reach into the document before: NgramConfig.
"""

import collections
import dataclasses
import enum
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# One ten-digit prime per hash function, in the order of the released code.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


class NgramKind(enum.Enum):
    """Where n-gram ids come from: nowhere, a hash, or a table of the most frequent n-grams."""

    NONE = "none"
    HASH = "hash"
    EXACT = "exact"


class HashOrder(enum.Enum):
    """Which byte of an n-gram is multiplied by the prime's power 0."""

    NEWEST_FIRST = "newest_first"
    OLDEST_FIRST = "oldest_first"


class NgramStart(enum.Enum):
    """N-grams longer than the text before them add nothing, or are filled up with id 0."""

    SKIP = "skip"
    PAD_ZERO = "pad_zero"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class NgramConfig:
    """The n-gram embeddings; the defaults are the paper's, `released()` is the code's."""

    kind: NgramKind = NgramKind.HASH
    num_functions: int = 1
    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    vocab_size: int = 500_000
    order: HashOrder = HashOrder.NEWEST_FIRST
    normalize: bool = True
    """Divide by the number of sizes + 1, also where sizes were skipped."""
    start: NgramStart = NgramStart.SKIP
    cross_documents: bool = False

    def __post_init__(self):
        if not self.sizes and self.kind is not NgramKind.NONE:
            raise ValueError("NgramConfig.sizes=(): give sizes, or kind=NONE")
        if not all(isinstance(n, int) and 2 <= n <= 8 for n in self.sizes):
            raise ValueError(f"NgramConfig.sizes={self.sizes}: must be integers 2..8")
        if len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"NgramConfig.sizes={self.sizes}: must not repeat")
        if not 4 < self.vocab_size < 2**24:
            raise ValueError(f"NgramConfig.vocab_size={self.vocab_size}: must be 5..{2**24 - 1}")
        if not 1 <= self.num_functions <= len(PRIMES):
            raise ValueError(
                f"NgramConfig.num_functions={self.num_functions}: must be 1..{len(PRIMES)}"
            )
        if self.kind is NgramKind.EXACT and self.num_functions != 1:
            raise ValueError(
                f"NgramConfig.num_functions={self.num_functions}: must be 1 for kind=EXACT"
            )

    @classmethod
    def released(cls, **overrides) -> "NgramConfig":
        """As in the released code and checkpoints."""
        defaults = {
            "vocab_size": 500_002,
            "order": HashOrder.OLDEST_FIRST,
            "normalize": False,
            "start": NgramStart.PAD_ZERO,
            "cross_documents": True,
        }
        return cls(**(defaults | overrides))

    @property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """(function, size) of every embedding table, in the released order."""
        if self.kind is NgramKind.NONE:
            return ()
        return tuple((f, n) for f in range(self.num_functions) for n in self.sizes)


def _power_limbs(prime: int, power: int) -> tuple[int, ...]:
    """The four 16-bit limbs of prime^power mod 2^64, lowest first."""
    value = pow(prime, power, 2**64)
    return tuple((value >> (16 * limb)) & 0xFFFF for limb in range(4))


def previous_tokens(
    tokens: Int[Array, "B N"],
    back: int,
    positions: Int[Array, "B N"] | None = None,
) -> Int[Array, "B N"]:
    """The token `back` places before each one; 0 before the row and, with positions, before the
    document."""
    shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
    return shifted if positions is None else jnp.where(positions >= back, shifted, 0)


def hash_ids(
    tokens: Int[Array, "B N"],
    size: int,
    prime: int,
    vocab_size: int,
    order: HashOrder,
    positions: Int[Array, "B N"] | None = None,
) -> Int[Array, "B N"]:
    """Hash in 0..vocab_size-1 of the n-gram of `size` ids that ends at each token.

    The sum of id * prime^power as a signed 64-bit number with wrap-around, then modulo vocab_size,
    in 32-bit arithmetic: the sum is kept as four 16-bit limbs (8 products of a 9-bit id stay
    below 2^28) and reduced byte by byte, which needs vocab_size < 2^24. positions: of tokens in
    their documents, to fill up with id 0 before a document.
    """
    limbs = [jnp.zeros(tokens.shape, jnp.uint32) for _ in range(4)]
    for back in range(size):
        power = back if order is HashOrder.NEWEST_FIRST else size - 1 - back
        token = previous_tokens(tokens, back, positions).astype(jnp.uint32)
        for limb, factor in enumerate(_power_limbs(prime, power)):
            limbs[limb] += token * jnp.uint32(factor)
    for limb in range(3):
        limbs[limb + 1] += limbs[limb] >> 16
    modulus = jnp.uint32(vocab_size)
    remainder = jnp.zeros(tokens.shape, jnp.uint32)
    for limb in reversed(limbs):
        for byte in ((limb >> 8) & 0xFF, limb & 0xFF):
            remainder = (remainder * jnp.uint32(256) + byte) % modulus
    # A set top bit makes the signed number smaller by 2^64.
    negative = ((limbs[3] >> 15) & 1) == 1
    signed = (remainder + jnp.uint32(vocab_size - 2**64 % vocab_size)) % modulus
    return jnp.where(negative, signed, remainder).astype(jnp.int32)


def hash_ids_host(
    tokens: np.ndarray, size: int, prime: int, vocab_size: int, order: HashOrder
) -> np.ndarray:
    """`hash_ids` of rows int [B, N] in numpy's wrapping int64, filled up with id 0."""
    tokens = np.asarray(tokens, np.int64)
    padded = np.pad(tokens, ((0, 0), (size - 1, 0)))
    total = np.zeros(tokens.shape, np.int64)
    with np.errstate(over="ignore"):
        for back in range(size):
            power = back if order is HashOrder.NEWEST_FIRST else size - 1 - back
            factor = np.uint64(pow(prime, power, 2**64)).astype(np.int64)
            start = size - 1 - back
            total += padded[:, start : start + tokens.shape[1]] * factor
    return np.mod(total, vocab_size).astype(np.int32)


# ------------------------------------------------------------------------- exact n-gram tables


def _words(tokens: list) -> list:
    """Up to 8 ids of 9 bits as three words: the newest 3, the 3 before, the rest."""
    words = []
    for begin in range(0, 9, 3):
        word = tokens[0] * 0
        for place, token in enumerate(tokens[begin : begin + 3]):
            word = word | (token << (9 * place))
        words.append(word)
    return words


@dataclasses.dataclass(frozen=True, eq=False)
class NgramTables:
    """The most frequent n-grams of each size: sorted keys [K, 3] and their ids [K], by size."""

    keys: dict[int, np.ndarray]
    ids: dict[int, np.ndarray]

    def lookup(
        self, tokens: Int[Array, "B N"], size: int, positions: Int[Array, "B N"] | None = None
    ) -> Int[Array, "B N"]:
        """Id of the n-gram that ends at each token: 4 + its rank, or 0 if it is not known.

        A binary search over the sorted keys, in 32-bit words.
        """
        if size not in self.keys:
            raise ValueError(f"no table for n-grams of size {size}: built for {tuple(self.keys)}")
        keys, ids = jnp.asarray(self.keys[size]), jnp.asarray(self.ids[size])
        words = _words([previous_tokens(tokens, back, positions) for back in range(size)])
        low = jnp.zeros(tokens.shape, jnp.int32)
        high = jnp.full(tokens.shape, keys.shape[0], jnp.int32)
        # Every step halves high - low; afterwards low is the first key not below the words.
        for _ in range(int(keys.shape[0]).bit_length()):
            middle = (low + high) // 2
            candidate = jnp.take(keys, jnp.minimum(middle, keys.shape[0] - 1), axis=0)
            below = self._less(candidate, words) & (low < high)
            low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
        index = jnp.minimum(low, keys.shape[0] - 1)
        found = jnp.take(keys, index, axis=0)
        same = jnp.ones(tokens.shape, bool)
        for place, word in enumerate(words):
            same &= found[..., place] == word
        return jnp.where(same, jnp.take(ids, index), 0)

    @staticmethod
    def _less(candidate: jax.Array, words: list[jax.Array]) -> Bool[Array, "B N"]:
        less = jnp.zeros(words[0].shape, bool)
        for place in range(3):
            # From the least to the most significant word, which is the last.
            at = candidate[..., place]
            less = (at < words[place]) | ((at == words[place]) & less)
        return less


def build_ngram_tables(
    documents: Iterable[np.ndarray], sizes: tuple[int, ...], vocab_size: int
) -> NgramTables:
    """Counts the n-grams of tokenised documents and keeps the vocab_size - 4 most frequent.

    Ties go to the n-gram seen first. Raises ValueError if no document has n tokens.
    """
    documents = [np.asarray(document, np.int64) for document in documents]
    keys, ids = {}, {}
    for size in sizes:
        counts = collections.Counter()
        for document in documents:
            windows = [document[size - 1 - back : len(document) - back] for back in range(size)]
            if len(windows[0]):
                counts.update(zip(*(word.tolist() for word in _words(windows)), strict=True))
        if not counts:
            raise ValueError(f"no document has an n-gram of size {size}")
        best = [key for key, _ in counts.most_common(vocab_size - 4)]
        table = np.array(best, np.int32)
        order = np.lexsort((table[:, 0], table[:, 1], table[:, 2]))
        keys[size] = table[order]
        ids[size] = (order + 4).astype(np.int32)
    return NgramTables(keys, ids)
