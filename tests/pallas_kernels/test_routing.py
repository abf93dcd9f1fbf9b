"""Tokens to rows sorted by expert and back; experts spread over a mesh axis."""

import collections
import functools
import sys

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from grouped_products import assert_all_close, assert_close
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import evidence


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
        np.testing.assert_array_equal(
            np.asarray(routing.order)[routing.inverse.reshape(-1)], np.arange(39)
        )

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

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                dict(x=np.zeros((8, 3), "f")),
                ValueError,
                r"x has shape \(8, 3\); \[9, D\] is needed",
            ),
            (dict(x=np.zeros(9, "f")), ValueError, r"x has shape \(9,\)"),
            (dict(x=None), TypeError, "x=None is no array"),
            (dict(rows=np.zeros((9, 3), "f")), ValueError, r"rows has shape \(9, 3\); \[18, D\]"),
            (dict(rows=np.zeros((18, 3), int)), TypeError, "rows has dtype int"),
            (dict(weights=np.zeros((9, 1), "f")), ValueError, r"weights has .* \(9, 2\) is needed"),
            (dict(weights=np.zeros((9, 2), int)), TypeError, "weights has dtype int"),
            (dict(routing=np.zeros((9, 2), int)), TypeError, "must be what sort_by_expert returns"),
        ],
    )
    def test_errors_of_rows(self, change, error, message):
        rows, weights = np.zeros((18, 3), "f"), np.zeros((9, 2), "f")
        routing = pallas_kernels.sort_by_expert(np.zeros((9, 2), np.int32), 4)
        a = dict(x=np.zeros((9, 3), "f"), rows=rows, weights=weights, routing=routing) | change
        sort, unsort = (
            # Past the annotations, which only tests check.
            getattr(f, "__wrapped__", f)
            for f in (pallas_kernels.sort_rows, pallas_kernels.unsort_rows)
        )
        with pytest.raises(error, match=message):
            sort(a["x"], a["routing"])
            unsort(a["rows"], a["weights"], a["routing"])


def routed_arguments(tokens=40, experts=4, dtype=np.float32):
    """x, weights, cotangent and routing of uneven experts, with dropped choices and a token that is
    dropped whole, which is NaN."""
    rng = np.random.default_rng(3)
    ids = rng.choice(experts, (tokens, 2), p=[0.6, 0.3, 0.1, 0.0]).astype(np.int32)
    ids[2, 1], ids[7] = -1, experts
    x = rng.normal(size=(tokens, 24)).astype(dtype)
    x[7] = np.nan
    weights = rng.normal(size=(experts, 24, 16)).astype(dtype)
    dout = rng.normal(size=(2 * tokens, 16)).astype(dtype)
    return x, weights, dout, pallas_kernels.sort_by_expert(ids, experts)


class TestTokens:
    """Products of tokens equal those of sorted rows."""

    @staticmethod
    def products(routing, implementation, gathered, **options):
        options |= dict(implementation=implementation)

        def run(x, weights, dout):
            sizes, given = routing.group_sizes, dict(routing=routing)
            if not gathered:
                given = {}

            def rows(x):
                return x if gathered else pallas_kernels.sort_rows(x, routing)

            def forward(x, weights):
                return pallas_kernels.gmm(rows(x), weights, sizes, **given, **options)

            out, vjp = jax.vjp(forward, x, weights)
            plain = dict(implementation=implementation)
            return out, vjp(dout), pallas_kernels.tgmm(rows(x), dout, sizes, **given, **plain)

        return jax.jit(run)

    @pytest.mark.parametrize(
        "implementation", ["reference", "xla", "ragged_dot", "interpret", "interpret_gpu", None]
    )
    def test_values_and_gradients(self, implementation):
        x, weights, dout, routing = routed_arguments()
        found, expected = (
            self.products(routing, implementation, gathered)(x, weights, dout)
            for gathered in (True, False)
        )
        assert_all_close(found, expected, 1e-6)
        assert not np.isnan(found[0]).any() and not np.isnan(found[1][1]).any()
        np.testing.assert_array_equal(found[1][0][7], 0)

    @pytest.mark.parametrize("options", [dict(transpose_rhs=True), dict(activation="swiglu")])
    def test_options(self, options):
        x, weights, dout, routing = routed_arguments()
        if "activation" in options:
            dout = dout[:, :8]
        else:
            weights = weights.swapaxes(1, 2)
        for implementation in ("xla", "interpret_gpu"):
            found, expected = (
                self.products(routing, implementation, gathered, **options)(x, weights, dout)
                for gathered in (True, False)
            )
            assert_all_close(found, expected, 1e-6)

    @pytest.mark.parametrize("operation", ["gmm", "tgmm"])
    def test_finite_differences_of_second_order(self, operation):
        x, weights, dout, routing = routed_arguments(tokens=12)
        x[7] = 0.0
        other = weights if operation == "gmm" else dout
        with jax.enable_x64(True):

            def run(x, other):
                product = getattr(pallas_kernels, operation)
                return product(x, other, routing.group_sizes, routing=routing, implementation="xla")

            jax.test_util.check_grads(
                jax.jit(run),
                (x.astype(np.float64), other.astype(np.float64)),
                2,
                modes=["rev"],
                atol=1e-5,
                rtol=1e-5,
                eps=1e-5,
            )

    def test_bfloat16_and_vmap(self):
        x, weights, _, routing = routed_arguments()
        x[7] = 0.0
        xs = jnp.stack([x, 2 * x[::-1]]).astype(jnp.bfloat16)
        weights = jnp.asarray(weights, jnp.bfloat16)

        def run(x):
            return pallas_kernels.gmm(x, weights, routing.group_sizes, routing=routing)

        found = jax.jit(jax.vmap(run))(xs)
        for x, out in zip(xs, found, strict=True):
            rows = pallas_kernels.sort_rows(x, routing)
            assert_close(out, pallas_kernels.gmm(rows, weights, routing.group_sizes), 1e-6)

    def test_tokens_are_kept_in_place_of_rows(self):
        x, weights, _, routing = routed_arguments()
        sizes, kept = routing.group_sizes, []
        for rows, given in ((lambda x: x, dict(routing=routing)), (None, {})):
            rows = rows or functools.partial(pallas_kernels.sort_rows, routing=routing)

            def run(x, weights, rows=rows, given=given):
                return pallas_kernels.gmm(rows(x), weights, sizes, implementation="xla", **given)

            _, vjp = jax.vjp(run, x, weights)
            kept.append({leaf.shape for leaf in jax.tree.leaves(vjp)})
        tokens, sorted_rows = kept
        assert (40, 24) in tokens and (80, 24) not in tokens
        assert (80, 24) in sorted_rows

    def test_tokens_compile_for_devices(self):
        x, weights, dout, routing = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.asarray(a).dtype), routed_arguments(512)
        )

        def run(implementation):
            def products(x, weights, dout, routing):
                given = dict(routing=routing, implementation=implementation)

                def forward(x, weights):
                    return pallas_kernels.gmm(x, weights, routing.group_sizes, **given)

                out, vjp = jax.vjp(forward, x, weights)
                return out, vjp(dout)

            return products

        arguments = (x, weights, dout, routing)
        assert len(evidence.lower_for_cuda(run("gpu"), arguments).kernels) == 3
        assert evidence.compile_for_tpu(run("tpu"), arguments).as_text().count("tpu_custom") >= 3

    def test_errors(self):
        x, weights, dout, routing = routed_arguments()
        sizes = routing.group_sizes
        with pytest.raises(ValueError, match=r"lhs has shape \(80, 24\); 40 tokens are needed"):
            pallas_kernels.gmm(np.zeros((80, 24), "f"), weights, sizes, routing=routing)
        with pytest.raises(ValueError, match=r"dout has shape \(40, 16\); 80 rows are needed"):
            pallas_kernels.tgmm(x, dout[:40], sizes, routing=routing)
        groups = pallas_kernels.make_group_metadata(sizes, 40)
        with pytest.raises(ValueError, match="the metadata is of 40 rows; 80 are needed"):
            pallas_kernels.gmm(x, weights, groups, routing=routing)
        product = getattr(pallas_kernels.gmm, "__wrapped__", pallas_kernels.gmm)
        with pytest.raises(TypeError, match="must be what sort_by_expert returns"):
            product(x, weights, sizes, routing=sizes)


TOKENS, CHOICES, EXPERTS, WIDTH, MLP = 64, 2, 16, 12, 10


def moe_arguments(seed=0, skewed=False):
    """x, expert_ids, weights, gate_up, down of all shards."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3 if skewed else EXPERTS, (TOKENS, CHOICES)).astype(np.int32)
    ids[5, 1], ids[40, 0] = -1, EXPERTS

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = jnp.asarray(rng.random((TOKENS, CHOICES)), jnp.float32)
    gate_up, down = normal(EXPERTS, WIDTH, 2 * MLP), normal(EXPERTS, MLP, WIDTH)
    return normal(TOKENS, WIDTH), jnp.asarray(ids), weights, gate_up, down


def dense_ffn(x, ids, weights, gate_up, down):
    """Every expert on every token, in float32."""
    gate, up = jnp.split(jnp.einsum("td,edf->tef", x, gate_up, precision="highest"), 2, axis=2)
    out = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, down, precision="highest")
    chosen = ids[..., None] == jnp.arange(EXPERTS)[None, None]
    return jnp.einsum("tk,tke,ted->td", weights, chosen.astype(x.dtype), out, precision="highest")


def local_ffn(x, ids, weights, gate_up, down, implementation=None):
    """The MLP with all experts on one device."""
    routing = pallas_kernels.sort_by_expert(ids, EXPERTS)
    groups = pallas_kernels.make_group_metadata(routing.group_sizes, ids.size)
    product = functools.partial(
        pallas_kernels.gmm, group_sizes=groups, implementation=implementation
    )
    hidden = product(pallas_kernels.sort_rows(x, routing), gate_up, activation="swiglu")
    return pallas_kernels.unsort_rows(product(hidden, down), weights, routing)


def gradients_under(policy, implementation):
    """Of the experts' MLP, the layer before it included, in x, the weights and the matrices."""

    def loss(x, ids, *others):
        return local_ffn(jnp.tanh(x), ids, *others, implementation=implementation).sum()

    return jax.grad(jax.checkpoint(loss, policy=policy), (0, 2, 3, 4))


def counted(jaxpr):
    """How often the kernels and sorts by name occur anywhere in a jaxpr."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            name = equation.params["name"]
        found[name] += 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += counted(inner)
    return {name: found[name] for name in ("gmm", "tgmm", "sort")}


class TestRemat:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("gmm", "routing"), dict(gmm=4, tgmm=2, sort=1)),  # two forward, two backward
            (("gmm",), dict(gmm=4, tgmm=2, sort=2)),
            ((), dict(gmm=6, tgmm=2, sort=2)),
        ],
    )
    def test_saved_products_are_not_repeated(self, names, expected):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        jaxpr = jax.make_jaxpr(gradients_under(policy, "tpu"))(*moe_arguments())
        assert counted(jaxpr.jaxpr) == expected

    def test_gradients_are_the_same(self):
        save = jax.checkpoint_policies.save_only_these_names("gmm", "routing")
        found, expected = (
            jax.jit(gradients_under(policy, "ragged_dot"))(*moe_arguments())
            for policy in (save, jax.checkpoint_policies.everything_saveable)
        )
        assert_all_close(found, expected, 1e-6)


def spread_ffn(mesh, **options):
    run = functools.partial(pallas_kernels.expert_parallel_ffn, axis_name="expert", **options)
    spread = P("expert")
    return jax.shard_map(run, mesh=mesh, in_specs=(spread,) * 5, out_specs=spread, check_vma=False)


class TestExpertParallel:
    def mesh(self):
        return jax.make_mesh((8,), ("expert",), (jax.sharding.AxisType.Auto,))

    @pytest.mark.parametrize("implementation", ["xla", "interpret", "interpret_gpu"])
    def test_padded_exchange(self, implementation):
        def value_and_gradients(ffn):
            @jax.jit
            def run(x, ids, weights, gate_up, down):
                out, vjp = jax.vjp(
                    lambda x, w, g, d: ffn(x, ids, w, g, d), x, weights, gate_up, down
                )
                return out, vjp(jnp.cos(x))

            return run

        found = value_and_gradients(spread_ffn(self.mesh(), implementation=implementation))
        expected = value_and_gradients(dense_ffn)
        for skewed in (False, True):
            arguments = moe_arguments(skewed=skewed)
            assert_all_close(found(*arguments), expected(*arguments), 1e-5)

    def test_capacity_drops_the_last_rows(self):
        x, ids, weights, gate_up, down = moe_arguments(skewed=True)
        factor = 1.5
        out = jax.jit(spread_ffn(self.mesh(), capacity_factor=factor))(
            x, ids, weights, gate_up, down
        )
        rows = TOKENS * CHOICES // 8
        capacity = int(np.ceil(factor * rows / 8))
        kept = np.array(ids).reshape(8, rows)
        for shard in kept:
            # The experts of one shard lie together; of its rows the first `capacity` travel.
            order = np.argsort(
                np.where((shard >= 0) & (shard < EXPERTS), shard, EXPERTS), kind="stable"
            )
            for target in range(8):
                mine = [r for r in order if 0 <= shard[r] < EXPERTS and shard[r] // 2 == target]
                shard[mine[capacity:]] = -1
        assert (kept.reshape(ids.shape) != np.asarray(ids)).sum() > 20
        expected = dense_ffn(x, jnp.asarray(kept.reshape(ids.shape)), weights, gate_up, down)
        assert_close(out, expected, 1e-5)

    @pytest.mark.parametrize("capacity_factor", [None, 2.0])
    def test_ragged_exchange_compiles_for_tpu(self, capacity_factor):
        # Evidence that it compiles, forward and backward; XLA cannot run it on the CPU.
        devices = np.array(evidence.tpu_devices("v5p:2x2x1"))
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.Mesh(devices, ("expert",), axis_types=axis_types)
        run = spread_ffn(mesh, exchange="ragged", capacity_factor=capacity_factor)
        sharding = jax.sharding.NamedSharding(mesh, P("expert"))

        def gradients(x, ids, weights, gate_up, down):
            out, vjp = jax.vjp(lambda x, w, g, d: run(x, ids, w, g, d), x, weights, gate_up, down)
            return vjp(out)

        shapes = [(256, 256), (256, 2), (256, 2), (8, 256, 256), (8, 128, 256)]
        dtypes = [jnp.bfloat16, jnp.int32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        text = evidence.compile_for_tpu(gradients, arguments).as_text()
        assert "ragged-all-to-all" in text

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(exchange="ring"), ValueError, "exchange='ring' is unknown; allowed are padded"),
            (dict(capacity_factor=0.0), ValueError, "capacity_factor=0.0 must be positive"),
            (dict(capacity_factor="2x"), TypeError, "capacity_factor='2x' must be a number"),
            (dict(down=np.zeros((2, 9, WIDTH), np.float32)), ValueError, "down has shape"),
            (dict(down=np.zeros((2, MLP, WIDTH), np.float16)), TypeError, "down has dtype float16"),
            (dict(gate_up=np.zeros((2, 5, 20), np.float32)), ValueError, "gate_up has shape"),
            (dict(gate_up=np.zeros((2, WIDTH, 19), "f")), ValueError, "gate_up has shape .* 2F"),
            (dict(gate_up=np.zeros((2, WIDTH), "f")), ValueError, "gate_up has shape .* 3 axes"),
            (
                dict(weights=np.zeros((8, 3), np.float32)),
                ValueError,
                r"\[8, K\] is needed beside x",
            ),
            (dict(weights=np.zeros((8, 2), int)), TypeError, "weights has dtype int"),
            (dict(x=np.zeros(8, np.float32)), ValueError, r"x has shape \(8,\)"),
            (dict(x=np.zeros((8, WIDTH), np.int32)), TypeError, "x has dtype int32"),
        ],
    )
    def test_errors(self, change, error, message):
        arguments = dict(
            x=np.zeros((8, WIDTH), np.float32),
            expert_ids=np.zeros((8, 2), np.int32),
            weights=np.zeros((8, 2), np.float32),
            gate_up=np.zeros((2, WIDTH, 2 * MLP), np.float32),
            down=np.zeros((2, MLP, WIDTH), np.float32),
        )
        # Past the annotations, which only tests check.
        operation = pallas_kernels.expert_parallel_ffn
        with pytest.raises(error, match=message):
            getattr(operation, "__wrapped__", operation)(**(arguments | change), axis_name="expert")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
