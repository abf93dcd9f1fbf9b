"""Exact resume, shuffling, host sharding, finite passes, mixtures, bad configurations."""

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

SIZES = (3, 50, 0, 17, 8, 90, 5, 1, 33, 21, 2)
TEXTS = tuple(bytes([65 + i]) * n for i, n in enumerate(SIZES))


def starts_of(index, ids):
    positions = np.arange(len(ids))
    return (positions < 2) | (positions % (2 + index % 3) == 0)


def make(texts=TEXTS, patcher=None, process=(0, 1), parts=None, **changes):
    settings = {"batch_size": 4, "sequence_length": 16, "seed": 3}
    settings |= {"num_threads": 0, "prefetch": 0, "shuffle_rows": 0}
    config = loader_lib.DataConfig(**{**settings, **changes})
    return loader_lib.loader(
        config,
        tokenizer=ByteTokenizer(),
        patcher=patcher,
        process_index=process[0],
        process_count=process[1],
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
@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
@pytest.mark.parametrize("sharding", list(loader_lib.HostSharding))
def test_shuffled_rows_resume_exactly(sharding, process, prefetch):
    dataset = make(
        process=process, host_sharding=sharding, prefetch=prefetch, shuffle_rows=12, batch_size=4
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
    with pytest.raises(ValueError, match="process count"):
        iter(make(process=(0, 2))).set_state(state)
    with pytest.raises(ValueError, match="row length"):
        iter(make(sequence_length=8)).set_state(state)


def test_changed_data_is_noticed_on_resume():
    iterator = iter(make(texts=[b"a" * 100], batch_size=1))
    next(iterator)
    changed = iter(make(texts=[b"a" * 90], batch_size=1))
    with pytest.raises(ValueError, match="have changed"):
        changed.set_state(iterator.get_state())


def test_shared_rows_resume_with_any_process_count():
    kwargs = {"host_sharding": loader_lib.HostSharding.ROWS, "patcher": starts_of}
    whole = take(make(**kwargs), 30)
    state, found = None, []
    for count, steps in ((1, 7), (2, 9), (4, 5), (1, 9)):
        iterators = [iter(make(**kwargs, process=(i, count))) for i in range(count)]
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        for _ in range(steps):
            parts = [next(iterator) for iterator in iterators]
            found.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        states = [iterator.get_state() for iterator in iterators]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert_same(found, whole)


def test_mixtures_resume_on_their_own_process():
    parts = [InMemorySource(TEXTS[:6]), InMemorySource(TEXTS[6:])]
    sources = (SourceConfig(weight=0.7), SourceConfig(weight=0.3))
    for index in range(2):
        dataset = make(parts=parts, sources=sources, process=(index, 2), prefetch=1)
        iterator, states, batches = iter(dataset), [], []
        for _ in range(25):
            states.append(iterator.get_state())
            batches.append(next(iterator))
        for at in (1, 8, 21):
            resumed = iter(dataset)
            resumed.set_state(states[at])
            assert_same(list(itertools.islice(resumed, 4)), batches[at : at + 4])
            resumed.close()
        iterator.close()


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
def test_processes_share_every_epoch(count):
    texts = [bytes([65 + i]) for i in range(10)]
    kwargs = {"texts": texts, "batch_size": 6, "sequence_length": 2}
    kwargs["packing"] = packing.Packing.ONE_DOCUMENT
    steps = 10 * count  # 6 * 10 * count rows: 6 * count epochs of ten documents
    total = collections.Counter()
    for index in range(count):
        batches = take(make(**kwargs, process=(index, count)), steps)
        assert batches[0]["tokens"].shape == (6 // count, 2)
        total += documents_in(batches)
    assert total == {65 + i: 6 * count for i in range(10)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("mode", list(packing.Packing))
def test_finite_pass_drops_nothing_on_any_number_of_processes(mode, count):
    kwargs = {"repeat": False, "shuffle": False, "packing": mode, "patcher": starts_of}
    whole = list(make(**kwargs, max_patches=6))
    shares = [list(make(**kwargs, max_patches=6, process=(i, count))) for i in range(count)]
    assert {len(share) for share in shares} == {len(whole)}  # processes stay in step
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)
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
    halves = sum((documents_in(take(make(**kwargs, process=(i, 2)), 50)) for i in (0, 1)), found)
    assert halves == {ord("a"): 300, ord("b"): 100}
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


def test_bad_process_arguments():
    with pytest.raises(ValueError, match="process_index is 2"):
        make(process=(2, 2))
    with pytest.raises(ValueError, match="not divisible by 3"):
        make(process=(0, 3))


def test_config_is_hashable_and_its_check_can_run_again():
    config = loader_lib.DataConfig()
    config.__post_init__()
    assert hash(config) == hash(dataclasses.replace(config))
