"""Properties of Megalodon that need no other implementation."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules, init_params, param_shapes
from blt_jax.layers.model import Precision
from blt_jax.layers.transformer import Remat
from blt_jax.models import megalodon, megalodon_memory
from blt_jax.models.megalodon import (
    AttentionDropout,
    AttentionKind,
    DecayInit,
    EmaKind,
    GateKind,
    NormKind,
    ScanForm,
)
from blt_jax.models.megalodon_decode import MegalodonDecoder
from blt_jax.models.megalodon_memory import NormState
from blt_jax.train.optimizer import OptimizerConfig, decay_mask, parameter_names
from tests.models.gradients import assert_leaves_close

CONFIG = megalodon.small(
    vocab_size=30,
    d_model=16,
    chunk_size=8,
    norm_groups=4,
    num_heads=2,
    qk_dim=8,
    value_dim=12,
    mlp_dim=16,
    state_size=3,
    scan_form=megalodon.ScanForm.REFERENCE,  # compiles fastest; the others are compared with it
)
SEGMENTS = jnp.array([[1] * 5 + [2] * 9 + [3] * 4 + [0] * 2, [4] * 20], jnp.int32)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def params_of(config):
    params = init_params(config.build(), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def tokens_of(rows=2, length=20, seed=2):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 30, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, segment_ids=None, key=None):
    return model.apply({"params": params}, tokens, segment_ids, key=key).logits


def logits_of(config, tokens, segment_ids=None, key=None):
    return apply(config.build(), params_of(CONFIG), tokens, segment_ids, key)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, tokens, segment_ids=None):
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "target_mask": jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0,
        "target_bytes": jnp.ones_like(tokens),
    }
    if segment_ids is not None:
        batch["segment_ids"] = segment_ids
    return jax.value_and_grad(lambda p: model.loss(p, batch).objective)(params)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (megalodon.mega_200m(), 220_627_968),
        (megalodon.mega_1_3b(), 1_342_832_640),
        (megalodon.mega_1_3b_pg19(), 1_327_628_288),
        (megalodon.mega_7_1b(), 7_117_381_632),
        (megalodon.mega_7_3b(), 7_385_817_088),
        (megalodon.megalodon_7b(), 7_385_817_088),
    ],
)
def test_parameter_counts(config, count):
    shapes = param_shapes(config.build())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_flops_follow_the_parameters():
    config = megalodon.megalodon_7b()
    D, L = config.d_model, config.num_layers
    small = L * (2 * D + 4 * D * 16 + 2 * D + D + 1024 + 2 * 8192 + D + 4 * 1024 + 2 * D) + 2 * D
    matrices = 7_385_817_088 - config.vocab_size * D - small
    attention = L * 2 * (1024 + 8192) * (4096 + 1) / 2
    assert config.build().flops_per_token(32_768) == 2 * matrices + attention + L * 12 * 16 * D


def test_initialisation_of_the_moving_average():
    config = dataclasses.replace(megalodon.byte_level(d_model=256, num_layers=1), state_size=16)
    w = jax.tree.map(lambda x: x[0], init_params(config.build(), jax.random.key(0))["layers"])
    np.testing.assert_allclose(jnp.std(w["ema_alpha"]), 0.2, rtol=0.05)
    frequencies = np.sort(np.asarray(jax.nn.sigmoid(w["ema_theta"])))
    expected = np.sort(256.0 ** (-np.arange(1, 257) / 256))
    np.testing.assert_allclose(frequencies, expected, rtol=1e-4)
    assert (w["ema_gamma_im"] == 0).all() and float(jnp.abs(w["ema_omega"]).max()) <= 1
    np.testing.assert_allclose(jnp.std(w["z_kernel"]), (3 * 256) ** -0.5, rtol=0.03)
    c = megalodon.ema_coefficients(config, w)
    modulus = jnp.hypot(c.decay_re, c.decay_im)
    assert float(modulus.min()) > 0.55 and float(modulus.max()) < 0.88
    log_uniform = dataclasses.replace(config, decay_init=DecayInit.LOG_UNIFORM)
    w = init_params(log_uniform.build(), jax.random.key(0))["layers"]
    reach = 1 / (jax.nn.sigmoid(w["ema_alpha"]) * jax.nn.sigmoid(w["ema_delta"]))
    np.testing.assert_allclose([reach.min(), reach.max()], [2, config.chunk_size], rtol=1e-3)


def test_the_moving_average_can_be_left_out_of_weight_decay():
    params = params_of(CONFIG)
    decayed = jax.tree.leaves(decay_mask(OptimizerConfig(undecayed=("ema_(?!norm)",)), params))
    spared = {n for n, x in zip(parameter_names(params), decayed, strict=True) if not x}
    parts = ("alpha", "delta", "theta", "gamma_re", "gamma_im", "omega")
    assert spared == {f"layers/ema_{part}" for part in parts}


# -------------------------------------------------------------------------------- properties


@jax.jit
def _jacobian(params, segment_ids):
    def logits(table):
        changed = params | {"embed": {"table": table}}
        out = CONFIG.build().apply({"params": changed}, jnp.arange(20)[None], segment_ids)
        return out.logits[0].sum(-1)

    return jnp.abs(jax.jacrev(logits)(params["embed"]["table"])[:, :20]).sum(-1)


def test_causality_and_isolation_through_gradients():
    """|d logits[t] / d input[s]|; chunks of 8, so that only the memory crosses position 8."""
    influence = np.asarray(_jacobian(params_of(CONFIG), jnp.ones((1, 20), jnp.int32)))
    assert (influence[np.triu_indices(20, 1)] == 0).all()
    assert (influence[np.tril_indices(20)] > 0).all()
    influence = np.asarray(_jacobian(params_of(CONFIG), SEGMENTS[:1]))
    own = SEGMENTS[0][:, None] == SEGMENTS[0][None, :]
    expected = np.tril(own & (SEGMENTS[0] > 0)[:, None])
    assert ((influence[:18] > 0) == expected[:18]).all()


@pytest.mark.parametrize("window", [0, 5])
def test_packed_equals_separate_and_padding_changes_nothing(window):
    config = changed(attention_window=window)
    tokens = tokens_of()
    packed = logits_of(config, tokens, SEGMENTS)
    assert bool(jnp.isfinite(packed).all())
    np.testing.assert_allclose(packed[1], logits_of(config, tokens)[1], atol=1e-5)
    for start, stop in ((0, 5), (5, 14), (14, 18)):
        alone = jnp.pad(tokens[:1, start:stop], ((0, 1), (0, 20 - stop + start)))
        expected = logits_of(config, alone)[0, : stop - start]
        np.testing.assert_allclose(packed[0, start:stop], expected, atol=1e-5)
    other = tokens.at[0, :5].set((tokens[0, :5] + 1) % 30)
    again = logits_of(config, other, SEGMENTS)
    np.testing.assert_array_equal(again[0, 5:18], packed[0, 5:18])


LONG_SEGMENTS = jnp.array([[1] * 5 + [2] * 20 + [3] * 4 + [0] * 3, [4] * 32], jnp.int32)


def test_scanned_equals_unrolled():
    params, tokens = params_of(CONFIG), tokens_of(2, 32)
    value, grads = loss_and_grads(CONFIG.build(), params, tokens, LONG_SEGMENTS)
    other = changed(scan_layers=False, remat=Remat.SAVE_NAMES).build()
    value_2, grads_2 = loss_and_grads(other, params, tokens, LONG_SEGMENTS)
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    assert_close(grads, grads_2, atol=2e-4)


SHARDED = ShardingRules(length=("context",))
HALVES = MeshConfig(data=2, context=2, tensor=2)
"""The length over two devices."""


def test_sharded_equals_one_device():
    """16 tokens on each device: two chunks; documents cross the cut, and begin with a prior."""
    config = changed(scan_form=ScanForm.AUTO, prior_count=3)
    params, tokens = params_of(config), tokens_of(2, 32)
    value, grads = loss_and_grads(config.build(), params, tokens, LONG_SEGMENTS)
    with jax.set_mesh(make_mesh(HALVES)):
        value_2, grads_2 = loss_and_grads(config.build(SHARDED), params, tokens, LONG_SEGMENTS)
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    assert_leaves_close(grads_2, grads)


@pytest.mark.parametrize(
    ("changes", "segment_ids"),
    [
        ({"prior_count": 3}, None),
        ({"dropout": 0.2, "hidden_dropout": 0.3}, None),
        ({"attention_window": 5}, None),
        ({"attention_window": 5}, SEGMENTS),
    ],
    ids=["whole chunks", "half chunks, dropout", "window", "window, packed"],
)
def test_forward_pass_sharded(changes, segment_ids):
    """The cut lies after 16 or after 10 tokens, where chunks are 8."""
    config = changed(scan_form=ScanForm.AUTO, **changes)
    params, tokens = params_of(config), tokens_of(2, 32 if "prior_count" in changes else 20)
    key = jax.random.key(7) if config.dropout else None
    logits = apply(config.build(), params, tokens, segment_ids, key)
    with jax.set_mesh(make_mesh(HALVES)):
        sharded = apply(config.build(SHARDED), params, tokens, segment_ids, key)
    np.testing.assert_allclose(sharded, logits, atol=1e-5)


def test_prefill_sharded():
    """Rows, length and features over eight devices; the last documents of packed rows."""
    config = changed(scan_form=ScanForm.AUTO, prior_count=3)
    params, tokens = params_of(config), tokens_of(2, 32)
    segment_ids = jnp.array([[1] * 5 + [2] * 25 + [0] * 2, [0] * 3 + [1] * 17 + [0] * 12])
    prompt = tokens, jnp.array([30, 20]), segment_ids
    one = MegalodonDecoder.create(config.build(), params)
    expected = jax.jit(MegalodonDecoder.prefill)(one, *prompt)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2, tensor=2))):
        many = MegalodonDecoder.create(config.build(SHARDED), params)
        found = jax.jit(MegalodonDecoder.prefill)(many, *prompt)
    assert_close(found, expected, atol=1e-5)


def test_created_sharded():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = init_params(CONFIG.build(), jax.random.key(0), mesh)
    assert "tensor" in str(params["layers"]["value_kernel"].sharding.spec)
    assert "fsdp" in str(params["layers"]["mlp_gate"].sharding.spec)


@pytest.mark.parametrize("form", ["AUTO", "INTERPRET", "FFT", "ASSOCIATIVE"])
def test_implementations_of_the_moving_average_agree(form):
    w = jax.tree.map(lambda x: x[0], params_of(CONFIG)["layers"])
    x = jax.random.normal(jax.random.key(4), (2, 33, 16))

    @functools.partial(jax.jit, static_argnums=1)
    def run(w, form):
        def objective(w):
            y, _ = megalodon_memory.moving_average(
                x,
                megalodon.ema_coefficients(CONFIG, w),
                None,
                None,
                form=form,
                sharding=ShardingRules(),
            )
            return jnp.tanh(y).sum(), y

        return jax.grad(objective, has_aux=True)(w)

    names = [name for name in w if name.startswith("ema_") and name != "ema_norm_weight"]
    w = {name: w[name] for name in names}
    assert_close(run(w, ScanForm[form]), run(w, ScanForm.REFERENCE), atol=2e-5)


def test_bfloat16_is_close():
    tokens = tokens_of()
    wide, narrow = (logits_of(changed(precision=p), tokens) for p in list(Precision)[1:])
    assert narrow.dtype == jnp.float32
    scale = float(jnp.abs(wide).max())
    assert 0 < float(jnp.abs(narrow - wide).max()) < 0.04 * scale


def test_logits_in_chunks_give_the_same_loss():
    params, tokens = params_of(CONFIG), tokens_of(2, 32)
    value, grads = loss_and_grads(CONFIG.build(), params, tokens, LONG_SEGMENTS)
    chunked = changed(logits_chunk=7).build()
    value_2, grads_2 = loss_and_grads(chunked, params, tokens, LONG_SEGMENTS)
    np.testing.assert_allclose(value, value_2, rtol=1e-6)
    assert_close(grads, grads_2, atol=2e-5)


# ------------------------------------------------------------------------ timestep normalisation


def welford(x, groups):
    """Eq. 4 token by token in float64: [T, D] -> normalised, and the last mean and variance."""
    mean = variance = np.zeros(groups)
    rows = []
    for count, token in enumerate(x.astype(np.float64).reshape(len(x), groups, -1), start=1):
        m, v = token.mean(1), token.var(1)
        difference = m - mean
        mean = mean + difference / count
        variance = ((count - 1) * variance + v + difference**2 * (count - 1) / count) / count
        rows.append((token - mean[:, None]) / np.sqrt(variance + 1e-5)[:, None])
    return np.stack(rows).reshape(x.shape), mean, variance


@functools.partial(jax.jit, static_argnums=3)
def norm(x, state, segment_ids, config):
    w = {"n_weight": jnp.zeros(16), "n_bias": jnp.zeros(16)}
    documents = None if segment_ids is None else megalodon_memory.documents_of(segment_ids, config)
    return megalodon_memory.timestep_norm(
        x, w, "n", state, documents, config=config, sharding=ShardingRules()
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_timestep_norm_equals_the_recurrence(offset):
    x = np.random.default_rng(0).normal(size=(1, 300, 16)).astype(np.float32) + np.float32(offset)
    expected, mean, variance = welford(x[0], 4)
    y, state = norm(jnp.asarray(x), None, None, CONFIG)
    tolerance = 2e-5 if not offset else 2e-3
    np.testing.assert_allclose(y[0], expected, atol=tolerance)
    np.testing.assert_allclose(state.mean[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.variance[0], variance, rtol=1e-3)
    first, state = norm(jnp.asarray(x[:, :140]), None, None, CONFIG)
    second, _ = norm(jnp.asarray(x[:, 140:]), state, None, CONFIG)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1)[0], expected, atol=tolerance)
    assert int(state.count[0]) == 140


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block, length", [(4, 1), (4, 16), (4, 17), (4, 100), (64, 300)])
def test_running_sums(monkeypatch, block, length, packed):
    """One to four levels of blocks; documents that end in, at the end of and after a block."""
    monkeypatch.setattr(megalodon_memory, "SUM_BLOCK", block)
    generator = np.random.default_rng(length)
    x = generator.normal(size=(2, length, 3)).astype(np.float32)
    starts = generator.random((2, length)) < 0.08
    starts[0, block::block] = True
    starts[1, length // 2 :] = False
    document = np.where(starts, np.arange(length), -1)
    document = np.maximum.accumulate(document, axis=1) if packed else np.zeros_like(document)
    sums, cotangent = np.zeros_like(x, np.float64), generator.normal(size=x.shape)
    d_x = np.zeros_like(sums)
    for row, t in np.ndindex(2, length):
        own = (document[row] == document[row, t]) & (np.arange(length) <= t)
        sums[row, t] = x[row, own].sum(0, dtype=np.float64)
        d_x[row, own] += cotangent[row, t]
    given = jnp.asarray(document, jnp.int32) if packed else None
    result, pullback = jax.vjp(lambda x: megalodon_memory.running_sums(x, given), jnp.asarray(x))
    np.testing.assert_allclose(result, sums, atol=1e-5)
    np.testing.assert_allclose(pullback(jnp.float32(cotangent))[0], d_x, atol=1e-5)


def test_statistics_merge():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 50, 16)), jnp.float32)
    _, whole = norm(x, None, None, CONFIG)
    (_, a), (_, b) = norm(x[:, :20], None, None, CONFIG), norm(x[:, 20:], None, None, CONFIG)
    assert_close(megalodon_memory.merge_statistics(a, b), whole, rtol=1e-5, atol=1e-6)
    empty = NormState(jnp.zeros((1,), jnp.int32), jnp.full((1, 4), 7.0), jnp.ones((1, 4)))
    assert_close(megalodon_memory.merge_statistics(empty, whole), whole, rtol=1e-6)
    assert_close(megalodon_memory.merge_statistics(whole, empty), whole, rtol=1e-6)


def test_count_beyond_float_precision():
    _, state = norm(jnp.ones((1, 3, 16)), None, None, CONFIG)
    state = state.replace(count=jnp.asarray([2**24 + 1], jnp.int32))
    assert int(norm(jnp.ones((1, 3, 16)), state, None, CONFIG)[1].count[0]) == 2**24 + 4


# ---------------------------------------------------------------------------------- options


def mega_attention(kind, z, gain, offset, v, group):
    """The equations of Mega in float64, token by token: [T, D] of one row and head."""
    z = z / (1 + np.exp(-z))
    q, k = (z * gain[i] + offset[i] for i in (0, 1))
    rows = np.zeros(v.shape)
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if group[s] == group[t] > 0]
        scores = k[seen] @ q[t]
        if kind is AttentionKind.SOFTMAX:
            weights = np.exp(scores / math.sqrt(q.shape[1]))
            weights /= weights.sum()
        elif kind is AttentionKind.RELU_SQUARED:
            weights = np.maximum(scores / max(len(seen), 1), 0) ** 2
        else:
            standard = (scores / max(len(seen), 1) - 0.5**0.5) * math.sqrt(4 * math.pi)
            weights = np.array([0.5 * (1 + math.erf(s / math.sqrt(2))) for s in standard])
        rows[t] = weights @ v[seen] if seen else 0
    return rows


@pytest.mark.parametrize("kind", list(AttentionKind)[1:])
@pytest.mark.parametrize("packed", [False, True])
def test_functions_of_mega(kind, packed):
    config = changed(gate=GateKind.MEGA, attention=kind)
    rng = np.random.default_rng(5)
    shapes = {
        "z_kernel": (16, 2, 4),
        "z_bias": (2, 4),
        "qk_gain": (2, 2, 4),
        "qk_offset": (2, 2, 4),
    }
    w = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x, v = 0.25 * rng.normal(size=(2, 20, 16)), rng.normal(size=(2, 20, 2, 6))
    documents = megalodon_memory.documents_of(SEGMENTS, config) if packed else None
    group = (
        np.asarray(documents.attention) if packed else np.arange(40).reshape(2, 20) % 20 // 8 + 1
    )

    @jax.jit
    def run(w, x, v):
        q, k = megalodon.mega_queries_keys(config, w, x)
        return megalodon.dense_chunk_attention(q, k, v, documents, config)

    result = run(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (w, x, v)))
    for row in range(2):
        for head in range(2):
            z = x[row] @ w["z_kernel"][:, head] + w["z_bias"][head]
            arguments = z, w["qk_gain"][:, head], w["qk_offset"][:, head], v[row, :, head]
            expected = mega_attention(kind, *arguments, group[row])
            np.testing.assert_allclose(result[row, :, head], expected, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("kind", list(AttentionDropout))
def test_dropout(kind):
    tokens, key = tokens_of(), jax.random.key(7)
    config = changed(attention_dropout=0.4, attention_dropout_kind=kind)
    plain = logits_of(CONFIG, tokens, SEGMENTS)
    np.testing.assert_array_equal(logits_of(config, tokens, SEGMENTS), plain)
    dropped = logits_of(config, tokens, SEGMENTS, key)
    assert bool(jnp.isfinite(dropped).all()) and float(jnp.abs(dropped - plain).max()) > 1e-3
    # Almost no dropout: the dense attention is the chunked one.
    config = changed(attention_dropout=1e-9, dropout=1e-9, hidden_dropout=1e-9)
    np.testing.assert_allclose(logits_of(config, tokens, SEGMENTS, key), plain, atol=1e-5)


# -------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_dim": 6}, "qk_dim=6: the width per head, 3, must be even"),
        ({"qk_dim": 7}, "qk_dim=7: must be a multiple of num_heads=2"),
        ({"value_dim": 9}, "value_dim=9: must be a multiple of num_heads=2"),
        ({"norm_groups": 5}, "norm_groups=5: must divide d_model=16"),
        ({"norm_groups": 16}, "prior_count=0: must be >= 2 with norm_groups=d_model=16"),
        ({"chunk_size": 0}, "chunk_size=0: must be >= 1"),
        ({"attention_window": -1}, "attention_window=-1: must be >= 0"),
        ({"attention": AttentionKind.LAPLACE}, "attention=LAPLACE: allowed with gate=MEGA"),
        (
            {
                "gate": GateKind.MEGA,
                "attention": AttentionKind.RELU_SQUARED,
                "attention_dropout": 0.1,
                "attention_dropout_kind": AttentionDropout.KEYS,
            },
            "attention_dropout_kind=KEYS: must be WEIGHTS with attention=RELU_SQUARED",
        ),
        ({"dropout": 1.0}, r"dropout=1\.0: must be in \[0, 1\)"),
        ({"norm_eps": -1.0}, r"norm_eps=-1\.0: must be > 0"),
        ({"input_phase": True, "ema": EmaKind.REAL}, "input_phase=True: needs ema=EmaKind.COMPLEX"),
        ({"norm": NormKind.LAYER, "prior_count": 3}, "norm=LAYER: prior_count=3 and"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_bad_inputs():
    model, params = CONFIG.build(), params_of(CONFIG)
    with pytest.raises(ValueError, match=r"lengths=\[20, 20\]: .* end at \[18, 20\]"):
        model.apply({"params": params}, tokens_of(), SEGMENTS, jnp.array([20, 20]))
    with pytest.raises(ValueError, match=r"lengths=\[20, 0\]: .* end at \[20, 0\]"):
        padding = jnp.stack([jnp.ones(20, jnp.int32), jnp.zeros(20, jnp.int32)])
        model.apply({"params": params}, tokens_of(), padding, jnp.array([20, 0]))
    with pytest.raises(ValueError, match=r"\(2, 20\) and lengths \(1,\): must be \(2, 20\) and"):
        megalodon.check_last_documents(SEGMENTS, jnp.array([18]), (2, 20))
    with pytest.raises(ValueError, match=r"tokens \(2, 0\): must have at least one token per row"):
        model.apply({"params": params}, tokens_of()[:, :0])
    with pytest.raises(ValueError, match="a language model looks back only"):
        changed(bidirectional=True).build()
    with pytest.raises(NotImplementedError, match="'fft' cannot reset the state"):
        logits_of(changed(scan_form=ScanForm.FFT), tokens_of(), SEGMENTS)
