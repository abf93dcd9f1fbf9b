"""Every suffix, splits, byte limits, and clear errors for bad files."""

import gzip
import json
import threading

import numpy as np
import pytest

from blt_jax.data import sources as lib

TEXTS = ["first", "", "third ü", "fourth\nwith a line"]


def texts_of(source):
    return [source[i].text.decode() for i in range(len(source))]


def config(*paths, **changes):
    return lib.SourceConfig(kind=lib.SourceKind.FILES, paths=tuple(map(str, paths)), **changes)


def write_jsonl(path, texts=TEXTS, field="text"):
    data = "\n".join(json.dumps({field: text, "n": i}) for i, text in enumerate(texts))
    path.write_bytes(data.encode() + b"\n\n")
    return path


def test_text_files(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    source = lib.open_source(config(tmp_path / "*.txt"), lib.Split.ALL)
    assert texts_of(source) == ["first", "second"]  # sorted; empty files are no documents
    assert source[1].metadata["path"].endswith("b.txt")
    listed = lib.open_source(config(tmp_path / "b.txt", tmp_path / "a.txt"), lib.Split.ALL)
    assert texts_of(listed) == ["second", "first"]


def test_text_separator_and_document_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\n\n\nüüüü\n\n")
    split = lib.open_source(config(path, separator="\n\n"), lib.Split.ALL)
    assert texts_of(split) == ["one", "two", "üüüü"]
    cut = lib.open_source(config(path, separator="\n\n", document_bytes=5), lib.Split.ALL)
    assert texts_of(cut) == ["one", "two", "üü", "üü"]
    whole = lib.open_source(config(path, document_bytes=7), lib.Split.ALL)
    assert "".join(texts_of(whole)) == path.read_text()
    assert all(len(whole[i].text) <= 7 for i in range(len(whole)))


def test_text_that_is_not_utf8_is_cut_all_the_same(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\x80" * 30)
    source = lib.open_source(config(path, document_bytes=8), lib.Split.ALL)
    assert [len(source[i].text) for i in range(len(source))] == [8, 8, 8, 6]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path, suffix):
    path = write_jsonl(tmp_path / "plain.jsonl")
    if suffix.endswith("gz"):
        packed = tmp_path / "a.jsonl.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    source = lib.open_source(config(path), lib.Split.ALL)
    assert texts_of(source) == TEXTS
    assert source[2].metadata["n"] == 2
    results = {}

    def read(worker):
        results[worker] = [source[i % 4].text for i in range(200)]

    threads = [threading.Thread(target=read, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(value == [TEXTS[i % 4].encode() for i in range(200)] for value in results.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3: not valid JSON"),
        (b'{"text": "\xff\xfe"}', "line 3: not valid JSON"),
        (b'["text"]', "line 3: a JSON list; it must be an object"),
        (b'{"body": "x"}', r"line 3: no field 'text'; the record has \['body'\]"),
        (b'{"text": 5}', "line 3: field 'text' holds int"),
    ],
)
def test_corrupt_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    source = lib.open_source(config(path), lib.Split.ALL)
    assert (source[0].text, source[2].text) == (b"a", b"b")
    with pytest.raises(ValueError, match=message) as caught:
        source[1]
    assert str(path) in str(caught.value)


def test_corrupt_line_reaches_the_user_through_the_loader(tmp_path):
    from blt_jax.data import loader

    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b\n')
    data = loader.DataConfig(
        sources=(config(path),), split=lib.Split.ALL, batch_size=1, sequence_length=8
    )
    iterator = iter(loader.loader(data))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid JSON"):
        for _ in range(10):
            next(iterator)
    iterator.close()


def test_broken_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b'{"text": "a"}\n' * 99)[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable gzip file"):
            lib.open_source(config(path), lib.Split.ALL)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": [*TEXTS, None, "last"], "number": range(6)})
    pq.write_table(table, path, row_group_size=2)
    source = lib.open_source(config(path, path, field="body"), lib.Split.ALL)
    assert len(source) == 12
    assert [source[i].text.decode() for i in (0, 1, 2, 3, 5, 6, 11)] == [
        *TEXTS,
        "last",
        TEXTS[0],
        "last",
    ]
    with pytest.raises(ValueError, match="row 10: column 'body' holds NoneType"):
        source[10]
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['body', 'number'\]"):
        lib.open_source(config(path), lib.Split.ALL)
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable parquet"):
        lib.open_source(config(path), lib.Split.ALL)


def test_array_record(tmp_path):
    from array_record.python import array_record_module

    def write(name, records):
        path = tmp_path / name
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return path

    plain = write("a.array_record", [text.encode() for text in TEXTS])
    assert texts_of(lib.open_source(config(plain), lib.Split.ALL)) == TEXTS
    packed = write("b.array_record", [json.dumps({"text": text}).encode() for text in TEXTS])
    json_format = lib.RecordFormat.JSON
    source = lib.open_source(config(packed, record_format=json_format), lib.Split.ALL)
    assert texts_of(source) == TEXTS
    wrong = lib.open_source(config(plain, record_format=json_format), lib.Split.ALL)
    with pytest.raises(ValueError, match="record 0: not valid JSON"):
        wrong[0]


def test_splits_by_index_are_disjoint_and_stable(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(300)])
    made = config(path, validation_fraction=0.25)
    parts = {split: texts_of(lib.open_source(made, split)) for split in lib.Split}
    train, held_out = parts[lib.Split.TRAIN], parts[lib.Split.VALIDATION]
    assert sorted(train + held_out) == sorted(parts[lib.Split.ALL])
    assert 45 < len(held_out) < 105
    assert held_out[:3] == ["document 2", "document 6", "document 17"]  # the same everywhere


def test_separate_validation_paths(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ["a", "b", "c"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["x"])
    made = config(train, validation_paths=(str(held_out),))
    assert texts_of(lib.open_source(made, lib.Split.TRAIN)) == ["a", "b", "c"]
    assert texts_of(lib.open_source(made, lib.Split.VALIDATION)) == ["x"]
    assert texts_of(lib.open_source(made, lib.Split.ALL)) == ["a", "b", "c", "x"]


def test_max_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 10] * 20)
    limits = {10: 1, 5: 1, 35: 3, 200: 20, 1000: 20}
    for limit, number in limits.items():
        assert len(lib.open_source(config(path, max_bytes=limit), lib.Split.ALL)) == number


def test_standard_library():
    everything = lib.StandardLibrarySource()
    assert len(everything) > 300
    assert "dataclasses.py" in everything.names and "json/decoder.py" in everything.names
    assert list(everything.names) == sorted(everything.names)
    banned = ("site-packages", "test", "tests", "idle_test", "__pycache__", "encodings")
    assert not any(part in banned for name in everything.names for part in name.split("/"))
    json_file = everything[everything.names.index("json/decoder.py")]
    assert b"JSONDecoder" in json_file.text
    train = lib.StandardLibrarySource(lib.Split.TRAIN)
    held_out = lib.StandardLibrarySource(lib.Split.VALIDATION)
    assert not set(train.names) & set(held_out.names)
    assert set(train.names) | set(held_out.names) == set(everything.names)
    assert 0.05 < len(held_out) / len(everything) < 0.16
    small = lib.StandardLibrarySource(lib.Split.TRAIN, max_bytes=150_000)
    total = sum(len(small[i].text) for i in range(len(small)))
    assert 100_000 < total <= 150_000
    assert set(small.names) < set(train.names)


def test_concatenated_source():
    source = lib.ConcatenatedSource(
        [lib.InMemorySource(["a", "b"]), lib.InMemorySource([]), lib.InMemorySource([b"c"])]
    )
    assert texts_of(source) == ["a", "b", "c"]
    assert len(source) == 3
    with pytest.raises(IndexError, match="document 3 of a source of 3"):
        source[3]


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        lib.open_source(config(tmp_path / "nothing.txt"))
    with pytest.raises(FileNotFoundError, match="matches no file"):
        lib.open_source(config(tmp_path / "*.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv has an unknown suffix; allowed are \.txt"):
        lib.open_source(config(tmp_path / "a.csv"))
    (tmp_path / "a.txt").write_text("x")
    jsonl = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="mix the suffixes"):
        lib.open_source(config(tmp_path / "a.txt", jsonl))


def test_empty_sources_and_splits(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"split ALL of .* holds no document"):
        lib.open_source(config(tmp_path / "a.txt"), lib.Split.ALL)
    (tmp_path / "a.txt").write_text("one document")
    found = []
    for split in (lib.Split.TRAIN, lib.Split.VALIDATION):
        try:
            found.append(texts_of(lib.open_source(config(tmp_path / "a.txt"), split)))
        except ValueError as error:
            assert "separator or document_bytes" in str(error)
    assert found == [["one document"]]
    with pytest.raises(ValueError, match="sources is empty"):
        lib.open_sources((), lib.Split.ALL)


def test_misspelt_split_names_what_is_allowed():
    with pytest.raises((ValueError, TypeError), match="split"):
        lib.open_source(lib.SourceConfig(), "trian")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": lib.SourceKind.FILES}, "needs at least one file"),
        ({"paths": ("a.txt",)}, "not read by kind STDLIB"),
        ({"kind": lib.SourceKind.FILES, "paths": ("",)}, "non-empty strings"),
        ({"field": ""}, "field is ''"),
        ({"max_bytes": -1}, "max_bytes is -1"),
        ({"document_bytes": -1}, "document_bytes is -1"),
        ({"document_bytes": 2}, "at least 4"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": float("nan")}, "weight is nan"),
    ],
)
def test_bad_source_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        lib.SourceConfig(**changes)


def test_hash_fractions_are_even():
    fractions = [lib._hash_fraction(str(i)) for i in range(2000)]
    counts, _ = np.histogram(fractions, bins=10, range=(0, 1))
    assert counts.min() > 150
