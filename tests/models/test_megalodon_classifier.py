"""The bidirectional blocks of Megalodon's classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.sharding import init_params
from blt_jax.models import megalodon
from blt_jax.models.megalodon_classifier import ClassifierConfig

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


def test_bad_configs():
    with pytest.raises(ValueError, match="bidirectional=False: must be True"):
        ClassifierConfig(blocks=megalodon.small(**SIZES), num_classes=3)
    with pytest.raises(ValueError, match="num_classes=1: must be >= 2"):
        ClassifierConfig(blocks=CONFIG.blocks, num_classes=1)
