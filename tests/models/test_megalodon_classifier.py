"""The bidirectional blocks of Megalodon's classifier."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params
from blt_jax.layers.attention import masked_attention
from blt_jax.models import megalodon
from blt_jax.models.megalodon_classifier import ClassifierConfig
from blt_jax.models.megalodon_memory import documents_of
from tests.models.megalodon_numpy import class_logits

SIZES = dict(
    vocab_size=30,
    num_layers=1,
    d_model=16,
    chunk_size=4,
    norm_groups=4,
    qk_dim=8,
    mlp_dim=16,
    scan_form=megalodon.ScanForm.REFERENCE,
)
CONFIG = ClassifierConfig(blocks=megalodon.small(bidirectional=True, **SIZES), num_classes=3)
TOKENS = jax.random.randint(jax.random.key(2), (2, 10), 0, 30, jnp.int32)


@functools.cache
def params():
    return init_params(CONFIG.build(), jax.random.key(0))


@jax.jit
def apply(params, tokens, segment_ids):
    return CONFIG.build().apply({"params": params}, tokens, segment_ids)


@pytest.mark.parametrize("ema", [megalodon.EmaKind.COMPLEX, megalodon.EmaKind.REAL])
def test_equals_the_equations_in_float64(ema):
    """Two layers and heads; a row of 11 tokens and one of 7, in chunks of 4."""
    sizes = SIZES | dict(num_layers=2, num_heads=2, swiglu=True)
    blocks = megalodon.small(bidirectional=True, ema=ema, **sizes)
    model = ClassifierConfig(blocks=blocks, num_classes=3).build()
    leaves, tree = jax.tree.flatten(init_params(model, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    params = jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in pairs])
    tokens = jax.random.randint(jax.random.key(2), (2, 11), 0, 30, jnp.int32)
    lengths = np.array([11, 7])
    segment_ids = jnp.asarray(np.arange(11)[None] < lengths[:, None], jnp.int32)
    logits = jax.jit(model.apply)({"params": params}, tokens, segment_ids).logits
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, length in enumerate(lengths):
        expected = class_logits(blocks, exact, np.asarray(tokens[row, :length]))
        np.testing.assert_allclose(logits[row], expected, atol=2e-6)


def test_every_token_counts_in_both_directions():
    def hidden(table):
        changed = params() | {"embed": {"table": table}}
        row = jnp.arange(10)[None]
        return CONFIG.build().apply({"params": changed}, row).hidden[0].sum(-1)

    jacobian = jax.jit(jax.jacrev(hidden))(params()["embed"]["table"])[:, :10]
    assert (np.abs(np.asarray(jacobian)).sum(-1) > 0).all()


def test_padding_changes_nothing():
    segment_ids = (jnp.arange(10) < 7).astype(jnp.int32)[None].repeat(2, 0)
    other = TOKENS.at[:, 7:].set(0)
    a, b = (apply(params(), tokens, segment_ids) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(a.logits, b.logits)
    assert (np.asarray(a.hidden[:, 7:]) == 0).all() and a.logits.shape == (2, 3)
    alone = apply(params(), TOKENS[:, :7], segment_ids[:, :7]).logits
    np.testing.assert_allclose(a.logits, alone, atol=1e-5)


def test_it_learns_two_rows():
    batch = {"tokens": TOKENS, "labels": jnp.array([0, 2])}
    model = CONFIG.build()

    @jax.jit
    def step(params):
        loss, gradient = jax.value_and_grad(lambda p: model.loss(p, batch).objective)(params)
        return loss, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    state, losses = params(), []
    for _ in range(60):
        loss, state = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_the_length_over_devices_equals_one_device():
    tokens, segment_ids = jnp.tile(TOKENS, (1, 2))[:, :16], jnp.ones((2, 16), jnp.int32)
    segment_ids = segment_ids.at[1, 13:].set(0)
    alone = apply(params(), tokens, segment_ids)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        sharded = jax.jit(lambda p, *x: CONFIG.build().apply({"params": p}, *x))
        shared = sharded(params(), tokens, segment_ids)
    np.testing.assert_allclose(shared.logits, alone.logits, atol=1e-5)
    np.testing.assert_allclose(shared.hidden, alone.hidden, atol=1e-5)


def test_scaled_embeddings_and_dropout():
    blocks = dataclasses.replace(CONFIG.blocks, scale_embeddings=True, dropout=0.5)
    model = dataclasses.replace(CONFIG, blocks=blocks).build()
    assert model.has_dropout() and not CONFIG.build().has_dropout()
    run = jax.jit(lambda params, key=None: model.apply({"params": params}, TOKENS, key=key))
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    scaled = params() | {"embed": {"table": params()["embed"]["table"] * 4.0}}
    expected = apply(scaled, TOKENS, ones).logits
    np.testing.assert_allclose(run(params()).logits, expected, atol=1e-5)
    assert float(jnp.abs(expected - apply(params(), TOKENS, ones).logits).max()) > 1e-3
    # Blocks that add nothing leave the dropout of the embeddings.
    layers = params()["layers"] | {"mlp_down": jnp.zeros_like(params()["layers"]["mlp_down"])}
    idle = params() | {"layers": layers}
    dropped = run(idle, jax.random.key(0)).hidden
    assert float(jnp.abs(dropped - run(idle).hidden).max()) > 0.1


whole = jax.jit(functools.partial(masked_attention, scale=1.0))


@pytest.mark.parametrize("changes", [{}, {"attention_window": 3}])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks_of_scores_equal_the_whole_mask(bidirectional, changes):
    """Chunks and windows; packed rows looking back, one padded sequence looking both ways."""
    T = 41
    config = megalodon.small(**SIZES, bidirectional=bidirectional, **changes)
    segment_ids = jnp.array([[1] * 41, [1] * 26 + [0] * 15], jnp.int32)
    if not bidirectional:
        segment_ids = jnp.array([[1] * 6 + [2] * 22 + [3] * 11 + [0] * 2, [4] * 41], jnp.int32)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, T, 2, 6))
    index = jnp.arange(T)
    for ids in (segment_ids, None):
        documents = None if ids is None else documents_of(ids, config)
        if documents is None:
            group = jnp.broadcast_to(1 + (0 if changes else index // 4), (2, T))
        else:
            group = documents.attention
        distance = index[:, None] - index[None, :]
        near = jnp.abs(distance) < (config.attention_window or T)
        mask = (group[:, :, None] == group[:, None, :]) & (group > 0)[:, :, None] & near[None]
        if not bidirectional:
            mask &= (distance >= 0)[None]
        expected = whole(q, k, v, mask)
        attend = functools.partial(
            megalodon.dense_chunk_attention, documents=documents, config=config
        )
        np.testing.assert_allclose(jax.jit(attend)(q, k, v), expected, atol=1e-6)
    program = jax.make_jaxpr(functools.partial(attend, key=jax.random.key(1)))(q, k, v)
    sizes = [v.aval.size for e in program.jaxpr.eqns for v in e.outvars]
    assert max(sizes) < 2 * 2 * T * T / 2, "no array as large as all scores"


def test_padding_before_a_token_is_an_error():
    model = CONFIG.build()
    model.check_batch({"segment_ids": np.array([[1, 1, 0], [1, 1, 1]])})
    with pytest.raises(ValueError, match=r"rows \[0, 2\] have padding before a token"):
        model.check_batch({"segment_ids": np.array([[0, 1, 1], [1, 1, 0], [1, 0, 1]])})


def test_bad_configs():
    for name, value in (("tied_embeddings", True), ("prior_count", 2), ("logits_chunk", 4)):
        blocks = dataclasses.replace(CONFIG.blocks, **{name: value})
        with pytest.raises(ValueError, match=rf"{name}={value}: must be .*, a classifier has no"):
            ClassifierConfig(blocks=blocks, num_classes=3)
    with pytest.raises(ValueError, match=r"z_loss=0\.1: must be 0\.0, a classifier"):
        blocks = dataclasses.replace(CONFIG.blocks, z_loss=0.1)
        ClassifierConfig(blocks=blocks, num_classes=3)
    with pytest.raises(ValueError, match="bidirectional=False: must be True"):
        ClassifierConfig(blocks=megalodon.small(**SIZES), num_classes=3)
    with pytest.raises(ValueError, match="num_classes=1: must be >= 2"):
        ClassifierConfig(blocks=CONFIG.blocks, num_classes=1)
