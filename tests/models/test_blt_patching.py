"""Patchers: closed forms, causality, incremental form, lengths, calibration, n-gram entropies."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_jax.models import blt_patching as bp
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

TEXT = "Hello, wide world: naïve  99 bottles\n--end"
CAUSAL = (
    PatcherConfig(kind=PatcherKind.GLOBAL, threshold=1.0),
    PatcherConfig(kind=PatcherKind.GLOBAL, threshold=1.0, max_patch_length=3),
    PatcherConfig(kind=PatcherKind.MONOTONIC, relative_threshold=0.2),
    PatcherConfig(kind=PatcherKind.MONOTONIC, relative_threshold=0.2, force_third_start=True),
    PatcherConfig(kind=PatcherKind.BOTH, threshold=0.5, relative_threshold=0.1),
    PatcherConfig(
        kind=PatcherKind.BOTH,
        threshold=0.5,
        relative_threshold=0.1,
        force_third_start=True,
        forbid_fourth_start=True,
        max_patch_length=4,
    ),
    PatcherConfig(kind=PatcherKind.STRIDED, stride=3),
    PatcherConfig(kind=PatcherKind.STRIDED, stride=5, max_patch_length=2),
    PatcherConfig(kind=PatcherKind.SPACE),
    PatcherConfig(kind=PatcherKind.BPE),
    PatcherConfig(kind=PatcherKind.BPE_PATCHER),
    PatcherConfig(kind=PatcherKind.BYTE),
)


def encode(text: str) -> np.ndarray:
    return np.array([bp.BOS, *(b + 4 for b in text.encode()), bp.EOS], np.int32)


def pieces(text: str, starts) -> list[bytes]:
    """Text of the patches over BOS + text + EOS, BOS as ^ and EOS as $."""
    tokens, result = encode(text), []
    for token, start in zip(tokens.tolist(), np.asarray(starts).tolist(), strict=True):
        if start:
            result.append(b"")
        result[-1] += {bp.BOS: b"^", bp.EOS: b"$"}.get(token) or bytes([token - 4])
    return result


def inputs_for(config: PatcherConfig, tokens: np.ndarray, seed: int = 0) -> dict:
    """Entropies and predictions that depend on nothing but position and seed, [B, N]."""
    random = np.random.default_rng(seed)
    values = random.random(tokens.shape).astype(np.float32) * 2
    predictions = random.integers(2, 6, tokens.shape).astype(np.int32)
    if config.needs_entropies:
        return {"entropies": jnp.asarray(values)}
    if config.kind is PatcherKind.BPE_PATCHER:
        return {"predictions": jnp.asarray(predictions)}
    return {}


def test_space_patches():
    config = PatcherConfig(kind=PatcherKind.SPACE)
    found = pieces(TEXT, config.document_starts(encode(TEXT)))
    # The lead byte of ï is space-like, its continuation is not; of "  " the first space closes.
    lead, rest = "ï".encode()[:1], "ï".encode()[1:]
    words = [b"^", b"Hello,", b" wide ", b"world:", b" na" + lead, rest + b"ve ", b" 99 "]
    assert found == [*words, b"bottles\n", b"--end$"]


def test_strided_counts_from_the_second_token():
    starts = bp.strided_starts(1, 10, 4)
    assert np.flatnonzero(np.asarray(starts)[0]).tolist() == [0, 1, 5, 9]


def test_entropy_rules_by_hand():
    H = jnp.array([[9.0, 0.5, 2.0, 2.1, 0.1, 3.0]])
    found = {
        "global": bp.global_starts(H, 1.0),
        "strict": bp.global_starts(H, 2.0),
        "monotonic": bp.monotonic_starts(H, 0.5),
        "both": bp.both_starts(H, 2.5, 0.5),
        "third": bp.monotonic_starts(H, 0.5, force_third_start=True),
        "fourth": bp.both_starts(H, 1.0, 0.5, force_third_start=True, forbid_fourth_start=True),
    }
    expected = {
        "global": [0, 1, 3, 4, 6],
        "strict": [0, 1, 4, 6],
        "monotonic": [0, 1, 3, 6],
        "both": [0, 1, 6],
        "third": [0, 1, 2, 3, 6],
        "fourth": [0, 1, 2, 6],
    }
    assert {name: np.flatnonzero(s[0]).tolist() for name, s in found.items()} == expected


def test_delimiters():
    tokens = jnp.array([[1, 50, 51, 3, 52, 3, 53]], jnp.int32)
    assert np.flatnonzero(bp.bpe_starts(tokens)[0]).tolist() == [0, 1, 4, 6]
    assert np.flatnonzero(bp.bpe_patcher_starts(tokens)[0]).tolist() == [0, 1, 4, 6]


def test_topk_is_not_causal():
    H = jnp.asarray(np.random.default_rng(0).random((1, 24)).astype(np.float32))
    starts = bp.topk_starts(H, 4)
    assert int(starts.sum()) == 2 + 24 // 4 - 2
    config = PatcherConfig(kind=PatcherKind.TOPK, target_patch_size=4.0)
    np.testing.assert_array_equal(config.starts(jnp.zeros((1, 24), jnp.int32), entropies=H), starts)
    moved = bp.topk_starts(H.at[0, -1].set(9.0).at[0, -2].set(9.0), 4)
    assert (np.asarray(moved)[0, :23] != np.asarray(starts)[0, :23]).any()
    with pytest.raises(ValueError, match="not causal"):
        step = jnp.zeros(1, jnp.int32)
        config.next_start(
            token=step,
            previous_token=step,
            position=step,
            patch_length=step,
            entropy=H[:, 0],
            previous_entropy=H[:, 0],
        )


def test_max_patch_length():
    starts = jnp.zeros((1, 12), bool).at[0, jnp.array([0, 1, 9])].set(True)
    limited = bp.limit_patch_length(starts, 3)
    assert np.asarray(bp.to_lengths(limited, 8))[0].tolist() == [1, 3, 3, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("config", CAUSAL, ids=str)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 23))
def test_incremental_property(config, seed, cut):
    """f(x_<i) = f(x)_<i: what comes later moves no boundary."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 260, (2, 24)).astype(np.int32)
    inputs = inputs_for(config, tokens, seed)
    whole = config.starts(jnp.asarray(tokens), **inputs)
    changed = {name: x.at[:, cut:].set(x[:, cut:][:, ::-1] + 1) for name, x in inputs.items()}
    tokens[:, cut:] = random.integers(0, 260, (2, 24 - cut))
    other = config.starts(jnp.asarray(tokens), **changed)
    np.testing.assert_array_equal(whole[:, : cut + 1], other[:, : cut + 1])


@pytest.mark.parametrize("config", CAUSAL, ids=str)
def test_next_start_gives_the_same_patches(config):
    random = np.random.default_rng(1)
    tokens = random.integers(0, 130, (3, 30)).astype(np.int32)
    inputs = inputs_for(config, tokens)
    whole = np.asarray(config.starts(jnp.asarray(tokens), **inputs))
    H = inputs.get("entropies")
    length = np.zeros(3, np.int32)
    for t in range(30):
        length = np.where(whole[:, t], 1, length + 1)
        step = {
            "token": jnp.asarray(tokens[:, t]),
            "previous_token": jnp.asarray(tokens[:, max(t - 1, 0)]),
            "position": jnp.full(3, t, jnp.int32),
            "patch_length": jnp.asarray(length, jnp.int32),
        }
        if H is not None:
            step |= {"entropy": H[:, t], "previous_entropy": H[:, max(t - 1, 0)]}
        if "predictions" in inputs:
            step["prediction"] = inputs["predictions"][:, t]
        np.testing.assert_array_equal(config.next_start(**step), whole[:, t + 1])


@pytest.mark.parametrize("config", CAUSAL, ids=str)
def test_packed_rows_patch_as_separate_documents(config):
    random = np.random.default_rng(2)
    sizes = (7, 1, 12, 2)
    documents = [random.integers(0, 260, n).astype(np.int32) for n in sizes]
    rows = [inputs_for(config, d[None], seed) for seed, d in enumerate(documents)]
    alone = []
    for document, row in zip(documents, rows, strict=True):
        values = {name: np.asarray(x)[0] for name, x in row.items()}
        alone.append(config.document_starts(document, **values))
    padding = 4
    tokens = np.concatenate([*documents, np.zeros(padding, np.int32)])[None, :-1]
    packed = {}
    for name, first in rows[0].items():
        values = [*(row[name][0] for row in rows), jnp.zeros(padding, first.dtype)]
        packed[name] = jnp.concatenate(values)[None, :-1]
    segments = np.concatenate([np.repeat(np.arange(4) + 1, sizes), np.zeros(padding)])[None]
    starts = config.starts(jnp.asarray(tokens), jnp.asarray(segments.astype(np.int32)), **packed)
    expected = np.concatenate([*alone, np.zeros(padding, bool)])
    np.testing.assert_array_equal(starts[0], expected)
    # First and second token of every document, whatever the rule.
    firsts = np.cumsum((0, *sizes))[:-1]
    assert expected[firsts].all()
    assert all(expected[f + 1] for f, n in zip(firsts, sizes, strict=True) if n > 1)


def test_ids():
    starts = jnp.array([[True, True, False, True, False, False, True]])
    segments = jnp.array([[1, 1, 1, 1, 1, 0]], jnp.int32)
    assert bp.patch_ids(starts).tolist() == [[0, 1, 1, 2, 2, 2, 3]]
    assert bp.encoder_ids(starts).tolist() == [[0, 1, 1, 2, 2, 2]]
    # The last byte of a patch sees its own patch, the others the one before.
    assert bp.decoder_ids(starts).tolist() == [[0, 0, 1, 1, 1, 2]]
    assert bp.encoder_ids(starts, segments).tolist() == [[0, 1, 1, 2, 2, -1]]
    assert bp.decoder_ids(starts, segments).tolist() == [[0, 0, 1, 1, 1, -1]]


def test_lengths_round_trip_and_overflow():
    starts = np.random.default_rng(0).random((4, 20)) < 0.4
    starts[:, :2] = True
    lengths = bp.to_lengths(jnp.asarray(starts), 20)
    assert (np.asarray(lengths).sum(1) == 20).all()
    np.testing.assert_array_equal(bp.from_lengths(np.asarray(lengths), 20), starts)
    np.testing.assert_array_equal(bp.to_lengths(jnp.asarray(starts), 3), lengths[:, :3])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[1, 3, 2]], "sums to 6: must be 7"),
        ([[1, 0, 6]], "zero before its last patch"),
        ([[2, 3, 2]], "first patch must be exactly one token"),
        ([[0, 1, 6]], "zero before"),
        ([[1, -1, 7]], "negative"),
        ([[1.0, 6.0]], "must be integers"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        bp.from_lengths(np.array(lengths), 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "threshold=0.0: GLOBAL needs"),
        ({"threshold": -1.0}, "threshold=-1.0: must be >= 0"),
        ({"kind": PatcherKind.MONOTONIC}, "relative_threshold=0.0: MONOTONIC needs"),
        ({"kind": PatcherKind.BOTH, "threshold": 1.0}, "relative_threshold=0.0: BOTH needs"),
        ({"kind": PatcherKind.STRIDED, "stride": 0}, "stride=0: must be >= 1"),
        ({"kind": PatcherKind.BYTE, "max_patch_length": -1}, "max_patch_length=-1"),
        ({"kind": PatcherKind.TOPK}, "target_patch_size=0.0: TOPK needs"),
        ({"threshold": 1.0, "force_third_start": True}, "only for MONOTONIC and BOTH"),
        ({"threshold": 1.0, "forbid_fourth_start": True}, "only for BOTH"),
        ({"target_patch_size": 0.5}, "above 1 byte"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        PatcherConfig(**fields)


def test_missing_inputs():
    tokens = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="needs entropies"):
        PatcherConfig(threshold=1.0).starts(tokens)
    with pytest.raises(ValueError, match="needs predictions"):
        PatcherConfig(kind=PatcherKind.BPE_PATCHER).starts(tokens)
    with pytest.raises(ValueError, match="calibrate"):
        PatcherConfig(target_patch_size=4.0).starts(tokens, entropies=jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="the last target included"):
        PatcherConfig(kind=PatcherKind.SPACE).starts(tokens, tokens + 1)
    with pytest.raises(ValueError, match="one document"):
        PatcherConfig(kind=PatcherKind.SPACE).document_starts(np.zeros((0,), np.int32))


def test_newline_reset():
    newline = bp.NEWLINE
    tokens = jnp.array([[1, 70, newline, 71, newline, newline, 72, 1, 80, 0]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 0]], jnp.int32)
    ids, positions = bp.reset_segments(tokens, segments)
    assert ids.tolist() == [[1, 1, 1, 2, 2, 3, 4, 5, 5, 0]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    "config",
    [
        PatcherConfig(target_patch_size=4.5),
        PatcherConfig(target_patch_size=4.5, max_patch_length=12),
        PatcherConfig(kind=PatcherKind.MONOTONIC, target_patch_size=4.5),
        PatcherConfig(kind=PatcherKind.BOTH, relative_threshold=0.05, target_patch_size=4.5),
    ],
    ids=str,
)
def test_calibration(config):
    random = np.random.default_rng(0)
    entropies = [random.gamma(2.0, 0.7, n).astype(np.float32) for n in (3000, 10, 5000, 777)]
    found = config.calibrate(entropies)
    patches = sum(found.document_starts(np.zeros(len(h), np.int32), h).sum() for h in entropies)
    size = sum(map(len, entropies)) / patches
    assert abs(size / 4.5 - 1) < 0.02
    assert dataclasses.replace(found, threshold=config.threshold) != config or found.threshold
    with pytest.raises(ValueError, match="comes closest"):
        dataclasses.replace(config, target_patch_size=1e5).calibrate(entropies)


def test_calibration_needs_a_threshold_rule():
    with pytest.raises(ValueError, match="no threshold"):
        bp.calibrate_threshold([np.ones(4)], 4.0, PatcherConfig(kind=PatcherKind.SPACE))
    space = PatcherConfig(kind=PatcherKind.SPACE)
    assert space.calibrate([np.ones(4)]) is space


# ----------------------------------------------------------------------- n-gram entropies


def witten_bell(documents, context: tuple[int, ...]) -> np.ndarray:
    """The distribution after a context, straight from the definition."""
    if not context:
        lower = np.full(260, 1 / 260)
    else:
        lower = witten_bell(documents, context[1:])
    counts = np.zeros(260)
    for document in documents:
        for t in range(len(document) - 1):
            if tuple(document[max(t - len(context) + 1, 0) : t + 1]) == context or not context:
                counts[document[t + 1]] += 1
    distinct = (counts > 0).sum()
    if not counts.sum():
        return lower
    return (counts + distinct * lower) / (counts.sum() + distinct)


def test_ngram_entropy_equals_the_definition():
    random = np.random.default_rng(0)
    documents = [random.integers(4, 7, n).astype(np.int32) for n in (40, 1, 25)]
    model = bp.ngram_entropy(documents, order=3)
    held_out = np.array([5, 4, 6, 250, 4, 4, 5, 6], np.int32)
    found = model(held_out)
    for t in range(len(held_out)):
        p = witten_bell(documents, tuple(held_out[max(t - 1, 0) : t + 1].tolist()))
        assert math.isclose(p.sum(), 1, rel_tol=1e-9)
        np.testing.assert_allclose(found[t], -np.sum(p * np.log(p)), rtol=1e-5)


def test_ngram_entropy_errors():
    with pytest.raises(ValueError, match="order=7"):
        bp.ngram_entropy([np.ones(4, np.int32)], order=7)
    with pytest.raises(ValueError, match="at least one document"):
        bp.ngram_entropy([])
    with pytest.raises(ValueError, match=r"ids 300\.\.300"):
        bp.ngram_entropy([np.full(4, 300, np.int32)])
    with pytest.raises(ValueError, match="two tokens"):
        bp.ngram_entropy([np.ones(1, np.int32)])
