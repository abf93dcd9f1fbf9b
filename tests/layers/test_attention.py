"""Blockwise causal attention beside the dense form, and the dense form beside numpy."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blt_jax.layers import attention, block_attention
from blt_jax.layers.block_attention import Plan, make_plan

WINDOW = Plan("window", 128, 37)
TRIANGLE = Plan("triangle", 128, 0)
TILES = Plan("tiles", 128, 0)
TILES_WINDOW = Plan("tiles", 128, 150)
all_plans = pytest.mark.parametrize("plan", [WINDOW, TRIANGLE, TILES, TILES_WINDOW])


def make_arguments(length, heads=4, kv_heads=2, rows=2, seed=0, width=8, dtype=np.float32):
    """q, k, v, segment_ids with several documents per row and padding at the end of one."""
    rng = np.random.default_rng(seed)

    def normal(n):
        return jnp.asarray(rng.normal(size=(rows, length, n, width)), dtype)

    segments = np.sort(rng.integers(1, 5, (rows, length)), axis=1).astype(np.int32)
    segments[0, length - length // 6 :] = 0
    return normal(heads), normal(kv_heads), normal(kv_heads), jnp.asarray(segments)


def blocks(plan):
    """`block_attention` with the plan fixed, so that every form is reached at small sizes."""

    def attend(q, k, v, segments):
        padding = 0 if plan.form == "triangle" else -q.shape[1] % plan.block
        q_, k_, v_ = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)))
        scale = q.shape[3] ** -0.5
        first = jnp.int32(0)
        inputs = (q_, k_, v_, segments, segments, first, None)
        return block_attention._attention(*inputs, plan, scale)[0][:, : q.shape[1]]

    return attend


def dense(plan):
    def attend(*arguments):
        return attention.dense_causal_attention(*arguments, window=plan.window)

    return attend


def value_and_gradients(attend, q, k, v, segments):
    out, vjp = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
    weight = np.random.default_rng(1).normal(size=out.shape)
    return out, *vjp(jnp.asarray(weight, out.dtype))


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


def assert_equals_dense(plan, arguments, tolerance=1e-5):
    found = jax.jit(lambda *x: value_and_gradients(blocks(plan), *x))(*arguments)
    expected = jax.jit(lambda *x: value_and_gradients(dense(plan), *x))(*arguments)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("window", [0, 1, 5])
def test_dense_form_against_numpy(window):
    q, k, v, segments = (np.asarray(x, np.float64) for x in make_arguments(17))
    expected = np.zeros(q.shape)
    for row, t, head in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(t + 1)
            if segments[row, s] == segments[row, t] > 0 and (not window or t - s < window)
        ]
        if seen:
            scores = k[row, seen, head // 2] @ q[row, t, head] * q.shape[3] ** -0.5
            weights = np.exp(scores - scores.max())
            expected[row, t, head] = weights @ v[row, seen, head // 2] / weights.sum()
    found = attention.causal_attention(*make_arguments(17), window=window)
    assert_close([found], [expected])


@all_plans
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_equals_dense(plan, heads, kv_heads):
    assert_equals_dense(plan, make_arguments(300, heads, kv_heads))


@pytest.mark.parametrize("window", [1, 2, 17, 128, 129, 299])
def test_every_window(window):
    assert_equals_dense(Plan("window", 128, window), make_arguments(300, 2, 2, rows=1))


@given(
    length=st.integers(129, 400),
    window=st.integers(0, 450),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_length(length, window, kv_heads, seed):
    arguments = make_arguments(length, 2, kv_heads, seed=seed)
    found = attention.causal_attention(*arguments, window=window)
    expected = attention.dense_causal_attention(*arguments, window=window)
    assert_close([found], [expected])


def test_form_follows_from_the_shapes():
    assert make_plan(4096, 512, 8) == Plan("window", 128, 512)
    assert make_plan(400, 512, 8) == Plan("triangle", 128, 0)
    assert make_plan(1025, 0, 8) == Plan("triangle", 256, 0)
    assert make_plan(4096, 0, 8) == Plan("triangle", 512, 0)
    assert make_plan(4096, 0, 64) == Plan("tiles", 512, 0)
    assert make_plan(8192, 0, 8) == Plan("tiles", 512, 0)
    assert make_plan(8192, 4096, 8) == Plan("tiles", 512, 4096)


def test_triangle_cuts_the_whole_row():
    assert block_attention._spans(1025, 256) == [(0, 256), (256, 256), (512, 256), (768, 257)]
    assert block_attention._spans(300, 128) == [(0, 128), (128, 128), (256, 44)]
    assert block_attention._spans(129, 128) == [(0, 129)]


@pytest.mark.parametrize("length", [1, 2, 128, 129])
def test_short_rows(length):
    arguments = make_arguments(length, 2, 2)
    found = value_and_gradients(attention.causal_attention, *arguments)
    assert_close(found, value_and_gradients(attention.dense_causal_attention, *arguments))


@all_plans
def test_padding_gives_zero(plan):
    q, k, v, segments = make_arguments(300)
    k, v = (jnp.where((segments > 0)[:, :, None, None], x, 1e4) for x in (k, v))
    padding = np.asarray(segments) == 0
    for x in value_and_gradients(blocks(plan), q, k, v, segments):
        assert np.isfinite(x).all()
        assert not np.asarray(x)[padding].any()


@all_plans
def test_future_and_other_documents_do_not_matter(plan):
    q, k, v, segments = make_arguments(300)

    def one_query(k, v, t):
        return blocks(plan)(q, k, v, segments)[1, t].sum()

    seen_k, seen_v = jax.jit(jax.grad(one_query, argnums=(0, 1)))(k, v, 170)
    near = 170 - np.arange(300)
    allowed = (near >= 0) & (np.asarray(segments[1]) == np.asarray(segments[1, 170]))
    if plan.window:
        allowed &= near < plan.window
    np.testing.assert_array_equal(np.asarray(seen_v[1]).any((1, 2)), allowed)
    assert not np.asarray(seen_k[1])[~allowed].any()
    assert not np.asarray(seen_v[0]).any()


@all_plans
def test_packed_documents_equal_separate_ones(plan):
    q, k, v, _ = make_arguments(300, rows=1)
    segments = jnp.where(jnp.arange(300) < 140, 1, 2)[None]
    together = jax.jit(blocks(plan))(q, k, v, segments)
    second = [x[:, 140:] for x in (q, k, v)]
    apart = jax.jit(blocks(plan))(*second, jnp.ones((1, 160), jnp.int32))
    assert_close([together[:, 140:]], [apart])


@all_plans
def test_bfloat16(plan):
    q, k, v, segments = make_arguments(300, dtype=jnp.bfloat16)
    found = jax.jit(lambda *x: value_and_gradients(blocks(plan), *x))(q, k, v, segments)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    assert_close(found, value_and_gradients(dense(plan), *wide, segments), 2e-2)


@all_plans
def test_large_scores(plan):
    q, k, v, segments = make_arguments(300)
    for x in value_and_gradients(blocks(plan), 300 * q, 300 * k, v, segments):
        assert np.isfinite(x).all()


@all_plans
def test_vmap(plan):
    q, k, v, segments = make_arguments(300, 2, 1)
    stacked = [jnp.stack([x, -x]) for x in (q, k, v)]
    run = lambda q, k, v: value_and_gradients(blocks(plan), q, k, v, segments)  # noqa: E731
    together = jax.jit(jax.vmap(run))(*stacked)
    for i in range(2):
        apart = jax.jit(run)(*(x[i] for x in stacked))
        assert_close([x[i] for x in together], apart)


@pytest.mark.parametrize("plan", [WINDOW, TILES_WINDOW])
@pytest.mark.parametrize("saved", [(), ("attention",)])
def test_scan_over_layers_with_remat(plan, saved):
    q, k, v, segments = make_arguments(300, 2, 2)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def loss(attend, q):
        def layer(x, scale):
            return attend(x * scale, k, v, segments), None

        layer = jax.checkpoint(layer, policy=policy)
        return (jax.lax.scan(layer, q, jnp.array([1.0, 0.5]))[0] ** 2).sum()

    found = jax.jit(jax.grad(lambda q: loss(blocks(plan), q)))(q)
    expected = jax.jit(jax.grad(lambda q: loss(dense(plan), q)))(q)
    assert_close([found], [expected])


@all_plans
def test_sharded_over_rows_and_heads(plan):
    arguments = make_arguments(300, 4, 2, rows=4)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    run = jax.jit(lambda *x: value_and_gradients(blocks(plan), *x))
    expected = run(*arguments)
    *arrays, segments = arguments
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor"))) for x in arrays]
        segments = jax.device_put(segments, NamedSharding(mesh, P("data")))
        compiled = run.lower(*arrays, segments).compile()
        assert_close(compiled(*arrays, segments), expected)
    text = compiled.as_text()
    assert not any(x in text for x in ("all-gather", "all-to-all", "collective-permute"))


def arrays_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


def test_memory_is_linear():
    def largest(length, window):
        arguments = make_arguments(length, 1, 1, rows=1)
        jaxpr = jax.make_jaxpr(
            lambda *x: value_and_gradients(
                lambda *y: attention.causal_attention(*y, window=window), *x
            )
        )(*arguments)
        return max(aval.size for aval in arrays_in(jaxpr.jaxpr))

    assert largest(16384, 512) <= 16384 * 16
    assert largest(16384, 0) <= 512 * 512
    assert largest(16384, 4096) <= 512 * 512


def test_errors():
    q, k, v, segments = make_arguments(9, 3, 2)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 kv heads"):
        attention.causal_attention(q, k, v, segments)
    with pytest.raises(ValueError, match="window=-1 must be at least 0"):
        attention.causal_attention(q[:, :, :2], k, v, segments, window=-1)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("window", "first"), [(0, 150), (0, 0), (40, 150), (40, 17), (1500, 150)])
def test_queries_that_stand_later_than_the_first_key(window, first, traced, monkeypatch):
    monkeypatch.setattr(block_attention, "TILE", 64)
    q, k, v, segments = make_arguments(300)
    here = slice(first, first + 100)

    def part(index):
        def attend(q, k, v, segments):
            return block_attention.block_attention(
                q[:, here], k, v, segments[:, here], segments, index, window=window, scale=0.5
            )

        return value_and_gradients(attend, q, k, v, segments)

    def whole(*arguments):
        return attention.dense_causal_attention(*arguments, window=window, scale=0.5)[:, here]

    found = jax.jit(part)(jnp.int32(first)) if traced else part(first)
    assert_close(found, value_and_gradients(whole, q, k, v, segments))
