"""Golden ids, round trips, byte counts, the Llama 3 split and chat format, bad files."""

import base64
import io
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from blt_jax.data import tokenizers as lib
from blt_jax.data.sources import StandardLibrarySource

GREETING = "Let's début: 12345 naïve  tests,\n\n\tover   there… 日本語 🙂!"
BASE = 600


@pytest.fixture(scope="module")
def texts():
    source = StandardLibrarySource(max_bytes=200_000)
    return [source[i].text for i in range(len(source))]


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return lib.train_bpe(texts, BASE + 3, str(path))


@pytest.fixture(scope="module")
def rank_file(bpe, tmp_path_factory):
    """A tiktoken rank file with the vocabulary of the trained BPE (its ids are merge order)."""
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    lines = [
        b"%s %d" % (base64.b64encode(bpe.pieces([number])[0]), number - 3)
        for number in range(3, bpe.vocab_size)
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.fixture(scope="module")
def llama(rank_file):
    return lib.Llama3Tokenizer.from_file(rank_file)


@pytest.fixture(scope="module")
def sentence_piece_file(texts, tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(b"\n".join(texts[:3]).decode().splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_byte_ids_are_golden():
    tokenizer = lib.ByteTokenizer()
    ids = tokenizer.encode("Let's c", bos=True, eos=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 80, 105, 120, 43, 119, 36, 103, 2]
    assert tokenizer.encode("é🙂").tolist() == [4 + b for b in "é🙂".encode()]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (260, 1, 2)
    assert (tokenizer.boe_id, tokenizer.delimiter_id, tokenizer.pad_id) == (0, 3, 0)
    assert tokenizer.token_bytes(np.asarray([[0, 1, 2], [3, 4, 259]])).tolist() == [
        [0, 0, 0],
        [0, 1, 1],
    ]


def test_byte_tokenizer_drops_surrogates_and_broken_utf8():
    tokenizer = lib.ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == b"ab"
    assert lib.decode_text(tokenizer, [1, 4 + 0xC3, 4 + 97, 2]) == "a"


@hypothesis.settings(deadline=None)
@hypothesis.given(st.binary(max_size=200))
def test_byte_round_trip(data):
    tokenizer = lib.ByteTokenizer()
    ids = lib.encode_document(tokenizer, data)
    assert tokenizer.decode(ids) == data
    assert tokenizer.token_bytes(ids).sum() == len(data)


def test_byte_decode_refuses_foreign_ids():
    with pytest.raises(ValueError, match=r"260 is outside 0\.\.259"):
        lib.ByteTokenizer().decode([4, 260])
    with pytest.raises(ValueError, match="-1 is outside"):
        lib.ByteTokenizer().decode([-1])
    with pytest.raises(ValueError, match="float64"):
        lib.ByteTokenizer().decode([1.0])
    assert lib.ByteTokenizer().decode([]) == b""


@hypothesis.settings(deadline=None)
@hypothesis.given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
@pytest.mark.parametrize("name", ["bpe", "llama"])
def test_byte_level_round_trip_and_counts(name, request, text):
    tokenizer = request.getfixturevalue(name)
    data = lib.text_bytes(text)
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == data
    assert tokenizer.token_bytes(ids).sum() == len(data)


def test_bpe_compresses_and_its_file_loads_again(bpe, texts, tmp_path):
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.vocab_size) == (0, 1, 2, BASE + 3)
    assert bpe.exact_bytes
    ids = bpe.encode(texts[0])
    assert len(ids) < 0.6 * len(texts[0])
    path = str(tmp_path / "folder" / "tokenizer.json")
    lib.train_bpe(texts, BASE + 3, path)
    for place in (path, str(tmp_path / "folder")):
        config = lib.TokenizerConfig(kind=lib.TokenizerKind.HUGGING_FACE, path=place)
        np.testing.assert_array_equal(config.build().encode(texts[0]), ids)


def test_special_names_are_plain_text(bpe, llama):
    for tokenizer, text in ((bpe, "a <eos> b"), (llama, "a <|eot_id|> b")):
        ids = tokenizer.encode(text)
        assert not set(ids.tolist()) & set(tokenizer.stop_ids)
        assert tokenizer.decode(ids) == text.encode()


def test_special_names_come_from_the_config_beside(bpe, texts, tmp_path):
    lib.train_bpe(texts[:1], 300, str(tmp_path / "tokenizer.json"))
    names = {"bos_token": {"content": "<pad>"}, "eos_token": "<bos>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = lib.HuggingFaceTokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 0)
    named = lib.HuggingFaceTokenizer(str(tmp_path), bos="<eos>")
    assert named.bos_id == 2
    with pytest.raises(ValueError, match="no eos token nothing"):
        lib.HuggingFaceTokenizer(str(tmp_path), eos="nothing")


def test_llama3_equals_tiktoken_and_the_trained_bpe(llama, bpe, texts):
    import tiktoken

    peer = tiktoken.Encoding(
        "peer",
        pat_str=lib.LLAMA3_SPLIT,
        mergeable_ranks={llama.pieces([i])[0]: i for i in range(BASE)},
        special_tokens={},
    )
    for text in [GREETING, *(text.decode() for text in texts[:3])]:
        ids = llama.encode(text)
        assert ids.tolist() == peer.encode(text)
        np.testing.assert_array_equal(ids, bpe.encode(text) - 3)  # another library, same merges


def test_llama3_split():
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)}
    words = ["We", "'LL", " see", " ", "123", "4", " 5", "?!\n\n", "  ", " x", "\t", "\n"]
    pieces = []
    for word in words:
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end].encode(), len(ranks))
            pieces.append(word[:end])
    encoding = tiktoken.Encoding(
        "split", pat_str=lib.LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = lib.Llama3Tokenizer(ranks)
    text = "We'LL see 1234 5?!\n\n   x\t\n"
    expected = ["We", "'LL", " see", " ", "123", "4", " ", "5", "?!\n\n", "  ", " x", "\t", "\n"]
    assert encoding.decode(tokenizer.encode(text).tolist()) == text
    found = [piece.decode() for piece in tokenizer.pieces(tokenizer.encode(text))]
    assert found == expected


def test_llama3_special_ids(llama):
    assert len(lib.LLAMA3_SPECIALS) == len(set(lib.LLAMA3_SPECIALS)) == 256
    assert llama.vocab_size == BASE + 256
    offsets = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_1|>": 3,
        "<|finetune_right_pad_id|>": 4,
        "<|step_id|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|image|>": 11,
        "<|reserved_special_token_2|>": 12,
        "<|reserved_special_token_245|>": 255,
    }
    assert {name: llama.special_ids[name] - BASE for name in offsets} == offsets
    assert llama.pad_id == BASE + 4
    assert set(llama.stop_ids) == {BASE + 1, BASE + 8, BASE + 9}
    assert llama.token_bytes([BASE, BASE + 255]).tolist() == [0, 0]


def test_llama3_dialog(llama):
    tool_call = lib.Message(lib.Role.ASSISTANT, "1+1", python_tag=True, end_of_message=True)
    dialog = llama.encode_dialog(
        [
            lib.Message(lib.Role.SYSTEM, " Be brief. \n"),
            lib.Message(lib.Role.USER, "What is 1+1? <|eot_id|>"),
            tool_call,
            lib.Message(lib.Role.IPYTHON, "2"),
        ]
    )
    text = (
        "<|begin_of_text|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1? @<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|>1+1<|eom_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    before, after = text.split("@")
    expected = np.concatenate(
        [
            llama.encode_with_specials(before),
            llama.encode("<|eot_id|>"),  # in the content: plain text
            llama.encode_with_specials(after),
        ]
    )
    np.testing.assert_array_equal(dialog.ids, expected)
    content = llama.decode(dialog.ids[~dialog.is_format])
    assert content == b"Be brief.What is 1+1? <|eot_id|>1+12"
    order = [role for role, _ in itertools.groupby(dialog.roles.tolist())]
    assert order == [-1, 0, 1, 2, 3, 2]
    assert dialog.is_format[dialog.ids >= BASE].all()
    without = llama.encode_dialog([lib.Message(lib.Role.USER, "x")], generation_prompt=False)
    assert without.ids[-1] == llama.eot_id
    with pytest.raises(ValueError, match="messages is empty"):
        llama.encode_dialog([])


def test_llama3_never_gets_two_bos(llama):
    once = llama.encode_with_specials("<|begin_of_text|>hi<|end_of_text|>")
    np.testing.assert_array_equal(once, llama.encode("hi", bos=True, eos=True))
    np.testing.assert_array_equal(llama.encode_with_specials("hi", bos=True, eos=True), once)
    with pytest.raises(ValueError, match="begins with"):
        llama.encode_with_specials("<|begin_of_text|>hi", bos=True)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 30), st.integers(1, 9))
def test_long_texts_are_cut(text, max_characters, max_run):
    parts = list(lib.cut_long_text(text, max_characters, max_run))
    assert "".join(parts) == text
    assert max(map(len, parts), default=0) <= max_characters
    for part in parts:
        longest = max((len(list(g)) for _, g in itertools.groupby(part, str.isspace)), default=0)
        assert longest <= max_run


def test_long_text_is_only_cut_where_needed(llama):
    assert list(lib.cut_long_text("a b" * 10, 100, 25)) == ["a b" * 10]
    assert list(lib.cut_long_text("x" * 25 + " y", 100, 10)) == ["x" * 10, "x" * 10, "x" * 5 + " y"]
    text = " " * 60_000 + "q" * 60_000
    assert llama.decode(llama.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nnot base64!\n", "line 2"),
        (b"YQ== 0\nYg==\n", "line 2"),
        (b"YQ== 0\nYg== 0\n", "each once"),
        (b"YQ== 0\nYg== 1\n", "single bytes"),
    ],
)
def test_bad_rank_files(tmp_path, content, message):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        lib.Llama3Tokenizer.from_file(str(path))


def test_sentencepiece(sentence_piece_file):
    config = lib.TokenizerConfig(kind=lib.TokenizerKind.SENTENCEPIECE, path=sentence_piece_file)
    tokenizer = config.build()
    text = "import os and some words é"
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == text.encode()
    # The dummy space before the text is the one byte too many.
    assert tokenizer.token_bytes(ids).sum() == len(text.encode()) + 1


def test_delimited_bytes(bpe, texts):
    tokenizer = lib.DelimitedByteTokenizer(bpe)
    ids = tokenizer.encode(texts[0], bos=True, eos=True)
    assert tokenizer.decode(ids) == texts[0]
    assert (ids == lib.BPE_DELIM_ID).sum() == len(bpe.encode(texts[0]))
    assert ids[:2].tolist() == [1, 3]
    assert tokenizer.token_bytes(ids).sum() == len(texts[0])


def test_configs(rank_file, tmp_path):
    kinds = lib.TokenizerKind
    assert isinstance(lib.TokenizerConfig().build(), lib.ByteTokenizer)
    built = lib.TokenizerConfig(kind=kinds.TIKTOKEN_LLAMA3, path=rank_file).build()
    assert isinstance(built, lib.Tokenizer)
    assert isinstance(lib.ByteTokenizer(), lib.Tokenizer)
    with pytest.raises(ValueError, match="reads no file"):
        lib.TokenizerConfig(path="x")
    for kind in (kinds.HUGGING_FACE, kinds.TIKTOKEN_LLAMA3, kinds.SENTENCEPIECE):
        with pytest.raises(ValueError, match="needs the tokenizer's file"):
            lib.TokenizerConfig(kind=kind).build()
        with pytest.raises(FileNotFoundError, match="missing"):
            lib.TokenizerConfig(kind=kind, path=str(tmp_path / "missing")).build()
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        lib.HuggingFaceTokenizer(str(broken))
    with pytest.raises(ValueError, match="at least 259"):
        lib.train_bpe(["a"], 258)
    with pytest.raises(TypeError, match="text"):
        lib.text_bytes(3)
