"""The input pipeline: sources, shuffling, host sharding, tokenizing, packing, prefetch.

Batches are dicts of numpy arrays with a leading batch axis; see `loader`.
"""

import atexit
import dataclasses
import enum
import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from blt_jax.data.packing import (
    LongDocuments,
    Packing,
    PackIterDataset,
    Patcher,
    RowLayout,
    TokenizedDocument,
)
from blt_jax.data.sources import ConcatenatedSource, Document, SourceConfig, Split, open_sources
from blt_jax.data.tokenizers import Tokenizer, TokenizerConfig, encode_document


class HostSharding(enum.Enum):
    """How processes share a repeated stream.

    DOCUMENTS: each reads its own part of every epoch; resumes with the same process count.
    ROWS: each packs everything and keeps its rows; the state is the same everywhere and
    resumes with any process count. Finite passes always share rows.
    """

    DOCUMENTS = "documents"
    ROWS = "rows"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DataConfig:
    """What is read and how it becomes batches.

    `batch_size` rows over all processes, of `sequence_length` input tokens (and with
    `max_patches`, at most so many patches) each. With `repeat` the stream has no end, every
    epoch is shuffled anew and documents are drawn from the sources by weight (of documents);
    without it every document of every source comes once and nothing is dropped.
    `shuffle_rows` packed rows are shuffled at a time where `shuffle` and `repeat` hold, so that
    the rows of a batch come from different documents; 0 keeps rows in the order of documents.
    For context parallelism, rows are cut into `row_pieces` of whole patches, each with its share of
    `max_patches`; a document continues only over pieces of at least `piece_halo` tokens.
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
    host_sharding: HostSharding = HostSharding.DOCUMENTS
    seed: int = 0
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        if not isinstance(self.sources, tuple) or not self.sources:
            raise ValueError(f"sources is {self.sources!r}; it must be a non-empty tuple")
        for name in ("batch_size", "sequence_length", "row_pieces"):
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
    process_index: int = 0,
    process_count: int = 1,
    documents: ConcatenatedSource | None = None,
) -> grain.IterDataset:
    """Batches for one process: numpy arrays whose leading axis is batch_size / process_count.

    "tokens", "targets", "segment_ids" (1.. per row, 0 = padding), "positions" (from 0 in each
    segment), "target_bytes": int32 [B, N]; "target_mask": bool [B, N]; with a patcher "starts":
    bool [B, N+1]. `patcher(index, ids)` gives the start mask of one document, `index` as in
    `open_documents(config)`. Processes share the stream as `HostSharding` says and always
    yield the same number of batches. Iterators have get_state and set_state.

    Raises:
      ValueError: process_count does not divide batch_size; max_patches without a patcher.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; it must be in 0..{process_count - 1}")
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by {process_count} processes"
        )
    if config.max_patches and patcher is None:
        raise ValueError(f"max_patches is {config.max_patches}, but no patcher was given")
    tokenizer = config.tokenizer.build() if tokenizer is None else tokenizer
    documents = open_documents(config) if documents is None else documents
    own_documents = config.repeat and config.host_sharding is HostSharding.DOCUMENTS
    share = slice(process_index, None, process_count) if own_documents else slice(None)
    stream = _document_stream(config, documents, share).map(_Tokenize(tokenizer))
    rows_per_process = config.batch_size // process_count
    first = process_index * rows_per_process
    rows = rows_per_process if own_documents else config.batch_size
    kept = slice(None) if own_documents else slice(first, first + rows_per_process)
    mixes_rows = config.shuffle and config.repeat and config.shuffle_rows > 0
    packed: grain.IterDataset = PackIterDataset(
        stream.to_iter_dataset(
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
        kept=slice(None) if mixes_rows else kept,
        tokenizer=tokenizer,
        patcher=patcher,
        identity=(
            process_index if own_documents else 0,
            process_count if own_documents else 1,
            config.batch_size,
            config.sequence_length,
        ),
    )
    if mixes_rows:
        packed = grain.experimental.WindowShuffleIterDataset(
            packed, window_size=config.shuffle_rows, seed=_shuffle_seed(config.seed, -1)
        )
        packed = packed.batch(rows, batch_fn=lambda parts: _join_rows(parts, kept))
    if config.prefetch:
        packed = _ThreadPrefetch(packed, prefetch_buffer_size=config.prefetch)
    return packed


def _join_rows(parts: Sequence[dict[str, Any]], kept: slice) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts])[kept] for name in parts[0]}


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
            # Sharded after the repetition: epochs of a length that the processes do not
            # divide still reach every document.
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
