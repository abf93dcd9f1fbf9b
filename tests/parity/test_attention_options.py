"""Sink logits against GPT-OSS, linear position bias against MPT and Bloom, of transformers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.alibi import alibi_slopes
from blt_jax.layers.attention import causal_attention
from blt_jax.layers.transformer import PositionEncoding, SelfAttention, TransformerConfig

T = 150
"""Longer than the rows of the dense form."""


def hidden_mask(window):
    """True where a query must not see a key."""
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    return torch.tensor((distance < 0) | (distance >= (window or T)))


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("window", [0, 40])
def test_learned_sink(window):
    H, G, K = 6, 2, 8
    shapes = ((2, T, H, K), (2, T, G, K), (2, T, G, K), (H,))
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    weight = normal(2, T, H, K, seed=9)

    q, k, v, sinks = theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    module = types.SimpleNamespace(sinks=sinks, num_key_value_groups=H // G, training=False)
    mask = torch.zeros(T, T).masked_fill(hidden_mask(window), torch.finfo(torch.float32).min)
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    expected, _ = eager_attention_forward(module, *by_head, mask[None, None], K**-0.5)
    (expected * torch.tensor(weight)).sum().backward()

    @jax.jit
    def ours(q, k, v, sink):
        segment_ids = jnp.ones((2, T), jnp.int32)
        out, vjp = jax.vjp(
            lambda q, k, v, sink: causal_attention(q, k, v, segment_ids, window=window, sink=sink),
            *(q, k, v, sink),
        )
        return out, vjp(jnp.asarray(weight))

    out, gradients = ours(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-6)
    for found, tensor in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(found, tensor.grad.numpy(), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12, 20, 32])
def test_slopes(num_heads):
    ours = alibi_slopes(num_heads)
    mpt = build_mpt_alibi_tensor(num_heads, 3).numpy()[:, 0]
    np.testing.assert_allclose(ours[:, None] * np.array([-2, -1, 0]), mpt, rtol=1e-6)
    bloom = build_alibi_tensor(torch.ones(1, 3), num_heads, torch.float32).numpy()
    np.testing.assert_allclose(ours[:, None] * np.array([0, 1, 2]), bloom[:, 0], rtol=1e-6)


@pytest.mark.parametrize("num_heads", [4, 6])
def test_whole_attention_with_linear_bias(num_heads):
    d_model = 8 * num_heads
    torch.manual_seed(0)
    config = transformers.MptConfig(d_model=d_model, n_heads=num_heads, max_seq_len=T)
    theirs = MptAttention(config, 0).eval()
    x = normal(2, T, d_model, seed=3)
    hidden = torch.tensor(x, requires_grad=True)
    bias = build_mpt_alibi_tensor(num_heads, T)
    expected, _ = theirs(hidden, bias, attention_mask=hidden_mask(0)[None, None])
    expected.square().sum().backward()

    stack = TransformerConfig(
        num_layers=1,
        d_model=d_model,
        num_heads=num_heads,
        position_encoding=PositionEncoding.ALIBI,
    )
    qkv = theirs.Wqkv.weight.detach().numpy().reshape(3, num_heads, 8, d_model)
    out = theirs.out_proj.weight.detach().numpy().reshape(d_model, num_heads, 8)
    params = dict(zip(("query", "key", "value"), np.moveaxis(qkv, 3, 1), strict=True))
    params["out"] = np.moveaxis(out, 0, 2)
    module = SelfAttention(stack, ShardingRules())

    @jax.jit
    def ours(params, x):
        positions = jnp.broadcast_to(jnp.arange(T), (2, T))
        segment_ids = jnp.ones((2, T), jnp.int32)
        inputs = (x, None, positions, segment_ids, 1.0)
        found = module.apply({"params": params}, *inputs)[0]
        return jnp.sum(jnp.square(found)), found

    (_, found), (d_params, d_x) = jax.value_and_grad(ours, (0, 1), has_aux=True)(params, x)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(d_x, hidden.grad.numpy(), atol=5e-5, rtol=1e-3)
    d_qkv = theirs.Wqkv.weight.grad.numpy().reshape(3, num_heads, 8, d_model)
    for name, expected in zip(("query", "key", "value"), np.moveaxis(d_qkv, 3, 1), strict=True):
        np.testing.assert_allclose(d_params[name], expected, atol=5e-5, rtol=1e-3)
