"""Synthetic corpora are pure functions of their seed and have the stated structure."""

import pytest

from blt_jax.data import synthetic


def test_repeated_documents():
    documents = synthetic.repeated_documents(5, 3, length=20, seed=1)
    assert documents == synthetic.repeated_documents(5, 3, length=20, seed=1)
    assert documents != synthetic.repeated_documents(5, 3, length=20, seed=2)
    assert len(documents) == 15
    assert all(len(set(documents[i : i + 3])) == 1 for i in range(0, 15, 3))
    assert len(set(documents)) == 5
    assert set(b"".join(documents)) <= set(synthetic.LETTERS.encode())


def test_lookup_documents():
    lookups = synthetic.lookup_documents(20, 12, seed=3, key_length=1, value_length=2)
    assert lookups == synthetic.lookup_documents(20, 12, seed=3, key_length=1, value_length=2)
    for lookup in lookups:
        *lines, question = lookup.text.decode().split("\n")
        table = dict(line.split("=") for line in lines)
        assert len(table) == len(lines) == 12
        key, answer = question.removeprefix("?").split("=")
        assert table[key] == answer == lookup.answer.decode()
        assert lines[round(lookup.depth * 11)] == f"{key}={answer}"
    assert len({lookup.depth for lookup in lookups}) > 3


@pytest.mark.parametrize(("depth", "line"), [(0.0, 0), (0.5, 5), (1.0, 10)])
def test_lookup_depth(depth, line):
    lookup = synthetic.lookup_document(11, seed=0, depth=depth)
    lines = lookup.text.decode().split("\n")
    assert lines[-1] == "?" + lines[line]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.random_text(-1, seed=0), "length is -1"),
        (lambda: synthetic.random_text(1, seed=0, alphabet="ü"), "ASCII"),
        (lambda: synthetic.repeated_documents(0, 1), "num_texts is 0"),
        (lambda: synthetic.lookup_document(27, seed=0, key_length=1), "at most 26"),
        (lambda: synthetic.lookup_document(3, seed=0, depth=2.0), "depth is 2.0"),
        (lambda: synthetic.lookup_documents(0, 3), "count is 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_recall_rows():
    batch = synthetic.recall_rows(6, 5, length=9, seed=(1, 2))
    again = synthetic.recall_rows(6, 5, length=9, seed=(1, 2))
    assert all((batch[name] == again[name]).all() for name in batch)
    tokens, asked = batch["tokens"], batch["target_mask"]
    assert (asked.sum(1) == 1).all() and asked[:, 6].all()
    assert (batch["targets"][:, 6] == tokens[:, 0]).all()
    assert ((tokens[:, 1:6] >= 8) & (tokens[:, 1:6] < 16)).all()
    assert (tokens[:, 6] == synthetic.RECALL_VOCABULARY - 1).all()
    assert (batch["segment_ids"].sum(1) == 7).all() and (tokens[:, 7:] == 0).all()
    with pytest.raises(ValueError, match="length is 6; it must be at least 7"):
        synthetic.recall_rows(1, 5, length=6, seed=0)
