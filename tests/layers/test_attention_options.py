"""Position bias, sink logit and prefix: the dense form beside numpy, the others beside it."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers import block_attention
from blt_jax.layers import cache as caches
from blt_jax.layers.alibi import alibi_slopes
from blt_jax.layers.attention import causal_attention, dense_causal_attention, masked_attention
from blt_jax.layers.block_attention import Plan
from blt_jax.layers.cache import LayerCache
from blt_jax.layers.prefix import Prefix
from blt_jax.layers.sharded_attention import sharded_causal_attention
from blt_jax.layers.step import attend_slots

RULES = ShardingRules()
ALL = ("slopes", "sink", "prefix")
EACH = [("slopes",), ("sink",), ("prefix",), ALL]


def arrays(length, heads=4, kv_heads=2, prefix=2, width=8, value_width=6):
    """Arguments of packed rows with padding, and the three options."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    segments[0, length - length // 6 :] = 0
    distance = jnp.asarray(rng.integers(prefix, 50, (2, length)), jnp.int32)
    arguments = (
        normal(2, length, heads, width),
        normal(2, length, kv_heads, width),
        normal(2, length, kv_heads, value_width),
        jnp.asarray(segments),
    )
    keys = (normal(prefix, kv_heads, width), normal(prefix, kv_heads, value_width), distance)
    options = {
        "slopes": jnp.asarray(alibi_slopes(heads)),
        "sink": normal(heads),
        "prefix": Prefix(*keys),
    }
    return arguments, options


def chosen(options, names):
    options = {name: options[name] for name in names}
    if "prefix" in options and "slopes" not in options:
        options["prefix"] = options["prefix"].replace(distance=None)
    return options


def with_gradients(attend, arguments, options):
    """Output and gradients of q, k, v and of the options that have one."""
    q, k, v, segments = arguments
    parts = {"sink": options.get("sink")}
    if "prefix" in options:
        parts |= {"key": options["prefix"].key, "value": options["prefix"].value}

    def run(q, k, v, parts):
        changed = dict(options)
        if "sink" in options:
            changed["sink"] = parts["sink"]
        if "prefix" in options:
            changed["prefix"] = options["prefix"].replace(key=parts["key"], value=parts["value"])
        return attend(q, k, v, segments, **changed)

    out, vjp = jax.vjp(run, q, k, v, parts)
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return out, vjp(weight.astype(out.dtype))


def assert_close(found, expected, tolerance=1e-5):
    def close(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))

    jax.tree.map(close, found, expected)


def in_float64(arguments, options, window):
    """Every query apart, in numpy."""
    q, k, v, segments = (np.asarray(x, np.float64) for x in arguments)
    slopes = np.asarray(options.get("slopes", np.zeros(q.shape[2])), np.float64)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for row, t, head in np.ndindex(q.shape[:3]):
        if segments[row, t] == 0:
            continue
        group = head // (q.shape[2] // k.shape[2])
        near = range(max(0, t - window + 1) if window else 0, t + 1)
        seen = [s for s in near if segments[row, s] == segments[row, t]]
        keys, values = k[row, seen, group], v[row, seen, group]
        distance = t - np.asarray(seen)
        if "prefix" in options:
            prefix = options["prefix"]
            keys = np.concatenate([np.asarray(prefix.key)[:, group], keys])
            values = np.concatenate([np.asarray(prefix.value)[:, group], values])
            far = 0 if prefix.distance is None else int(prefix.distance[row, t])
            distance = np.concatenate([far - np.arange(len(prefix.key)), distance])
        scores = keys @ q[row, t, head] * q.shape[3] ** -0.5 - slopes[head] * distance
        weights = np.exp(scores)
        total = weights.sum()
        if "sink" in options:
            total += np.exp(float(options["sink"][head]))
        out[row, t, head] = weights @ values / total
    return out


@pytest.mark.parametrize("names", EACH, ids=str)
@pytest.mark.parametrize("window", [0, 5])
def test_dense_form_against_numpy(names, window):
    arguments, options = arrays(19)
    options = chosen(options, names)
    found = causal_attention(*arguments, window=window, **options)
    assert_close(found, in_float64(arguments, options, window))


def test_off_by_one_is_a_sink_of_zero():
    (q, k, v, _), _ = arrays(7, kv_heads=4)
    mask = jnp.ones((2, 7, 7), bool)
    found = masked_attention(q, k, v, mask, sink=jnp.zeros(4))
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k, v = wide
    power = np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8))
    weights = power / (1 + power.sum(-1, keepdims=True))
    assert_close(found, np.einsum("bhts,bshj->bthj", weights, v))


PLANS = [
    Plan("window", 128, 37),
    Plan("triangle", 128, 0),
    Plan("tiles", 128, 0),
    Plan("tiles", 128, 150),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("names", [("sink",), ALL], ids=str)
def test_blocks_equal_dense(plan, names, monkeypatch):
    monkeypatch.setattr(block_attention, "make_plan", lambda *_: plan)
    arguments, options = arrays(300)
    options = chosen(options, names)

    def blocks(*x, **options):
        return block_attention.block_attention(*x, window=plan.window, scale=0.3, **options)

    def dense(*x, **options):
        return dense_causal_attention(*x, window=plan.window, scale=0.3, **options)

    found = jax.jit(lambda: with_gradients(blocks, arguments, options))()
    expected = jax.jit(lambda: with_gradients(dense, arguments, options))()
    assert_close(found, expected)


@pytest.mark.parametrize("length", [20, 150])
def test_bfloat16(length):
    arguments, options = arrays(length)

    def narrow(x):
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    prefix = jax.tree.map(narrow, options["prefix"])
    inputs = tuple(map(narrow, arguments)), options | {"prefix": prefix}
    found = jax.jit(lambda: with_gradients(causal_attention, *inputs))()
    expected = jax.jit(lambda: with_gradients(dense_causal_attention, arguments, options))()
    assert found[0].dtype == jnp.bfloat16
    assert_close(found, expected, 2e-2)


def test_memory_is_linear(monkeypatch):
    monkeypatch.setattr(block_attention, "TILE", 64)
    arguments, options = arrays(2048, heads=1, kv_heads=1)

    def largest_in(jaxpr):
        sizes = [variable.aval.size for eqn in jaxpr.eqns for variable in eqn.outvars]
        inner = (x for eqn in jaxpr.eqns for x in jax.extend.core.jaxprs_in_params(eqn.params))
        return max(sizes + [largest_in(x) for x in inner], default=0)

    def largest(attend):
        attend = functools.partial(attend, window=1200)
        return largest_in(
            jax.make_jaxpr(lambda: with_gradients(attend, arguments, options))().jaxpr
        )

    assert largest(causal_attention) <= 2 * 2048 * 3 * 8
    assert largest(dense_causal_attention) >= 2048**2


@pytest.mark.parametrize("window", [0, 4])
def test_attention_over_slots_equals_the_last_row_of_the_full_one(window, monkeypatch):
    monkeypatch.setattr(caches, "FIRST_CHUNK", 3)  # several chunks
    T = 10
    (q, k, v, _), options = arrays(T)
    options = chosen(options, ("slopes", "sink"))
    slots = window or T
    full = dense_causal_attention(q, k, v, jnp.ones((2, T), jnp.int32), window=window, **options)
    for t in (0, 2, 3, 4, 5, 9):
        lengths = jnp.full(2, t + 1, jnp.int32)
        cache = LayerCache.from_rows(k, v, 0 * lengths, lengths, slots, jnp.float32)
        distance = (t - jnp.arange(slots, dtype=jnp.int32)) % slots
        distance = jnp.broadcast_to(distance, (2, slots))
        begin, end = 0 * lengths, jnp.minimum(lengths, slots)
        out = jax.jit(attend_slots)(q[:, t], cache, begin, end, distance=distance, **options)
        np.testing.assert_allclose(out, full[:, t], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kv_heads", "window"),
    [
        (MeshConfig(data=2, tensor=4), 2, 0),
        (MeshConfig(context=4, data=2), 2, 0),
        (MeshConfig(context=4, data=1, tensor=2), 1, 7),
    ],
    ids=str,
)
def test_sharded_equals_one_device(config, kv_heads, window):
    arguments, options = arrays(64, kv_heads=kv_heads)

    def attend(*x, **options):
        return sharded_causal_attention(*x, window=window, sharding=RULES, **options)

    def dense(*x, **options):
        return dense_causal_attention(*x, window=window, **options)

    expected = jax.jit(lambda: with_gradients(dense, arguments, options))()
    with jax.set_mesh(make_mesh(config)):
        found = jax.jit(lambda: with_gradients(attend, arguments, options))()
    assert_close(found, expected, 2e-5)


def test_pieces_of_a_row():
    arguments, options = arrays(64)
    options = chosen(options, ("sink", "prefix"))

    def attend(*x, **options):
        return sharded_causal_attention(*x, window=9, sharding=RULES, pieces=4, **options)

    def dense(*x, **options):
        return dense_causal_attention(*x, window=9, **options)

    found = jax.jit(lambda: with_gradients(attend, arguments, options))()
    expected = jax.jit(lambda: with_gradients(dense, arguments, options))()
    # The padding at the end of the first row is that of its last piece.
    assert_close(found, expected)


def test_slopes():
    np.testing.assert_array_equal(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(16), 2.0 ** -(np.arange(1, 17) / 2), rtol=1e-6)
    np.testing.assert_allclose(
        alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-6
    )
    with pytest.raises(ValueError, match="num_heads=0: must be >= 1"):
        alibi_slopes(0)


def test_errors():
    arguments, options = arrays(8)
    with pytest.raises(ValueError, match=r"pieces=2: must be 1 with slopes"):
        sharded_causal_attention(
            *arguments, sharding=RULES, pieces=2, **chosen(options, ("slopes",))
        )
    options["prefix"] = options["prefix"].replace(distance=None)
    with pytest.raises(ValueError, match=r"prefix\.distance=None: slopes need"):
        causal_attention(*arguments, **options)
    cache = LayerCache.create(2, 2, 4, 8, jnp.float32)
    one = jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="distance=None, but slopes need"):
        attend_slots(arguments[0][:, 0], cache, 0 * one, one, slopes=options["slopes"])
