import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params
from blt_jax.interop.nnx import from_nnx, to_nnx
from blt_jax.models import llama3

TOKENS = jax.random.randint(jax.random.key(1), (8, 6), 0, 260)


def test_same_logits_and_params():
    model = llama3.byte_level(num_kv_heads=2).build()
    params = init_params(model, jax.random.key(0))
    module = to_nnx(model, params)
    np.testing.assert_array_equal(
        module(TOKENS).logits, model.apply({"params": params}, TOKENS).logits
    )
    jax.tree.map(np.testing.assert_array_equal, from_nnx(module), params)


def test_trains_under_nnx_transforms():
    model = llama3.byte_level(num_layers=1, d_model=16, num_heads=2).build()
    module = to_nnx(model, init_params(model, jax.random.key(0)))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)

    def loss(module):
        logits = module(TOKENS[:, :-1]).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]))

    @nnx.jit
    def step(module, optimizer):
        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1


def test_sharded_params_stay_sharded():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = llama3.byte_level().build()
    params = init_params(model, jax.random.key(0), mesh)
    module = to_nnx(model, params)
    assert from_nnx(module)["head"]["kernel"].sharding == params["head"]["kernel"].sharding
    with jax.set_mesh(mesh):
        sharded = nnx.jit(lambda module: module(TOKENS).logits)(module)
    expected = model.apply(
        {"params": jax.tree.map(jnp.asarray, jax.device_get(params))}, TOKENS
    ).logits
    np.testing.assert_allclose(sharded, expected, atol=1e-5)
