"""Folders of safetensors files, read lazily and written in shards, with every defect named."""

import collections
import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INTEGER_TYPES = ("I64", "I32")
PICKLES = (".pth", ".pt", ".bin")


def import_safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors files need: pip install 'blt-jax[hf]'") from error
    return safetensors


class TensorFiles:
    """The tensors of a folder by name; a context manager. Nothing is read but headers until `read`.

    shapes: name -> shape. file: the only file to look at, where several are no shards of one
    checkpoint. counters: last parts of names whose tensors may be integers. Raises
    FileNotFoundError for a missing folder, file or shard, and ValueError for a corrupt file, a
    tensor stored twice, an index that names other tensors than its files hold, and a type other
    than F32, F16, BF16.
    """

    def __init__(
        self, path: str | pathlib.Path, *, file: str | None = None, counters: tuple[str, ...] = ()
    ):
        self.path, self._only, self._counters = pathlib.Path(path), file, counters
        self._stack = contextlib.ExitStack()
        self._files: dict[str, object] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            owners = self._open(self._find())
            self._check_types(owners)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in the type of its file (bfloat16 as ml_dtypes.bfloat16)."""
        return self._files[name].get_tensor(name)

    def _find(self) -> dict[str, list[str] | None]:
        """Names that each file should hold; None where no index says so."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")
        if self._only is not None:
            return {self._only: None}
        index = self.path / INDEX_FILE
        if index.exists():
            return _read_index(index)
        if (self.path / SINGLE_FILE).exists():
            return {SINGLE_FILE: None}
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(files) == 1:
            return {files[0]: None}
        if files:
            raise FileNotFoundError(
                f"{self.path}: {len(files)} safetensors files but no {INDEX_FILE}"
            )
        pickles = sorted(f.name for f in self.path.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{self.path} holds only pickled weights {pickles}, which can run code when read "
                "and are refused. Convert once, where torch is installed: "
                "safetensors.torch.save_file(torch.load(file, weights_only=True), "
                "'model.safetensors'), joining the pieces of a model-parallel checkpoint first"
            )
        raise FileNotFoundError(f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE}")

    def _open(self, expected: dict[str, list[str] | None]) -> dict[str, list[str]]:
        missing = [file for file in expected if not (self.path / file).exists()]
        if missing:
            names = {file: (expected[file] or [])[:4] for file in missing}
            raise FileNotFoundError(
                f"{self.path}: missing shards, with their first tensors: {names}"
            )
        safetensors = import_safetensors()
        owners = collections.defaultdict(list)
        for file, names in expected.items():
            try:
                handle = self._stack.enter_context(
                    safetensors.safe_open(self.path / file, framework="numpy")
                )
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{self.path / file}: corrupt safetensors file: {error}"
                ) from error
            stored = list(handle.keys())
            if names is not None and set(names) != set(stored):
                raise ValueError(
                    f"{self.path / file} and {INDEX_FILE} disagree: only in the index "
                    f"{sorted(set(names) - set(stored))}, only in the file "
                    f"{sorted(set(stored) - set(names))}"
                )
            for name in stored:
                owners[name].append(file)
                self._files[name] = handle
        twice = {name: files for name, files in owners.items() if len(files) > 1}
        if twice:
            raise ValueError(f"{self.path}: tensors stored twice: {twice}")
        return owners

    def _check_types(self, owners: Iterable[str]) -> None:
        wrong = {}
        for name in owners:
            piece = self._files[name].get_slice(name)
            self.shapes[name] = tuple(piece.get_shape())
            counter = name.split(".")[-1] in self._counters
            if piece.get_dtype() not in (*FLOAT_TYPES, *(INTEGER_TYPES if counter else ())):
                wrong[name] = piece.get_dtype()
        if wrong:
            raise ValueError(
                f"{self.path}: types of {wrong} cannot be read as weights: allowed are "
                f"{sorted(FLOAT_TYPES)}"
            )


class SplitFiles:
    """Files of a folder that hold parts of the same tensors, read as `TensorFiles` are.

    axis_of(name): the axis along which a tensor's parts are joined in the order of `files`, None
    where every file holds all of it. Raises ValueError, besides what TensorFiles does, for files
    with different names, and in `read` for tensors that should be equal and are not.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        files: list[str],
        axis_of: Callable[[str], int | None],
        *,
        counters: tuple[str, ...] = (),
    ):
        self.path, self._axis_of = pathlib.Path(path), axis_of
        self._stack = contextlib.ExitStack()
        try:
            self._files = [
                self._stack.enter_context(TensorFiles(path, file=file, counters=counters))
                for file in files
            ]
            for part, file in zip(self._files, files, strict=True):
                check_names(self._files[0].shapes, part.shapes, self.path / file)
        except BaseException:
            self._stack.close()
            raise
        self.shapes = {name: self._shape(name) for name in self._files[0].shapes}

    def __enter__(self) -> "SplitFiles":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, name: str) -> np.ndarray:
        """The whole tensor `name` in the type of its files."""
        parts, axis = [part.read(name) for part in self._files], self._axis_of(name)
        if axis is not None:
            return np.concatenate(parts, axis=axis)
        if any(not np.array_equal(parts[0], part) for part in parts[1:]):
            raise ValueError(f"{self.path}: {name} differs between files that should all hold it")
        return parts[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes, axis = [part.shapes[name] for part in self._files], self._axis_of(name)
        if axis is None or axis >= len(shapes[0]):
            return shapes[0]
        size = sum(shape[axis] for shape in shapes)
        return (*shapes[0][:axis], size, *shapes[0][axis + 1 :])


def _read_index(index: pathlib.Path) -> dict[str, list[str]]:
    def no_duplicates(pairs):
        twice = [k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1]
        if twice:
            raise ValueError(f"{index}: keys given twice: {twice}")
        return dict(pairs)

    try:
        content = json.loads(index.read_text(), object_pairs_hook=no_duplicates)
        weight_map = content["weight_map"]
        files = collections.defaultdict(list)
        for name, file in weight_map.items():
            files[file].append(name)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of safetensors files: {error!r}") from error
    outside = [file for file in files if pathlib.PurePath(file).name != file]
    if outside:
        raise ValueError(f"{index}: files outside the folder: {outside}")
    return dict(files)


def check_names(expected: Iterable[str], stored: Iterable[str], where: object) -> None:
    """ValueError naming the tensors that are missing and those nobody asked for."""
    expected, stored = set(expected), set(stored)
    if expected != stored:
        raise ValueError(
            f"{where}: missing tensors {_some(expected - stored)}, unexpected tensors "
            f"{_some(stored - expected)}"
        )


def _some(names: set[str]) -> str:
    names = sorted(names)
    return str(names) if len(names) <= 20 else f"{names[:20]} and {len(names) - 20} more"


def write_tensors(
    path: str | pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    max_shard_bytes: int,
    own_types: dict[str, np.dtype] | None = None,
) -> None:
    """Writes model.safetensors, or several shards and their index, of at most max_shard_bytes each
    unless one tensor is larger; tensors come from `read(name)` one shard at a time, cast to dtype
    or to that of `own_types`.

    Raises FileExistsError if the folder already holds safetensors files.
    """
    dtype = np.dtype(dtype)
    if dtype not in FLOAT_TYPES.values():
        raise ValueError(f"dtype={dtype}: allowed are {[str(d) for d in FLOAT_TYPES.values()]}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be >= 1")
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in path.glob("*.safetensors*"))
    if present:
        raise FileExistsError(f"{path} already holds {present}")
    types = dict.fromkeys(shapes, dtype) | (own_types or {})
    sizes = {name: math.prod(shape) * types[name].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        tensors = {name: np.asarray(read(name).astype(types[name]), order="C") for name in names}
        # transformers refuses a file that does not say which framework wrote it.
        import_safetensors().numpy.save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
