"""Packing of tokenised documents into rows of fixed length, documents kept apart.

A row is tokens z[0..N]: inputs z[0..N-1] and targets z[1..N]. Documents longer than what is
left of a row continue in the next row as a new segment whose first input is the last target
before it, so every token of a document but its first is a target exactly once.

Patches (where a patcher is given): starts over z[0..N], true at the first and second token of
every segment besides the patcher's own. With `max_patches` a row closes at the patch boundary
where its inputs hold that many patches; the document continues in the next row.

Pieces (for context parallelism): a row is cut into pieces of equal size, each with its share of
max_patches. A document that does not end in a piece continues in the next one as the same
segment, from a patch boundary on; padding fills the piece up.
"""

import copy
import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool

from blt_jax.data.tokenizers import Tokenizer

Patcher = Callable[[int, Any], Any]
"""(document index, ids int32 [n]) -> bool [n], true where a patch starts."""


SHARDS = "shards"
"""Key of a state that holds the states of several shards."""


class Packing(enum.Enum):
    """CONCATENATE: documents back to back. ONE_DOCUMENT: one document (piece) per row."""

    CONCATENATE = "concatenate"
    ONE_DOCUMENT = "one_document"


class LongDocuments(enum.Enum):
    """What happens to the rest of a document at the end of a row: kept, or dropped."""

    CONTINUE = "continue"
    TRUNCATE = "truncate"


@dataclasses.dataclass
class PackingStatistics:
    """Counts since the first batch. Targets and bytes are those the loss counts."""

    documents: int = 0
    rows: int = 0
    positions: int = 0
    inputs: int = 0
    targets: int = 0
    bytes: int = 0
    patches: int = 0
    dropped_targets: int = 0
    dropped_bytes: int = 0

    @property
    def padding_rate(self) -> float:
        """Share of the row positions that hold no token."""
        return 1 - self.inputs / max(self.positions, 1)

    @property
    def drop_rate(self) -> float:
        """Share of the documents' targets that were dropped."""
        return self.dropped_targets / max(self.targets + self.dropped_targets, 1)

    @property
    def mean_patch_size(self) -> float:
        """Inputs per patch; 0 without patches."""
        return self.inputs / self.patches if self.patches else 0.0


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """A document's index in its source and its ids, BOS to EOS (int32 [n])."""

    index: int
    ids: Any


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Shape and rules of the rows. `max_patches` 0 means no limit.

    pieces: into which a row is cut. halo: tokens that a piece must hold if a document passes
    through the whole of it; where it holds fewer, the row ends.
    """

    sequence_length: int
    packing: Packing = Packing.CONCATENATE
    long_documents: LongDocuments = LongDocuments.CONTINUE
    max_patches: int = 0
    with_starts: bool = False
    pieces: int = 1
    halo: int = 0

    @property
    def piece_length(self) -> int:
        """Tokens of a piece."""
        return self.sequence_length // self.pieces

    @property
    def piece_patches(self) -> int:
        """Most patches of a piece; 0 means no limit."""
        return self.max_patches // self.pieces

    def empty_rows(self, rows: int) -> dict[str, Any]:
        """Arrays of `rows` padding rows, as the batch contract names them."""
        shape = (rows, self.sequence_length)
        batch: dict[str, Any] = {
            name: np.zeros(shape, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions", "target_bytes")
        }
        batch["target_mask"] = np.zeros(shape, bool)
        if self.with_starts:
            batch["starts"] = np.zeros((rows, self.sequence_length + 1), bool)
        return batch


@dataclasses.dataclass
class _Cursor:
    """The document being consumed: the next piece begins at ids[offset]."""

    index: int
    ids: Any
    starts: Any  # bool [n], or None
    bytes: Any  # int32 [n]
    offset: int = 0


class DataStateError(ValueError):
    """The data state of a checkpoint does not fit the loader or its sources."""


class PackIterDataset(grain.IterDataset):
    """Batches of packed rows from `TokenizedDocument`s; see the module's text for the rules.

    A batch has `rows` rows. A finite parent ends with a batch filled up with padding rows.
    `get_state` is exact between batches, also where a document is half consumed. `identity`:
    (shard, number of shards, batch size, row length, documents), as a restored state must have.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        *,
        layout: RowLayout,
        rows: int,
        tokenizer: Tokenizer,
        patcher: Patcher | None = None,
        identity: tuple[int, ...] = (),
    ):
        super().__init__(parent)
        self._arguments = {
            "layout": layout,
            "rows": rows,
            "tokenizer": tokenizer,
            "patcher": patcher,
            "identity": identity,
        }

    def __iter__(self) -> "PackIterator":
        return PackIterator(self._parent.__iter__(), **self._arguments)

    def __str__(self) -> str:
        return "PackIterDataset"


class PackIterator(grain.DatasetIterator):
    """Iterator of `PackIterDataset`."""

    def __init__(
        self,
        parent: grain.DatasetIterator,
        *,
        layout: RowLayout,
        rows: int,
        tokenizer: Tokenizer,
        patcher: Patcher | None,
        identity: tuple[int, ...],
    ):
        super().__init__(parent)
        self._layout, self._rows = layout, rows
        self._tokenizer, self._patcher = tokenizer, patcher
        self._identity = list(identity)
        self._statistics = PackingStatistics()
        self._document: _Cursor | None = None
        self._before_document = parent.get_state()

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        if not self._has_document():
            raise StopIteration
        batch = self._layout.empty_rows(self._rows)
        for row in range(self._rows):
            if not self._has_document():
                break
            self._fill_row({name: values[row] for name, values in batch.items()})
        self._statistics.positions += self._rows * self._layout.sequence_length
        return batch

    def get_state(self) -> dict[str, Any]:
        document = self._document
        half_consumed = document is not None and document.offset > 0
        return {
            "parent": copy.deepcopy(
                self._before_document if document is not None else self._parent.get_state()
            ),
            "offset": document.offset if half_consumed else 0,
            "document": document.index if half_consumed else -1,
            "length": len(document.ids) if half_consumed else 0,
            "identity": list(self._identity),
            "statistics": dataclasses.asdict(self._statistics),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if list(state["identity"]) != self._identity:
            raise DataStateError(
                "the data state was saved with (shard, number of shards, batch size, row length,"
                f" documents) {tuple(state['identity'])}, this loader has"
                f" {tuple(self._identity)}: packed rows resume only with the same"
            )
        self._document = None
        self._parent.set_state(copy.deepcopy(state["parent"]))
        self._statistics = PackingStatistics(**state["statistics"])
        if state["offset"] == 0:
            return
        found = self._has_document()
        document = self._document
        if not found or (document.index, len(document.ids)) != (state["document"], state["length"]):
            raise DataStateError(
                f"the data state stands in document {state['document']} of {state['length']}"
                " ids, but the sources now give another one there: they have changed"
            )
        document.offset = state["offset"]

    def __str__(self) -> str:
        return "PackIterator"

    def _has_document(self) -> bool:
        """Fetches documents until one has a target; False at the end of a finite parent."""
        while self._document is None:
            self._before_document = self._parent.get_state()
            try:
                element = next(self._parent)
            except StopIteration:
                return False
            if len(element.ids) > 1:
                self._document = self._open_document(element)
        return True

    def _open_document(self, element: TokenizedDocument) -> _Cursor:
        starts = None
        if self._patcher is not None:
            starts = check_starts(
                self._patcher(element.index, element.ids), element.index, len(element.ids)
            )
        counts = np.asarray(self._tokenizer.token_bytes(element.ids), np.int32)
        return _Cursor(element.index, element.ids, starts, counts)

    def _fill_row(self, row: dict[str, Any]) -> None:
        """Fills the arrays of one row ([N], starts [N+1]) in place, advancing the documents."""
        filling = _Filling()
        for begin in range(0, self._layout.sequence_length, self._layout.piece_length):
            self._fill_piece(row, begin, filling)
            if filling.ended:
                break
        self._statistics.rows += 1

    def _fill_piece(self, row: dict[str, Any], begin: int, filling: "_Filling") -> None:
        layout, statistics = self._layout, self._statistics
        length, filled, patches = layout.piece_length, 0, 0
        is_last = begin + length == layout.sequence_length
        while filled < length and self._has_document():
            document = self._document
            remaining = len(document.ids) - document.offset
            size, starts = min(length - filled, remaining), None
            if document.starts is not None:
                # One more than the inputs: the last target's own start is part of the row.
                starts = document.starts[document.offset : document.offset + size + 1].copy()
                if not filling.continues:
                    starts[:2] = True
                if layout.max_patches:
                    room = layout.piece_patches - patches
                    size = min(size, int(np.searchsorted(np.cumsum(starts), room, "right")))
            through = filling.continues and filled == 0
            if size < remaining and not is_last:
                whole = size if starts is None else int(np.flatnonzero(starts[: size + 1])[-1])
                if through and whole < layout.halo:
                    is_last = True  # what follows could not see far enough back
                elif whole == 0 and filled == 0:
                    raise ValueError(
                        f"a patch of document {document.index} is longer than a piece of {length}"
                        " tokens: limit the length of patches, or cut rows into fewer pieces"
                    )
                else:
                    size = whole
            if size == 0:
                break
            patches += int(starts[:size].sum()) if starts is not None else 0
            finished = self._place_piece(row, begin + filled, size, starts, filling, is_last)
            filled += size
            filling.continues = not finished
            if not finished:
                break
            if layout.packing is Packing.ONE_DOCUMENT:
                is_last = True
                break
        filling.ended = is_last or not self._has_document()
        statistics.inputs += filled
        statistics.patches += patches

    def _place_piece(
        self,
        row: dict[str, Any],
        at: int,
        size: int,
        starts: Any,
        filling: "_Filling",
        is_last: bool,
    ) -> bool:
        """Places ids[offset : offset + size] as inputs; True where the document ends there."""
        document, statistics = self._document, self._statistics
        offset = document.offset
        remaining = len(document.ids) - offset
        targets = min(size, remaining - 1)
        span, target_span = slice(at, at + size), slice(at, at + targets)
        if not filling.continues:
            filling.segment, filling.position = filling.segment + 1, 0
            if filling.end:  # the masked target of a document's end is the next one's first token
                row["targets"][filling.end - 1] = document.ids[offset]
        row["tokens"][span] = document.ids[offset : offset + size]
        row["segment_ids"][span] = filling.segment
        row["positions"][span] = np.arange(size, dtype=np.int32) + filling.position
        row["targets"][target_span] = document.ids[offset + 1 : offset + 1 + targets]
        row["target_mask"][target_span] = True
        counts = document.bytes[offset + 1 : offset + 1 + targets]
        row["target_bytes"][target_span] = counts
        if starts is not None:
            marks = starts[: size + 1]
            row["starts"][at : at + len(marks)] = marks
        filling.position += size
        filling.end = at + size
        statistics.documents += offset == 0
        statistics.targets += targets
        statistics.bytes += int(counts.sum())
        finished = size == remaining
        if not finished and not is_last:
            document.offset = offset + size
        elif remaining - targets <= 1:
            self._document = None
        elif self._layout.long_documents is LongDocuments.TRUNCATE:
            statistics.dropped_targets += remaining - 1 - targets
            statistics.dropped_bytes += int(document.bytes[offset + 1 + targets :].sum())
            self._document = None
        else:
            document.offset = offset + targets
        return finished


@dataclasses.dataclass
class _Filling:
    """Where the packing of a row stands: segments so far, the index after its last token, the
    position of the next one in its document, whether that document continues, and whether the row
    has ended."""

    segment: int = 0
    end: int = 0
    position: int = 0
    continues: bool = False
    ended: bool = False


def check_starts(starts: Any, index: int, length: int) -> Bool[np.ndarray, "n"]:
    """A patcher's start mask, checked.

    Raises:
      ValueError: wrong shape, not boolean, or the first or second token starts no patch.
    """
    starts = np.asarray(starts)
    where = f"the patcher's starts for document {index}"
    if starts.shape != (length,):
        raise ValueError(f"{where} have shape {starts.shape}; they must have ({length},)")
    if starts.dtype != np.bool_:
        raise ValueError(f"{where} have dtype {starts.dtype}; they must be bool")
    if not starts[:2].all():
        raise ValueError(f"{where} begin with {starts[:2]}; the first two must be true")
    return starts


def statistics_from_state(state: dict[str, Any]) -> PackingStatistics:
    """The packing statistics in the state of a loader's iterator.

    As of its last batch; where rows are shuffled, as of the last full window of rows. Counts of
    several shards are added.

    Raises:
      ValueError: the state is not one of a packed loader.
    """
    inner: Any = state
    while isinstance(inner, dict):
        if SHARDS in inner:
            parts = [statistics_from_state(part) for part in inner[SHARDS].values()]
            names = [field.name for field in dataclasses.fields(PackingStatistics)]
            return PackingStatistics(**{n: sum(getattr(p, n) for p in parts) for n in names})
        if "statistics" in inner:
            return PackingStatistics(**inner["statistics"])
        inner = inner.get("parent", inner.get("parent_window_start_state"))
    raise ValueError("the iterator state holds no packing statistics")
