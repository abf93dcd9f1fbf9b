"""The settings every other test relies on."""

import warnings

import jax
import jax.numpy as jnp
import pytest


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_dtype_promotion_is_strict():
    with pytest.raises(Exception, match="no available implicit dtype promotion path"):
        jnp.ones(3, jnp.bfloat16) * jnp.ones(3, jnp.float32)


def test_warning_of_own_package_is_an_error():
    with pytest.raises(UserWarning, match="from us"):
        warnings.warn_explicit("from us", UserWarning, "x.py", 1, module="blt_jax.layers.norms")
    with pytest.raises(RuntimeWarning, match="kwargs are not supported"):
        warnings.warn("kwargs are not supported in scan, so x is ignored", RuntimeWarning)
