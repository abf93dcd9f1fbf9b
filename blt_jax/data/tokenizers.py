"""Tokenizers: bytes, Hugging Face `tokenizers`, Llama 3's tiktoken, sentencepiece.

All share one protocol, `Tokenizer`: text in, int32 ids out, and for every id the number of
UTF-8 bytes it stands for, so that bits per byte mean the same for all of them. The libraries
are imported where a tokenizer is built (the extra `text`).
"""

import base64
import binascii
import dataclasses
import enum
import functools
import importlib
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32

BOE_ID, BOS_ID, EOS_ID, BPE_DELIM_ID, BYTE_OFFSET = 0, 1, 2, 3, 4

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_NUM_SPECIALS = 256
MAX_CHARACTERS = 400_000  # longer strings overflow the library's regex engine
MAX_RUN = 25_000  # characters without (or of nothing but) white space

_LLAMA3_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
LLAMA3_SPECIALS = _LLAMA3_NAMED + tuple(
    f"<|reserved_special_token_{number}|>"
    for number in range(2, LLAMA3_NUM_SPECIALS - len(_LLAMA3_NAMED) + 2)
)

_TRAINED_SPECIALS = ("<pad>", "<bos>", "<eos>")
_BOS_NAMES = ("<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>")
_PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")


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

    def decode(self, ids: Any) -> bytes:
        """Bytes of the ids, exactly; ids below 4 are dropped.

        Raises:
          ValueError: an id outside 0..259.
        """
        ids = _checked_ids(ids, self.vocab_size)
        return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()

    def token_bytes(self, ids: Any) -> Int32[np.ndarray, "*s"]:
        """1 for bytes, 0 for special ids."""
        return (np.asarray(ids) >= BYTE_OFFSET).astype(np.int32)


class DelimitedByteTokenizer(ByteTokenizer):
    """Bytes with BPE_DELIM before the bytes of each token of a byte-level BPE tokenizer.

    Source: BLT, the `bpe` patching scheme (patches are the BPE tokens, made decodable).
    """

    def __init__(self, bpe: "PieceTokenizer"):
        self._bpe = bpe

    def encode(
        self, text: bytes | str, *, bos: bool = False, eos: bool = False
    ) -> Int32[np.ndarray, "n"]:
        """Ids of a text; ValueError where the BPE's tokens do not spell the text's bytes."""
        data = text_bytes(text)
        pieces = self._bpe.pieces(self._bpe.encode(data))
        if b"".join(pieces) != data:
            raise ValueError("the BPE tokenizer changes the text; use a byte-level one")
        parts = [np.zeros((0,), np.int32)]
        for piece in pieces:
            parts += [np.asarray([BPE_DELIM_ID], np.int32), ByteTokenizer.encode(self, piece)]
        return _with_specials(
            np.concatenate(parts), BOS_ID if bos else None, EOS_ID if eos else None
        )


class PieceTokenizer:
    """A vocabulary of byte strings: what the subword tokenizers share.

    `pieces` has the bytes of every id, b"" for special ids.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = tuple(pieces)
        self._lengths = np.asarray([len(piece) for piece in self._pieces], np.int32)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ids included."""
        return len(self._pieces)

    def encode(
        self, text: bytes | str, *, bos: bool = False, eos: bool = False
    ) -> Int32[np.ndarray, "n"]:
        """Ids of a text. Bytes that are not UTF-8 become one single-byte token each."""
        ids: list[int] = []
        for part in _utf8_parts(text):
            ids += self._encode_text(part) if isinstance(part, str) else [self._byte_id(part)]
        return _with_specials(
            np.asarray(ids, np.int32), self.bos_id if bos else None, self.eos_id if eos else None
        )

    def decode(self, ids: Any) -> bytes:
        """Bytes of the ids; ValueError for an id outside the vocabulary."""
        return b"".join(self.pieces(ids))

    def pieces(self, ids: Any) -> list[bytes]:
        """The bytes of each id."""
        return [self._pieces[i] for i in _checked_ids(ids, self.vocab_size).tolist()]

    def token_bytes(self, ids: Any) -> Int32[np.ndarray, "*s"]:
        """Number of bytes of each id; 0 for special ids."""
        return self._lengths[np.asarray(ids, np.int64)]

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {piece[0]: i for i, piece in reversed([*enumerate(self._pieces)]) if len(piece) == 1}

    def _byte_id(self, byte: int) -> int:
        if byte not in self._byte_ids:
            raise ValueError(f"the vocabulary has no token for the byte 0x{byte:02x}")
        return self._byte_ids[byte]


class HuggingFaceTokenizer(PieceTokenizer):
    """A `tokenizer.json` (file, or folder holding it), by the library `tokenizers`.

    Special tokens in the text are plain text. `bos`, `eos`, `pad` name the special tokens; empty
    means what a `tokenizer_config.json` beside it says, else a known name. Without a BOS token,
    EOS also begins documents. Byte counts are exact (`exact_bytes`) for byte-level vocabularies
    that do not normalise; else they are those of the pieces.
    """

    def __init__(self, path: str, *, bos: str = "", eos: str = "", pad: str = ""):
        tokenizers = import_extra("tokenizers")
        file = pathlib.Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        require_file(file)
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a readable tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        byte_level = '"ByteLevel"' in json.dumps(description.get("decoder"))
        self._byte_level = byte_level
        prefix = '"add_prefix_space": true' in json.dumps(description.get("pre_tokenizer"))
        self.exact_bytes = byte_level and not prefix and description.get("normalizer") is None
        super().__init__(_hugging_face_pieces(self._tokenizer, description, byte_level))
        named = _special_names(file.with_name("tokenizer_config.json"))
        self.eos_id = self._special(file, "eos", eos or named.get("eos_token", ""), _EOS_NAMES)
        self.bos_id = self._special(
            file, "bos", bos or named.get("bos_token", ""), _BOS_NAMES, self.eos_id
        )
        self.pad_id = self._special(
            file, "pad", pad or named.get("pad_token", ""), _PAD_NAMES, self.bos_id
        )
        self.stop_ids = (self.eos_id,)

    def decode(self, ids: Any) -> bytes:
        """Bytes of the ids; special ids stand for none."""
        if self._byte_level:
            return super().decode(ids)
        ids = _checked_ids(ids, self.vocab_size).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=True).encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _special(
        self,
        file: pathlib.Path,
        kind: str,
        name: str,
        known: Sequence[str],
        default: int | None = None,
    ) -> int:
        for candidate in (name,) if name else known:
            found = self._tokenizer.token_to_id(candidate)
            if found is not None:
                return found
        if name or default is None:
            raise ValueError(
                f"{file} has no {kind} token {name or list(known)}; name it by the argument {kind}"
            )
        return default


class Role(enum.Enum):
    """Who speaks; IPYTHON is a tool's answer."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    IPYTHON = "ipython"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. A tool call may begin with python_tag; a turn that goes on ends with eom."""

    role: Role
    content: str
    python_tag: bool = False
    end_of_message: bool = False


@dataclasses.dataclass(frozen=True)
class Dialog:
    """An encoded dialog, all [n]: `ids` int32; `is_format` bool, true for everything but the
    content (BOS, headers, line breaks, python_tag, eot, eom); `roles` int32, the place of the
    speaker in `Role`, -1 for BOS."""

    ids: Int32[np.ndarray, "n"]
    is_format: Bool[np.ndarray, "n"]
    roles: Int32[np.ndarray, "n"]


class Llama3Tokenizer(PieceTokenizer):
    """Byte-level BPE by tiktoken with Llama 3's split, special ids and chat format.

    Llama 3 has 128,000 ranks and 256 special ids behind them; with another rank file they begin
    behind its last rank. Source: arXiv 2407.21783 section 3, and the released code.
    """

    def __init__(self, ranks: dict[bytes, int]):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"the {len(ranks)} ranks are not 0..{len(ranks) - 1}, each once")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"the ranks lack the single bytes {missing[:5]}...")
        tiktoken = import_extra("tiktoken")
        super().__init__([*sorted(ranks, key=ranks.__getitem__), *[b""] * LLAMA3_NUM_SPECIALS])
        self.special_ids = {
            name: len(ranks) + number for number, name in enumerate(LLAMA3_SPECIALS)
        }
        self._encoding = tiktoken.Encoding(
            "llama3",
            pat_str=LLAMA3_SPLIT,
            mergeable_ranks=ranks,
            special_tokens=self.special_ids,
            explicit_n_vocab=self.vocab_size,
        )
        self.bos_id = self.special_ids["<|begin_of_text|>"]
        self.eos_id = self.special_ids["<|end_of_text|>"]
        self.pad_id = self.special_ids["<|finetune_right_pad_id|>"]
        self.eot_id = self.special_ids["<|eot_id|>"]
        self.eom_id = self.special_ids["<|eom_id|>"]
        self.stop_ids = (self.eos_id, self.eom_id, self.eot_id)

    @classmethod
    def from_file(cls, path: str) -> "Llama3Tokenizer":
        """Reads a rank file; errors name the line."""
        require_file(pathlib.Path(path))
        ranks: dict[bytes, int] = {}
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except (ValueError, binascii.Error) as error:
                    raise ValueError(
                        f"{path}, line {number}: {line[:40]!r} is not 'base64(bytes) rank'"
                    ) from error
        return cls(ranks)

    def encode_with_specials(
        self, text: str, *, bos: bool = False, eos: bool = False
    ) -> Int32[np.ndarray, "n"]:
        """Ids of a trusted text in which the names of special tokens stand for their ids.

        Raises:
          ValueError: bos=True though the text begins with <|begin_of_text|>.
        """
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, LLAMA3_SPECIALS)) + ")", text):
            special = self.special_ids.get(part)
            ids += [special] if special is not None else self.encode(part).tolist()
        if bos and ids[:1] == [self.bos_id]:
            raise ValueError("the text begins with <|begin_of_text|> already; pass bos=False")
        return np.asarray([self.bos_id] * bos + ids + [self.eos_id] * eos, np.int32)

    def encode_dialog(
        self, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> Dialog:
        """A dialog in the chat format, BOS included; white space around contents is cut.

        `generation_prompt` adds the header of the assistant's turn.

        Raises:
          ValueError: no message.
        """
        if not messages:
            raise ValueError("messages is empty; a dialog needs at least one")
        parts: list[tuple[list[int], bool, int]] = [([self.bos_id], True, -1)]
        for message in messages:
            speaker = list(Role).index(message.role)
            parts.append((self._header(message.role), True, speaker))
            if message.python_tag:
                parts.append(([self.special_ids["<|python_tag|>"]], True, speaker))
            parts.append((self.encode(message.content.strip()).tolist(), False, speaker))
            end = self.eom_id if message.end_of_message else self.eot_id
            parts.append(([end], True, speaker))
        if generation_prompt:
            speaker = list(Role).index(Role.ASSISTANT)
            parts.append((self._header(Role.ASSISTANT), True, speaker))
        return Dialog(
            ids=np.asarray([i for ids, _, _ in parts for i in ids], np.int32),
            is_format=np.asarray([form for ids, form, _ in parts for _ in ids], bool),
            roles=np.asarray([who for ids, _, who in parts for _ in ids], np.int32),
        )

    def _header(self, role: Role) -> list[int]:
        return [
            self.special_ids["<|start_header_id|>"],
            *self.encode(role.value).tolist(),
            self.special_ids["<|end_header_id|>"],
            *self.encode("\n\n").tolist(),
        ]

    def _encode_text(self, text: str) -> list[int]:
        return [
            number
            for part in cut_long_text(text)
            for number in self._encoding.encode(part, allowed_special=set(), disallowed_special=())
        ]


def cut_long_text(
    text: str, max_characters: int = MAX_CHARACTERS, max_run: int = MAX_RUN
) -> Iterator[str]:
    """Cuts a text every `max_characters`, and runs of (non-)white space every `max_run`."""
    for first in range(0, len(text), max_characters):
        part = text[first : first + max_characters]
        start = 0
        long_run = rf"\s{{{max_run + 1},}}|\S{{{max_run + 1},}}"
        for run in re.finditer(long_run, part):
            for cut in range(run.start() + max_run, run.end(), max_run):
                yield part[start:cut]
                start = cut
        yield part[start:]


class SentencePieceTokenizer(PieceTokenizer):
    """A sentencepiece `.model` file. Byte counts are those of the pieces.

    Its normalisation and the space it puts before a text make them inexact by a few bytes.
    """

    def __init__(self, path: str):
        sentencepiece = import_extra("sentencepiece")
        require_file(pathlib.Path(path))
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a readable sentencepiece model: {error}") from error
        model = self._model
        if model.eos_id() < 0:
            raise ValueError(f"{path} has no end-of-sentence id")
        super().__init__(
            [
                b""
                if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
                else _piece_bytes(model.id_to_piece(i))
                for i in range(model.get_piece_size())
            ]
        )
        self.eos_id = model.eos_id()
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else self.eos_id
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else self.bos_id
        self.stop_ids = (self.eos_id,)

    def decode(self, ids: Any) -> bytes:
        """Bytes of the ids; special ids stand for none."""
        return self._model.decode(_checked_ids(ids, self.vocab_size).tolist()).encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def _byte_id(self, byte: int) -> int:
        return self._byte_ids.get(byte, self._model.unk_id())


def train_bpe(
    texts: Iterable[bytes | str], vocab_size: int, path: str = ""
) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE with Llama 3's split; specials <pad> 0, <bos> 1, <eos> 2.

    Needs no network. `path` is where the `tokenizer.json` is left ("": nowhere).

    Raises:
      ValueError: vocab_size below 259 (256 bytes and the specials).
    """
    smallest = 256 + len(_TRAINED_SPECIALS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {smallest}")
    tokenizers = import_extra("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_TRAINED_SPECIALS),
        initial_alphabet=sorted(_BYTE_CHARACTERS.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text_bytes(text).decode("utf-8", errors="ignore") for text in texts), trainer
    )
    if path:
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(target))
        return HuggingFaceTokenizer(str(target))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "tokenizer.json")
        tokenizer.save(str(file))
        return HuggingFaceTokenizer(str(file))


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


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: Any) -> None:
    """Raises ValueError, naming `where`, if the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}"
        )


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


def _byte_characters() -> dict[int, str]:
    """The character by which byte-level vocabularies write each byte (GPT-2's convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + number) for number, byte in enumerate(others)},
    }


_BYTE_CHARACTERS = _byte_characters()
_CHARACTER_BYTES = {character: byte for byte, character in _BYTE_CHARACTERS.items()}


def _hugging_face_pieces(tokenizer: Any, description: Any, byte_level: bool) -> list[bytes]:
    added = {token["id"]: token for token in description.get("added_tokens", ())}
    pieces = [b""] * tokenizer.get_vocab_size(with_added_tokens=True)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number >= len(pieces):
            pieces += [b""] * (number + 1 - len(pieces))
        if number in added:
            pieces[number] = b"" if added[number]["special"] else token.encode()
        elif byte_level and all(character in _CHARACTER_BYTES for character in token):
            pieces[number] = bytes(_CHARACTER_BYTES[character] for character in token)
        else:
            pieces[number] = _piece_bytes(token)
    return pieces


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a sentencepiece or WordPiece piece."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.removeprefix("##").replace("\u2581", " ").encode()


def _special_names(file: pathlib.Path) -> dict[str, str]:
    """bos_token, eos_token, pad_token of a `tokenizer_config.json`, those that are set."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value:
            names[key] = value
    return names


def _utf8_parts(text: bytes | str) -> Iterator[str | int]:
    """A text as strings, with the bytes that are no UTF-8 as numbers between them."""
    data = text_bytes(text)
    try:
        yield data.decode("utf-8")
        return
    except UnicodeDecodeError:
        pass
    escaped = data.decode("utf-8", errors="surrogateescape")
    for part in re.split("([\udc80-\udcff])", escaped):
        if len(part) == 1 and 0xDC80 <= ord(part) <= 0xDCFF:
            yield ord(part) - 0xDC00
        elif part:
            yield part


def import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this tokenizer needs {name}: pip install 'blt-jax[text]'") from error


def require_file(file: pathlib.Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is not a file")
