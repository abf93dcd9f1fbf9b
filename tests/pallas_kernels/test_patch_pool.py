"""Every implementation of the patch operations against numpy in float64, and against another."""

import functools
import sys

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.patch_pool import api
from pallas_kernels.patch_pool.shapes import SHAPES, Shape, make_arguments

MODES = ("max", "mean", "sum", "min")
BY_NAME = {shape.name: shape for shape in SHAPES}
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=list(BY_NAME))
some_shapes = pytest.mark.parametrize("name", ["ignored", "segments"])


# numpy in float64, one group at a time.


def numpy_pool(x, patch_ids, num_patches, mode):
    out = np.zeros((x.shape[0], num_patches, x.shape[2]))
    for row, patch in np.ndindex(out.shape[:2]):
        own = x[row, patch_ids[row] == patch].astype(np.float64)
        if len(own):
            out[row, patch] = getattr(np, mode)(own, axis=0)
    return out


def numpy_softmax_sum(scores, values):
    """scores[N], values[N, K] -> [K]."""
    if not len(scores):
        return np.zeros(values.shape[1])
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def sees(arguments, window, row, byte, patch):
    """Whether byte and patch meet when the patch is `behind` the byte's own, and by how much."""
    own = arguments.patch_ids[row, byte]
    if not 0 <= own < arguments.patches_q.shape[1]:
        return False
    if arguments.segment_ids is not None and (
        arguments.segment_ids[row, byte] != arguments.patch_segment_ids[row, patch]
    ):
        return False
    return window(own, patch) >= 0


def numpy_patch_attention(arguments, window, scale):
    q = arguments.patches_q.astype(np.float64)
    key, value = arguments.bytes_key, arguments.bytes_value
    out = np.zeros_like(q)
    near = lambda own, patch: min(patch - own, window - 1 - (patch - own))  # noqa: E731
    for row, patch in np.ndindex(q.shape[:2]):
        seen = [t for t in range(key.shape[1]) if sees(arguments, near, row, t, patch)]
        for vector, head in np.ndindex(q.shape[2:4]):
            scores = key[row, seen, head] @ q[row, patch, vector, head] * scale
            out[row, patch, vector, head] = numpy_softmax_sum(scores, value[row, seen, head])
    return out


def numpy_gather_attention(arguments, window, scale):
    q = arguments.bytes_q.astype(np.float64)
    key, value = arguments.patches_key, arguments.patches_value
    out = np.zeros_like(q)
    near = lambda own, patch: min(own - patch, window - 1 - (own - patch))  # noqa: E731
    for row, byte in np.ndindex(q.shape[:2]):
        seen = [p for p in range(key.shape[1]) if sees(arguments, near, row, byte, p)]
        for head in range(q.shape[2]):
            keys = key[row, seen, :, head].reshape(-1, q.shape[3])
            values = value[row, seen, :, head].reshape(-1, q.shape[3])
            scores = keys @ q[row, byte, head] * scale
            out[row, byte, head] = numpy_softmax_sum(scores, values)
    return out


# The three operations as functions of their floating-point arguments only.


def pool_of(shape, arguments, mode, implementation):
    x = arguments.bytes_q.reshape(*arguments.bytes_q.shape[:2], -1)

    def pool(x):
        return pallas_kernels.patch_pool(
            x, arguments.patch_ids, shape.num_patches, mode, implementation
        )

    return pool, (x,)


def attention_of(shape, arguments, implementation, gather):
    options = dict(
        window=shape.window,
        segment_ids=arguments.segment_ids,
        patch_segment_ids=arguments.patch_segment_ids,
        implementation=implementation,
    )
    a = arguments
    if gather:
        operation = pallas_kernels.patch_gather_attention
        arrays = (a.bytes_q, a.patches_key, a.patches_value)
    else:
        operation = pallas_kernels.patch_attention
        arrays = (a.patches_q, a.bytes_key, a.bytes_value)
    return lambda q, k, v: operation(q, k, v, a.patch_ids, **options), arrays


def operations_of(shape, arguments, implementation):
    for mode in MODES:
        yield pool_of(shape, arguments, mode, implementation)
    for gather in (False, True):
        yield attention_of(shape, arguments, implementation, gather)


def value_and_gradients(function, arrays):
    """The value, and the gradients of a fixed random combination of its entries."""
    out, vjp = jax.vjp(function, *arrays)
    weight = np.random.default_rng(1).normal(size=out.shape)
    return out, *vjp(jnp.asarray(weight, out.dtype))


def all_values_and_gradients(shape, arguments, implementation, change=lambda x: x):
    """Those of every operation, in one compiled program."""
    operations = list(operations_of(shape, arguments, implementation))

    @jax.jit
    def run(all_arrays):
        pairs = zip(operations, all_arrays, strict=True)
        return [value_and_gradients(function, arrays) for (function, _), arrays in pairs]

    return run([tuple(map(change, arrays)) for _, arrays in operations])


def assert_all_close(actual, expected, tolerance):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, tolerance)


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = max(np.abs(expected).max(initial=0.0), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


class Values:
    """Values beside numpy, and gradients beside finite differences."""

    implementation: str

    @all_shapes
    @pytest.mark.parametrize("mode", MODES)
    def test_pool_value(self, shape, mode):
        arguments = make_arguments(shape)
        function, (x,) = pool_of(shape, arguments, mode, self.implementation)
        expected = numpy_pool(x, arguments.patch_ids, shape.num_patches, mode)
        assert_close(jax.jit(function)(x), expected, 1e-6)

    @all_shapes
    def test_patch_attention_value(self, shape):
        arguments = make_arguments(shape)
        function, arrays = attention_of(shape, arguments, self.implementation, gather=False)
        expected = numpy_patch_attention(arguments, shape.window, shape.head_dim**-0.5)
        assert_close(jax.jit(function)(*arrays), expected, 1e-5)

    @all_shapes
    def test_gather_attention_value(self, shape):
        arguments = make_arguments(shape)
        function, arrays = attention_of(shape, arguments, self.implementation, gather=True)
        expected = numpy_gather_attention(arguments, shape.window, shape.head_dim**-0.5)
        assert_close(jax.jit(function)(*arrays), expected, 1e-5)

    @some_shapes
    def test_finite_differences(self, name):
        shape = BY_NAME[name]
        arguments = make_arguments(shape)
        with jax.enable_x64(True):
            for function, arrays in operations_of(shape, arguments, self.implementation):
                arrays = tuple(x.astype(np.float64) for x in arrays)
                jax.test_util.check_grads(
                    jax.jit(function),
                    arrays,
                    order=1,
                    modes=["rev"],
                    atol=1e-7,
                    rtol=1e-7,
                    eps=1e-6,
                )

    def test_ties_share_the_gradient(self):
        x = np.array([[[3.0], [1.0], [3.0], [3.0], [2.0]]], np.float32)
        ids = np.array([[0, 0, 0, 0, 1]], np.int32)

        def total(x, mode):
            return pallas_kernels.patch_pool(x, ids, 2, mode, self.implementation).sum()

        for sign, mode in ((1, "max"), (-1, "min")):
            gradient = jax.grad(functools.partial(total, mode=mode))(sign * x)
            assert_close(gradient[0, :, 0], [1 / 3, 0, 1 / 3, 1 / 3, 1], 1e-6)


class TestReference(Values):
    implementation = "reference"


class PatchOperations(Values):
    """All that an implementation must do; a subclass names one."""

    @all_shapes
    def test_gradients(self, shape):
        arguments = make_arguments(shape)
        found = all_values_and_gradients(shape, arguments, self.implementation)
        expected = all_values_and_gradients(shape, arguments, "reference")
        assert_all_close(found, expected, 1e-5)

    @given(data=st.data())
    @settings(max_examples=4, deadline=None, derandomize=True)
    def test_any_sizes(self, data):
        size = st.integers(1, 6)
        shape = Shape(
            name="drawn",
            rows=data.draw(st.integers(1, 2)),
            num_bytes=data.draw(size),
            num_patches=data.draw(size),
            num_vectors=data.draw(st.integers(1, 2)),
            window=data.draw(st.integers(1, 4)),
            segments=data.draw(st.booleans()),
        )
        arguments = make_arguments(shape, seed=data.draw(st.integers(0, 99)))
        ids = st.lists(
            st.integers(0, shape.num_patches - 1),
            min_size=shape.num_bytes,
            max_size=shape.num_bytes,
        )
        arguments.patch_ids[0] = np.sort(data.draw(ids))
        arguments.patch_ids[0][data.draw(st.integers(0, shape.num_bytes)) :] = -1
        found = all_values_and_gradients(shape, arguments, self.implementation)
        expected = all_values_and_gradients(shape, arguments, "reference")
        assert_all_close(found, expected, 1e-5)

    @some_shapes
    def test_vmap(self, name):
        shape = BY_NAME[name]
        arguments = make_arguments(shape)
        for function, arrays in operations_of(shape, arguments, self.implementation):
            stacked = tuple(np.stack([x, 2 * x, -x]) for x in arrays)
            run = jax.jit(functools.partial(value_and_gradients, function))
            together = jax.jit(jax.vmap(run))(stacked)
            for i in range(3):
                apart = run(tuple(x[i] for x in stacked))
                assert_all_close([x[i] for x in together], apart, 1e-5)

    @some_shapes
    def test_bfloat16(self, name):
        shape = BY_NAME[name]
        arguments = make_arguments(shape)
        run = functools.partial(all_values_and_gradients, shape, arguments, self.implementation)
        found = run(lambda x: jnp.asarray(x, jnp.bfloat16))
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
        assert_all_close(found, run(lambda x: jnp.asarray(x, jnp.bfloat16).astype("float32")), 2e-2)

    def test_ignored_bytes_may_hold_anything(self):
        shape = BY_NAME["ignored"]
        arguments = make_arguments(shape)
        ignored = (arguments.patch_ids < 0) | (arguments.patch_ids >= shape.num_patches)
        for x in (arguments.bytes_q, arguments.bytes_key, arguments.bytes_value):
            x[ignored] = 1e30
        found = all_values_and_gradients(shape, arguments, self.implementation)
        for x in jax.tree.leaves(found):
            assert np.isfinite(x).all()
            if x.shape[1] == shape.num_bytes:
                assert not np.asarray(x)[ignored].any()

    def test_large_scores(self):
        shape = BY_NAME["window"]
        arguments = make_arguments(shape)
        for gather in (False, True):
            function, (q, k, v) = attention_of(shape, arguments, self.implementation, gather)
            for x in value_and_gradients(function, (q * 1e3, k * 1e3, v)):
                assert np.isfinite(x).all()

    def test_sharded_over_rows(self):
        shape = BY_NAME["eight_rows"]
        arguments = make_arguments(shape)
        mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, P("data"))
        run = functools.partial(all_values_and_gradients, shape, arguments, self.implementation)
        with jax.set_mesh(mesh):
            found = run(lambda x: jax.device_put(x, sharding))
        assert_all_close(found, run(), 1e-5)


class TestXLA(PatchOperations):
    implementation = "xla"


def test_default_is_the_portable_form():
    shape = BY_NAME["window"]
    arguments = make_arguments(shape)
    found = all_values_and_gradients(shape, arguments, None)
    jax.tree.map(
        np.testing.assert_array_equal, found, all_values_and_gradients(shape, arguments, "xla")
    )


def arrays_in(jaxpr):
    """Every array computed anywhere in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("window", [1, 3])
def test_no_array_grows_with_patches_times_bytes(implementation, window):
    shape = Shape(
        name="long",
        rows=1,
        num_bytes=1024,
        num_patches=512,
        num_heads=1,
        window=window,
        segments=True,
    )
    arguments = make_arguments(shape)
    largest = []
    for function, arrays in operations_of(shape, arguments, implementation):
        jaxpr = jax.make_jaxpr(functools.partial(value_and_gradients, function))(arrays)
        largest.append(max(aval.size for aval in arrays_in(jaxpr.jaxpr)))
    if implementation == "xla":
        assert max(largest) < 1024 * 512 // 8
    else:
        assert min(largest) >= 1024 * 512  # the walk does find such arrays


def test_sharded_rows_need_no_communication():
    shape = BY_NAME["eight_rows"]
    arguments = make_arguments(shape)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    ids = jax.device_put(arguments.patch_ids, sharding)
    arrays = (arguments.patches_q, arguments.bytes_key, arguments.bytes_value)
    placed = tuple(jax.device_put(x, sharding) for x in arrays)

    def gradients(ids, *arrays):
        out, vjp = jax.vjp(lambda *a: pallas_kernels.patch_attention(*a, ids), *arrays)
        return vjp(out)

    text = jax.jit(gradients).lower(ids, *placed).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective-permute"))


class TestArguments:
    x = np.zeros((2, 3, 4), np.float32)
    ids = np.zeros((2, 3), np.int32)
    q = np.zeros((2, 5, 1, 2, 4), np.float32)
    key = np.zeros((2, 3, 2, 4), np.float32)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(mode="median"), ValueError, "mode='median' is unknown; allowed are max"),
            (dict(num_patches=0), ValueError, "num_patches=0 must be at least 1"),
            (dict(patch_ids=ids.astype(np.float32)), TypeError, "patch_ids has dtype float32"),
            (dict(patch_ids=ids[:, :2]), ValueError, r"patch_ids has shape \(2, 2\)"),
            (dict(x=x.astype(np.int32)), TypeError, "x has dtype int32"),
            (dict(x=x[0]), ValueError, "3 axes are needed"),
            (dict(x=x[:, :0], patch_ids=ids[:, :0]), ValueError, "every axis must be at least 1"),
            (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
            (dict(implementation="tpu"), NotImplementedError, "allowed are None"),
            (dict(implementation="gpu"), NotImplementedError, "allowed are None"),
            (dict(implementation="interpret"), NotImplementedError, "allowed are None"),
        ],
    )
    def test_pool_errors(self, change, error, message):
        arguments = dict(x=self.x, patch_ids=self.ids, num_patches=2) | change
        with pytest.raises(error, match=message):
            pallas_kernels.patch_pool(**arguments)

    def test_sizes_are_integers(self):
        # Past the annotation, which only tests check.
        with pytest.raises(TypeError, match=r"num_patches=1.5 must be an integer"):
            api._positive("num_patches", 1.5)

    @pytest.mark.parametrize("gather", [False, True])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(window=0), ValueError, "window=0 must be at least 1"),
            (dict(scale=float("nan")), ValueError, "scale=nan must be finite"),
            (dict(segment_ids=ids), ValueError, "given both or neither"),
            (
                dict(segment_ids=ids, patch_segment_ids=ids),
                ValueError,
                r"patch_segment_ids has shape \(2, 3\); \(2, 5\) is needed",
            ),
            (dict(patch_ids=ids[:1]), ValueError, r"patch_ids has shape \(1, 3\)"),
            (dict(value=np.zeros((2, 3, 2, 5), np.float32)), ValueError, "value has shape"),
            (dict(value=key.astype(np.float16)), TypeError, "value has dtype float16"),
            (dict(implementation="tpu"), NotImplementedError, "allowed are None"),
        ],
    )
    def test_attention_errors(self, gather, change, error, message):
        arguments = dict(q=self.q, key=self.key, value=self.key, patch_ids=self.ids)
        operation = pallas_kernels.patch_attention
        if gather:
            operation = pallas_kernels.patch_gather_attention
            arguments |= dict(q=self.key, key=self.q, value=self.q)
            if "value" in change:
                dtype = change["value"].dtype
                width = change["value"].shape[-1]
                change = dict(value=np.zeros((2, 5, 1, 2, width), dtype))
        with pytest.raises(error, match=message):
            operation(**(arguments | change))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
