import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.layers.projection import (
    DepthScaling,
    Initialization,
    depth_divisor,
    project,
    projection_init,
    truncated_normal,
)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_project(on_mesh):
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 5, 2, 7))
    f = jax.jit(lambda x, kernel: project(x, kernel, num_input_axes=2))
    g = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), argnums=(0, 1)))
    expected = jnp.einsum("btij,ijkl->btkl", x, kernel)
    if on_mesh:
        with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
            y, grads = f(x, kernel), g(x, kernel)
    else:
        y, grads = f(x, kernel), g(x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    cos = jnp.cos(expected)
    np.testing.assert_allclose(grads[0], jnp.einsum("btkl,ijkl->btij", cos, kernel), atol=1e-5)
    np.testing.assert_allclose(grads[1], jnp.einsum("btkl,btij->ijkl", cos, x), atol=1e-5)


def test_types():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    kernel = jnp.full((4, 5), 1.003, jnp.float32)
    assert project(x, kernel).dtype == jnp.bfloat16
    assert project(x, kernel, output_dtype=jnp.dtype(jnp.float32)).dtype == jnp.float32


def test_kernel_that_does_not_fit():
    with pytest.raises(ValueError, match=r"x \(2, 3\) does not end in the kernel's inputs \(4,\)"):
        project(jnp.ones((2, 3)), jnp.ones((4, 5)))


def test_initialisers():
    shape, key = (400, 300), jax.random.key(0)
    fan_in = projection_init(Initialization.FAN_IN, 400)(key, shape)
    # A normal cut at three sigma has 0.9866 of its standard deviation.
    np.testing.assert_allclose(jnp.std(fan_in), 0.9866 / 20, rtol=0.01)
    assert float(jnp.abs(fan_in).max()) <= 3 / 20
    normal = projection_init(Initialization.NORMAL_002, 400)(key, shape)
    np.testing.assert_allclose(jnp.std(normal), 0.02, rtol=0.01)
    halved = projection_init(Initialization.FAN_IN, 400, 2.0)(key, shape)
    np.testing.assert_allclose(halved * 2, fan_in, rtol=1e-6)
    assert truncated_normal(0.5)(key, (3,)).dtype == jnp.float32


def test_depth_divisors():
    args = dict(num_layers=7, d_model=2048)
    assert depth_divisor(DepthScaling.NONE, 3, **args) == 1
    np.testing.assert_allclose(depth_divisor(DepthScaling.CURRENT, 3, **args), 8**0.5, rtol=1e-6)
    assert depth_divisor(DepthScaling.TOTAL, 3, **args) == 16**0.5
    assert depth_divisor(DepthScaling.WIDTH, 3, **args) == 0.5
