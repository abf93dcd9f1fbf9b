"""Documents and the random-access sources they come from.

A source has `__len__` and `__getitem__(index) -> Document`, as grain's
`RandomAccessDataSource`. Files are chosen by suffix: `.txt`, `.jsonl`, `.jsonl.gz`,
`.parquet`, `.array_record`. `SourceKind.STDLIB` is the embedded default: the Python standard
library's own source files. `open_source(config, split)` is the entry point.
"""

import dataclasses
import enum
import functools
import glob
import gzip
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import sysconfig
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".array_record")
_STDLIB_SKIPPED = frozenset(
    # encodings: character tables. The rest: not the library's own code, or tests of it.
    {"test", "tests", "idle_test", "encodings", "__pycache__", "site-packages", "dist-packages"}
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its UTF-8 bytes, and what is known about it (at least where it lies)."""

    text: bytes
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """Random access to documents; safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class SourceKind(enum.Enum):
    """Where documents come from: named files, or the Python standard library."""

    FILES = "files"
    STDLIB = "stdlib"


class Split(enum.Enum):
    """Which part of a source is read; ALL is the union of the other two."""

    TRAIN = "train"
    VALIDATION = "validation"
    ALL = "all"


class RecordFormat(enum.Enum):
    """What a record of an `.array_record` file is: UTF-8 text, or a JSON object."""

    TEXT = "text"
    JSON = "json"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SourceConfig:
    """One source of documents.

    `validation_paths`, where given, are the validation split and `paths` the training split;
    otherwise documents are split by a hash (of the path for STDLIB, else of the index).
    `separator` and `document_bytes` cut `.txt` files, which are else one document each.
    `max_bytes` keeps about the first so many bytes of each split. 0 or "" means off.
    """

    kind: SourceKind = SourceKind.STDLIB
    paths: tuple[str, ...] = ()
    validation_paths: tuple[str, ...] = ()
    field: str = "text"
    record_format: RecordFormat = RecordFormat.TEXT
    separator: str = ""
    document_bytes: int = 0
    validation_fraction: float = 0.1
    max_bytes: int = 0
    weight: float = 1.0

    def __post_init__(self):
        if self.kind is SourceKind.FILES and not self.paths:
            raise ValueError("paths is empty; kind FILES needs at least one file")
        if self.kind is SourceKind.STDLIB and (self.paths or self.validation_paths):
            raise ValueError(
                f"paths {self.paths + self.validation_paths} are not read by kind STDLIB;"
                " set kind to FILES or leave the paths empty"
            )
        for name in ("paths", "validation_paths"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(p, str) and p for p in value):
                raise ValueError(f"{name} is {value!r}; it must be a tuple of non-empty strings")
        if not self.field:
            raise ValueError("field is ''; it names the text field of a record or column")
        for name in ("document_bytes", "max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if self.document_bytes and self.document_bytes < 4:
            raise ValueError(f"document_bytes is {self.document_bytes}; it must be 0 or at least 4")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; it must be in [0, 1)"
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}; it must be positive and finite")


class InMemorySource:
    """Documents held in memory; also what tests and synthetic corpora use."""

    def __init__(self, texts: Sequence[bytes | str | Document]):
        self._documents = [_as_document(text, index) for index, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


class _SpanSource:
    """Documents that are spans of bytes of local or remote files, read when asked for."""

    def __init__(self, paths: Sequence[str]):
        self._paths = tuple(paths)
        self._spans = np.zeros((0, 3), np.int64)  # file, start, end

    def __len__(self) -> int:
        return len(self._spans)

    def _read(self, index: int) -> tuple[str, int, bytes]:
        file, start, end = (int(value) for value in self._spans[index])
        with self._open(file) as stream:
            stream.seek(start)
            return self._paths[file], start, stream.read(end - start)

    def _open(self, file: int) -> BinaryIO:
        return _open_binary(self._paths[file])


class TextSource(_SpanSource):
    """`.txt` files: a document per file, or per part between `separator`s, or per
    `document_bytes` bytes (never cut inside a UTF-8 character). Empty parts are left out."""

    def __init__(self, paths: Sequence[str], separator: str = "", document_bytes: int = 0):
        super().__init__(paths)
        spans = [
            (file, start, end)
            for file, path in enumerate(self._paths)
            for start, end in _text_spans(path, separator.encode(), document_bytes)
        ]
        self._spans = np.asarray(spans, np.int64).reshape(-1, 3)

    def __getitem__(self, index: int) -> Document:
        path, start, text = self._read(index)
        return Document(text, {"path": path, "start": start})


class JsonLinesSource(_SpanSource):
    """`.jsonl` and `.jsonl.gz` files: a JSON object per line, blank lines left out.

    Only the byte offsets of the lines are held in memory. A `.gz` file has no random access,
    so it is unpacked once into an unnamed temporary file.

    Raises:
      ValueError: a line that is not a JSON object with a string `field`; names file and line.
    """

    def __init__(self, paths: Sequence[str], field: str = "text"):
        super().__init__(paths)
        self._field = field
        self._unpacked: dict[int, BinaryIO] = {}
        spans, lines = [], []
        for file, path in enumerate(self._paths):
            if path.endswith(".gz"):
                self._unpacked[file] = _unpack_gzip(path)
            start = 0
            with self._open(file) as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        spans.append((file, start, start + len(line)))
                        lines.append(number)
                    start += len(line)
        self._spans = np.asarray(spans, np.int64).reshape(-1, 3)
        self._lines = np.asarray(lines, np.int64)

    def _open(self, file: int) -> BinaryIO:
        # A second descriptor would share its position, so spans are read by pread below.
        if file in self._unpacked:
            return open(os.dup(self._unpacked[file].fileno()), "rb")
        return super()._open(file)

    def __getitem__(self, index: int) -> Document:
        file, start, end = (int(value) for value in self._spans[index])
        if file in self._unpacked:
            path = self._paths[file]
            line = os.pread(self._unpacked[file].fileno(), end - start, start)
        else:
            path, _, line = self._read(index)
        return _record_document(line, self._field, f"{path}, line {self._lines[index]}")

    def __del__(self):
        for stream in getattr(self, "_unpacked", {}).values():
            stream.close()


class ParquetSource:
    """A text column of `.parquet` files (needs pyarrow, the extra `parquet`).

    One row group is held in memory: reading in order or shuffling within groups is fast.
    """

    def __init__(self, paths: Sequence[str], field: str = "text"):
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                "reading .parquet needs pyarrow: pip install 'blt-jax[parquet]'"
            ) from error
        self._paths, self._field = tuple(paths), field
        self._files, groups = [], []
        for file, path in enumerate(self._paths):
            try:
                parquet = pq.ParquetFile(path) if "://" not in path else _remote_parquet(pq, path)
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                if isinstance(error, FileNotFoundError):
                    raise
                raise ValueError(f"{path} is not a readable parquet file: {error}") from error
            names = parquet.schema_arrow.names
            if field not in names:
                raise ValueError(f"{path} has no column {field!r}; its columns are {names}")
            self._files.append(parquet)
            groups += [
                (file, group, parquet.metadata.row_group(group).num_rows)
                for group in range(parquet.metadata.num_row_groups)
            ]
        self._groups = groups
        self._ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)
        self._lock = threading.Lock()
        self._read_group = functools.lru_cache(maxsize=4)(self._read_group_uncached)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read_group_uncached(self, number: int):
        file, group, _ = self._groups[number]
        return self._files[file].read_row_group(group, columns=[self._field]).column(0)

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, _, rows = self._groups[number]
        row = index - (int(self._ends[number]) - rows)
        with self._lock:
            value = self._read_group(number)[row].as_py()
        if not isinstance(value, (str, bytes)):
            raise ValueError(
                f"{self._paths[file]}, row {index}: column {self._field!r} holds"
                f" {type(value).__name__}; it must hold text"
            )
        return Document(_to_bytes(value), {"path": self._paths[file], "row": row})


class ArrayRecordSource:
    """Records of `.array_record` files: UTF-8 bytes, or JSON objects with a text `field`."""

    def __init__(
        self,
        paths: Sequence[str],
        field: str = "text",
        record_format: RecordFormat = RecordFormat.TEXT,
    ):
        try:
            from array_record.python import array_record_data_source
        except ImportError as error:
            raise ImportError(
                "reading .array_record needs array-record: pip install array-record"
            ) from error
        self._paths = tuple(paths)
        self._field, self._format = field, record_format
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(list(self._paths))
            self._length = len(self._records)
        except Exception as error:  # the library raises its own C++ errors
            raise ValueError(
                f"{', '.join(self._paths)}: not readable as array_record: {error}"
            ) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        record = self._records[index]
        where = f"{', '.join(self._paths)}, record {index}"
        if self._format is RecordFormat.JSON:
            return _record_document(record, self._field, where)
        return Document(bytes(record), {"path": where})


class StandardLibrarySource:
    """The Python standard library's `.py` files, a document each, sorted by relative path.

    Left out: installed packages, test directories, character tables (`encodings`), empty
    files. A file belongs to the validation split where a hash of its relative path falls below
    `validation_fraction`. `max_bytes` keeps files in the order of another hash of their paths,
    so that a small corpus is a spread sample.
    """

    def __init__(
        self,
        split: Split = Split.ALL,
        validation_fraction: float = 0.1,
        max_bytes: int = 0,
        root: str = "",
    ):
        self._root = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
        if not self._root.is_dir():
            raise FileNotFoundError(f"the standard library is not at {self._root}")
        names = [
            (name, size)
            for name, size in _python_files(self._root)
            if _in_split(name, split, validation_fraction)
        ]
        if max_bytes:
            names.sort(key=lambda item: _hash_fraction("order:" + item[0]))
            kept, total = [], 0
            for name, size in names:
                if not kept or total + size <= max_bytes:
                    kept.append((name, size))
                    total += size
            names = kept
        self._names = sorted(name for name, _ in names)

    @property
    def names(self) -> tuple[str, ...]:
        """Relative paths of the documents, in order."""
        return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Document:
        name = self._names[index]
        return Document((self._root / name).read_bytes(), {"path": name})


class SelectedSource:
    """The documents of another source at the given indices."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source = source
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self._source[int(self._indices[index])]


class ConcatenatedSource:
    """Several sources behind each other; a document's index counts through all of them."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in self._sources], dtype=np.int64)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The parts, in order."""
        return self._sources

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a source of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[part]
        return source[index - (int(self._ends[part]) - len(source))]


def open_files(config: SourceConfig, paths: Sequence[str]) -> Source:
    """Opens files by suffix, all of one kind; patterns with `*` are expanded and sorted.

    Raises:
      FileNotFoundError: a path that does not exist, or a pattern that matches nothing.
      ValueError: an unknown suffix, mixed suffixes, or an unreadable file.
    """
    expanded = tuple(path for pattern in paths for path in _expand(pattern))
    suffixes = {_suffix(path) for path in expanded}
    if len(suffixes) != 1:
        raise ValueError(
            f"paths {tuple(paths)} mix the suffixes {sorted(suffixes)};"
            " give each kind of file its own source"
        )
    match suffixes.pop():
        case ".txt":
            return TextSource(expanded, config.separator, config.document_bytes)
        case ".jsonl" | ".jsonl.gz":
            return JsonLinesSource(expanded, config.field)
        case ".parquet":
            return ParquetSource(expanded, config.field)
        case _:
            return ArrayRecordSource(expanded, config.field, config.record_format)


def open_source(config: SourceConfig, split: Split = Split.TRAIN) -> Source:
    """Opens one split of a source.

    Raises:
      FileNotFoundError, ValueError: as `open_files`; also where the split holds no document.
    """
    if not isinstance(split, Split):
        raise ValueError(f"split is {split!r}; it must be one of {[s.name for s in Split]}")
    if config.kind is SourceKind.STDLIB:
        source: Source = StandardLibrarySource(split, config.validation_fraction, config.max_bytes)
        name = "the standard library"
    else:
        source = _open_split_files(config, split)
        name = ", ".join(config.paths)
        if config.max_bytes:
            source = _limit_bytes(source, config.max_bytes)
    if len(source) == 0:
        raise ValueError(
            f"split {split.name} of {name} holds no document"
            f" (validation_fraction {config.validation_fraction}); add documents, set"
            " separator or document_bytes to cut text files, or give validation_paths"
        )
    return source


def open_sources(configs: Sequence[SourceConfig], split: Split) -> ConcatenatedSource:
    """Opens one split of every source, behind each other. See `open_source`."""
    if not configs:
        raise ValueError("sources is empty; give at least one SourceConfig")
    return ConcatenatedSource([open_source(config, split) for config in configs])


def _open_split_files(config: SourceConfig, split: Split) -> Source:
    if config.validation_paths:
        parts = {
            Split.TRAIN: (config.paths,),
            Split.VALIDATION: (config.validation_paths,),
            Split.ALL: (config.paths, config.validation_paths),
        }[split]
        return ConcatenatedSource([open_files(config, paths) for paths in parts])
    source = open_files(config, config.paths)
    if split is Split.ALL:
        return source
    indices = [
        index
        for index in range(len(source))
        if _in_split(str(index), split, config.validation_fraction)
    ]
    return SelectedSource(source, indices)


def _limit_bytes(source: Source, max_bytes: int) -> Source:
    """The first documents that together hold at most `max_bytes` bytes, but at least one."""
    total = 0
    for index in range(len(source)):
        total += len(source[index].text)
        if total > max_bytes:
            return SelectedSource(source, range(max(index, 1)))
    return source


def _as_document(text: bytes | str | Document, index: int) -> Document:
    if isinstance(text, Document):
        return text
    return Document(_to_bytes(text), {"index": index})


def _to_bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="ignore")


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name only, on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def _in_split(name: str, split: Split, validation_fraction: float) -> bool:
    if split is Split.ALL:
        return True
    return (_hash_fraction(name) < validation_fraction) == (split is Split.VALIDATION)


def _python_files(root: pathlib.Path) -> Iterator[tuple[str, int]]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if d not in _STDLIB_SKIPPED]
        for file in files:
            path = pathlib.Path(directory, file)
            if file.endswith(".py") and (size := path.stat().st_size):
                yield path.relative_to(root).as_posix(), size


def _suffix(path: str) -> str:
    for suffix in SUFFIXES:
        if path.lower().endswith(suffix):
            return suffix
    raise ValueError(f"{path} has an unknown suffix; allowed are {', '.join(SUFFIXES)}")


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        return [pattern]
    _suffix(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    if any(character in pattern for character in "*?["):
        found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if found:
            return found
        raise FileNotFoundError(f"{pattern} matches no file")
    raise FileNotFoundError(f"{pattern} does not exist or is not a file")


def _open_binary(path: str) -> BinaryIO:
    if "://" not in path:
        return open(path, "rb")
    from etils import epath

    return epath.Path(path).open("rb")


def _remote_parquet(pq: Any, path: str) -> Any:
    from pyarrow import fs

    filesystem, name = fs.FileSystem.from_uri(path)
    return pq.ParquetFile(name, filesystem=filesystem)


def _text_spans(path: str, separator: bytes, document_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans of the documents in one text file; the separator belongs to none of them."""
    with _open_binary(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            return
        if not separator and not document_bytes:
            yield 0, size
            return
        stream.seek(0)
        mapped = "://" not in path
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if mapped else stream.read()
        try:
            start = 0
            while start < size:
                found = data.find(separator, start) if separator else -1
                end = size if found < 0 else found
                yield from _cut_span(data, start, end, document_bytes)
                start = end + len(separator)
                if not separator:
                    return
        finally:
            if mapped:
                data.close()


def _cut_span(
    data: mmap.mmap | bytes, start: int, end: int, document_bytes: int
) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = end if not document_bytes else min(end, start + document_bytes)
        if stop < end:
            back = stop
            while back > stop - 4 and back > start and data[back] & 0xC0 == 0x80:
                back -= 1
            stop = back if data[back] & 0xC0 != 0x80 and back > start else stop
        yield start, stop
        start = stop


def _unpack_gzip(path: str) -> BinaryIO:
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the source)
    try:
        with _open_binary(path) as packed, gzip.open(packed) as stream:
            shutil.copyfileobj(stream, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        unpacked.close()
        raise ValueError(f"{path} is not a readable gzip file: {error}") from error
    unpacked.seek(0)
    return unpacked


def json_records(path: str | pathlib.Path, count: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, the first `count` (0: all), each with where it stands,
    for errors; blank lines are left out.

    Raises FileNotFoundError, and ValueError for a line that is no object, a file without any, and
    a negative count.
    """
    if count < 0:
        raise ValueError(f"count={count}: must be >= 0 (0: all)")
    records = []
    for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), 1):
        if count and len(records) == count:
            break
        if line.strip():
            where = f"{path}, line {number}"
            records.append((where, _record(line, where)))
    if not records:
        raise ValueError(f"{path}: no JSON object in it")
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}; it must be an object")
    return record


def _record_document(line: bytes, field: str, where: str) -> Document:
    record = _record(line, where)
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; the record has {sorted(record)}")
    if not isinstance(record[field], str):
        raise ValueError(
            f"{where}: field {field!r} holds {type(record[field]).__name__}; it must hold text"
        )
    metadata = {key: value for key, value in record.items() if key != field}
    return Document(_to_bytes(record[field]), {**metadata, "path": where})
