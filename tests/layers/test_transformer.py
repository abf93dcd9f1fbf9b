import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules, param_shapes
from blt_jax.layers.projection import DepthScaling
from blt_jax.layers.rope import RopeConfig, apply_rope
from blt_jax.layers.transformer import Remat, Transformer, TransformerConfig

CONFIG = TransformerConfig(
    num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=24, rope=RopeConfig(theta=100.0)
)
INPUTS = (
    jax.random.normal(jax.random.key(0), (2, 6, 16)),
    jnp.broadcast_to(jnp.arange(6), (2, 6)),
    jnp.array([[1] * 6, [1, 1, 1, 2, 2, 0]]),
)


TOKENS = jax.ShapeDtypeStruct((2, 4), jnp.int32)


def init(config, seed=0):
    module = Transformer(config, ShardingRules())
    variables = jax.jit(lambda: module.init(jax.random.key(seed), *INPUTS))()
    return module, nn.unbox(variables["params"])


def by_hand(config, params, x, positions, segments):
    """The blocks in plain numpy and float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers"])
    x = np.asarray(x, np.float64)
    T, K = x.shape[1], config.head_width

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def rotated(x):
        return np.asarray(apply_rope(jnp.asarray(x, jnp.float32), positions, config.rope))

    index, segments = np.arange(T), np.asarray(segments)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < (config.window or T))
    mask = mask[None] & (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    for i in range(config.num_layers):
        a, m = p["attention"], p["mlp"]
        h = norm(x, p["attention_norm"]["weight"][i])
        q = rotated(np.einsum("btd,dhk->bthk", h, a["query"][i]))
        k = rotated(np.einsum("btd,dgk->btgk", h, a["key"][i]))
        v = np.einsum("btd,dgk->btgk", h, a["value"][i])
        repeats = config.num_heads // config.kv_heads
        k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)
        scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
        weights = np.exp(np.where(mask[:, None], scores, -np.inf))
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        x = x + np.einsum("bhts,bshk,hkd->btd", weights, v, a["out"][i])
        h = norm(x, p["mlp_norm"]["weight"][i])
        gate = h @ m["gate"][i]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"][i])) @ m["down"][i]
    return x


@pytest.mark.parametrize(
    "changes",
    [{}, dict(window=2), dict(num_kv_heads=4, head_dim=6), dict(num_kv_heads=1, norm_eps=0.1)],
    ids=str,
)
def test_against_plain_numpy(changes):
    config = dataclasses.replace(CONFIG, **changes)
    module, params = init(config)
    out, key_values = jax.jit(lambda p: module.apply({"params": p}, *INPUTS))(params)
    assert key_values is None
    np.testing.assert_allclose(out, by_hand(config, params, *INPUTS), atol=1e-4)


def test_parameters_do_not_depend_on_how_layers_run():
    trees = []
    for changes in ({}, dict(scan_layers=False), dict(remat=Remat.FULL)):
        trees.append(init(dataclasses.replace(CONFIG, **changes))[1])
    for other in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, trees[0], other)
    flat = flax.traverse_util.flatten_dict(trees[0])
    assert all(path[0] == "layers" and leaf.shape[0] == 3 for path, leaf in flat.items())
    gate = flat["layers", "mlp", "gate"]
    assert float(jnp.abs(gate[0] - gate[1]).max()) > 0.1  # layers draw their own values


@pytest.mark.parametrize("remat", [Remat.SAVE_DOTS, Remat.FULL])
def test_remat_changes_no_gradient(remat):
    module, params = init(CONFIG)
    other = Transformer(dataclasses.replace(CONFIG, remat=remat), ShardingRules())

    def grads(module):
        f = lambda p: jnp.sum(jnp.square(module.apply({"params": p}, *INPUTS)[0]))  # noqa: E731
        return jax.jit(jax.grad(f))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        grads(module),
        grads(other),
    )


def test_depth_scaling_divides_each_layer():
    plain = init(CONFIG)[1]["layers"]["mlp"]["gate"]
    current = dataclasses.replace(CONFIG, depth_scaling=DepthScaling.CURRENT)
    ratio = plain / init(current)[1]["layers"]["mlp"]["gate"]
    for layer in range(3):
        np.testing.assert_allclose(ratio[layer], (2 * (layer + 1)) ** 0.5, rtol=1e-4)


def test_key_values_are_stacked_on_layers():
    module, params = init(CONFIG)
    _, key_values = module.apply({"params": params}, *INPUTS, True)
    assert key_values.key.shape == key_values.value.shape == (3, 2, 6, 2, 4)


def test_more_devices_than_kv_heads():
    """Keys and values replicate where they cannot be divided over the tensor axis."""
    from blt_jax.models import llama3

    rules = ShardingRules(kv_heads=(), vocab=(), vocab_act=())
    config = llama3.small(vocab_size=10, num_layers=1, d_model=16, num_heads=8, num_kv_heads=2)
    model = config.build(rules)
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    shapes = param_shapes(model)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)
        lowered = logits.lower(shapes, TOKENS)
        assert lowered.out_info.shape == (2, 4, 10)
        strict = config.build(ShardingRules(vocab=(), vocab_act=()))
        with pytest.raises(ValueError, match=r"'kv_heads' of size 2 .* cannot be divided"):
            jax.eval_shape(lambda p, t: strict.apply({"params": p}, t).logits, shapes, TOKENS)


def test_usual_values_and_flops():
    config = TransformerConfig(num_layers=2, d_model=96, num_heads=3)
    assert (config.kv_heads, config.head_width, config.mlp_width) == (3, 32, 256)
    products = 2 * (4 * 96 * 96 + 3 * 96 * 256)
    assert config.flops_per_token(101.0) == 2 * (products + 4 * 96 * 51)
    windowed = dataclasses.replace(config, window=10)
    assert windowed.flops_per_token(101.0) == 2 * (products + 4 * 96 * 10)
