"""What every implementation of the grouped products must do, beside numpy in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape, Sizes, make_arguments

BY_NAME = {shape.name: shape for shape in SHAPES}
HALF_PRECISION = {"bfloat16": 2e-2, "float16": 2e-3}
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=list(BY_NAME))


# numpy in float64, one group at a time.


def group_rows(shape, sizes):
    """The rows of every local group, as slices; sizes past the last row are cut off."""
    ends = np.minimum(np.cumsum(np.maximum(sizes.astype(object), 0)), shape.m)
    bounds = [0, *map(int, ends)]
    rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return rows[shape.offset : shape.offset + shape.local_groups]


def numpy_gmm(shape, a):
    out = np.zeros((shape.m, shape.n))
    for rows, weight in zip(group_rows(shape, a.group_sizes), a.rhs, strict=True):
        out[rows] = a.lhs[rows].astype(np.float64) @ weight.astype(np.float64)
    return out


def numpy_d_lhs(shape, a):
    swapped = dataclasses.replace(a, lhs=a.dout, rhs=a.rhs.swapaxes(1, 2))
    return numpy_gmm(dataclasses.replace(shape, k=shape.n, n=shape.k), swapped)


def numpy_tgmm(shape, a):
    return np.stack(
        [
            a.lhs[rows].astype(np.float64).T @ a.dout[rows].astype(np.float64)
            for rows in group_rows(shape, a.group_sizes)
        ]
    )


def numpy_truth(shape, a):
    """gmm, gmm of the transposed weights, tgmm, and the two gradients of gmm at `dout`."""
    d_rhs = numpy_tgmm(shape, a)
    return numpy_gmm(shape, a), numpy_gmm(shape, a), d_rhs, numpy_d_lhs(shape, a), d_rhs


def offset_of(shape):
    return dict(group_offset=shape.offset) if shape.local else {}


def products(shape, implementation, tile_rows=None, tiling=None):
    """Of lhs, rhs, dout, sizes: what `numpy_truth` returns, as one program for all sizes."""
    shape = dataclasses.replace(shape, name="", sizes=())
    return _compiled_products(shape, implementation, tile_rows, tiling)


@functools.cache
def _compiled_products(shape, implementation, tile_rows, tiling):
    options = dict(implementation=implementation, tiling=tiling)

    @jax.jit
    def run(lhs, rhs, dout, sizes):
        metadata = pallas_kernels.make_group_metadata(
            sizes,
            shape.m,
            num_local_groups=shape.local_groups,
            tile_rows=tile_rows,
            **offset_of(shape),
        )
        gmm = functools.partial(pallas_kernels.gmm, group_sizes=metadata, **options)
        out, vjp = jax.vjp(gmm, lhs, rhs)
        transposed = gmm(lhs, rhs.swapaxes(1, 2), transpose_rhs=True)
        tgmm = pallas_kernels.tgmm(lhs, dout, metadata, **options)
        return out, transposed, tgmm, *vjp(dout.astype(out.dtype))

    return run


def arrays_of(a):
    return a.lhs, a.rhs, a.dout, a.group_sizes


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = max(np.abs(expected).max(initial=0.0), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_all_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance)


class GroupedProducts:
    """All that an implementation must do; a subclass names one."""

    implementation: str
    half_precision = ("bfloat16", "float16")

    @all_shapes
    def test_values_and_gradients(self, shape):
        a = make_arguments(shape)
        found = products(shape, self.implementation)(*arrays_of(a))
        assert_all_close(found, numpy_truth(shape, a), 1e-5)

    @given(data=st.data())
    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        # Every subclass runs it; nothing is kept between the runs.
        suppress_health_check=[HealthCheck.differing_executors],
    )
    def test_any_sizes(self, data):
        groups = data.draw(st.integers(1, 5))
        sizes = data.draw(st.lists(st.integers(0, 12), min_size=groups, max_size=groups))
        width = st.integers(1, 9)
        shape = Shape(
            name="drawn",
            m=max(sum(sizes) + data.draw(st.integers(0, 9)), 1),
            k=data.draw(width),
            n=data.draw(width),
            groups=groups,
            sizes=tuple(sizes),
        )
        a = make_arguments(shape, seed=data.draw(st.integers(0, 99)))
        found = products(shape, self.implementation)(*arrays_of(a))
        assert_all_close(found, numpy_truth(shape, a), 1e-5)

    def test_one_program_serves_all_sizes(self):
        shape = BY_NAME["many_tiles"]
        run = products(shape, self.implementation)
        programs = set()
        for kind in Sizes:
            a = make_arguments(dataclasses.replace(shape, sizes=kind))
            assert_all_close(run(*arrays_of(a)), numpy_truth(shape, a), 1e-5)
            programs.add(run._cache_size())
        assert len(programs) == 1

    @pytest.mark.parametrize("name", ["tail", "offset"])
    def test_rows_outside_may_hold_nan(self, name):
        shape = BY_NAME[name]
        a = make_arguments(shape)
        truth = numpy_truth(shape, a)
        outside = np.ones(shape.m, bool)
        for rows in group_rows(shape, a.group_sizes):
            outside[rows] = False
        a.lhs[outside] = np.nan
        a.dout[outside] = np.nan
        found = products(shape, self.implementation)(*arrays_of(a))
        assert_all_close(found, truth, 1e-5)
        for index in (0, 1, 3):
            assert not np.asarray(found[index])[outside].any()

    def test_neighbours_do_not_leak(self):
        shape = BY_NAME["uneven"]
        a = make_arguments(shape)
        truth = numpy_gmm(shape, a), numpy_tgmm(shape, a), numpy_d_lhs(shape, a)
        middle = group_rows(shape, a.group_sizes)[1]
        a.lhs[middle] = np.inf
        a.dout[middle] = np.nan
        out, _, d_rhs, d_lhs, _ = products(shape, self.implementation)(*arrays_of(a))
        others = np.r_[0 : middle.start, middle.stop : shape.m]
        assert_close(np.asarray(out)[others], truth[0][others], 1e-5)
        assert_close(np.asarray(d_lhs)[others], truth[2][others], 1e-5)
        assert_close(np.asarray(d_rhs)[[0, 2, 3]], truth[1][[0, 2, 3]], 1e-5)

    @pytest.mark.parametrize("name", ["empty_middle", "all_empty", "one_group_has_all"])
    def test_empty_groups_have_exactly_no_gradient(self, name):
        shape = BY_NAME[name]
        a = make_arguments(shape)
        *_, d_rhs = products(shape, self.implementation)(*arrays_of(a))
        assert not np.asarray(d_rhs)[a.group_sizes == 0].any()

    def test_shards_of_groups_add_up(self):
        shape = dataclasses.replace(BY_NAME["offset"], local=None)
        a = make_arguments(shape)
        total = np.zeros((shape.m, shape.n))

        @jax.jit
        def part(lhs, rhs, sizes, offset):
            return pallas_kernels.gmm(
                lhs, rhs, sizes, group_offset=offset, implementation=self.implementation
            )

        for first in (0, 2, 4):
            total += part(a.lhs, a.rhs[first : first + 2], a.group_sizes, np.int32(first))
        assert part._cache_size() == 1
        assert_close(total, numpy_gmm(shape, a), 1e-5)

    def test_permuted_groups(self):
        shape = BY_NAME["uneven"]
        a = make_arguments(shape)
        order = np.array([2, 0, 3, 1])
        slices = group_rows(shape, a.group_sizes)
        rows = np.concatenate([np.arange(shape.m)[slices[i]] for i in order])
        run = products(shape, self.implementation)
        out, *_ = run(*arrays_of(a))
        permuted, *_ = run(a.lhs[rows], a.rhs[order], a.dout[rows], a.group_sizes[order])
        assert_close(permuted, np.asarray(out)[rows], 1e-5)

    @pytest.mark.parametrize(
        "sizes", [(-3, 20, -(2**31), 40), (30, 2**31 - 1, 2**31 - 1, 5), (0, 41, 9, 9)]
    )
    def test_bad_sizes_are_cut_off(self, sizes):
        shape = dataclasses.replace(BY_NAME["uneven"], sizes=sizes)
        a = make_arguments(shape)
        found = products(shape, self.implementation)(*arrays_of(a))
        assert_all_close(found, numpy_truth(shape, a), 1e-5)

    def test_half_precision(self):
        shape = BY_NAME["many_tiles"]
        a = make_arguments(shape)
        for dtype in self.half_precision:
            low = {k: jnp.asarray(getattr(a, k), dtype) for k in ("lhs", "rhs", "dout")}
            found = products(shape, self.implementation)(*low.values(), a.group_sizes)
            assert all(x.dtype == dtype for x in found)
            wide = {k: np.asarray(x, np.float32) for k, x in low.items()}
            truth = numpy_truth(shape, dataclasses.replace(a, **wide))
            assert_all_close(found, truth, HALF_PRECISION[dtype])

    def test_bfloat16_is_summed_in_float32(self):
        # 4096 products of 1 are 4096 exactly; a bfloat16 sum would stop at 256.
        ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
        options = dict(implementation=self.implementation, preferred_element_type=jnp.float32)
        sizes = np.array([3, 5], np.int32)
        out = pallas_kernels.gmm(ones((8, 4097)), ones((2, 4097, 8)), sizes, **options)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, 4097)
        tall = np.array([4097, 0], np.int32)
        out = pallas_kernels.tgmm(ones((4097, 8)), ones((4097, 8)), tall, **options)
        np.testing.assert_array_equal(out, np.array([4097, 0])[:, None, None] * np.ones((2, 8, 8)))

    def test_swiglu(self):
        shape = dataclasses.replace(BY_NAME["tail"], n=12)
        a = make_arguments(shape)

        def run(lhs, rhs, implementation):
            return pallas_kernels.gmm(
                lhs, rhs, a.group_sizes, activation="swiglu", implementation=implementation
            )

        def loop(lhs, rhs):
            gate, up = jnp.split(
                pallas_kernels.gmm(lhs, rhs, a.group_sizes, implementation="reference"), 2, axis=1
            )
            return jax.nn.silu(gate) * up

        dout = a.dout[:, :6]
        fused = functools.partial(run, implementation=self.implementation)
        assert_close(jax.jit(fused)(a.lhs, a.rhs), loop(a.lhs, a.rhs), 1e-5)
        out, vjp = jax.vjp(fused, a.lhs, a.rhs)
        expected, expected_vjp = jax.vjp(loop, a.lhs, a.rhs)
        assert_all_close((out, vjp(dout)), (expected, expected_vjp(dout)), 1e-5)

    def test_second_order(self):
        """Gradients of gradients beside plain indexing of the weights."""
        shape = dataclasses.replace(BY_NAME["empty_last"], m=12, k=4, n=6, sizes=(5, 4, 0))
        a, tangent = make_arguments(shape), make_arguments(shape, seed=1)
        group = np.repeat(np.arange(4), (5, 4, 0, 3))

        def product(lhs, rhs):
            return pallas_kernels.gmm(
                lhs, rhs, a.group_sizes, activation="swiglu", implementation=self.implementation
            )

        def plain(lhs, rhs):
            with_tail = jnp.concatenate([rhs, jnp.zeros_like(rhs[:1])])
            gate, up = jnp.split(jnp.einsum("mk,mkn->mn", lhs, with_tail[group]), 2, axis=1)
            return jax.nn.silu(gate) * up

        def along(run, lhs, rhs, dout):
            """The inner product of the gradients with fixed arrays."""
            d_lhs, d_rhs = jax.vjp(run, lhs, rhs)[1](dout)
            return (d_lhs * tangent.lhs).sum() + (d_rhs * tangent.rhs).sum()

        found, expected = (
            jax.jit(jax.grad(functools.partial(along, run), (0, 1, 2)))(a.lhs, a.rhs, a.dout[:, :3])
            for run in (product, plain)
        )
        assert_all_close(found, expected, 1e-5)

    def test_sharded(self):
        """Rows and their sizes over two devices, the weights whole on both."""
        shape = Shape(name="sharded", m=12, k=8, n=6, groups=3)
        mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
        parts = [
            make_arguments(dataclasses.replace(shape, sizes=sizes))
            for sizes in ((5, 0, 4), (1, 8, 3))
        ]
        parts = [dataclasses.replace(part, rhs=parts[0].rhs) for part in parts]
        rows = P("data")

        def product(lhs, rhs, sizes):
            return pallas_kernels.gmm(lhs, rhs, sizes, implementation=self.implementation)

        @jax.jit
        def run(lhs, rhs, dout, sizes):
            sharded = jax.shard_map(
                lambda lhs, rhs, sizes: product(lhs, rhs, sizes[0]),
                mesh=mesh,
                in_specs=(rows, P(), rows),
                out_specs=rows,
                check_vma=False,
            )
            out, vjp = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes), lhs, rhs)
            return out, *vjp(dout)

        lhs, dout = (np.concatenate([getattr(p, name) for p in parts]) for name in ("lhs", "dout"))
        sizes = np.stack([p.group_sizes for p in parts])
        out, d_lhs, d_rhs = run(lhs, parts[0].rhs, dout, sizes)
        assert len(out.sharding.device_set) == 2
        assert_close(out, np.concatenate([numpy_gmm(shape, p) for p in parts]), 1e-5)
        assert_close(d_lhs, np.concatenate([numpy_d_lhs(shape, p) for p in parts]), 1e-5)
        assert_close(d_rhs, sum(numpy_tgmm(shape, p) for p in parts), 1e-5)

    def test_vmap(self):
        shape = BY_NAME["tail"]
        a = make_arguments(shape)
        run = products(shape, self.implementation)
        lhs = np.stack([a.lhs, -2 * a.lhs])
        rhs = np.stack([a.rhs, a.rhs + 1])
        dout = np.stack([a.dout, 3 * a.dout])
        sizes = np.stack([a.group_sizes, a.group_sizes[::-1]])
        together = jax.vmap(run)(lhs, rhs, dout, sizes)
        shared = jax.vmap(run, in_axes=(0, None, None, None))(lhs, a.rhs, a.dout, a.group_sizes)
        for i in range(2):
            assert_all_close([x[i] for x in together], run(lhs[i], rhs[i], dout[i], sizes[i]), 1e-5)
            assert_all_close(
                [x[i] for x in shared], run(lhs[i], a.rhs, a.dout, a.group_sizes), 1e-5
            )

    def test_scan_over_layers_with_remat(self):
        shape = dataclasses.replace(BY_NAME["uneven"], k=8, n=8)
        a = make_arguments(shape)
        weights = np.stack([a.rhs, a.rhs / 2, -a.rhs]) / 4

        def loss(weights, implementation):
            metadata = pallas_kernels.make_group_metadata(a.group_sizes, shape.m)

            @jax.checkpoint
            def layer(x, weight):
                out = pallas_kernels.gmm(x, weight, metadata, implementation=implementation)
                return jnp.tanh(out), None

            return jax.lax.scan(layer, jnp.asarray(a.lhs[:, :8]), weights)[0].sum()

        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, implementation=name)))(weights)
            for name in (self.implementation, "reference")
        )
        assert_close(found, expected, 1e-5)
