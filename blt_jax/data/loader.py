"""The input pipeline: sources, shuffling, tokenizing, packing, sharding, prefetch.

Batches are dicts of numpy arrays with a leading batch axis; see `loader`. They depend on the
config and the number of the batch, not on how many processes there are: every process packs the
stream and keeps the rows of its devices.
"""

import atexit
import dataclasses
import hashlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from blt_jax.data.packing import (
    SHARDS,
    LongDocuments,
    Packing,
    PackIterDataset,
    Patcher,
    RowLayout,
    TokenizedDocument,
)
from blt_jax.data.sources import ConcatenatedSource, Document, SourceConfig, Split, open_sources
from blt_jax.data.tokenizers import Tokenizer, TokenizerConfig, encode_document


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DataConfig:
    """What is read and how it becomes batches.

    `batch_size` rows of all processes together, of `sequence_length` input tokens (and with
    `max_patches`, at most so many patches) each. With `repeat` the stream has no end, every
    epoch is shuffled anew and documents are drawn from the sources by weight (of documents);
    without it every document of every source comes once and nothing is dropped.
    `shuffle_rows` packed rows are shuffled at a time where `shuffle` and `repeat` hold, so that
    the rows of a batch come from different documents; 0 keeps rows in the order of documents.
    For context parallelism, rows are cut into `row_pieces` of whole patches, each with its share of
    `max_patches`; a document continues only over pieces of at least `piece_halo` tokens.
    With `num_shards` S > 1 and `repeat`, S parts of the documents are packed apart, each into its
    own batch_size / S rows of every batch, and a process packs only the parts that it keeps rows
    of: for pods where one process cannot tokenize and patch everything in a step's time.
    `num_threads` read and tokenize documents, `prefetch` batches are made ahead; 0 is off.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    split: Split = Split.TRAIN
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    batch_size: int = 8
    sequence_length: int = 256
    packing: Packing = Packing.CONCATENATE
    long_documents: LongDocuments = LongDocuments.CONTINUE
    max_patches: int = 0
    row_pieces: int = 1
    piece_halo: int = 0
    shuffle: bool = True
    shuffle_rows: int = 512
    repeat: bool = True
    num_shards: int = 1
    seed: int = 0
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        if not isinstance(self.sources, tuple) or not self.sources:
            raise ValueError(f"sources is {self.sources!r}; it must be a non-empty tuple")
        for name in ("batch_size", "sequence_length", "num_shards", "row_pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        sizes = ("max_patches", "piece_halo", "shuffle_rows", "num_threads", "prefetch")
        for name in (*sizes, "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("sequence_length", "max_patches"):
            if getattr(self, name) % self.row_pieces:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be divisible by"
                    f" row_pieces={self.row_pieces}"
                )
        if self.piece_halo > self.sequence_length // self.row_pieces:
            raise ValueError(
                f"piece_halo is {self.piece_halo}; it must be at most the"
                f" {self.sequence_length // self.row_pieces} tokens of a piece"
            )
        if self.batch_size % self.num_shards:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be divisible by num_shards "
                f"{self.num_shards}"
            )
        if self.long_documents is LongDocuments.TRUNCATE and not self.repeat:
            raise ValueError(
                "long_documents is TRUNCATE with repeat=False; a finite pass drops nothing,"
                " use CONTINUE"
            )


def evaluation_config(config: DataConfig, **changes: Any) -> DataConfig:
    """The same rows over the validation split: one pass in order, nothing dropped."""
    defaults = {
        "split": Split.VALIDATION,
        "shuffle": False,
        "repeat": False,
        "long_documents": LongDocuments.CONTINUE,
    }
    return dataclasses.replace(config, **{**defaults, **changes})


def open_documents(config: DataConfig) -> ConcatenatedSource:
    """The documents of the config's split, in the order of the index that patchers are given."""
    return open_sources(config.sources, config.split)


def loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    patcher: Patcher | None = None,
    rows: Sequence[int] | None = None,
    documents: ConcatenatedSource | None = None,
) -> grain.IterDataset:
    """Batches of numpy arrays whose leading axis are the given `rows` of each batch, None for all.

    "tokens", "targets", "segment_ids" (1.. per row, 0 = padding), "positions" (from 0 in each
    segment), "target_bytes": int32 [B, N]; "target_mask": bool [B, N]; with a patcher "starts":
    bool [B, N+1]. `patcher(index, ids)` gives the start mask of one document, `index` as in
    `open_documents(config)`. Iterators have get_state and set_state; the state is the same for
    any `rows`, except that with `num_shards` it holds the shards that have such rows.

    Raises:
      ValueError: rows outside of the batch or not increasing; max_patches without a patcher.
    """
    rows = range(config.batch_size) if rows is None else rows
    increasing = all(a < b for a, b in itertools.pairwise(rows))
    if not rows or not increasing or rows[0] < 0 or rows[-1] >= config.batch_size:
        raise ValueError(
            f"rows are {list(rows)}; they must increase, within 0..{config.batch_size - 1}"
        )
    if config.max_patches and patcher is None:
        raise ValueError(f"max_patches is {config.max_patches}, but no patcher was given")
    tokenizer = config.tokenizer.build() if tokenizer is None else tokenizer
    documents = open_documents(config) if documents is None else documents
    num_shards = config.num_shards if config.repeat else 1
    size = config.batch_size // num_shards
    kept: dict[int, list[int]] = {}
    for row in rows:
        kept.setdefault(row // size, []).append(row % size)
    parts = {
        shard: _packed_shard(config, documents, tokenizer, patcher, (shard, num_shards), own)
        for shard, own in kept.items()
    }
    dataset = parts[0] if num_shards == 1 else _JoinedShards(parts)
    if config.prefetch:
        dataset = _ThreadPrefetch(dataset, prefetch_buffer_size=config.prefetch)
    return dataset


def _packed_shard(
    config: DataConfig,
    documents: ConcatenatedSource,
    tokenizer: Tokenizer,
    patcher: Patcher | None,
    shard: tuple[int, int],
    kept: list[int],
) -> grain.IterDataset:
    """The `kept` rows of one shard (number, of how many) of every batch."""
    rows = config.batch_size // shard[1]
    mixes_rows = config.shuffle and config.repeat and config.shuffle_rows > 0
    stream = _document_stream(config, documents, slice(shard[0], None, shard[1]))
    packed: grain.IterDataset = PackIterDataset(
        stream.map(_Tokenize(tokenizer)).to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.num_threads, prefetch_buffer_size=4 * config.num_threads
            )
        ),
        layout=RowLayout(
            sequence_length=config.sequence_length,
            packing=config.packing,
            long_documents=config.long_documents,
            max_patches=config.max_patches,
            with_starts=patcher is not None,
            pieces=config.row_pieces,
            halo=config.piece_halo,
        ),
        rows=1 if mixes_rows else rows,
        tokenizer=tokenizer,
        patcher=patcher,
        identity=(*shard, config.batch_size, config.sequence_length, len(documents)),
    )
    if mixes_rows:
        packed = grain.experimental.WindowShuffleIterDataset(
            packed, window_size=config.shuffle_rows, seed=_shuffle_seed(config.seed, -1 - shard[0])
        )
        packed = packed.batch(rows, batch_fn=_join_rows)
    return packed if len(kept) == rows else packed.map(_KeepRows(kept))


def _join_rows(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _KeepRows(grain.transforms.Map):
    """The given rows of a batch."""

    def __init__(self, rows: Sequence[int]):
        self._rows = np.asarray(rows)

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        return {name: values[self._rows] for name, values in element.items()}


class _JoinedShards(grain.IterDataset):
    """Batches whose rows are those of several shards, one after another."""

    def __init__(self, parts: dict[int, grain.IterDataset]):
        super().__init__(tuple(parts.values()))
        self._shards = tuple(parts)

    def __iter__(self) -> "_JoinedIterator":
        parts = [iter(parent) for parent in self._parents]
        return _JoinedIterator(dict(zip(self._shards, parts, strict=True)))


class _JoinedIterator(grain.DatasetIterator):
    """Its state holds the state of each shard by number: that of all processes is their union."""

    def __init__(self, parts: dict[int, grain.DatasetIterator]):
        super().__init__(tuple(parts.values()))
        self._parts = parts

    def __next__(self) -> dict[str, Any]:
        return _join_rows([next(part) for part in self._parts.values()])

    def get_state(self) -> dict[str, Any]:
        return {SHARDS: {str(shard): part.get_state() for shard, part in self._parts.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for shard, part in self._parts.items():
            part.set_state(state[SHARDS][str(shard)])


_open_iterators: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    for iterator in list(_open_iterators):
        iterator.close()
        iterator.close = lambda: None  # its destructor closes again, when grain is gone


class _ThreadPrefetch(grain.experimental.ThreadPrefetchIterDataset):
    """Prefetch whose threads end before the interpreter does; grain's own raise there."""

    def __iter__(self) -> grain.DatasetIterator:
        iterator = super().__iter__()
        _open_iterators.add(iterator)
        return iterator


class _Tokenize(grain.transforms.Map):
    """(document index, document) -> TokenizedDocument."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def map(self, element: tuple[int, Document]) -> TokenizedDocument:
        index, document = element
        return TokenizedDocument(index, encode_document(self._tokenizer, document.text))


class _NumberedSource:
    """(index over all sources, document) of one source."""

    def __init__(self, source: Any, first: int):
        self._source, self._first = source, first

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Document]:
        return self._first + int(index), self._source[int(index)]


def _document_stream(
    config: DataConfig, documents: ConcatenatedSource, share: slice
) -> grain.MapDataset:
    parts, first = [], 0
    for number, source in enumerate(documents.sources):
        part = grain.MapDataset.source(_NumberedSource(source, first))
        first += len(source)
        if config.shuffle:
            part = part.shuffle(seed=_shuffle_seed(config.seed, number))
        if config.repeat:
            # Sharded after the repetition: epochs of a length that the shards do not divide
            # still reach every document.
            part = part.repeat()[share]
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    if config.repeat:
        return grain.MapDataset.mix(parts, [source.weight for source in config.sources])
    return grain.MapDataset.concatenate(parts)


def _shuffle_seed(seed: int, number: int) -> int:
    """A 32-bit seed; hashed, since grain adds the epoch to it and near seeds would coincide."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest()
    return int(np.frombuffer(digest, np.uint32)[0])
