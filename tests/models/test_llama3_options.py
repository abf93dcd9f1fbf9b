"""Linear position bias, softmax with a sink, and sink tokens as options of Llama 3."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params, logical_axes
from blt_jax.layers.transformer import PositionEncoding, Remat, Softmax
from blt_jax.models import llama3
from tests.models.gradients import assert_leaves_close

PLAIN = llama3.small(
    vocab_size=50, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, mlp_dim=32
)
T = 16
SEGMENTS = jnp.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * 4 + [2] * 12])
POSITIONS = jnp.array([[*range(7), *range(6), 0, 0, 0], [*range(4), *range(12)]])
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 50)


def changed(sink_tokens=0, **stack):
    stack = dataclasses.replace(PLAIN.transformer, **stack)
    return dataclasses.replace(PLAIN, transformer=stack, sink_tokens=sink_tokens)


OPTIONS = {
    "alibi": changed(position_encoding=PositionEncoding.ALIBI),
    "off_by_one": changed(softmax=Softmax.OFF_BY_ONE),
    "learned_sink": changed(softmax=Softmax.LEARNED_SINK),
    "sink_tokens": changed(sink_tokens=2),
    "all": changed(
        sink_tokens=2,
        position_encoding=PositionEncoding.ALIBI,
        softmax=Softmax.LEARNED_SINK,
        window=5,
    ),
}
every_option = pytest.mark.parametrize("name", list(OPTIONS))


@functools.cache
def make_params(config):
    """Random parameters, learned sinks included."""
    params = init_params(config.build(), jax.random.key(0))
    attention = params["transformer"]["layers"]["attention"]
    if "sink" in attention:
        attention["sink"] = jax.random.normal(jax.random.key(5), attention["sink"].shape)
    return params


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, segment_ids=None, positions=None):
    return model.apply({"params": params}, tokens, segment_ids, positions).logits


def batch():
    real = SEGMENTS > 0
    return {
        "tokens": TOKENS,
        "targets": jnp.roll(TOKENS, -1, axis=1),
        "segment_ids": SEGMENTS,
        "positions": POSITIONS,
        "target_mask": real,
        "target_bytes": real.astype(jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, batch):
    return jax.value_and_grad(lambda p: model.loss(p, batch).objective)(params)


DOCUMENTS = ((0, 0, 7), (0, 7, 13), (1, 0, 4), (1, 4, 16))
"""Row, start and end of the documents in SEGMENTS."""


def apart(before=()):
    """The documents in rows of their own, after the ids `before`: tokens, segments, positions."""
    rows = [jnp.concatenate([jnp.array(before, int), TOKENS[i, a:b]]) for i, a, b in DOCUMENTS]
    length = T + len(before)
    tokens = jnp.stack([jnp.pad(row, (0, length - len(row))) for row in rows])
    size = jnp.array([len(row) for row in rows])
    index = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return tokens, (index < size[:, None]).astype(jnp.int32), index


def assert_documents_equal(packed, separate, skip=0):
    for row, (i, start, end) in zip(separate, DOCUMENTS, strict=True):
        row = row[skip : skip + end - start]
        np.testing.assert_allclose(packed[i, start:end], row, atol=1e-5)


@every_option
def test_packed_equals_separate(name):
    model, params = OPTIONS[name].build(), make_params(OPTIONS[name])
    rows = zip((TOKENS, SEGMENTS, POSITIONS), apart(), strict=True)
    logits = logits_of(model, params, *map(jnp.concatenate, rows))
    assert logits.shape == (6, T, 50)
    assert_documents_equal(logits[:2], logits[2:])


@pytest.mark.parametrize("kind", list(PositionEncoding))
def test_sink_tokens_are_the_first_tokens_of_every_document(kind):
    config = changed(sink_tokens=2, position_encoding=kind)
    model, params = config.build(), make_params(config)
    packed = logits_of(model, params, TOKENS, SEGMENTS, POSITIONS)
    # A model without sink tokens that has them in its vocabulary, as ids 50 and 51.
    wide = dataclasses.replace(config, vocab_size=52, sink_tokens=0).build()
    table = jnp.concatenate([params["embed"]["table"], params["sink_tokens"]])
    head = jnp.pad(params["head"]["kernel"], ((0, 0), (0, 2)))
    plain = {k: v for k, v in params.items() if k != "sink_tokens"}
    plain |= {"embed": {"table": table}, "head": {"kernel": head}}
    expected = logits_of(wide, plain, *apart(before=(50, 51)))
    assert_documents_equal(packed, expected[:, :, :50], skip=2)


def test_a_window_never_hides_the_sink_tokens():
    config = changed(sink_tokens=1, window=3, num_layers=1)
    model, params = config.build(), make_params(config)

    def influence(sinks):
        logits = model.apply({"params": params | {"sink_tokens": sinks}}, TOKENS).logits
        return jnp.abs(logits).sum((0, 2))

    jacobian = jax.jit(jax.jacrev(influence))(params["sink_tokens"])
    assert (jnp.abs(jacobian).sum((1, 2)) > 1e-6).all()


@every_option
def test_causality_through_gradients(name):
    config = OPTIONS[name]
    model, params = config.build(), make_params(config)

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        changed = params | {"embed": {"table": table}}
        return model.apply({"params": changed}, jnp.arange(T)[None], SEGMENTS[:1]).logits[0].sum(-1)

    influence = np.abs(np.asarray(jacobian(params["embed"]["table"]))[:, :T]).sum(-1)
    segments = np.asarray(SEGMENTS[0])
    allowed = np.tril(segments[:, None] == segments[None, :])[:13]
    if config.transformer.window:
        distance = np.arange(13)[:, None] - np.arange(T)[None, :]
        allowed &= distance <= 2 * (config.transformer.window - 1)  # of two layers
    np.testing.assert_array_equal(influence[:13] > 0, allowed)


def test_the_loss_reaches_every_parameter():
    config = OPTIONS["all"]
    value, gradients = loss_and_gradients(config.build(), make_params(config), batch())
    assert np.isfinite(value)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 1e-4
    assert gradients["transformer"]["layers"]["attention"]["sink"].shape == (2, 4)
    assert gradients["sink_tokens"].shape == (2, 24)


def test_scanned_equals_unrolled():
    config = OPTIONS["all"]
    params = make_params(config)
    value, gradients = loss_and_gradients(config.build(), params, batch())
    stack = dataclasses.replace(config.transformer, scan_layers=False, remat=Remat.SAVE_NAMES)
    other = dataclasses.replace(config, transformer=stack).build()
    value_2, gradients_2 = loss_and_gradients(other, params, batch())
    np.testing.assert_allclose(value, value_2, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), gradients, gradients_2
    )


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("all", MeshConfig(data=1, tensor=2, context=2, fsdp=2)),
        ("sink_tokens", MeshConfig(data=2, context=4)),
    ],
    ids=str,
)
def test_sharded_equals_one_device(name, mesh):
    model = OPTIONS[name].build()
    params = make_params(OPTIONS[name])
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch())
    value, gradients = loss_and_gradients(model, params, rows)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, init_params(model, jax.random.key(0), mesh))
        value_2, gradients_2 = loss_and_gradients(model, jax.device_put(params, shardings), rows)
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    assert_leaves_close(gradients_2, gradients)


def test_parameters_and_their_axes():
    axes = logical_axes(OPTIONS["all"].build())
    assert axes["transformer"]["layers"]["attention"]["sink"] == ("layers", "heads")
    assert axes["sink_tokens"] == (None, "embed")
    for name in ("alibi", "off_by_one"):
        assert jax.tree.structure(make_params(OPTIONS[name])) == jax.tree.structure(
            make_params(PLAIN)
        )
    new = init_params(OPTIONS["learned_sink"].build(), jax.random.key(0))
    np.testing.assert_array_equal(new["transformer"]["layers"]["attention"]["sink"], 0.0)


def test_flops_of_the_sink_tokens():
    flops = changed(sink_tokens=3).build().flops_per_token(T) - PLAIN.build().flops_per_token(T)
    assert flops == 3 * 2 * 4 * PLAIN.transformer.d_model


def test_bad_configs():
    with pytest.raises(ValueError, match="sink_tokens=-1: must be >= 0"):
        changed(sink_tokens=-1)
    odd = changed(position_encoding=PositionEncoding.ALIBI, head_dim=7)
    assert odd.transformer.head_width == 7  # only a rotation needs pairs of features
