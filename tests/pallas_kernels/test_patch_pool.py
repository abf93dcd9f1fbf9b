"""The portable implementations of the patch operations, their arguments and errors."""

import functools
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from patch_operations import (
    BY_NAME,
    FiniteDifferences,
    Isolated,
    PatchOperations,
    Values,
    assert_all_close,
    operations_of,
    program,
    value_and_gradients,
)

import pallas_kernels
from pallas_kernels.patch_pool.shapes import Shape, make_arguments


class TestReference(Values, FiniteDifferences):
    implementation = "reference"


class TestXLA(PatchOperations, FiniteDifferences, Isolated):
    implementation = "xla"
    half_precision = ("bfloat16", "float16")


@pytest.mark.parametrize("name", ["ignored", "segments", "window"])
def test_second_order(name):
    """Gradients of gradients of the default and the portable form beside the reference's."""
    shape = BY_NAME[name]
    arguments = make_arguments(shape)

    def second(implementation):
        found = []
        for function, arrays in operations_of(shape, arguments, implementation):

            def along(*arrays, function=function):
                out, vjp = jax.vjp(function, *arrays)
                return sum((g * jnp.sin(x)).sum() for g, x in zip(vjp(out), arrays, strict=True))

            found.append(jax.jit(jax.grad(along, tuple(range(len(arrays)))))(*arrays))
        return found

    expected = second("reference")
    for implementation in (None, "xla"):
        assert_all_close(second(implementation), expected, 1e-5)


def test_default_is_the_portable_form():
    shape = BY_NAME["window"]
    arguments = make_arguments(shape)
    found, expected = (program(shape, i)(vars(arguments)) for i in (None, "xla"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


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


@pytest.mark.parametrize("operation", ["patch_attention", "patch_gather_attention"])
def test_segment_ids_past_int32(operation):
    shape = BY_NAME["segments"]
    a = make_arguments(shape)
    arrays = {
        "patch_attention": (a.patches_q, a.bytes_key, a.bytes_value),
        "patch_gather_attention": (a.bytes_q, a.patches_key, a.patches_value),
    }[operation]

    def attend(segments):
        return getattr(pallas_kernels, operation)(
            *arrays,
            a.patch_ids,
            window=shape.window,
            segment_ids=segments(a.segment_ids),
            patch_segment_ids=segments(a.patch_segment_ids),
        )

    expected = attend(lambda ids: ids)
    with jax.enable_x64(True):
        found = attend(lambda ids: ids.astype(np.int64) + 2**32)
    np.testing.assert_array_equal(found, expected)


class TestIds:
    x = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4, 1)
    q, vectors = x[..., None], np.ones((2, 2, 1, 1, 1), np.float32)

    def test_ids_past_int32_are_ignored(self):
        with jax.enable_x64(True):
            ids = np.array([[0, 2**32, -(2**32), 1]] * 2)
            found = pallas_kernels.patch_pool(self.x, ids, 2, "sum")
        np.testing.assert_array_equal(found[..., 0], [[1, 4], [5, 8]])


def unannotated(operation):
    """The operation without the annotations, which only tests check."""
    return getattr(operation, "__wrapped__", operation)


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
            (dict(x=None), TypeError, "x=None is no array"),
            (dict(patch_ids={}), TypeError, "patch_ids={} is no array"),
            (dict(patch_ids=ids > 0), TypeError, "patch_ids has dtype bool"),
            (dict(num_patches=-2), ValueError, "num_patches=-2 must be at least 1"),
            (dict(num_patches=2.0), TypeError, "num_patches=2.0 must be an integer"),
            (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
            (dict(implementation=["xla"]), TypeError, "must be None or a string"),
            (dict(x=x.astype(np.float16), implementation="tpu"), NotImplementedError, "float16"),
            (dict(x=x.astype(np.float16), implementation="interpret"), NotImplementedError, "bfl"),
        ],
    )
    def test_pool_errors(self, change, error, message):
        arguments = dict(x=self.x, patch_ids=self.ids, num_patches=2) | change
        with pytest.raises(error, match=message):
            unannotated(pallas_kernels.patch_pool)(**arguments)

    @pytest.mark.parametrize("gather", [False, True])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(window=0), ValueError, "window=0 must be at least 1"),
            (dict(scale=float("nan")), ValueError, "scale=nan must be finite"),
            (dict(scale="a"), TypeError, "scale='a' must be a number"),
            (dict(window=1.5), TypeError, "window=1.5 must be an integer"),
            (dict(q=None), TypeError, "q=None is no array"),
            (dict(value=None), TypeError, "value=None is no array"),
            (dict(key=key[:, :, 0]), ValueError, r"key has shape \(2, 3, 4\); . axes are needed"),
            (dict(segment_ids=ids), ValueError, "given both or neither"),
            (
                dict(segment_ids=ids * 1.0, patch_segment_ids=ids),
                TypeError,
                "segment_ids has dtype float",
            ),
            (
                dict(segment_ids=ids, patch_segment_ids=ids),
                ValueError,
                r"patch_segment_ids has shape \(2, 3\); \(2, 5\) is needed",
            ),
            (dict(patch_ids=ids[:1]), ValueError, r"patch_ids has shape \(1, 3\)"),
            (dict(value=np.zeros((2, 3, 2, 5), np.float32)), ValueError, "value has shape"),
            (dict(value=key.astype(np.float16)), TypeError, "value has dtype float16"),
            (dict(implementation="triton"), ValueError, "implementation='triton' is unknown"),
        ],
    )
    def test_attention_errors(self, gather, change, error, message):
        arguments = dict(q=self.q, key=self.key, value=self.key, patch_ids=self.ids)
        operation = pallas_kernels.patch_attention
        if gather:
            operation = pallas_kernels.patch_gather_attention
            arguments |= dict(q=self.key, key=self.q, value=self.q)
            if isinstance(change.get("value"), np.ndarray):
                dtype = change["value"].dtype
                width = change["value"].shape[-1]
                change = dict(value=np.zeros((2, 5, 1, 2, width), dtype))
        with pytest.raises(error, match=message):
            unannotated(operation)(**(arguments | change))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
