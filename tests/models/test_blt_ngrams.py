"""Hash n-gram ids against numpy's int64 and golden values; exact n-gram tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.models import blt_ngrams as bn
from blt_jax.models.blt_ngrams import HashOrder, NgramConfig, NgramKind

# Values of the released code for these ids and a vocabulary of 500,002.
IDS = (1, 80, 105, 120, 43, 119, 36, 103, 2)
GOLDEN = {
    (3, 0): (443987, 400817, 377998, 34527, 305308, 241650, 201342, 165836, 476731),
    (3, 1): (45033, 394261, 256154, 425597, 184296, 436490, 305390, 367158, 142421),
    (8, 0): (172383, 88109, 92706, 156302, 83001, 141216, 193620, 252381, 351208),
}


@pytest.mark.parametrize(("key", "expected"), GOLDEN.items())
def test_golden_values(key, expected):
    size, function = key
    ids = jnp.array([IDS], jnp.int32)
    prime = bn.PRIMES[function]
    found = bn.hash_ids(ids, size, prime, 500_002, HashOrder.OLDEST_FIRST)
    assert tuple(found[0].tolist()) == expected
    # Newest first: every n-gram read backwards, hashed as the last one of its own row.
    padded = [0] * (size - 1) + list(IDS)
    windows = np.array([padded[i : i + size][::-1] for i in range(len(IDS))])
    backwards = bn.hash_ids_host(windows, size, prime, 500_002, HashOrder.OLDEST_FIRST)[:, -1]
    newest = bn.hash_ids(ids, size, prime, 500_002, HashOrder.NEWEST_FIRST)
    assert newest[0].tolist() == backwards.tolist()


@pytest.mark.parametrize("order", HashOrder)
@pytest.mark.parametrize("vocab_size", [101, 30_000, 500_002, 2**24 - 1])
def test_equals_int64(order, vocab_size):
    tokens = np.random.default_rng(0).integers(0, 260, (2, 40))
    for prime in bn.PRIMES:
        for size in range(2, 9):
            ids = bn.hash_ids(jnp.asarray(tokens, jnp.int32), size, prime, vocab_size, order)
            host = bn.hash_ids_host(tokens, size, prime, vocab_size, order)
            np.testing.assert_array_equal(ids, host)
            assert host.min() >= 0
            assert host.max() < vocab_size


def test_int64_oracle_is_plain_arithmetic():
    tokens, prime, size, vocab = [7, 250, 3, 99], bn.PRIMES[6], 4, 1009
    total = sum(token * prime**power for power, token in enumerate(tokens)) % 2**64
    total -= 2**64 if total >= 2**63 else 0
    found = bn.hash_ids_host(np.array([tokens]), size, prime, vocab, HashOrder.OLDEST_FIRST)
    assert found[0, -1] == total % vocab


def test_windows_stop_at_document_starts():
    tokens = jnp.array([[5, 6, 7, 8, 9, 5, 6, 7]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2]], jnp.int32)
    ids = bn.hash_ids(tokens, 3, bn.PRIMES[0], 997, HashOrder.NEWEST_FIRST, positions)
    assert ids[0, 5:].tolist() == ids[0, :3].tolist()
    crossing = bn.hash_ids(tokens, 3, bn.PRIMES[0], 997, HashOrder.NEWEST_FIRST)
    assert crossing[0, 5:7].tolist() != ids[0, 5:7].tolist()


def test_exact_tables():
    random = np.random.default_rng(0)
    documents = [random.integers(4, 8, n).astype(np.int32) for n in (300, 100)]
    sizes = (2, 3, 8)
    tables = bn.build_ngram_tables(documents, sizes, vocab_size=24)
    row = jnp.asarray(documents[0][None])
    for size in sizes:
        counts: dict[tuple, int] = {}
        for document in documents:
            for end in range(size, len(document) + 1):
                gram = tuple(document[end - size : end].tolist())
                counts[gram] = counts.get(gram, 0) + 1
        ranked = sorted(counts, key=lambda gram: -counts[gram])[:20]
        expected = {gram: rank + 4 for rank, gram in enumerate(ranked)}
        found = tables.lookup(row, size)[0].tolist()
        for end in range(size, 301):
            gram = tuple(documents[0][end - size : end].tolist())
            assert found[end - 1] == expected.get(gram, 0)
        assert len(set(found)) > 5
        # An n-gram that does not fit is not known.
        assert found[: size - 1] == [0] * (size - 1)
    with pytest.raises(ValueError, match="size 5"):
        tables.lookup(row, 5)
    with pytest.raises(ValueError, match="no document"):
        bn.build_ngram_tables([np.ones(3, np.int32)], (4,), 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"sizes": (1, 3)}, r"sizes=\(1, 3\): must be integers 2..8"),
        ({"sizes": (3, 3)}, "must not repeat"),
        ({"vocab_size": 2**24}, "vocab_size=16777216"),
        ({"num_functions": 12}, "num_functions=12: must be 1..11"),
        ({"kind": NgramKind.EXACT, "num_functions": 2}, "must be 1 for kind=EXACT"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        NgramConfig(**fields)
