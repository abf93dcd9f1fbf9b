"""The portable forms of the grouped products, their metadata, and the checks of arguments."""

import dataclasses
import functools
import re
import sys

import jax
import jax.extend
import jax.test_util
import numpy as np
import pytest
from grouped_products import (
    BY_NAME,
    GroupedProducts,
    arrays_of,
    assert_all_close,
    numpy_truth,
    offset_of,
    products,
)
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul.shapes import Shape, Sizes, draw_sizes, make_arguments


class TestReference(GroupedProducts):
    implementation = "reference"

    @pytest.mark.parametrize("name", ["tail", "offset"])
    def test_finite_differences(self, name):
        check_finite_differences(BY_NAME[name], self.implementation, order=1)


class TestXLA(GroupedProducts):
    implementation = "xla"

    def test_finite_differences(self):
        check_finite_differences(BY_NAME["uneven"], self.implementation, order=2)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [("uint8", 250), ("int8", 100), ("int8", -3), ("int16", 299), ("uint32", 2**31), ("int64", 7)],
)
def test_offsets_of_any_dtype(dtype, offset):
    """Beside 300 groups an int8 cannot hold the last offset that is allowed, 298."""
    with jax.enable_x64(True):
        out = pallas_kernels.gmm(
            np.ones((300, 1), np.float32),
            np.ones((2, 1, 1), np.float32),
            np.ones(300, np.int32),
            group_offset=np.dtype(dtype).type(offset),
            implementation="xla",
        )
    first = min(max(offset, 0), 298)
    np.testing.assert_array_equal(np.flatnonzero(out), [first, first + 1])


@pytest.mark.parametrize("name", ["uneven", "empty_middle", "tail"])
def test_ragged_dot(name):
    shape = BY_NAME[name]
    a = make_arguments(shape)
    assert_all_close(products(shape, "ragged_dot")(*arrays_of(a)), numpy_truth(shape, a), 1e-5)


def test_ragged_dot_has_no_offset():
    shape = BY_NAME["offset"]
    with pytest.raises(NotImplementedError, match="no group_offset"):
        products(shape, "ragged_dot")(*arrays_of(make_arguments(shape)))


def check_finite_differences(shape, implementation, order):
    a = make_arguments(shape)
    options = offset_of(shape) | dict(implementation=implementation)
    with jax.enable_x64(True):
        lhs, rhs = a.lhs.astype(np.float64), a.rhs.astype(np.float64)

        def run(lhs, rhs):
            return pallas_kernels.gmm(lhs, rhs, a.group_sizes, **options)

        jax.test_util.check_grads(
            jax.jit(run), (lhs, rhs), order, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5
        )


def arrays_in(jaxpr):
    """Every array computed anywhere in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


def test_no_array_grows_with_groups_times_rows():
    shape = Shape(name="long", m=4096, k=32, n=32, groups=64)
    a = make_arguments(shape)
    run = functools.partial(jax.make_jaxpr(products(shape, "xla")), *arrays_of(a))
    largest = max(aval.size for aval in arrays_in(run().jaxpr))
    assert largest < 4 * 4096 * 32
    expected = make_arguments(dataclasses.replace(shape, m=8))
    assert expected.rhs.size == 64 * 32 * 32 < largest


@pytest.mark.parametrize(
    "m, groups, local", [(64, 1, 1), (64, 4, 1), (64, 2, 2), (1500, 2, 2), (2500, 2, 2)]
)
def test_no_product_ahead_of_its_loop(m, groups, local):
    """XLA hoists what all turns of a loop share, needed or not: with one group every tile was."""

    def gradients(lhs, rhs, sizes, dout):
        def product(lhs, rhs):
            return pallas_kernels.gmm(lhs, rhs, sizes, group_offset=0, implementation="xla")

        out, vjp = jax.vjp(product, lhs, rhs)
        return out, vjp(dout)

    shapes = [(m, 16), (local, 16, 24), (m, 24)]
    lhs, rhs, dout = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((groups,), np.int32)
    text = jax.jit(gradients).lower(lhs, rhs, sizes, dout).compile().as_text()
    computations = {block.split()[0]: block for block in text.split("\n\n") if " {\n" in block}
    entry = next(block for name, block in computations.items() if name == "ENTRY")
    fused = [computations[name] for name in re.findall(r"calls=(%[\w.-]+)", entry)]
    assert " dot(" in text
    assert not any(" dot(" in block for block in [entry, *fused])


def test_sharded_rows():
    shape = Shape(name="sharded", m=64, k=16, n=24, groups=4)
    a = make_arguments(shape)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        lhs, dout = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (a.lhs, a.dout))
        found = products(shape, "xla")(lhs, a.rhs, dout, a.group_sizes)
    assert_all_close(found, numpy_truth(shape, a), 1e-5)


def test_default_on_the_cpu_is_the_portable_form():
    shape = BY_NAME["many_tiles"]
    a = make_arguments(shape)
    jax.tree.map(
        np.testing.assert_array_equal,
        products(shape, None)(*arrays_of(a)),
        products(shape, "xla")(*arrays_of(a)),
    )


class TestMetadata:
    @pytest.mark.parametrize("kind", Sizes)
    @pytest.mark.parametrize("tile_rows", [8, 16])
    def test_visits_cover_every_row_once(self, kind, tile_rows):
        sizes = draw_sizes(kind, 83, 7)
        meta = pallas_kernels.make_group_metadata(
            sizes, 90, group_offset=1, num_local_groups=5, tile_rows=tile_rows
        )
        starts, ends = np.asarray(meta.starts), np.asarray(meta.starts + meta.sizes)
        starts, ends = [0, *starts, ends[-1]], [starts[0], *ends, 90]
        seen = np.zeros(90, int)
        number = int(meta.num_visits[0])
        for group, tile in zip(meta.visit_groups[:number], meta.visit_tiles[:number], strict=True):
            seen[
                max(starts[group], tile * tile_rows) : min(ends[group], (tile + 1) * tile_rows)
            ] += 1
        assert (seen == 1).all()
        assert (np.diff(meta.visit_tiles[:number]) >= 0).all()
        assert number <= len(meta.visit_groups) == -(-90 // tile_rows) + 6

    @pytest.mark.parametrize("kind", Sizes)
    def test_updates_visit_every_local_group(self, kind):
        meta = pallas_kernels.make_group_metadata(draw_sizes(kind, 83, 7), 83, tile_rows=8)
        number = int(meta.num_updates[0])
        assert number <= len(meta.update_groups)
        assert set(np.asarray(meta.update_groups[:number]).tolist()) == set(range(7))
        assert (np.diff(meta.update_groups) >= 0).all()

    @pytest.mark.parametrize(
        "dtype", ["int8", "int16", "uint8", "uint16", "uint32", "int64", "uint64"]
    )
    def test_any_integer_sizes(self, dtype):
        expected = pallas_kernels.make_group_metadata(np.array([100, 0, 127], np.int32), 300)
        with jax.enable_x64(True):
            sizes = np.array([100, 0, 127], dtype)
            found = pallas_kernels.make_group_metadata(sizes, 300)
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    @pytest.mark.parametrize("dtype", ["uint32", "int64", "uint64"])
    def test_sizes_past_the_last_row_do_not_overflow(self, dtype):
        with jax.enable_x64(True):
            sizes = np.array([3, np.iinfo(dtype).max, np.iinfo(dtype).max], dtype)
            found = pallas_kernels.make_group_metadata(sizes, 10)
        np.testing.assert_array_equal(found.starts, [0, 3, 10])
        np.testing.assert_array_equal(found.sizes, [3, 7, 0])

    def test_checkify_finds_bad_sizes(self):
        def run(sizes):
            return pallas_kernels.make_group_metadata(sizes, 10).starts

        checked = checkify.checkify(jax.jit(run), errors=checkify.user_checks)
        assert checked(np.array([4, 6], np.int32))[0].get() is None
        assert "negative size" in checked(np.array([4, -1], np.int32))[0].get()
        assert "at most 10 rows" in checked(np.array([4, 7], np.int32))[0].get()


def unannotated(operation):
    """The operation without the annotations, which only tests check."""
    return getattr(operation, "__wrapped__", operation)


class TestArguments:
    lhs = np.zeros((6, 4), np.float32)
    rhs = np.zeros((2, 4, 3), np.float32)
    sizes = np.array([2, 3], np.int32)
    metadata = pallas_kernels.make_group_metadata(sizes, 6)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(lhs=lhs[0]), ValueError, r"lhs has shape \(4,\); 2 axes are needed"),
            (dict(lhs=lhs.astype(np.int32)), TypeError, "lhs has dtype int32"),
            (dict(lhs=lhs[:0]), ValueError, "every axis must be at least 1"),
            (dict(rhs=rhs.astype(np.float16)), TypeError, "rhs has dtype float16; lhs's"),
            (dict(transpose_rhs=True), ValueError, r"4 is needed in axis 2 beside lhs \(6, 4\)"),
            (dict(rhs=rhs[:, :3]), ValueError, "4 is needed in axis 1"),
            (
                dict(group_sizes=sizes.astype(np.float32)),
                TypeError,
                "group_sizes has dtype float32",
            ),
            (dict(group_sizes=sizes[None]), ValueError, "group_sizes has shape"),
            (dict(group_sizes=sizes[:1]), ValueError, "num_local_groups=2 must be from 1 to 1"),
            (dict(group_offset=np.float32(1)), TypeError, "group_offset has dtype float32"),
            (dict(group_offset=sizes), ValueError, "a scalar is needed"),
            (dict(group_sizes=metadata, group_offset=1), ValueError, "part of the metadata"),
            (dict(group_sizes=metadata, lhs=np.zeros((7, 4), "f")), ValueError, "is of 6 rows"),
            (dict(group_sizes=metadata, rhs=rhs[:1]), ValueError, "is of 2 local groups"),
            (dict(group_sizes=metadata, tiling=(64, 8, 8)), ValueError, "the metadata's tile_rows"),
            (dict(tiling=(12, 8, 8)), ValueError, "tile_rows=12 must be a multiple of 8"),
            (dict(tiling=(16, 8)), ValueError, r"tiling=\(16, 8\) must be \(rows, contr"),
            (dict(tiling=16), TypeError, "tiling=16 must be"),
            (dict(tiling=(16, 8.0, 8)), TypeError, "tiling=8.0 must be an integer"),
            (dict(tiling=(16, 8, 4)), ValueError, "tiling=4 must be from 8"),
            (dict(activation="relu"), ValueError, "activation='relu' is unknown"),
            (dict(activation="swiglu"), ValueError, r"needs rhs \[g, k, 2n\]"),
            (dict(preferred_element_type=np.int32), TypeError, "preferred_element_type=int32"),
            (dict(preferred_element_type="f1"), TypeError, "preferred_element_type='f1' is no"),
            (dict(lhs=None), TypeError, "lhs=None is no array"),
            (dict(rhs=rhs[0]), ValueError, r"rhs has shape \(4, 3\); 3 axes are needed"),
            (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
            (dict(implementation=b"xla"), TypeError, "must be None or a string"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = dict(lhs=self.lhs, rhs=self.rhs, group_sizes=self.sizes) | change
        lhs, rhs, sizes = (arguments.pop(name) for name in ("lhs", "rhs", "group_sizes"))
        # Past the annotations, which only tests check.
        with pytest.raises(error, match=message):
            unannotated(api.gmm)(lhs, rhs, sizes, **arguments)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(dout=lhs[:5]), ValueError, "6 rows are needed beside lhs"),
            (dict(dout=lhs[0]), ValueError, r"dout has shape \(4,\); 2 axes are needed"),
            (dict(dout=lhs.astype(np.float16)), TypeError, "dout has dtype float16; lhs's"),
            (dict(num_local_groups=3), ValueError, "num_local_groups=3 must be from 1 to 2"),
            (dict(num_local_groups=0), ValueError, "num_local_groups=0 must be from 1 to 2"),
        ],
    )
    def test_tgmm_errors(self, change, error, message):
        arguments = dict(lhs=self.lhs, dout=self.lhs, group_sizes=self.sizes) | change
        with pytest.raises(error, match=message):
            unannotated(api.tgmm)(**arguments)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(num_rows=1.5), TypeError, r"num_rows=1\.5 must be an integer"),
            (dict(num_local_groups=1.0), TypeError, "num_local_groups=1.0 must be an integer"),
            (dict(group_sizes=None), TypeError, "group_sizes=None is no array"),
            (dict(num_rows=-1), ValueError, "num_rows=-1 must be from 1"),
            (dict(group_sizes=sizes[:0]), ValueError, "1 axis of at least 1 is needed"),
            (dict(tile_rows=0), ValueError, "tile_rows=0 must be from 8"),
            (dict(tile_rows="8"), TypeError, "tile_rows='8' must be an integer"),
            (dict(group_offset=1.0), TypeError, "group_offset has dtype float"),
        ],
    )
    def test_metadata_errors(self, change, error, message):
        arguments = dict(group_sizes=self.sizes, num_rows=6) | change
        with pytest.raises(error, match=message):
            unannotated(api.make_group_metadata)(**arguments)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
