"""Synthetic corpora are pure functions of their seed and have the stated structure."""

import numpy as np
import pytest

from blt_jax.data import synthetic
from blt_jax.data.loader import DataConfig, evaluation_config


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


def bigrams():
    return synthetic.byte_bigrams([b"abcabcabdabc" * 9, b"cab"], 4)


def test_byte_bigrams():
    found = bigrams()
    np.testing.assert_allclose(found.transitions.sum(1), 1.0)
    np.testing.assert_allclose(found.start.sum(), 1.0)
    a, b, c, d = range(4)
    assert found.transitions[a, b] > 0.99 and found.transitions[d, a] > 0.99
    np.testing.assert_allclose(found.transitions[b, c] / found.transitions[b, d], 3, rtol=0.01)
    with pytest.raises(ValueError, match="num_symbols is 5; the texts have 4"):
        synthetic.byte_bigrams([b"abcd" * 2], 5)


@pytest.mark.parametrize("bos", [False, True])
def test_backcopy_rows(bos):
    task = dict(length=50, bigrams=bigrams(), triggers=(2,), bos=bos)
    batch = synthetic.backcopy_rows(range(5), (1, 2), **task)
    tokens, copies = batch["tokens"], batch["follows_trigger"]
    np.testing.assert_array_equal(batch["targets"][:, :-1], tokens[:, 1:])
    assert (tokens[:, 0] == 0).all() == bos and tokens[:, 1:].min() >= 1
    ids = np.concatenate([tokens, batch["targets"][:, -1:]], axis=1)
    assert copies.any() and not copies.all()
    for row, t in np.argwhere(copies):
        assert ids[row, t] == 2 and ids[row, t + 1] == ids[row, t - 1]
    np.testing.assert_array_equal(copies[:, 1:], (tokens == 2)[:, 1:])
    alone = synthetic.backcopy_rows([3], (1, 2), **task)
    np.testing.assert_array_equal(alone["tokens"][0], tokens[3])
    with pytest.raises(ValueError, match=r"triggers are \(5,\)"):
        synthetic.backcopy_rows([0], (1,), **{**task, "triggers": (5,)})


@pytest.mark.parametrize("distance", [-1, 0, 3])
def test_key_value_rows(distance):
    sizes = dict(lines=12, num_symbols=16, distance=distance)
    batch = synthetic.key_value_rows(range(4), (7,), **sizes)
    assert batch["tokens"].shape == (4, 96)
    for ids, targets, mask in zip(
        batch["tokens"], batch["targets"], batch["target_mask"], strict=True
    ):
        events = ids.reshape(12, 2, 4)
        lines, questions = events[:, 0], events[:, 1]
        assert (lines[:, 0] == 0).all() and (questions[:, 0] == 1).all()
        assert (events[:, :, 1:] >= 2).all() and (events < 18).all()
        for number, (_, key, *value) in enumerate(questions):
            earlier = [i for i in range(number + 1) if lines[i, 1] == key]
            assert lines[earlier[-1], 2:].tolist() == value
            if distance >= 0 and number >= distance:
                assert number - earlier[-1] == distance
            assert len(set(lines[max(number - 8, 0) : number + 1, 1])) == min(number + 1, 9)
        counted = targets[mask].reshape(-1, 2)
        assert (counted == questions[max(distance, 0) :, 2:]).all()
    with pytest.raises(ValueError, match="num_symbols is 4; it must be at least 8"):
        synthetic.key_value_rows([0], (7,), lines=9, num_symbols=4, distance=3)


def test_generated_batches_go_on_and_differ_between_splits():
    def make(numbers, seed):
        return {"ids": np.asarray(numbers), "seed": np.asarray(seed)}

    config = DataConfig(batch_size=3, seed=5)
    batches = synthetic.GeneratedBatches(config, make)
    next(batches)
    state = batches.get_state()
    assert next(batches)["ids"].tolist() == [3, 4, 5]
    batches.set_state(state)
    batch = next(batches)
    assert batch["ids"].tolist() == [3, 4, 5] and batch["seed"].tolist() == [5, 1]
    held_out = synthetic.GeneratedBatches(evaluation_config(config), make)
    assert next(held_out)["seed"].tolist() == [5, 0]
    own = synthetic.GeneratedBatches(config, make, rows=(0, 2))
    next(own)
    assert next(own)["ids"].tolist() == [3, 5]
    again = synthetic.GeneratedBatches(config, make, distinct=4)
    assert [next(again)["ids"].tolist() for _ in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
