"""Exact resume, shuffling, sharding, finite passes, mixtures, bad configurations."""

import collections
import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from blt_jax.data import loader as loader_lib
from blt_jax.data import packing
from blt_jax.data.sources import ConcatenatedSource, InMemorySource, SourceConfig, Split
from blt_jax.data.tokenizers import ByteTokenizer
from blt_jax.train.checkpoint import unite_states

SIZES = (3, 50, 0, 17, 8, 90, 5, 1, 33, 21, 2)
TEXTS = tuple(bytes([65 + i]) * n for i, n in enumerate(SIZES))


def starts_of(index, ids):
    positions = np.arange(len(ids))
    return (positions < 2) | (positions % (2 + index % 3) == 0)


def make(texts=TEXTS, patcher=None, rows=None, parts=None, **changes):
    settings = {"batch_size": 4, "sequence_length": 16, "seed": 3}
    settings |= {"num_threads": 0, "prefetch": 0, "shuffle_rows": 0}
    config = loader_lib.DataConfig(**{**settings, **changes})
    return loader_lib.loader(
        config,
        tokenizer=ByteTokenizer(),
        patcher=patcher,
        rows=rows,
        documents=ConcatenatedSource(parts or [InMemorySource(texts)]),
    )


def take(dataset, number):
    return list(itertools.islice(iter(dataset), number))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("rows", [None, [1, 3]])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_shuffled_rows_resume_exactly(num_shards, rows, prefetch):
    dataset = make(
        rows=rows, num_shards=num_shards, prefetch=prefetch, shuffle_rows=12, batch_size=4
    )
    iterator, states, batches = iter(dataset), [], []
    for _ in range(14):  # several windows
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for at in (0, 1, 2, 3, 4, 7, 11):
        resumed = iter(dataset)
        resumed.set_state(states[at])
        assert_same(list(itertools.islice(resumed, 3)), batches[at : at + 3])
    iterator.close()


def test_shuffled_rows_are_the_packed_rows_in_another_order():
    texts = [bytes([65 + i]) * 160 for i in range(6)]  # ten rows each
    plain = take(make(texts), 12)
    mixed = take(make(texts, shuffle_rows=48), 12)

    def rows(batches):
        return [tuple(row) for batch in batches for row in batch["tokens"]]

    assert sorted(rows(mixed)) == sorted(rows(plain)) and rows(mixed) != rows(plain)
    sources_per_batch = [len({max(row) for row in batch["tokens"]}) for batch in mixed]
    assert (
        np.mean(sources_per_batch)
        > 2
        > np.mean([len({max(row) for row in batch["tokens"]}) for batch in plain])
    )
    assert rows(take(make(texts, shuffle_rows=48, repeat=False), 12)) == rows(
        take(make(texts, repeat=False), 12)
    )


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("max_patches", [0, 5])
@pytest.mark.parametrize("mode", list(packing.Packing))
def test_resume_is_exact_at_every_batch(mode, max_patches, prefetch):
    dataset = make(
        patcher=starts_of,
        packing=mode,
        max_patches=max_patches,
        prefetch=prefetch,
        num_threads=prefetch,
        batch_size=2,
        sequence_length=9,
    )
    total = 60  # several epochs
    iterator, states, batches = iter(dataset), [], []
    for _ in range(total):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    assert any(state["offset"] for state in states)
    for at in (0, 1, 2, 3, 7, 20, 21, 22, 41, 57):
        resumed = iter(dataset)
        resumed.set_state(states[at])
        assert resumed.get_state() == states[at]
        assert_same(list(itertools.islice(resumed, 3)), batches[at : at + 3])
    # In place, backwards, also from another position.
    iterator.set_state(states[5])
    assert_same([next(iterator) for _ in range(4)], batches[5:9])
    final = packing.statistics_from_state(states[-1])
    assert final.rows == 2 * (total - 1)
    iterator.close()


def test_finite_pass_resumes_and_ends():
    dataset = make(repeat=False, shuffle=False, prefetch=2)
    everything = list(dataset)
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    resumed = iter(dataset)
    resumed.set_state(state)
    assert_same(list(resumed), everything[3:])
    with pytest.raises(StopIteration):
        next(resumed)


def test_state_of_another_layout_is_refused():
    iterator = iter(make())
    next(iterator)
    state = iterator.get_state()
    with pytest.raises(ValueError, match="number of shards"):
        iter(make(batch_size=8)).set_state(state)
    with pytest.raises(ValueError, match="row length"):
        iter(make(sequence_length=8)).set_state(state)


def test_changed_data_is_noticed_on_resume():
    iterator = iter(make(texts=[b"a" * 100], batch_size=1))
    next(iterator)
    changed = iter(make(texts=[b"a" * 90], batch_size=1))
    with pytest.raises(ValueError, match="have changed"):
        changed.set_state(iterator.get_state())


def shares(num_rows, count):
    """The rows of each of `count` processes that share a batch."""
    size = num_rows // count
    return [range(i * size, (i + 1) * size) for i in range(count)]


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_batches(num_shards):
    kwargs = {"num_shards": num_shards, "patcher": starts_of, "shuffle_rows": 6}
    whole = take(make(**kwargs), 36)
    state, found = None, []
    for count, steps in ((1, 7), (2, 9), (4, 5), (1, 9), (2, 6)):
        iterators = [iter(make(**kwargs, rows=rows)) for rows in shares(4, count)]
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        for _ in range(steps):
            found.append(joined([next(iterator) for iterator in iterators]))
        state = unite_states([iterator.get_state() for iterator in iterators])
        read = [packing.statistics_from_state(i.get_state()).rows for i in iterators]
        assert len(set(read)) == 1  # all of the rows, or those of as many shards each
    assert_same(found, whole)
    assert 4 * 36 - packing.statistics_from_state(state).rows <= 6 * num_shards  # last windows


def test_a_process_packs_only_the_shards_of_its_rows():
    iterator = iter(make(num_shards=4, batch_size=8, rows=[2, 3, 5]))
    assert list(iterator.get_state()[packing.SHARDS]) == ["1", "2"]
    whole = next(iter(make(num_shards=4, batch_size=8)))
    assert_same([next(iterator)], [{name: v[[2, 3, 5]] for name, v in whole.items()}])


def test_states_of_processes_that_disagree_are_refused():
    assert unite_states([{"a": {"x": 1}}, {"a": {"y": 2}}]) == {"a": {"x": 1, "y": 2}}
    with pytest.raises(ValueError, match="must go through the same batches"):
        unite_states([{"a": 1, "b": 2}, {"a": 3}])


def documents_in(batches):
    """How often each document's letter opens a document (follows a BOS)."""
    found = collections.Counter()
    for batch in batches:
        opened = (batch["tokens"] == 1) & batch["target_mask"] & (batch["targets"] != 2)
        found.update((batch["targets"][opened] - 4).tolist())
    return found


def test_epochs_are_shuffled_anew_from_the_seed_alone():
    texts = [bytes([65 + i]) for i in range(16)]
    kwargs = {"texts": texts, "batch_size": 1, "sequence_length": 2}
    kwargs["packing"] = packing.Packing.ONE_DOCUMENT
    letters = [int(batch["targets"][0, 0]) for batch in take(make(**kwargs), 48)]
    epochs = [letters[:16], letters[16:32], letters[32:]]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = [int(batch["targets"][0, 0]) for batch in take(make(**kwargs), 48)]
    assert letters == again
    other = [int(b["targets"][0, 0]) for b in take(make(**{**kwargs, "seed": 4}), 48)]
    assert other[:16] not in epochs  # seeds do not coincide with one another's epochs
    plain = [int(b["targets"][0, 0]) for b in take(make(**kwargs, shuffle=False), 16)]
    assert plain == [69 + i for i in range(16)]


@pytest.mark.parametrize("count", [2, 3])
def test_shards_share_every_epoch(count):
    texts = [bytes([65 + i]) for i in range(10)]
    kwargs = {"texts": texts, "batch_size": 6, "sequence_length": 2, "num_shards": count}
    kwargs["packing"] = packing.Packing.ONE_DOCUMENT
    steps = 10 * count  # 6 * 10 * count rows: 6 * count epochs of ten documents
    total = collections.Counter()
    for rows in shares(6, count):
        total += documents_in(take(make(**kwargs, rows=rows), steps))
    assert total == {65 + i: 6 * count for i in range(10)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("mode", list(packing.Packing))
def test_finite_pass_drops_nothing_on_any_number_of_processes(mode, count):
    kwargs = {"repeat": False, "shuffle": False, "packing": mode, "patcher": starts_of}
    whole = list(make(**kwargs, max_patches=6, num_shards=count))
    parts = [list(make(**kwargs, max_patches=6, rows=rows)) for rows in shares(4, count)]
    assert {len(part) for part in parts} == {len(whole)}  # processes stay in step
    assert_same([joined(batches) for batches in zip(*parts, strict=True)], whole)
    assert all(batch["tokens"].shape == (4, 16) for batch in whole)
    assert sum(int(batch["target_bytes"].sum()) for batch in whole) == sum(SIZES)
    assert sum(int(batch["target_mask"].sum()) for batch in whole) == sum(SIZES) + len(SIZES)


def test_sources_are_mixed_by_weight():
    parts = [InMemorySource([b"a"] * 7), InMemorySource([b"b"] * 5)]
    sources = (SourceConfig(weight=3.0), SourceConfig(weight=1.0))
    kwargs = {"parts": parts, "sources": sources, "batch_size": 4, "sequence_length": 2}
    kwargs["packing"] = packing.Packing.ONE_DOCUMENT
    found = documents_in(take(make(**kwargs), 50))
    assert found == {ord("a"): 150, ord("b"): 50}
    assert documents_in(take(make(**kwargs, num_shards=2), 50)) == found
    once = documents_in(list(make(**kwargs, repeat=False)))
    assert once == {ord("a"): 7, ord("b"): 5}


def test_patchers_are_given_the_index_over_all_sources():
    parts = [InMemorySource([b"a", b"bb"]), InMemorySource([b"ccc"])]
    sources = (SourceConfig(), SourceConfig())
    seen = {}

    def patcher(index, ids):
        seen[index] = ByteTokenizer().decode(ids)
        return np.ones(len(ids), bool)

    documents = ConcatenatedSource(parts)
    list(make(parts=parts, sources=sources, repeat=False, patcher=patcher))
    assert seen == {i: documents[i].text for i in range(3)}


def test_default_config_reads_the_standard_library():
    config = loader_lib.DataConfig(
        sources=(SourceConfig(max_bytes=100_000),), batch_size=2, sequence_length=64
    )
    iterator = iter(loader_lib.loader(config))
    batch = next(iterator)
    assert batch["tokens"].shape == (2, 64)
    assert batch["target_mask"].any()
    iterator.close()
    evaluation = loader_lib.evaluation_config(config)
    assert (evaluation.split, evaluation.shuffle, evaluation.repeat) == (
        Split.VALIDATION,
        False,
        False,
    )
    documents = loader_lib.open_documents(evaluation)
    held_out = sum(len(documents[i].text) for i in range(len(documents)))
    rows = loader_lib.loader(evaluation)
    assert sum(int(batch["target_bytes"].sum()) for batch in rows) == held_out


def test_an_open_iterator_does_not_trouble_the_end_of_the_program():
    program = (
        "from blt_jax.data import loader as lib\n"
        "config = lib.DataConfig(sources=(lib.SourceConfig(max_bytes=50_000),))\n"
        "iterator = iter(lib.loader(config))\n"
        "print(next(iterator)['tokens'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "(8, 256)"
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_shards": 0}, "num_shards is 0"),
        ({"num_shards": 3}, "must be divisible by num_shards 3"),
        ({"sequence_length": -1}, "sequence_length is -1"),
        ({"max_patches": -2}, "max_patches is -2"),
        ({"seed": -1}, "seed is -1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"sources": ()}, "sources is"),
        (
            {"repeat": False, "long_documents": packing.LongDocuments.TRUNCATE},
            "drops nothing",
        ),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        loader_lib.DataConfig(**changes)


@pytest.mark.parametrize("rows", [[], [1, 0], [0, 0], [-1], [3, 4]])
def test_bad_rows(rows):
    with pytest.raises(ValueError, match=r"they must increase, within 0\.\.3"):
        make(rows=rows)


def test_config_is_hashable_and_its_check_can_run_again():
    config = loader_lib.DataConfig()
    config.__post_init__()
    assert hash(config) == hash(dataclasses.replace(config))
