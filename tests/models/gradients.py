"""Gradients of two layouts of one program."""

import jax
import numpy as np


def assert_leaves_close(found, expected, relative=1e-5):
    """Every leaf agrees to `relative` of its own largest value, so that small leaves count too."""
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, x), y in pairs:
        atol, name = relative * np.abs(y).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)
