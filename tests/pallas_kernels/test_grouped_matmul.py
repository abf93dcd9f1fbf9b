"""Every implementation of the grouped products against numpy in float64, and against another."""

import dataclasses
import functools
import sys

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape, Sizes, draw_sizes, make_arguments

BY_NAME = {shape.name: shape for shape in SHAPES}
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=list(BY_NAME))


# numpy in float64, one group at a time.


def group_rows(shape, sizes):
    """The rows of every local group, as slices; sizes past the last row are cut off."""
    ends = np.minimum(np.cumsum(np.maximum(sizes.astype(object), 0)), shape.m)
    bounds = [0, *map(int, ends)]
    rows = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
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


def products(shape, implementation, **options):
    """Of lhs, rhs, dout, sizes: what `numpy_truth` returns."""

    @jax.jit
    def run(lhs, rhs, dout, sizes):
        metadata = pallas_kernels.make_group_metadata(
            sizes, shape.m, num_local_groups=shape.local_groups, **offset_of(shape)
        )
        gmm = functools.partial(
            pallas_kernels.gmm,
            group_sizes=metadata,
            implementation=implementation,
            **options,
        )
        out, vjp = jax.vjp(gmm, lhs, rhs)
        transposed = gmm(lhs, rhs.swapaxes(1, 2), transpose_rhs=True)
        tgmm = pallas_kernels.tgmm(lhs, dout, metadata, implementation=implementation, **options)
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
    has_offset = True

    def skip_if_refused(self, shape):
        if shape.local and not self.has_offset:
            a = make_arguments(shape)
            with pytest.raises(NotImplementedError, match="group_offset"):
                products(shape, self.implementation)(*arrays_of(a))
            return True
        return False

    @all_shapes
    def test_values_and_gradients(self, shape):
        if self.skip_if_refused(shape):
            return
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
        for kind in Sizes:
            a = make_arguments(dataclasses.replace(shape, sizes=kind))
            assert_all_close(run(*arrays_of(a)), numpy_truth(shape, a), 1e-5)
        assert run._cache_size() == 1

    @pytest.mark.parametrize("name", ["tail", "offset"])
    def test_rows_outside_may_hold_nan(self, name):
        shape = BY_NAME[name]
        if self.skip_if_refused(shape):
            return
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
        if not self.has_offset:
            return
        shape = dataclasses.replace(BY_NAME["offset"], local=None)
        a = make_arguments(shape)
        run = products(dataclasses.replace(shape, local=(0, 2)), self.implementation)
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
        del run

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

    @pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16", "uint32", "int64", "uint64"])
    def test_any_integer_sizes(self, dtype):
        shape = dataclasses.replace(BY_NAME["many_tiles"], sizes=(100, 0, 127))
        a = make_arguments(shape)
        with jax.enable_x64(True):
            sizes = a.group_sizes.astype(dtype)
            out = pallas_kernels.gmm(a.lhs, a.rhs, sizes, implementation=self.implementation)
        assert_close(out, numpy_gmm(shape, a), 1e-5)

    @pytest.mark.parametrize(
        "sizes", [(-3, 20, -(2**31), 40), (30, 2**31 - 1, 2**31 - 1, 5), (0, 41, 9, 9)]
    )
    def test_bad_sizes_are_cut_off(self, sizes):
        shape = dataclasses.replace(BY_NAME["uneven"], sizes=sizes)
        a = make_arguments(shape)
        found = products(shape, self.implementation)(*arrays_of(a))
        assert_all_close(found, numpy_truth(shape, a), 1e-5)

    def test_bfloat16(self):
        shape = BY_NAME["many_tiles"]
        a = make_arguments(shape)

        def rounded(x):
            return np.asarray(jnp.asarray(x, jnp.bfloat16))

        low = [rounded(x) for x in (a.lhs, a.rhs, a.dout)]
        found = products(shape, self.implementation)(*low, a.group_sizes)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        wide = dataclasses.replace(
            a, **dict(zip(("lhs", "rhs", "dout"), (x.astype(np.float32) for x in low), strict=True))
        )
        assert_all_close(found, numpy_truth(shape, wide), 2e-2)

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


class TestReference(GroupedProducts):
    implementation = "reference"

    @pytest.mark.parametrize("name", ["tail", "offset"])
    def test_finite_differences(self, name):
        check_finite_differences(BY_NAME[name], self.implementation, order=1)


class TestXLA(GroupedProducts):
    implementation = "xla"

    def test_finite_differences(self):
        check_finite_differences(BY_NAME["uneven"], self.implementation, order=2)


class TestRaggedDot(GroupedProducts):
    implementation = "ragged_dot"
    has_offset = False


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
            seen[max(starts[group], tile * tile_rows) : min(ends[group], (tile + 1) * tile_rows)] += 1
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

    def test_checkify_finds_bad_sizes(self):
        def run(sizes):
            return pallas_kernels.make_group_metadata(sizes, 10).starts

        checked = checkify.checkify(jax.jit(run), errors=checkify.user_checks)
        assert checked(np.array([4, 6], np.int32))[0].get() is None
        assert "negative size" in checked(np.array([4, -1], np.int32))[0].get()
        assert "at most 10 rows" in checked(np.array([4, 7], np.int32))[0].get()


class TestRouting:
    def test_sort_and_back(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 5, (13, 3)).astype(np.int32)
        ids[2, 1], ids[7, 0] = -1, 5
        routing = jax.jit(pallas_kernels.sort_by_expert, static_argnums=1)(ids, 5)
        flat = ids.reshape(-1)
        sizes = np.bincount(flat[(flat >= 0) & (flat < 5)], minlength=5)
        np.testing.assert_array_equal(routing.group_sizes, sizes)
        keys = np.where((flat >= 0) & (flat < 5), flat, 5)
        np.testing.assert_array_equal(routing.order, np.argsort(keys, kind="stable"))
        np.testing.assert_array_equal(np.asarray(routing.order)[routing.inverse.reshape(-1)], np.arange(39))

    def test_rows_and_gradients(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 4, (9, 2)).astype(np.int32)
        x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
        weights = jnp.asarray(rng.random((9, 2)), jnp.float32)
        routing = pallas_kernels.sort_by_expert(ids, 4)

        def run(x, weights):
            rows = pallas_kernels.sort_rows(x, routing)
            return pallas_kernels.unsort_rows(jnp.sin(rows), weights, routing)

        def direct(x, weights):
            return (jnp.sin(x)[:, None] * weights[..., None]).sum(1)

        assert_close(jax.jit(run)(x, weights), direct(x, weights), 1e-6)
        dout = rng.normal(size=(9, 6)).astype(np.float32)
        found, expected = (jax.vjp(f, x, weights)[1](dout) for f in (run, direct))
        assert_all_close(found, expected, 1e-6)

    def test_backward_has_no_scatter(self):
        routing = pallas_kernels.sort_by_expert(np.zeros((4, 2), np.int32), 2)

        def loss(x, weights):
            rows = pallas_kernels.sort_rows(x, routing)
            return pallas_kernels.unsort_rows(rows, weights, routing).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((4, 3)), jnp.ones((4, 2)))
        assert "gather" in str(jaxpr)
        assert "scatter" not in str(jaxpr)

    @pytest.mark.parametrize(
        ("ids", "experts", "error", "message"),
        [
            (np.zeros((2, 2), np.float32), 2, TypeError, "expert_ids has dtype float32"),
            (np.zeros(4, np.int32), 2, ValueError, r"expert_ids has shape \(4,\)"),
            (np.zeros((2, 2), np.int32), 0, ValueError, "num_experts=0 must be at least 1"),
        ],
    )
    def test_errors(self, ids, experts, error, message):
        with pytest.raises(error, match=message):
            pallas_kernels.sort_by_expert(ids, experts)


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
            (dict(group_sizes=sizes.astype(np.float32)), TypeError, "group_sizes has dtype float32"),
            (dict(group_sizes=sizes[None]), ValueError, "group_sizes has shape"),
            (dict(group_sizes=sizes[:1]), ValueError, "num_local_groups=2 must be from 1 to 1"),
            (dict(group_offset=np.float32(1)), TypeError, "group_offset has dtype float32"),
            (dict(group_offset=sizes), ValueError, "a scalar is needed"),
            (dict(group_sizes=metadata, group_offset=1), ValueError, "part of the metadata"),
            (dict(group_sizes=metadata, lhs=np.zeros((7, 4), "f")), ValueError, "is of 6 rows"),
            (dict(group_sizes=metadata, rhs=rhs[:1]), ValueError, "is of 2 local groups"),
            (dict(group_sizes=metadata, tiling=(64, 8, 8)), ValueError, "the metadata's tile_rows"),
            (dict(tiling=(12, 8, 8)), ValueError, "tile_rows=12 must be a multiple of 8"),
            (dict(tiling=(16, 8)), Exception, "tiling"),
            (dict(tiling=(16, 8, 4)), ValueError, "tiling=4 must be from 8"),
            (dict(activation="relu"), ValueError, "activation='relu' is unknown"),
            (dict(activation="swiglu"), ValueError, r"needs rhs \[g, k, 2n\]"),
            (dict(preferred_element_type=np.int32), TypeError, "preferred_element_type=int32"),
            (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = dict(lhs=self.lhs, rhs=self.rhs, group_sizes=self.sizes) | change
        lhs, rhs, sizes = (arguments.pop(name) for name in ("lhs", "rhs", "group_sizes"))
        # Past the annotations, which only tests check.
        with pytest.raises(error, match=message):
            getattr(api.gmm, "__wrapped__", api.gmm)(lhs, rhs, sizes, **arguments)

    def test_tgmm_errors(self):
        with pytest.raises(ValueError, match="6 rows are needed beside lhs"):
            pallas_kernels.tgmm(self.lhs, self.lhs[:5], self.sizes)
        with pytest.raises(TypeError, match="num_rows=1.5 must be an integer"):
            api._within("num_rows", 1.5, 1, 2)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
