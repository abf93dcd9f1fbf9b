"""BLT and its entropy model: options against a dense definition, and what must always hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params, param_shardings
from blt_jax.layers.model import Precision
from blt_jax.layers.projection import DepthScaling
from blt_jax.layers.rope import RopeConfig
from blt_jax.layers.transformer import Remat, TransformerConfig
from blt_jax.models import blt, blt_config, blt_patches, blt_patching
from blt_jax.models.blt_ngrams import (
    HashOrder,
    NgramConfig,
    NgramKind,
    NgramStart,
    build_ngram_tables,
)
from tests.models.blt_dense import blt_logits
from tests.models.gradients import assert_leaves_close


def config(**fields) -> blt.BLTConfig:
    local = TransformerConfig(
        num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=24, window=6
    )
    defaults = {
        "local_encoder": local,
        "latent": TransformerConfig(num_layers=2, d_model=24, num_heads=4, mlp_dim=32),
        "local_decoder": local,
        "ngrams": NgramConfig(sizes=(3, 4), vocab_size=104),
    }
    return blt.BLTConfig(**(defaults | fields))


SHORT = {
    "local_encoder": TransformerConfig(
        num_layers=1, d_model=16, num_heads=2, mlp_dim=24, window=6, rope=RopeConfig(theta=100.0)
    ),
    "latent": TransformerConfig(num_layers=1, d_model=32, num_heads=2, mlp_dim=32),
}

# Every named option at least once, each model checked against the definition.
OPTIONS = {
    "defaults": config(),
    "input, last, first": config(
        kv_from=blt.KeyValueSource.INPUT,
        encoder_cross_attention=blt.EncoderCrossAttention.LAST,
        decoder_cross_attention=blt.DecoderCrossAttention.FIRST,
        pooling=blt.Pooling.MEAN,
    ),
    "output, last": config(
        encoder_cross_attention=blt.EncoderCrossAttention.LAST,
        residual=blt.Residual.DOUBLED,
        ngrams=NgramConfig.released(sizes=(2, 5), vocab_size=104),
        pooling=blt.Pooling.MIN,
    ),
    "input, per layer, window": config(
        kv_from=blt.KeyValueSource.INPUT,
        pool_queries=blt.PoolQueries.PER_LAYER,
        patch_window=2,
        cross_attn_k=3,
        encoder_cross_heads=8,
        encoder_cross_kv_heads=4,
        decoder_cross_heads=2,
        pooling=blt.Pooling.MAX_MIN,
        ngrams=NgramConfig(kind=NgramKind.NONE),
    ),
    "no cross-attention": config(
        encoder_cross_attention=blt.EncoderCrossAttention.NONE,
        decoder_cross_attention=blt.DecoderCrossAttention.NONE,
        pooling=blt.Pooling.FIRST_BYTES,
        pooled_bytes=3,
        ngrams=NgramConfig(
            num_functions=2,
            sizes=(3,),
            vocab_size=104,
            start=NgramStart.PAD_ZERO,
            cross_documents=True,
        ),
    ),
    "one layer, no projection": config(
        **SHORT,
        kv_from=blt.KeyValueSource.INPUT,
        pooling=blt.Pooling.MAX_MEAN_MIN,
        ngrams=NgramConfig(sizes=(3,), vocab_size=104, order=HashOrder.OLDEST_FIRST),
    ),
    "few patches": config(**SHORT, max_patches=5, pooling=blt.Pooling.MAX_MEAN),
    "pools twice": config(pooling=blt.Pooling.MEAN_MIN, cross_attn_k=1),
}


def packed(seed: int = 0, rows: int = 2, sizes: tuple[int, ...] = (11, 4, 9), padding: int = 3):
    """A batch of rows of several documents and padding, with random patches."""
    random = np.random.default_rng(seed)
    length = sum(sizes) + padding
    tokens = random.integers(4, 260, (rows, length)).astype(np.int32)
    segments = np.concatenate([np.repeat(np.arange(len(sizes)) + 1, sizes), np.zeros(padding)])
    segments = np.tile(segments.astype(np.int32), (rows, 1))
    tokens[segments == 0] = 0
    starts = random.random((rows, length)) < 0.35
    first = np.diff(segments, axis=1, prepend=-1) != 0
    starts |= first | np.pad(first[:, :-1], ((0, 0), (1, 0)))
    starts &= segments > 0
    target_mask = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    inputs = jnp.asarray(segments[:, :-1])
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "segment_ids": inputs,
        "positions": blt_patching.document_positions(inputs),
        "target_mask": jnp.asarray(target_mask),
        "target_bytes": jnp.asarray(target_mask.astype(np.int32)),
        "starts": jnp.asarray(starts),
    }


def build(config: blt.BLTConfig, seed: int = 0):
    model = config.build()
    params = init_params(model, jax.random.key(seed))
    # Norm weights start at one, which would hide a wrong one.
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return model, jax.tree.map(
        lambda w: w * jax.random.uniform(next(keys), w.shape, minval=0.7, maxval=1.3), params
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, starts, segment_ids):
    return model.apply({"params": params}, tokens, starts, segment_ids)


def run(model, params, batch):
    """Jitted forward pass of a batch; compiled once per model and shape."""
    return _forward(model, params, *(batch[name] for name in ("tokens", "starts", "segment_ids")))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_the_definition(name):
    model, params = build(OPTIONS[name])
    batch = packed()
    logits = run(model, params, batch).logits
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    for row in range(2):
        real = np.asarray(batch["segment_ids"][row]) > 0
        expected = blt_logits(
            weights,
            model.config,
            *(np.asarray(batch[key][row]) for key in ("tokens", "starts", "segment_ids")),
        )
        np.testing.assert_allclose(logits[row][real], expected[real], atol=5e-5, rtol=0)
        assert np.abs(expected[real]).max() > 0.5


@pytest.fixture(scope="module")
def small():
    return build(config())


def test_no_leak_through_gradients(small):
    """Logits at i depend on the embeddings of i and before, inside their document, and no other."""
    model, params = small
    batch = packed(rows=1)
    segments, positions = batch["segment_ids"], batch["positions"]

    def logits_of(model, shift):
        layout = blt_patches.patch_layout(batch["starts"], segments, segments.shape[1])
        history = model.history(positions, segments)
        x = model.embed_bytes(batch["tokens"], history, segments) + shift
        encoded = model.encode(x, positions, segments)
        patches = model.pool_patches(
            encoded.states, layout.encoder_ids, segments, layout.segment_ids
        )
        latent, _ = model.latent(patches, layout.positions, layout.segment_ids)
        decoder = (layout.decoder_ids, segments, layout.segment_ids)
        args = (encoded.hidden, model.context(latent), decoder, positions)
        return model.decode(*args)[0][0]

    def influence(shift, weights):
        logits = model.apply({"params": params}, shift, method=logits_of)
        return jnp.sum(logits * weights)

    N = segments.shape[1]
    shift = jnp.zeros((1, N, 16))
    random = jax.random.normal(jax.random.key(0), (N, N, 260))
    weights = jnp.eye(N)[:, :, None] * random
    slopes = jax.jit(jax.vmap(jax.grad(influence), in_axes=(None, 0)))(shift, weights)
    depends = np.asarray(jnp.abs(slopes[:, 0]).max(-1)) > 0
    same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])[None]
    causal = np.tril(np.ones((N, N), bool)) & same & (np.asarray(segments[0]) > 0)
    real = np.asarray(segments[0]) > 0
    assert not (depends & ~causal)[real].any()
    # The latent transformer reaches everything before the last complete patch.
    decoder_ids = np.asarray(blt_patching.decoder_ids(batch["starts"], segments))[0]
    encoder_ids = np.asarray(blt_patching.encoder_ids(batch["starts"], segments))[0]
    reached = causal & (encoder_ids[None] <= decoder_ids[:, None]) & real[:, None]
    assert depends[reached].all()


def test_later_tokens_change_nothing_before(small):
    """Tokens and the patches that follow from them: space patching, prefix by prefix."""
    model, params = small
    patcher = blt_patching.PatcherConfig(kind=blt_patching.PatcherKind.SPACE)
    text = np.frombuffer(b"a few words, and: more of them", np.uint8).astype(np.int32) + 4
    tokens = jnp.asarray(np.concatenate([[1], text])[None].astype(np.int32))
    changed = np.random.default_rng(0).integers(4, 260, tokens.shape).astype(np.int32)

    @jax.jit
    def logits(tokens):
        return model.apply({"params": params}, tokens, patcher.starts(tokens)).logits

    whole = logits(tokens)
    for cut in (1, 2, 7, 12, 13, 20):
        other = logits(jnp.concatenate([tokens[:, :cut], jnp.asarray(changed)[:, cut:]], axis=1))
        np.testing.assert_array_equal(whole[:, :cut], other[:, :cut])
        assert jnp.abs(whole[:, cut:] - other[:, cut:]).max() > 1e-3


@pytest.mark.parametrize("name", ["defaults", "input, per layer, window"])
def test_packed_rows_equal_separate_documents(name):
    model, params = build(OPTIONS[name])
    batch = packed(rows=1)
    whole = run(model, params, batch).logits[0]
    N, begin = whole.shape[0], 0
    for size in (11, 4, 9):
        # Alone, and padded to one shape: padding changes nothing either.
        end, fill = begin + size, ((0, 0), (0, N - size))
        one = {
            "tokens": jnp.pad(batch["tokens"][:, begin:end], fill),
            # With the start after it, which tells that its last patch is complete.
            "starts": jnp.pad(batch["starts"][:, begin : end + 1], fill),
            "segment_ids": jnp.pad(jnp.ones((1, size), jnp.int32), fill),
        }
        alone = run(model, params, one).logits[0, :size]
        np.testing.assert_allclose(whole[begin:end], alone, atol=2e-5)
        begin = end


def test_padding_tokens_are_never_read(small):
    model, params = small
    batch = packed()
    plain = run(model, params, batch).logits
    other = batch | {"tokens": jnp.where(batch["segment_ids"] > 0, batch["tokens"], -1)}
    real = np.asarray(batch["segment_ids"]) > 0
    found = np.asarray(run(model, params, other).logits)
    np.testing.assert_array_equal(found[real], np.asarray(plain)[real])
    assert np.isfinite(found).all()


@functools.partial(jax.jit, static_argnums=0)
def objective(model, params, batch):
    """((mean objective, sums), gradients)."""

    def mean(params):
        sums = model.loss(params, batch)
        return sums.objective / sums.weight, sums

    return jax.value_and_grad(mean, has_aux=True)(params)


def test_scan_and_remat_change_nothing(small):
    model, params = small
    batch = packed()
    (value, _), gradients = objective(model, params, batch)

    def variant(stack):
        return dataclasses.replace(stack, scan_layers=False, remat=Remat.FULL)

    parts = ("local_encoder", "latent", "local_decoder")
    changed = {name: variant(getattr(model.config, name)) for name in parts}
    other = dataclasses.replace(model.config, **changed).build()
    (other_value, _), other_gradients = objective(other, params, batch)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradients,
        other_gradients,
    )


@pytest.fixture(scope="module")
def on_one_device():
    """A model, its parameters, eight rows, and their objective and gradients."""
    settings = config(
        local_encoder=TransformerConfig(
            num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=24, window=6
        )
    )
    model, params = build(settings)
    batch = packed(rows=8)
    return model, params, batch, objective(model, params, batch)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8), MeshConfig(data=1, fsdp=8)],
    ids=str,
)
def test_sharded_equals_single_device(mesh, on_one_device):
    model, params, batch, ((value, sums), gradients) = on_one_device
    mesh = make_mesh(mesh)
    placed = jax.device_put(params, param_shardings(model, mesh))
    with jax.set_mesh(mesh):
        (other, other_sums), other_gradients = objective(model, placed, batch)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    assert other_sums.metrics["patches"] == sums.metrics["patches"]
    assert_leaves_close(other_gradients, gradients)
    table = placed["ngram_embedding"]["f0_n3"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert table.addressable_shards[0].data.size == table.size // parts


def test_bfloat16_is_close(small):
    model, params = small
    batch = packed()
    exact = run(model, params, batch).logits
    half = dataclasses.replace(model.config, precision=Precision.BFLOAT16).build()
    found = run(half, params, batch).logits
    assert found.dtype == jnp.float32
    real = np.asarray(batch["segment_ids"]) > 0
    error = np.asarray(found - exact)[real]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.03 * np.std(np.asarray(exact)[real])
    assert np.abs(error).max() < 0.1 * np.abs(np.asarray(exact)).max()


def test_overflow_is_masked_and_counted(small):
    model, params = small
    batch = packed()
    few = dataclasses.replace(model.config, max_patches=6).build()
    sums = jax.jit(few.loss)(params, batch)
    decoder_ids = np.asarray(blt_patching.decoder_ids(batch["starts"], batch["segment_ids"]))
    mask = np.asarray(batch["target_mask"])
    kept = mask & (decoder_ids < 6)
    assert 0 < kept.sum() < mask.sum()
    assert float(sums.weight) == kept.sum()
    assert float(sums.metrics["dropped_targets"]) == mask.sum() - kept.sum()
    # What is kept is what the model with room for all patches says.
    whole = run(model, params, batch).logits
    log_p = jax.nn.log_softmax(whole)
    nats = -np.take_along_axis(np.asarray(log_p), np.asarray(batch["targets"])[..., None], -1)
    np.testing.assert_allclose(sums.metrics["nats"], nats[..., 0][kept].sum(), rtol=1e-5)


def test_loss_sums(small):
    model, params = small
    batch = packed()
    sums = objective(model, params, batch)[0][1]
    found = {name: float(value) for name, value in sums.metrics.items()}
    mask = np.asarray(batch["target_mask"])
    assert float(sums.weight) == mask.sum() == found["bytes"]
    assert found["dropped_targets"] == 0
    assert found["patched_bytes"] == (np.asarray(batch["segment_ids"]) > 0).sum()
    assert found["patches"] == np.asarray(batch["starts"])[:, :-1].sum()
    logits = np.asarray(run(model, params, batch).logits)
    best = logits.argmax(-1) == np.asarray(batch["targets"])
    assert found["correct"] == (best & mask).sum()
    z = dataclasses.replace(model.config, z_loss=0.1).build()
    z = jax.jit(z.loss)(params, batch)
    log_z = np.asarray(jax.nn.logsumexp(logits, axis=-1))[mask]
    expected = sums.objective + 0.1 * np.square(log_z).sum()
    np.testing.assert_allclose(z.objective, expected, rtol=1e-5)
    np.testing.assert_allclose(z.metrics["nats"], sums.metrics["nats"], rtol=1e-6)


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, variable.aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from shapes_of(inner.jaxpr)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    yield from shapes_of(inner)


def test_nothing_is_bytes_by_bytes_or_patches_by_bytes():
    """Training keeps arrays linear in the bytes; [P, P] of the latent transformer aside."""
    N, P = 1200, 300
    model = config(max_patches=P).build()
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((1, N), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions", "target_bytes"), row)
    batch["target_mask"] = jax.ShapeDtypeStruct((1, N), bool)
    batch["starts"] = jax.ShapeDtypeStruct((1, N + 1), bool)
    step = jax.make_jaxpr(jax.grad(lambda p, b: model.loss(p, b).objective))(params, batch)
    found = {(name, shape) for name, shape in shapes_of(step.jaxpr)}
    assert len(found) > 100
    large = [
        (name, shape)
        for name, shape in found
        if len(shape) > 1 and sorted(shape)[-1] >= N and sorted(shape)[-2] >= P
    ]
    assert not large


def test_key_values_of_a_prefill(small):
    """Keys and values of all three stacks come back when asked for."""
    model, params = small
    batch = packed()
    N = batch["tokens"].shape[1]
    out = jax.jit(
        lambda p: model.apply(
            {"params": p},
            batch["tokens"],
            batch["starts"],
            batch["segment_ids"],
            batch["positions"],
            True,
        )
    )(params)
    kv = out.aux.key_values
    assert kv.encoder.key.shape == (2, 2, N, 2, 4)
    assert kv.latent.value.shape == (2, 2, N, 4, 6)
    assert kv.decoder.key.shape == (2, 2, N, 2, 4)
    assert out.aux.encoder_states.shape == (2, 2, N, 16)


def test_exact_ngrams():
    settings = config(ngrams=NgramConfig(kind=NgramKind.EXACT, sizes=(2, 3), vocab_size=24))
    batch = packed()
    documents = [np.asarray(batch["tokens"][0])]
    tables = build_ngram_tables(documents, (2, 3), 24)
    model = settings.build(ngram_tables=tables)
    params = init_params(model, jax.random.key(0))
    logits = run(model, params, batch).logits
    moved = jax.tree.map(lambda x: x, params)
    moved["ngram_embedding"] = jax.tree.map(lambda x: x.at[4:].add(1.0), moved["ngram_embedding"])
    changed = np.asarray(jnp.abs(run(model, moved, batch).logits - logits).max(-1)) > 1e-4
    # Row 0 is the text the tables were made of; its first byte has no n-gram.
    assert changed[0, 3:9].all()
    assert not changed[0, 0]
    with pytest.raises(ValueError, match="needs build"):
        init_params(settings.build(), jax.random.key(0))
    with pytest.raises(ValueError, match="other kinds take none"):
        init_params(config().build(ngram_tables=tables), jax.random.key(0))


def test_depth_scaling_reaches_every_layer():
    def stacks(scaling):
        return {
            name: dataclasses.replace(getattr(config(), name), depth_scaling=scaling)
            for name in ("local_encoder", "latent", "local_decoder")
        }

    plain = init_params(config().build(), jax.random.key(0))
    scaled = config(**stacks(DepthScaling.CURRENT)).build()
    scaled = init_params(scaled, jax.random.key(0))
    for path in (("local_decoder", "layers", "cross_attention", "query"),):
        a, b = plain, scaled
        for name in path:
            a, b = a[name], b[name]
        ratio = np.asarray(a / b).reshape(2, -1)
        np.testing.assert_allclose(ratio[0], 2**0.5, rtol=1e-5)
        np.testing.assert_allclose(ratio[1], 2.0, rtol=1e-5)


# ------------------------------------------------------------------------------- bad inputs


def test_bad_inputs(small):
    model, params = small
    batch = packed()
    tokens, starts, segments = batch["tokens"], batch["starts"], batch["segment_ids"]

    def call(*args):
        return model.apply({"params": params}, *args)

    with pytest.raises(TypeError, match="tokens has dtype float32"):
        blt.check_inputs(tokens.astype(jnp.float32), starts)
    with pytest.raises(ValueError, match=r"ids 0\.\.260"):
        call(tokens.at[0, 3].set(260), starts, segments)
    with pytest.raises(ValueError, match=r"ids -1\.\."):
        call(tokens.at[0, 3].set(-1), starts, segments)
    with pytest.raises(ValueError, match="one for the last target"):
        call(tokens, starts[:, :-1], segments)
    with pytest.raises(ValueError, match="segment_ids has shape"):
        blt.check_inputs(tokens, starts, segments[:, :-1])
    with pytest.raises(ValueError, match="the first and the second token"):
        call(tokens, starts.at[1, 1].set(False), segments)
    with pytest.raises(ValueError, match="the first and the second token"):
        call(tokens, starts.at[0, 11].set(False), segments)
    with pytest.raises(ValueError, match="needs at least the BOS id"):
        call(jnp.zeros((1, 0), jnp.int32), jnp.ones((1, 1), bool))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_cross_heads": 3}, "encoder_cross_heads=3: 3 heads must divide the width 16"),
        ({"decoder_cross_heads": 5}, "decoder_cross_heads=5"),
        ({"decoder_cross_kv_heads": 3}, "decoder_cross_kv_heads=3: 3 must divide the 4 heads"),
        ({"cross_attn_k": 0}, "cross_attn_k=0: must be >= 1"),
        ({"max_patches": -1}, "max_patches=-1"),
        ({"patch_window": 0}, "patch_window=0"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"mean_patch_bytes": 0.5}, "mean_patch_bytes=0.5"),
        (
            {"local_decoder": TransformerConfig(num_layers=1, d_model=8, num_heads=2)},
            r"local_decoder.d_model=8: must equal local_encoder.d_model=16",
        ),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


# ------------------------------------------------------------------ sizes and FLOPs of the paper


def test_parameter_counts_of_the_table():
    counts = {
        "400m": (blt.paper_400m(), (7.1e6, 472e6, 49.5e6)),
        "1b": (blt.paper_1b(), (12.6e6, 1.26e9, 113e6)),
        "2b": (blt.paper_2b(), (12.6e6, 2.04e9, 113e6)),
        "4b": (blt.paper_4b(), (12.6e6, 4.08e9, 113e6)),
        "8b": (blt.paper_8b(), (19.7e6, 6.44e9, 118e6)),
    }
    for settings, expected in counts.values():
        stacks = (settings.local_encoder, settings.latent, settings.local_decoder)
        found = [blt_config.block_parameters(stack) for stack in stacks]
        np.testing.assert_allclose(found, expected, rtol=0.005)


def test_only_unequal_widths_are_projected():
    sizes = {
        "400m": blt.paper_400m(),
        "1b": blt.paper_1b(),
        "2b": blt.paper_2b(),
        "4b": blt.paper_4b(),
        "8b": blt.paper_8b(),
        "released": blt.released_1b(),
    }
    projected = set()
    for name, settings in sizes.items():
        # One layer of each is enough for the shapes in question.
        parts = ("local_encoder", "latent", "local_decoder")
        short = {p: dataclasses.replace(getattr(settings, p), num_layers=1) for p in parts}
        model = dataclasses.replace(settings, **short).build()
        model_init = functools.partial(model.init, jax.random.key(0), *model.example_inputs())
        params = jax.eval_shape(model_init)["params"]
        if "latent_projection" in params:
            projected.add(name)
        rows = 500_002 if name == "released" else 500_000
        assert len(params["ngram_embedding"]) == 6
        table = params["ngram_embedding"]["f0_n8"].unbox()
        assert table.shape == (rows, settings.local_encoder.d_model)
    assert projected == {"400m", "2b", "8b"}


def test_paper_flops():
    parts = blt.paper_flops_per_byte(blt.paper_8b(), 4.5, 16384)
    np.testing.assert_allclose(parts, (3.0755e9, 4.0635e7, 2.4446e8, 1.239e7, 7.435e7), rtol=1e-3)
    np.testing.assert_allclose(sum(parts), 3.4473e9, rtol=1e-4)
    bpe = blt_config.paper_transformer_flops(4096, 32, 16384 / 4.4, 128_000) / 4.4
    np.testing.assert_allclose(bpe, 3.3886e9, rtol=1e-4)
    for settings, expected in ((blt.paper_1b(), 9.240e8), (blt.paper_400m(), 3.818e8)):
        np.testing.assert_allclose(
            sum(blt.paper_flops_per_byte(settings, 4.5, 8192)), expected, rtol=1e-3
        )


def test_exact_flops_agree_with_the_papers():
    for settings in (blt.paper_400m(), blt.paper_1b(), blt.paper_8b()):
        exact = settings.build().flops_per_token(8192)
        paper = sum(blt.paper_flops_per_byte(settings, settings.mean_patch_bytes, 8192))
        assert abs(exact / paper - 1) < 0.1


# ---------------------------------------------------------------------------- entropy model


@pytest.fixture(scope="module")
def entropy_model():
    stack = TransformerConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, window=5)
    model = blt.EntropyModelConfig(transformer=stack, precision=Precision.FLOAT32).build()
    return model, init_params(model, jax.random.key(0))


def test_entropy_model(entropy_model):
    model, params = entropy_model
    batch = packed()
    apply = jax.jit(lambda *args: model.apply({"params": params}, *args))
    out = apply(batch["tokens"], batch["segment_ids"])
    p = np.asarray(jax.nn.softmax(out.logits.astype(jnp.float32)), np.float64)
    np.testing.assert_allclose(out.aux, -(p * np.log(p)).sum(-1), rtol=1e-5)
    # Each document alone.
    begin = 0
    for size in (11, 4, 9):
        alone = apply(
            jnp.pad(batch["tokens"][:, begin : begin + size], ((0, 0), (0, 26 - size))),
            jnp.pad(jnp.ones((2, size), jnp.int32), ((0, 0), (0, 26 - size))),
        )
        np.testing.assert_allclose(
            out.logits[:, begin : begin + size], alone.logits[:, :size], atol=1e-5
        )
        begin += size
    # Causal, and blind beyond two layers of four bytes back.
    changed = batch["tokens"].at[:, 0].set(100)
    moved = np.asarray(jnp.abs(apply(changed, None).aux - apply(batch["tokens"], None).aux))
    assert (moved[:, :5] > 0).all()
    assert (moved[:, 9:] == 0).all()
    later = apply(batch["tokens"].at[:, 9].set(100), None).aux
    np.testing.assert_array_equal(later[:, :9], apply(batch["tokens"], None).aux[:, :9])


def test_entropy_model_forgets_at_newlines(entropy_model):
    model, params = entropy_model
    tokens = jnp.array([[1, 70, 71, blt_patching.NEWLINE, 72, 73]], jnp.int32)
    segments, positions = blt_patching.reset_segments(tokens, jnp.ones_like(tokens))
    apply = jax.jit(lambda *args: model.apply({"params": params}, *args).aux)
    line = apply(jnp.pad(tokens[:, 4:], ((0, 0), (0, 4))), None)[:, :2]
    np.testing.assert_allclose(apply(tokens, segments, positions)[:, 4:], line, atol=1e-5)
    assert jnp.abs(apply(tokens, None)[:, 4:] - line).max() > 1e-4


def test_entropy_model_loss_and_sizes(entropy_model):
    model, params = entropy_model
    batch = packed()
    sums = jax.jit(model.loss)(params, batch)
    assert float(sums.weight) == np.asarray(batch["target_mask"]).sum()
    assert 5 < sums.objective / sums.weight < 7
    sizes = {
        blt.entropy_model_paper_100m: 99.5e6,
        blt.entropy_model_paper_512: 48.0e6,
        blt.entropy_model_released: 99.5e6,
    }
    for make, expected in sizes.items():
        made = make().build()
        shapes = jax.eval_shape(lambda made=made: init_params(made, jax.random.key(0)))
        count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
        np.testing.assert_allclose(count, expected, rtol=0.03)
    assert blt.entropy_model_released().transformer.rope.theta == 10_000
    assert blt.entropy_model_paper_100m().transformer.rope.theta == 500_000
    with pytest.raises(ValueError, match=r"z_loss=-1\.0"):
        dataclasses.replace(model.config, z_loss=-1.0)
