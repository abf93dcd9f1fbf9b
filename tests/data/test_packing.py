"""The batch contract: every target once, segments apart, patch starts and limits."""

import dataclasses

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from blt_jax.data import loader as loader_lib
from blt_jax.data import packing
from blt_jax.data.sources import ConcatenatedSource, InMemorySource
from blt_jax.data.tokenizers import ByteTokenizer

TEXTS = st.lists(st.binary(max_size=40), min_size=1, max_size=8)


def strided(stride):
    def patcher(index, ids):
        del index
        positions = np.arange(len(ids))
        return (positions == 0) | ((positions - 1) % stride == 0)

    return patcher


def seeded(seed):
    def patcher(index, ids):
        starts = np.random.default_rng((seed, index)).random(len(ids)) < 0.4
        starts[:2] = True
        return starts

    return patcher


def batches(texts, patcher=None, **changes):
    settings = {
        "batch_size": 2,
        "sequence_length": 16,
        "shuffle": False,
        "repeat": False,
        "num_threads": 0,
        "prefetch": 0,
    }
    config = loader_lib.DataConfig(**{**settings, **changes})
    documents = ConcatenatedSource([InMemorySource(texts)])
    return loader_lib.loader(
        config, tokenizer=ByteTokenizer(), patcher=patcher, documents=documents
    )


def flat_targets(rows):
    return np.concatenate([batch["targets"][batch["target_mask"]] for batch in rows])


def expected_targets(texts):
    tokenizer = ByteTokenizer()
    return np.concatenate([tokenizer.encode(text, bos=True, eos=True)[1:] for text in texts])


def check_rows(rows):
    """Invariants of the batch contract that hold for every packing."""
    for batch in rows:
        tokens, targets, segments = batch["tokens"], batch["targets"], batch["segment_ids"]
        mask, positions = batch["target_mask"], batch["positions"]
        padding = segments == 0
        for name in ("tokens", "positions"):
            assert not batch[name][padding].any()
        assert not mask[padding].any()
        assert not targets[padding].any()
        np.testing.assert_array_equal(
            batch["target_bytes"], np.where(mask, ByteTokenizer().token_bytes(targets), 0)
        )
        for row in range(len(tokens)):
            used = int((segments[row] > 0).sum())
            assert not segments[row, used:].any()
            changes = np.diff(segments[row, :used], prepend=0)
            assert set(np.unique(changes)) <= {0, 1}
            firsts = np.flatnonzero(changes)
            lengths = np.diff(np.append(firsts, used))
            np.testing.assert_array_equal(
                positions[row, :used],
                np.concatenate([np.arange(n) for n in lengths]) if used else [],
            )
            # Targets are the inputs shifted by one, within the used part of the row.
            np.testing.assert_array_equal(
                targets[row, : max(used - 1, 0)], tokens[row, 1 : max(used, 1)]
            )
            joins = firsts[1:] - 1
            assert not mask[row, joins].any()
            inside = np.setdiff1d(np.arange(max(used - 1, 0)), joins)
            assert mask[row, inside].all()
            assert (tokens[row, joins] == 2).all()  # a document's EOS ends its segment


@hypothesis.settings(deadline=None)
@hypothesis.given(texts=TEXTS, length=st.integers(1, 20), mode=st.sampled_from(packing.Packing))
def test_every_target_comes_once(texts, length, mode):
    rows = list(batches(texts, sequence_length=length, packing=mode))
    check_rows(rows)
    np.testing.assert_array_equal(flat_targets(rows), expected_targets(texts))
    assert sum(int(b["target_bytes"].sum()) for b in rows) == sum(map(len, texts))
    if mode is packing.Packing.ONE_DOCUMENT:
        assert max(int(b["segment_ids"].max()) for b in rows) == 1


@hypothesis.settings(deadline=None)
@hypothesis.given(
    texts=TEXTS,
    length=st.integers(1, 20),
    max_patches=st.integers(0, 9),
    seed=st.integers(0, 99),
    mode=st.sampled_from(packing.Packing),
)
def test_patch_packing_invariants(texts, length, max_patches, seed, mode):
    patcher = seeded(seed)
    rows = list(
        batches(texts, patcher, sequence_length=length, max_patches=max_patches, packing=mode)
    )
    check_rows(rows)
    np.testing.assert_array_equal(flat_targets(rows), expected_targets(texts))
    document_starts = [
        patcher(i, ByteTokenizer().encode(t, bos=True, eos=True)) for i, t in enumerate(texts)
    ]
    target_starts = np.concatenate([starts[1:] for starts in document_starts])
    found = []
    for batch in rows:
        starts, segments, mask = batch["starts"], batch["segment_ids"], batch["target_mask"]
        assert starts.shape == (2, length + 1)
        for row in range(2):
            used = int((segments[row] > 0).sum())
            if max_patches:
                assert starts[row, :used].sum() <= max_patches
            assert not starts[row, used + 1 :].any()
            # The first and second token of every segment start a patch, so none crosses over.
            forced = np.flatnonzero(batch["positions"][row, :used] <= 1)
            assert starts[row, forced].all()
            ends = np.flatnonzero(mask[row])
            forced_targets = batch["positions"][row, ends] == 0
            assert starts[row, ends + 1][forced_targets].all()
            found.append(np.where(forced_targets, -1, starts[row, ends + 1]))
    found = np.concatenate(found)
    # Elsewhere the starts are the patcher's, computed from the whole document.
    np.testing.assert_array_equal(found[found >= 0], target_starts[found >= 0])


def without_gaps(batch, pieces):
    """The rows with the padding between their pieces moved to the end."""
    found = {name: np.zeros_like(value) for name, value in batch.items() if name != "starts"}
    for row, segments in enumerate(batch["segment_ids"]):
        real = np.flatnonzero(segments)
        for piece in segments.reshape(pieces, -1):  # padding is at the end of a piece
            assert not piece[(piece > 0).sum() :].any()
        for name, values in found.items():
            values[row, : len(real)] = batch[name][row, real]
    return found


@hypothesis.settings(deadline=None)
@hypothesis.given(
    texts=TEXTS,
    pieces=st.integers(2, 4),
    patches=st.integers(2, 9),
    halo=st.integers(0, 6),
    seed=st.integers(0, 99),
    mode=st.sampled_from(packing.Packing),
)
def test_pieces_hold_whole_patches(texts, pieces, patches, halo, seed, mode):
    length, patcher = 12, seeded(seed)

    def limited(index, ids):
        starts = patcher(index, ids)
        starts[::7] = True
        return starts

    rows = list(
        batches(
            texts,
            limited,
            sequence_length=pieces * length,
            max_patches=pieces * patches,
            row_pieces=pieces,
            piece_halo=halo,
            packing=mode,
        )
    )
    check_rows([without_gaps(batch, pieces) for batch in rows])
    np.testing.assert_array_equal(flat_targets(rows), expected_targets(texts))
    for batch in rows:
        shape = (2, pieces, length)
        segments = batch["segment_ids"].reshape(shape)
        starts = batch["starts"][:, :-1].reshape(shape) & (segments > 0)
        assert starts.sum(-1).max() <= patches
        assert starts[:, :, 0][segments[:, :, 0] > 0].all()
        for row in range(2):
            for piece in range(pieces - 1):
                before, after = segments[row, piece], segments[row, piece + 1, 0]
                used = (before > 0).sum()
                if after and after == before[used - 1]:  # one document goes on
                    assert batch["starts"][row, piece * length + used]
                    assert (
                        used >= halo
                        or before[0] != after
                        or piece == 0
                        or (segments[row, piece - 1].max() != after)
                    )


def test_rows_without_patches_are_cut_where_they_fall():
    plain, cut = (list(batches([bytes(range(50))] * 3, row_pieces=n)) for n in (1, 4))
    for one, other in zip(plain, cut, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_patch_longer_than_a_piece():
    with pytest.raises(ValueError, match="a patch of document 0 is longer than a piece of 4 tok"):
        list(batches([bytes(range(40))], strided(6), row_pieces=4, max_patches=16))
    with pytest.raises(ValueError, match="max_patches is 6; it must be divisible by row_pieces=4"):
        batches([b"a"], strided(6), row_pieces=4, max_patches=6)
    with pytest.raises(ValueError, match="piece_halo is 5; it must be at most the 4 tokens"):
        batches([b"a"], row_pieces=4, piece_halo=5)


def test_row_closes_at_the_patch_boundary():
    rows = list(batches([bytes(range(20))], strided(4), max_patches=3, batch_size=1))
    first = rows[0]
    # BOS | 4 bytes | 4 bytes: nine inputs; the last target starts the fourth patch.
    assert (first["segment_ids"] > 0).sum() == 9
    assert first["starts"][0].nonzero()[0].tolist() == [0, 1, 5, 9]
    # The next row begins with the last target; its first two tokens are forced.
    assert rows[1]["tokens"][0, 0] == first["targets"][0, 8]
    assert rows[1]["starts"][0].nonzero()[0].tolist() == [0, 1, 4, 8]


def test_long_document_overlaps_by_one_token():
    first, second = list(batches([b"abcdefgh"], sequence_length=5, batch_size=1))
    assert first["tokens"].tolist() == [[1, 101, 102, 103, 104]]
    assert first["targets"].tolist() == [[101, 102, 103, 104, 105]]
    assert second["tokens"].tolist() == [[105, 106, 107, 108, 2]]
    assert second["targets"].tolist() == [[106, 107, 108, 2, 0]]
    assert second["positions"].tolist() == [[0, 1, 2, 3, 4]]
    assert second["target_mask"].tolist() == [[True, True, True, True, False]]
    assert second["target_bytes"].tolist() == [[1, 1, 1, 0, 0]]


def test_documents_that_fill_rows_equal_grain_first_fit():
    texts = [b"a" * 4, b"b" * 8, b"c" * 3, b"d" * 5, b"e" * 14]  # 6+10, 5+7(+4 padding), 16
    ids = [ByteTokenizer().encode(text, bos=True, eos=True) for text in texts]
    peer = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source([{"tokens": x} for x in ids[:2] + ids[4:]]).to_iter_dataset(),
        length_struct={"tokens": 16},
        num_packing_bins=1,
        shuffle_bins=False,
    )
    peer_rows = list(peer)
    own_rows = list(batches(texts[:2] + texts[4:], batch_size=1))
    assert len(peer_rows) == len(own_rows) == 2
    for own, other in zip(own_rows, peer_rows, strict=True):
        np.testing.assert_array_equal(own["tokens"][0], other["tokens"])
        np.testing.assert_array_equal(own["segment_ids"][0], other["tokens_segment_ids"])
        np.testing.assert_array_equal(own["positions"][0], other["tokens_positions"])


def test_statistics_and_drop_rate():
    texts = [b"x" * 30, b"y" * 3]
    iterator = iter(batches(texts, batch_size=1))
    rows = list(iterator)
    statistics = packing.statistics_from_state(iterator.get_state())
    assert statistics.rows == len(rows) == 3
    assert (statistics.documents, statistics.targets, statistics.bytes) == (2, 35, 33)
    assert statistics.padding_rate == 1 - statistics.inputs / 48
    assert statistics.inputs == sum(int((b["segment_ids"] > 0).sum()) for b in rows)
    assert statistics.drop_rate == 0

    cut = iter(
        batches(texts, batch_size=1, repeat=True, long_documents=packing.LongDocuments.TRUNCATE)
    )
    next(cut)
    statistics = packing.statistics_from_state(cut.get_state())
    assert (statistics.targets, statistics.dropped_targets) == (16, 15)
    assert statistics.dropped_bytes == 14
    assert statistics.drop_rate == 15 / 31


@pytest.mark.parametrize(
    ("patcher", "message"),
    [
        (lambda i, ids: np.ones(len(ids) + 1, bool), "shape"),
        (lambda i, ids: np.ones(len(ids), np.int32), "dtype"),
        (lambda i, ids: np.arange(len(ids)) != 1, "first two"),
    ],
)
def test_patcher_output_is_checked(patcher, message):
    with pytest.raises(ValueError, match=message):
        next(iter(batches([b"abc"], patcher)))


def test_without_patcher_there_are_no_starts():
    assert "starts" not in next(iter(batches([b"abc"])))
    with pytest.raises(ValueError, match="no patcher"):
        batches([b"abc"], max_patches=4)


def test_layout_makes_the_dtypes_of_the_contract():
    batch = next(iter(batches([b"abc"], strided(2))))
    kinds = {name: str(values.dtype) for name, values in batch.items()}
    assert kinds == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "target_bytes": "int32",
        "target_mask": "bool",
        "starts": "bool",
    }
    assert dataclasses.is_dataclass(packing.RowLayout)
