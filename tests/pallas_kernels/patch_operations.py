"""What every implementation of the patch operations must do: oracles and shared test classes."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.patch_pool.shapes import SHAPES, Shape, make_arguments

MODES = ("max", "mean", "sum", "min")
BY_NAME = {shape.name: shape for shape in SHAPES}
HALF_PRECISION = {"bfloat16": 2e-2, "float16": 2e-3}


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


# The operations as functions of their floating-point arguments only.


def operations_of(shape: Shape, arguments, implementation, modes=MODES):
    """(function, arrays) of pooling in every mode and of both attentions."""
    a = arguments
    options = dict(
        window=shape.window,
        segment_ids=a.segment_ids,
        patch_segment_ids=a.patch_segment_ids,
        implementation=implementation,
    )

    def pool(x, mode):
        return pallas_kernels.patch_pool(x, a.patch_ids, shape.num_patches, mode, implementation)

    for mode in modes:
        yield functools.partial(pool, mode=mode), (a.bytes_q.reshape(*a.bytes_q.shape[:2], -1),)
    attend, gather = pallas_kernels.patch_attention, pallas_kernels.patch_gather_attention
    yield (
        lambda q, k, v: attend(q, k, v, a.patch_ids, **options),
        (a.patches_q, a.bytes_key, a.bytes_value),
    )
    yield (
        lambda q, k, v: gather(q, k, v, a.patch_ids, **options),
        (a.bytes_q, a.patches_key, a.patches_value),
    )


def value_and_gradients(function, arrays):
    """The value, and the gradients of a fixed random combination of its entries."""
    out, vjp = jax.vjp(function, *arrays)
    weight = np.random.default_rng(1).normal(size=out.shape)
    return out, *vjp(jnp.asarray(weight, out.dtype))


def run_all(shape: Shape, arguments, implementation, modes=MODES):
    """Value and gradients of every operation."""
    operations = operations_of(shape, arguments, implementation, modes)
    return [value_and_gradients(function, arrays) for function, arrays in operations]


@functools.cache
def program(shape: Shape, implementation, modes=MODES, batched=False, options=()):
    """`run_all` compiled, as a function of arguments given as a dict; `options` of the compiler."""

    def run(arguments):
        return run_all(shape, types.SimpleNamespace(**arguments), implementation, modes)

    return jax.jit(jax.vmap(run) if batched else run, compiler_options=dict(options))


def as_dict(arguments, change=lambda x: x) -> dict:
    """Fields of the arguments; `change` is applied to the floating-point ones."""
    fields = vars(arguments)
    return {k: change(x) if k.startswith(("bytes", "patches")) else x for k, x in fields.items()}


def numpy_values(shape: Shape, arguments, modes=MODES):
    x = arguments.bytes_q.reshape(*arguments.bytes_q.shape[:2], -1)
    scale = shape.head_dim**-0.5
    return [
        *(numpy_pool(x, arguments.patch_ids, shape.num_patches, mode) for mode in modes),
        numpy_patch_attention(arguments, shape.window, scale),
        numpy_gather_attention(arguments, shape.window, scale),
    ]


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
    """Values beside numpy in float64; a subclass names the implementation."""

    implementation: str
    shapes = SHAPES
    modes = MODES
    compiler_options = ()

    def pytest_generate_tests(self, metafunc):
        if "shape" in metafunc.fixturenames:
            shapes = metafunc.cls.shapes
            metafunc.parametrize("shape", shapes, ids=[shape.name for shape in shapes])

    def run(self, shape, arguments, change=lambda x: x, batched=False):
        compiled = program(shape, self.implementation, self.modes, batched, self.compiler_options)
        return compiled(as_dict(arguments, change))

    def reference(self, shape, arguments, change=lambda x: x):
        return program(shape, "reference", self.modes)(as_dict(arguments, change))

    def test_values(self, shape):
        arguments = make_arguments(shape)
        found = [value for value, *_ in self.run(shape, arguments)]
        assert_all_close(found, numpy_values(shape, arguments, self.modes), 1e-5)

    def test_ties_share_the_gradient(self):
        x = np.array([[[3.0], [1.0], [3.0], [3.0], [2.0]]], np.float32)
        ids = np.array([[0, 0, 0, 0, 1]], np.int32)

        def total(x, mode):
            return pallas_kernels.patch_pool(x, ids, 2, mode, self.implementation).sum()

        for sign, mode in ((1, "max"), (-1, "min")):
            gradient = jax.grad(functools.partial(total, mode=mode))(sign * x)
            assert_close(gradient[0, :, 0], [1 / 3, 0, 1 / 3, 1 / 3, 1], 1e-6)


class FiniteDifferences:
    """Gradients in float64 beside finite differences."""

    implementation: str

    @pytest.mark.parametrize("name", ["ignored", "segments"])
    def test_finite_differences(self, name):
        shape = BY_NAME[name]
        arguments = make_arguments(shape)
        with jax.enable_x64(True):
            for function, arrays in operations_of(shape, arguments, self.implementation):
                jax.test_util.check_grads(
                    jax.jit(function),
                    tuple(x.astype(np.float64) for x in arrays),
                    order=1,
                    modes=["rev"],
                    atol=1e-7,
                    rtol=1e-7,
                    eps=1e-6,
                )


drawn = settings(
    deadline=None,
    derandomize=True,
    # One method of several classes, which may run in one process.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


class PatchOperations(Values):
    """All that an implementation beside the reference must do."""

    half_precision = ("bfloat16",)

    def test_gradients(self, shape):
        arguments = make_arguments(shape)
        assert_all_close(self.run(shape, arguments), self.reference(shape, arguments), 1e-5)

    @given(data=st.data())
    @settings(drawn, max_examples=20)
    def test_any_ids(self, data):
        shape = Shape(name="drawn", num_bytes=13, num_patches=5, window=2, segments=True)
        arguments = make_arguments(shape, seed=data.draw(st.integers(0, 99)))
        size = dict(min_size=shape.num_bytes, max_size=shape.num_bytes)
        for ids in arguments.patch_ids:
            ids[:] = np.sort(data.draw(st.lists(st.integers(0, shape.num_patches - 1), **size)))
            ignored = data.draw(st.sets(st.integers(0, shape.num_bytes - 1)))
            ids[list(ignored)] = data.draw(st.sampled_from([-1, shape.num_patches, 10**6]))
        found = self.run(shape, arguments)
        values = [value for value, *_ in found]
        assert_all_close(values, numpy_values(shape, arguments, self.modes), 1e-5)
        assert_all_close(found, self.reference(shape, arguments), 1e-5)

    @given(data=st.data())
    @settings(drawn, max_examples=3)
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
        assert_all_close(self.run(shape, arguments), self.reference(shape, arguments), 1e-5)

    def test_vmap(self):
        shape = BY_NAME["segments"]
        arguments = [make_arguments(shape, seed) for seed in range(3)]
        stacked = {k: np.stack([vars(a)[k] for a in arguments]) for k in vars(arguments[0])}
        together = self.run(shape, types.SimpleNamespace(**stacked), batched=True)
        for i, apart in enumerate(arguments):
            found = jax.tree.map(lambda x, i=i: x[i], together)
            assert_all_close(found, self.reference(shape, apart), 1e-5)

    @pytest.mark.parametrize("name", ["ignored", "segments"])
    def test_half_precision(self, name):
        shape = BY_NAME[name]
        arguments = make_arguments(shape)
        for dtype in self.half_precision:
            found = self.run(shape, arguments, lambda x, d=dtype: jnp.asarray(x, d))
            assert all(x.dtype == dtype for x in jax.tree.leaves(found))
            rounded = self.reference(
                shape, arguments, lambda x, d=dtype: jnp.asarray(x, d).astype("float32")
            )
            assert_all_close(found, rounded, HALF_PRECISION[dtype])

    def test_ignored_bytes_may_hold_anything(self):
        shape = BY_NAME["ignored"]
        ignored = make_arguments(shape).patch_ids
        ignored = (ignored < 0) | (ignored >= shape.num_patches)
        for anything in (1e30, np.inf, np.nan):
            arguments = make_arguments(shape)
            for x in (arguments.bytes_q, arguments.bytes_key, arguments.bytes_value):
                x[ignored] = anything
            for x in jax.tree.leaves(self.run(shape, arguments)):
                assert np.isfinite(x).all()
                if x.shape[1] == shape.num_bytes:
                    assert not np.asarray(x)[ignored].any()

    def test_large_scores(self):
        shape = BY_NAME["window"]
        arguments = make_arguments(shape)
        for x in jax.tree.leaves(self.run(shape, arguments, lambda x: x * np.float32(1e3))):
            assert np.isfinite(x).all()

    def test_sharded_over_rows(self):
        shape = BY_NAME["eight_rows"]
        arguments = make_arguments(shape)
        mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, P("data"))
        placed = {k: jax.device_put(x, sharding) for k, x in vars(arguments).items()}
        with jax.set_mesh(mesh):
            found = self.run(shape, types.SimpleNamespace(**placed))
        assert_all_close(found, self.reference(shape, arguments), 1e-5)


class Isolated:
    """For implementations in which NaN and infinity reach only what sees them."""

    implementation: str

    @pytest.mark.parametrize("window", [1, 2])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_patch_reaches_only_its_bytes(self, bad, window):
        shape = dataclasses.replace(BY_NAME["ignored"], window=window)
        arguments = make_arguments(shape)
        own = arguments.patch_ids
        ignored = (own < 0) | (own >= shape.num_patches)
        assert ignored.any()
        for x in (arguments.patches_q, arguments.patches_key, arguments.patches_value):
            x[:, 0] = bad  # whose row also leading ignored bytes borrow
        for function, arrays in operations_of(shape, arguments, self.implementation):
            out, vjp = jax.vjp(function, *arrays)
            d_out = np.ones(out.shape, np.float32)
            if out.shape[1] == shape.num_patches:
                d_out[:, 0] = bad
            for x in (out, *vjp(jnp.asarray(d_out))):
                if x.shape[1] == shape.num_bytes:
                    assert not np.asarray(x)[ignored].any()
                else:
                    assert np.isfinite(np.asarray(x)[:, window:]).all()

    def test_many_ties_in_float16(self):
        x, ids = jnp.ones((1, 70_000, 1), jnp.float16), np.zeros((1, 70_000), np.int32)
        for mode in ("max", "mean"):
            gradient = jax.grad(
                lambda x, m=mode: pallas_kernels.patch_pool(x, ids, 1, m, self.implementation).sum()
            )(x)
            np.testing.assert_allclose(gradient.astype(jnp.float32), 1 / 70_000, rtol=2e-3)


class Kernels(PatchOperations):
    """An interpreted kernel: every shape with two of the modes, and the others with one shape, as
    every mode is another kernel to compile."""

    modes = ("max", "mean")
    compiler_options = (("xla_backend_optimization_level", 0),)

    def test_pooling_in_the_other_modes(self):
        shape = BY_NAME["several_tiles"]
        arguments = make_arguments(shape)
        for mode in ("min", "sum"):
            function, (x,) = next(operations_of(shape, arguments, self.implementation, (mode,)))
            found, dx = jax.jit(functools.partial(value_and_gradients, function))((x,))
            expected = numpy_pool(x, arguments.patch_ids, shape.num_patches, mode)
            assert_close(found, expected, 1e-5)
            plain, _ = next(operations_of(shape, arguments, "reference", (mode,)))
            assert_close(dx, value_and_gradients(plain, (x,))[1], 1e-5)
