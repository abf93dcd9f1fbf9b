"""Tokenizers: bytes, Hugging Face `tokenizers`, Llama 3's tiktoken, sentencepiece.

All share one protocol, `Tokenizer`: text in, int32 ids out, and for every id the number of
UTF-8 bytes it stands for, so that bits per byte mean the same for all of them. The libraries
are imported where a tokenizer is built (the extra `text`).
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

BOE_ID, BOS_ID, EOS_ID, BPE_DELIM_ID, BYTE_OFFSET = 0, 1, 2, 3, 4


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: bytes | str, *, bos: bool = False, eos: bool = False) -> Any:
        """Ids [n] (int32) of a text, with `bos_id` before and `eos_id` behind where asked."""

    def decode(self, ids: Any) -> bytes:
        """The bytes the ids stand for; special ids stand for none."""

    def token_bytes(self, ids: Any) -> Any:
        """Number of UTF-8 bytes each id stands for (int32, shape of `ids`); specials 0."""


class TokenizerKind(enum.Enum):
    """The tokenizers that `TokenizerConfig.build` can make."""

    BYTE = "byte"
    BYTE_DELIMITED = "byte_delimited"
    HUGGING_FACE = "hugging_face"
    TIKTOKEN_LLAMA3 = "tiktoken_llama3"
    SENTENCEPIECE = "sentencepiece"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TokenizerConfig:
    """Which tokenizer, and its file (every kind but BYTE needs one).

    BYTE_DELIMITED is bytes with BPE_DELIM before the bytes of each token of the
    `tokenizer.json` at `path`.
    """

    kind: TokenizerKind = TokenizerKind.BYTE
    path: str = ""

    def __post_init__(self):
        if self.kind is TokenizerKind.BYTE and self.path:
            raise ValueError(f"path is {self.path!r}; kind BYTE reads no file, leave it empty")

    def build(self) -> "Tokenizer":
        """Makes the tokenizer. Raises ValueError, FileNotFoundError or ImportError."""
        if self.kind is TokenizerKind.BYTE:
            return ByteTokenizer()
        if not self.path:
            raise ValueError(f"path is ''; kind {self.kind.name} needs the tokenizer's file")
        match self.kind:
            case TokenizerKind.HUGGING_FACE:
                return HuggingFaceTokenizer(self.path)
            case TokenizerKind.BYTE_DELIMITED:
                return DelimitedByteTokenizer(HuggingFaceTokenizer(self.path))
            case TokenizerKind.TIKTOKEN_LLAMA3:
                return Llama3Tokenizer.from_file(self.path)
            case _:
                return SentencePieceTokenizer(self.path)


class ByteTokenizer:
    """Bytes as ids: byte b is b + 4; BOE 0, BOS 1, EOS 2, BPE_DELIM 3; vocabulary 260.

    Surrogates, which UTF-8 cannot encode, are dropped. Source: BLT, released vocabulary.
    """

    vocab_size = 260
    boe_id = BOE_ID
    bos_id = BOS_ID
    eos_id = EOS_ID
    delimiter_id = BPE_DELIM_ID
    pad_id = BOE_ID
    stop_ids = (EOS_ID,)

    def encode(
        self, text: bytes | str, *, bos: bool = False, eos: bool = False
    ) -> Int32[np.ndarray, "n"]:
        """Ids of a text; see `Tokenizer.encode`."""
        data = np.frombuffer(text_bytes(text), np.uint8).astype(np.int32) + BYTE_OFFSET
        return _with_specials(data, BOS_ID if bos else None, EOS_ID if eos else None)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "n"]) -> bytes:
        """Bytes of the ids, exactly; ids below 4 are dropped.

        Raises:
          ValueError: an id outside 0..259.
        """
        ids = _checked_ids(ids, self.vocab_size)
        return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()

    def token_bytes(self, ids: Sequence[int] | Int[np.ndarray, "*s"]) -> Int32[np.ndarray, "*s"]:
        """1 for bytes, 0 for special ids."""
        return (np.asarray(ids) >= BYTE_OFFSET).astype(np.int32)


def text_bytes(text: bytes | str) -> bytes:
    """UTF-8 bytes of a text; surrogates in a string are dropped."""
    if isinstance(text, str):
        return text.encode("utf-8", errors="ignore")
    if isinstance(text, (bytes, bytearray, memoryview)):
        return bytes(text)
    raise TypeError(f"text is {type(text).__name__}; it must be bytes or str")


def decode_text(tokenizer: Tokenizer, ids: Any) -> str:
    """The text the ids stand for; broken UTF-8 is left out."""
    return tokenizer.decode(ids).decode("utf-8", errors="ignore")


def encode_document(tokenizer: Tokenizer, text: bytes | str) -> Int32[np.ndarray, "n"]:
    """Ids of a whole document, BOS first and EOS last, as the loader packs it."""
    return tokenizer.encode(text, bos=True, eos=True)


def _with_specials(
    ids: Int32[np.ndarray, "n"], bos: int | None, eos: int | None
) -> Int32[np.ndarray, "m"]:
    parts = [[bos]] if bos is not None else []
    parts.append(ids)
    if eos is not None:
        parts.append([eos])
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _checked_ids(ids: Any, vocab_size: int) -> Int[np.ndarray, "n"]:
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros((0,), np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids have dtype {array.dtype}; they must be integers")
    if array.min() < 0 or array.max() >= vocab_size:
        bad = array[(array < 0) | (array >= vocab_size)].reshape(-1)[0]
        raise ValueError(f"id {bad} is outside 0..{vocab_size - 1}")
    return array.reshape(-1)
