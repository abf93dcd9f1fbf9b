import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params, logical_axes, param_shapes
from blt_jax.layers.embed import check_token_ids
from blt_jax.layers.model import Precision
from blt_jax.layers.projection import Initialization
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import Remat, TransformerConfig
from blt_jax.models import llama3
from tests.models.gradients import assert_leaves_close

CONFIG = llama3.small(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp_dim=48
)


def stack(config, **changes):
    changed = dataclasses.replace(config.transformer, **changes)
    return dataclasses.replace(config, transformer=changed)


@pytest.fixture(scope="module")
def model():
    return CONFIG.build()


@pytest.fixture(scope="module")
def params(model):
    return init_params(model, jax.random.key(0))


def tokens_of(shape=(2, 16), seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, 64)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens, segment_ids, positions):
    return model.apply({"params": params}, tokens, segment_ids, positions).logits


def logits_of(model, params, tokens, segment_ids=None, positions=None):
    """Compiled once per model for rows of 16: shorter ones are padded and cut again."""
    n = tokens.shape[1]
    pad = [(0, 0), (0, 16 - n)]
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(n), tokens.shape)
    padded = (jnp.pad(x, pad) for x in (tokens, segment_ids, positions))
    return _apply(model, params, *padded)[:, :n]


def batch_of(tokens, **changes):
    n = tokens.shape[1] - 1
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": jnp.ones_like(tokens[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(n), (tokens.shape[0], n)),
        "target_mask": jnp.arange(n)[None, :] < jnp.array([n, n - 3])[:, None],
        "target_bytes": jnp.broadcast_to(jnp.arange(n) % 4, (tokens.shape[0], n)),
    }
    return batch | changes


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (llama3.llama3_8b(), 8_030_261_248),
        (llama3.llama3_70b(), 70_553_706_496),
        (llama3.llama3_405b(), 405_853_388_800),
        (
            llama3.small(
                vocab_size=257, num_layers=2, d_model=64, num_heads=8, num_kv_heads=2, mlp_dim=160
            ),
            115_136,
        ),
    ],
)
def test_parameter_counts(config, count):
    shapes = param_shapes(config.build())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_feed_forward_widths():
    assert llama3.feed_forward_width(4096, 1.3, 1024) == 14_336
    assert llama3.feed_forward_width(8192, 1.3, 4096) == 28_672
    assert llama3.feed_forward_width(16_384, 1.2, 4096) == 53_248
    assert llama3.feed_forward_width(4096, 1.0, 256) == 11_008  # the 7B of Llama 1 and 2


def test_flops_follow_the_parameters():
    config = llama3.llama3_8b()
    # Twice the parameters that multiply, and causal attention over half of the context.
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    attention = 32 * 4 * 4096 * (8192 + 1) / 2
    assert config.build().flops_per_token(8192) == 2 * matrices + attention


def test_release_3_1():
    rope = llama3.llama31_8b().transformer.rope
    assert rope == RopeConfig(scaling_factor=8.0)
    assert llama3.llama31(llama3.llama3_8b(), 32.0).transformer.rope.scaling_factor == 32
    with pytest.raises(ValueError, match="already scaled"):
        llama3.llama31(llama3.llama31_8b())


def test_initialisation():
    wide = llama3.small(vocab_size=512, num_layers=1, d_model=256, num_heads=4, mlp_dim=1024)
    for kind, inputs, hidden in [
        (Initialization.FAN_IN, 256**-0.5, 1024**-0.5),
        (Initialization.NORMAL_002, 0.02, 0.02),
    ]:
        config = stack(wide, initialization=kind)
        params = init_params(config.build(), jax.random.key(0))
        layer = params["transformer"]["layers"]
        for leaf in (params["embed"]["table"], params["head"]["kernel"], layer["mlp"]["gate"]):
            np.testing.assert_allclose(jnp.std(leaf), inputs, rtol=0.03)
        np.testing.assert_allclose(jnp.std(layer["mlp"]["down"]), hidden, rtol=0.03)
        np.testing.assert_array_equal(layer["mlp_norm"]["weight"], 1.0)


def test_logical_axes(model):
    axes = logical_axes(model)
    assert axes["embed"]["table"] == ("vocab", "embed")
    assert axes["transformer"]["layers"]["attention"]["query"] == (
        "layers",
        "embed",
        "heads",
        "head_dim",
    )
    assert all(isinstance(leaf, dict) is False for leaf in jax.tree.leaves(axes))


# -------------------------------------------------------------------------------- properties


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(model, params, segment_ids):
    def logits(table):
        changed = params | {"embed": {"table": table}}
        return model.apply({"params": changed}, jnp.arange(12)[None], segment_ids).logits[0].sum(-1)

    return jax.jacrev(logits)(params["embed"]["table"])[:, :12]


def influences(model, params, segment_ids):
    """|d logits[t] / d input[s]| of 12 tokens; token s has id s, so its input is row s alone."""
    return np.abs(np.asarray(_jacobian(model, params, segment_ids))).sum(-1)


def test_causality_through_gradients(model, params):
    influence = influences(model, params, jnp.ones((1, 12), jnp.int32))
    assert (influence[np.triu_indices(12, 1)] == 0).all()
    assert (influence[np.tril_indices(12)] > 0).all()


def test_documents_are_isolated_through_gradients(model, params):
    influence = influences(model, params, jnp.array([[1] * 5 + [2] * 4 + [0] * 3]))
    assert (influence[5:9, :5] == 0).all() and (influence[:9, 9:] == 0).all()
    assert (influence[8, 5:9] > 0).all()


def test_packed_equals_separate(model, params):
    a, b = tokens_of((1, 7), 2), tokens_of((1, 9), 3)
    packed = jnp.concatenate([a, b], axis=1)
    segment_ids = jnp.array([[1] * 7 + [2] * 9])
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None]
    logits = logits_of(model, params, packed, segment_ids, positions)
    np.testing.assert_allclose(logits[:, :7], logits_of(model, params, a), atol=1e-5)
    np.testing.assert_allclose(logits[:, 7:], logits_of(model, params, b), atol=1e-5)
    # Rotary embedding sees distances only: not restarting the positions changes nothing.
    np.testing.assert_allclose(
        logits_of(model, params, packed, segment_ids)[:, 7:], logits[:, 7:], atol=1e-5
    )
    # Without segments the second document sees the first.
    alone = logits_of(model, params, packed, None, positions)[:, 7:]
    assert float(jnp.abs(alone - logits[:, 7:]).max()) > 1e-2


def test_second_document_ignores_the_first_exactly(model, params):
    segment_ids = jnp.array([[1] * 7 + [2] * 9])
    tokens = tokens_of((1, 16))
    other = tokens.at[:, :7].set((tokens[:, :7] + 1) % 64)
    a, b = (logits_of(model, params, x, segment_ids)[:, 7:] for x in (tokens, other))
    np.testing.assert_array_equal(a, b)


def test_padding_changes_nothing(model, params):
    tokens = tokens_of((2, 10))
    padded = jnp.pad(tokens, [(0, 0), (0, 6)])
    segment_ids = jnp.pad(jnp.ones((2, 10), jnp.int32), [(0, 0), (0, 6)])
    logits = logits_of(model, params, padded, segment_ids)
    assert bool(jnp.isfinite(logits).all())
    np.testing.assert_allclose(logits[:, :10], logits_of(model, params, tokens), atol=1e-5)
    empty = logits_of(model, params, padded, jnp.zeros_like(padded))
    assert bool(jnp.isfinite(empty).all())


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch):
    return jax.value_and_grad(lambda p: model.loss(p, batch).objective)(params)


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.SAVE_NAMES])
def test_scanned_equals_unrolled(model, params, remat):
    batch = batch_of(tokens_of())
    value, grads = loss_and_grads(model, params, batch)
    other = stack(CONFIG, scan_layers=False, remat=remat).build()
    value_2, grads_2 = loss_and_grads(other, params, batch)
    np.testing.assert_allclose(value, value_2, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, grads_2)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=1, fsdp=4, context=2),
        MeshConfig(data=1, tensor=2, context=4),
        MeshConfig(data=2, expert=2, context=2),
    ],
    ids=str,
)
def test_sharded_equals_one_device(mesh):
    model = dataclasses.replace(CONFIG, tied_embeddings=True).build()
    mesh = make_mesh(mesh)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.concatenate([tokens_of((2, 17), seed) for seed in (1, 2, 3, 4)])
    batch = batch_of(tokens, target_mask=jnp.ones((8, 16), bool))
    value, grads = loss_and_grads(model, params, batch)
    with jax.set_mesh(mesh):
        sharded = init_params(model, jax.random.key(0), mesh)
        value_2, grads_2 = loss_and_grads(model, sharded, batch)
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    assert_leaves_close(grads_2, grads)
    assert "fsdp" in str(sharded["transformer"]["layers"]["mlp"]["gate"].sharding.spec)


def test_bfloat16_is_close(params):
    tokens = tokens_of()
    wide = logits_of(CONFIG.build(), params, tokens)
    narrow = dataclasses.replace(CONFIG, precision=Precision.BFLOAT16).build()
    logits = logits_of(narrow, params, tokens)
    assert logits.dtype == jnp.float32
    scale = float(jnp.abs(wide).max())
    assert float(jnp.abs(logits - wide).max()) < 0.02 * scale
    assert float(jnp.abs(logits - wide).max()) > 0


# ------------------------------------------------------------------------------------- loss


def by_hand(logits, batch, z_loss):
    log_p = jax.nn.log_softmax(logits)
    nats = -np.take_along_axis(np.asarray(log_p), np.asarray(batch["targets"])[..., None], 2)[
        ..., 0
    ]
    z = np.square(np.asarray(jax.nn.logsumexp(logits, -1)))
    mask = np.asarray(batch["target_mask"])
    return {
        "nats": (nats * mask).sum(),
        "objective": ((nats + z_loss * z) * mask).sum(),
        "bytes": (np.asarray(batch["target_bytes"]) * mask).sum(),
        "correct": ((np.asarray(logits).argmax(-1) == batch["targets"]) & mask).sum(),
        "weight": mask.sum(),
    }


@pytest.mark.parametrize(("chunk", "tied"), [(0, False), (4, False), (15, True), (100, True)])
def test_loss_in_chunks(chunk, tied):
    config = dataclasses.replace(CONFIG, z_loss=1e-3, tied_embeddings=tied)
    whole = config.build()
    params = init_params(whole, jax.random.key(0))
    batch = batch_of(tokens_of())
    expected = by_hand(logits_of(whole, params, batch["tokens"]), batch, 1e-3)
    model = dataclasses.replace(config, logits_chunk=chunk).build()

    @jax.jit
    def step(params):
        def objective(params):
            sums = model.loss(params, batch)
            return sums.objective, sums

        return jax.grad(objective, has_aux=True)(params)

    grads, sums = step(params)
    got = {**sums.metrics, "objective": sums.objective, "weight": sums.weight}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    if chunk:
        whole_grads = jax.jit(jax.grad(lambda p: whole.loss(p, batch).objective))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, whole_grads)


def test_chunks_are_chosen_by_the_size_of_the_logits():
    assert CONFIG.build().logits_chunk((2, 512)) == 512
    large = llama3.llama3_8b().build()
    assert large.logits_chunk((4, 8192)) == 2**26 // (4 * 128_256)
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        assert large.logits_chunk((4, 8192)) == 8 * 2**26 // (4 * 128_256)
    assert large.logits_chunk((100_000, 8)) == 1


def test_chunked_loss_never_holds_all_logits():
    config = dataclasses.replace(llama3.small(vocab_size=4096, d_model=32), logits_chunk=64)
    B, T = 2, 1024
    arrays = {
        "tokens": jax.ShapeDtypeStruct((B, T), jnp.int32),
        "targets": jax.ShapeDtypeStruct((B, T), jnp.int32),
        "target_bytes": jax.ShapeDtypeStruct((B, T), jnp.int32),
        "target_mask": jax.ShapeDtypeStruct((B, T), jnp.bool_),
    }
    params = param_shapes(config.build())

    def logits_in(config):
        model = config.build()
        step = jax.grad(lambda p, b: model.loss(p, b).objective)
        text = str(jax.make_jaxpr(step)(params, arrays))
        return f"{B},{T},4096" in text

    assert logits_in(dataclasses.replace(config, logits_chunk=0))
    assert not logits_in(config)


# ------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(CONFIG, vocab_size=0), "Llama3Config.vocab_size=0"),
        (lambda: dataclasses.replace(CONFIG, z_loss=-1.0), "Llama3Config.z_loss=-1.0"),
        (lambda: dataclasses.replace(CONFIG, logits_chunk=-1), "Llama3Config.logits_chunk=-1"),
        (lambda: stack(CONFIG, num_kv_heads=3), "num_kv_heads=3: must divide num_heads=4"),
        (lambda: stack(CONFIG, num_heads=5, num_kv_heads=5), "num_heads=5: must divide d_model=32"),
        (lambda: stack(CONFIG, head_dim=7), "head width 7 must be even"),
        (lambda: stack(CONFIG, window=-1), "window=-1: must be >= 0"),
        (lambda: RopeConfig(theta=0.0), "theta=0.0"),
        (lambda: RopeConfig(scaling_factor=0.5), "scaling_factor=0.5"),
        (lambda: RopeConfig(low_freq_factor=4.0), "low_freq_factor=4.0"),
        (lambda: RopeConfig(original_max_positions=0), "original_max_positions=0"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs():
    with pytest.raises(TypeError, match="tokens has dtype float32: token ids must be integers"):
        check_token_ids("tokens", jnp.ones((1, 4)))


# --------------------------------------------------------------------------------- schedules


def test_batch_schedule():
    stage = llama3.stage_at(llama3.BATCH_SCHEDULE, 0)
    assert (stage.batch_tokens, stage.sequence_length) == (4 * 2**20, 4096)
    assert llama3.stage_at(llama3.BATCH_SCHEDULE, 251_999_999) == stage
    stage = llama3.stage_at(llama3.BATCH_SCHEDULE, 252_000_000)
    assert (stage.batch_tokens, stage.sequence_length) == (8 * 2**20, 8192)
    stage = llama3.stage_at(llama3.BATCH_SCHEDULE, 15 * 10**12)
    assert (stage.batch_tokens, stage.sequence_length) == (16 * 2**20, 8192)
    with pytest.raises(ValueError, match="after_tokens must start at 0"):
        llama3.stage_at(llama3.BATCH_SCHEDULE[1:], 0)
    with pytest.raises(ValueError, match="and increase"):
        llama3.stage_at(llama3.BATCH_SCHEDULE[:1] * 2, 0)
    with pytest.raises(ValueError, match="batch_tokens=100"):
        llama3.BatchStage(after_tokens=0, batch_tokens=100, sequence_length=64)


def test_context_extension():
    stages = llama3.context_extension()
    lengths = [stage.length for stage in stages]
    assert len(lengths) == 6 and lengths[-1] == 131_072
    assert all(a < b for a, b in zip([8192, *lengths], lengths, strict=False))
    assert all(length % 4096 == 0 for length in lengths)
    assert 0 <= 800_000_000_000 - sum(stage.tokens for stage in stages) < 6
    tiny = llama3.context_extension(first=128, last=512, increments=2, tokens=10, multiple_of=32)
    assert [(s.length, s.tokens) for s in tiny] == [(256, 5), (512, 5)]
    with pytest.raises(ValueError, match="first=512 must be > 0 and below last=512"):
        llama3.context_extension(first=512, last=512)
    with pytest.raises(ValueError, match="too coarse"):
        llama3.context_extension(first=128, last=256, increments=6, multiple_of=128)


def test_gate_of_longer_context():
    ready = dict(short_context_score=0.7, short_context_reference=0.7, needle_accuracy=1.0)
    assert llama3.ready_for_longer_context(**ready)
    assert not llama3.ready_for_longer_context(**ready | dict(short_context_score=0.69))
    assert llama3.ready_for_longer_context(**ready | dict(short_context_score=0.69), tolerance=0.02)
    assert not llama3.ready_for_longer_context(**ready | dict(needle_accuracy=0.99))
    assert llama3.ready_for_longer_context(
        **ready | dict(needle_accuracy=0.99), needle_threshold=0.95
    )
    # Scores where less is better are negated by the caller.
    losses = dict(short_context_score=-1.02, short_context_reference=-1.0, needle_accuracy=1.0)
    assert not llama3.ready_for_longer_context(**losses)
    assert llama3.ready_for_longer_context(**losses, tolerance=0.03)
    with pytest.raises(ValueError, match=r"needle_accuracy=1\.5"):
        llama3.ready_for_longer_context(**ready | dict(needle_accuracy=1.5))


def test_layout_default_is_that_of_metas_weights():
    assert CONFIG.transformer.rope.layout is RopeLayout.INTERLEAVED
    assert isinstance(CONFIG.transformer, TransformerConfig)
