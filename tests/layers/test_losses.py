"""Cross-entropy sums against a float64 computation in numpy, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers import losses


def _example(seed=0, shape=(2, 5), vocab=7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, vocab)).astype(np.float32) * 3
    targets = rng.integers(vocab, size=shape).astype(np.int32)
    mask = rng.random(shape) < 0.6
    mask[0, 0] = True
    return logits, targets, mask


def _log_probs(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _sums(logits, targets, mask, z_loss=0.0):
    return losses.cross_entropy_sums(
        jnp.asarray(logits),
        jnp.asarray(targets),
        jnp.asarray(mask),
        jnp.full(mask.shape, 3, jnp.int32),
        z_loss,
    )


def test_sums_against_numpy():
    logits, targets, mask = _example()
    sums = _sums(logits, targets, mask, z_loss=1e-2)
    log_p = _log_probs(logits)
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0][mask].sum()
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(sums.metrics["nats"], nats, rtol=1e-6)
    np.testing.assert_allclose(sums.objective, nats + 1e-2 * (log_z[mask] ** 2).sum(), rtol=1e-5)
    assert float(sums.weight) == mask.sum()
    assert float(sums.metrics["bytes"]) == 3 * mask.sum()
    assert float(sums.metrics["correct"]) == (logits.argmax(-1) == targets)[mask].sum()


def test_gradient_is_softmax_minus_one_hot():
    logits, targets, mask = _example(1)
    gradient = jax.grad(lambda x: _sums(x, targets, mask).objective)(jnp.asarray(logits))
    expected = (np.exp(_log_probs(logits)) - np.eye(7)[targets]) * mask[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_masked_rows_count_nothing_even_if_infinite():
    logits, targets, mask = _example(2)
    bad = logits.copy()
    bad[~mask] = np.inf
    assert float(_sums(logits, targets, mask).objective) == float(
        _sums(bad, targets, mask).objective
    )


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, mask = _example(4)
    assert _sums(jnp.asarray(logits, jnp.bfloat16), targets, mask).objective.dtype == jnp.float32


def test_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match="z_loss=-1"):
        _sums(*_example(), z_loss=-1.0)
