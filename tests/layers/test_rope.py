import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers.rope import RopeConfig, RopeLayout, apply_rope, rope_frequencies

RELEASE = RopeConfig(scaling_factor=8.0)
HALF = RopeConfig(layout=RopeLayout.HALF_SPLIT)


def test_unscaled_frequencies():
    freq = rope_frequencies(RopeConfig(theta=10_000.0), 8)
    np.testing.assert_allclose(freq, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert freq.dtype == np.float32


def test_golden_values_of_release_3_1():
    scaled, plain = rope_frequencies(RELEASE, 128), rope_frequencies(RopeConfig(), 128)
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_allclose(scaled[35:], plain[35:] / 8, rtol=1e-6)
    golden = {
        28: 3.2114461e-3,
        29: 2.1665704e-3,
        30: 1.3718937e-3,
        32: 5.2484608e-4,
        35: 9.556212e-5,
        63: 3.0689259e-7,
    }
    for index, value in golden.items():
        np.testing.assert_allclose(scaled[index], value, rtol=1e-6)
    blended = scaled[29:35]
    assert (blended < plain[29:35]).all() and (blended > plain[29:35] / 8).all()


def by_complex_numbers(x, positions, config):
    """x [B, T, H, K] in float64, pairs as complex numbers."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    interleaved = config.layout is RopeLayout.INTERLEAVED
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    freq = rope_frequencies(config, x.shape[-1]).astype(np.float64)
    z = (a + 1j * b) * np.exp(1j * np.asarray(positions)[:, :, None, None] * freq)
    y = np.empty_like(x)
    if interleaved:
        y[..., 0::2], y[..., 1::2] = z.real, z.imag
    else:
        y[..., :half], y[..., half:] = z.real, z.imag
    return y


@pytest.mark.parametrize("layout", list(RopeLayout))
def test_rotation(layout):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 0, 1, 100, 2]])
    config = RopeConfig(theta=100.0, layout=layout)
    expected = by_complex_numbers(x, positions, config)
    np.testing.assert_allclose(apply_rope(x, positions, config), expected, atol=1e-5)


def test_layouts_differ_by_a_permutation_of_features():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    positions = jnp.arange(6)[None]
    order = jnp.array([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = apply_rope(x, positions, RopeConfig())
    np.testing.assert_allclose(
        apply_rope(x[..., order], positions, HALF), interleaved[..., order], atol=1e-6
    )


def test_scores_depend_on_distances_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 8))
    positions = jnp.arange(4)[None]

    def scores(shift):
        a, b = (apply_rope(x, positions + shift, HALF) for x in (q, k))
        return jnp.einsum("bthk,bshk->bts", a, b)

    np.testing.assert_allclose(scores(0), scores(1000), atol=1e-3)


def test_angles_are_float32_for_bfloat16_inputs():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8), jnp.bfloat16)
    positions = jnp.array([[100_003]])
    y = apply_rope(x, positions, RopeConfig())
    assert y.dtype == jnp.bfloat16
    expected = by_complex_numbers(x.astype(jnp.float32), positions, RopeConfig())
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03)


def test_odd_width():
    with pytest.raises(ValueError, match="head_dim=7: rotary embedding needs an even width"):
        rope_frequencies(RopeConfig(), 7)


def test_overrides_are_validated_again():
    config = dataclasses.replace(RELEASE)
    config.high_freq_factor = 0.5
    with pytest.raises(ValueError, match=r"low_freq_factor=1\.0: must be > 0 and below"):
        config.__post_init__()
