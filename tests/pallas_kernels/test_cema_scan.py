"""Every implementation of the recurrence against numpy in float64, and against another."""

import functools
import sys

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.signal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import evidence, gpu_evidence
from pallas_kernels.cema_scan import gpu, tpu, vjp, xla
from pallas_kernels.cema_scan.shapes import (
    DEVICE_SHAPES,
    SHAPES,
    Arguments,
    Shape,
    make_arguments,
)

BY_NAME = {shape.name: shape for shape in SHAPES}
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=list(BY_NAME))


def numpy_scan(arguments):
    """The recurrence in float64, one token at a time."""
    x = arguments.x.astype(np.float64)
    decay_re, decay_im, input_coeff, output_re, output_im = (
        c.astype(np.float64) for c in arguments.coefficients
    )
    decay, output = decay_re + 1j * decay_im, output_re + 1j * output_im
    h = arguments.state[0].astype(np.float64) + 1j * arguments.state[1]
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        if arguments.reset is not None:
            h = np.where(arguments.reset[:, t, None, None], 0, h)
        h = decay * h + input_coeff * x[:, t, :, None]
        y[:, t] = (output * h).real.sum(-1)
    return y, (h.real, h.imag)


def function_of(arguments, implementation):
    """The operation as a function of its floating-point arguments."""

    def function(x, coefficients, state):
        return pallas_kernels.cema_scan(
            x, *coefficients, state, arguments.reset, implementation=implementation
        )

    return function


def value_and_gradients(function, x, coefficients, state):
    """The value, and the gradients of a fixed random combination of its entries."""
    out, vjp = jax.vjp(function, x, coefficients, state)
    rng = np.random.default_rng(1)
    return out, vjp(jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), out))


def run(arguments, implementation, change=lambda x: x, compiler_options=()):
    function = functools.partial(value_and_gradients, function_of(arguments, implementation))
    floats = (arguments.x, arguments.coefficients, arguments.state)
    compiled = jax.jit(function, compiler_options=dict(compiler_options))
    return compiled(*jax.tree.map(change, floats))


def assert_all_close(actual, expected, tolerance):
    """Each array within tolerance times the largest value of what is expected."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        scale = max(np.abs(b).max(initial=0.0), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def assert_finite_differences(implementation):
    """The gradients in float64 beside finite differences."""
    shape = Shape(name="small", rows=2, length=67, width=2, size=2, resets=(10, 12, 40))
    arguments = make_arguments(shape)
    with jax.enable_x64(True):
        floats = (arguments.x, arguments.coefficients, arguments.state)
        floats = jax.tree.map(lambda x: x.astype(np.float64), floats)
        function = jax.jit(function_of(arguments, implementation))
        jax.test_util.check_grads(
            function, floats, order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6
        )


class TestReference:
    @all_shapes
    def test_value(self, shape):
        arguments = make_arguments(shape)
        function = jax.jit(function_of(arguments, "reference"))
        found = function(arguments.x, arguments.coefficients, arguments.state)
        assert_all_close(found, numpy_scan(arguments), 1e-5)

    def test_finite_differences(self):
        assert_finite_differences("reference")

    def test_equals_lfilter(self):
        shape = Shape(name="filter", length=50, width=3, size=2)
        arguments = make_arguments(shape)
        decay_re, decay_im, input_coeff, output_re, output_im = arguments.coefficients
        expected = np.zeros(arguments.x.shape)
        for d, n in np.ndindex(decay_re.shape):
            decay = complex(decay_re[d, n], decay_im[d, n])
            start = complex(arguments.state[0][0, d, n], arguments.state[1][0, d, n])
            h, _ = scipy.signal.lfilter(
                [input_coeff[d, n]], [1, -decay], arguments.x[0, :, d], zi=[decay * start]
            )
            expected[0, :, d] += (complex(output_re[d, n], output_im[d, n]) * h).real
        found, _ = function_of(arguments, "reference")(
            arguments.x, arguments.coefficients, arguments.state
        )
        assert_all_close(found, expected, 1e-5)


class Scan:
    """All that an implementation must do; a subclass names one."""

    implementation: str
    compiler_options = ()

    def jit(self, function):
        return jax.jit(function, compiler_options=dict(self.compiler_options))

    def run(self, arguments, change=lambda x: x):
        return run(arguments, self.implementation, change, self.compiler_options)

    @all_shapes
    def test_values_and_gradients(self, shape):
        arguments = make_arguments(shape)
        found = self.run(arguments)
        assert_all_close(found[0], numpy_scan(arguments), 1e-5)
        assert_all_close(found, run(arguments, "reference"), 1e-5)

    def test_cut_anywhere(self):
        """Two calls that hand the state on equal one call."""
        arguments = make_arguments(BY_NAME["resets"])
        for cut in (1, 100):
            parts = [
                Arguments(
                    arguments.x[:, part],
                    arguments.coefficients,
                    arguments.state,
                    arguments.reset[:, part],
                )
                for part in (slice(None, cut), slice(cut, None))
            ]
            first, second = (self.jit(function_of(p, self.implementation)) for p in parts)
            y_first, state = first(parts[0].x, arguments.coefficients, arguments.state)
            y_second, state = second(parts[1].x, arguments.coefficients, state)
            joined = jnp.concatenate([y_first, y_second], 1), state
            assert_all_close(joined, numpy_scan(arguments), 1e-5)

    def test_vmap(self):
        arguments = make_arguments(BY_NAME["resets"])
        function = functools.partial(
            value_and_gradients, function_of(arguments, self.implementation)
        )
        x, coefficients, state = arguments.x, arguments.coefficients, arguments.state
        together = self.jit(jax.vmap(function, in_axes=(0, None, 0)))(
            np.stack([x, -2 * x]), coefficients, tuple(np.stack([s, 3 * s]) for s in state)
        )
        for i, floats in enumerate(((x, state), (-2 * x, tuple(3 * s for s in state)))):
            apart = self.jit(function)(floats[0], coefficients, floats[1])
            assert_all_close(jax.tree.map(lambda a, i=i: a[i], together), apart, 1e-5)

    def test_vmap_over_resets(self):
        arguments = make_arguments(BY_NAME["resets"])

        def gradients(reset):
            def function(x, coefficients, state):
                return pallas_kernels.cema_scan(
                    x, *coefficients, state, reset, implementation=self.implementation
                )

            floats = arguments.x, arguments.coefficients, arguments.state
            return value_and_gradients(function, *floats)

        resets = np.stack([arguments.reset, np.roll(arguments.reset, 3, 1)])
        together = self.jit(jax.vmap(gradients))(resets)
        for i in range(2):
            apart = self.jit(gradients)(resets[i])
            assert_all_close(jax.tree.map(lambda a, i=i: a[i], together), apart, 1e-5)

    def test_bfloat16(self):
        arguments = make_arguments(BY_NAME["resets"])
        short = jnp.bfloat16
        found = self.run(arguments, lambda x: jnp.asarray(x, short))
        (y, state), (dx, *others) = found
        assert y.dtype == dx.dtype == short
        assert all(part.dtype == jnp.float32 for part in state)
        assert all(part.dtype == short for part in jax.tree.leaves(others))
        wide = run(arguments, "reference", lambda x: jnp.asarray(x, short).astype("float32"))
        assert_all_close(found, wide, 2e-2)

    def test_long_memory(self):
        """Decay 0.9999 over 5000 tokens: the error grows no faster than 1 / (1 - modulus)."""
        shape = Shape(name="long", length=5000, width=2, size=2, resets=(40,))
        arguments = make_arguments(shape)
        modulus = np.hypot(*arguments.coefficients[:2])
        decay = [(0.9999 * c / modulus).astype(np.float32) for c in arguments.coefficients[:2]]
        coefficients = (*decay, *arguments.coefficients[2:])
        arguments = Arguments(arguments.x, coefficients, arguments.state, arguments.reset)
        function = self.jit(function_of(arguments, self.implementation))
        found = function(arguments.x, arguments.coefficients, arguments.state)
        assert_all_close(found, numpy_scan(arguments), 1e-4)

    def test_nothing_crosses_a_reset(self):
        """Infinities before a reset reach neither later outputs nor, backward, later tokens."""
        shape = Shape(name="isolated", length=100, width=2, size=2, resets=(45, 80))
        arguments = make_arguments(shape)
        arguments.x[:, :45] = np.inf
        function = function_of(arguments, self.implementation)
        y, _ = self.jit(function)(arguments.x, arguments.coefficients, arguments.state)
        assert np.isfinite(y[:, 45:]).all()
        x = make_arguments(shape).x
        dy = np.where(np.arange(100)[None, :, None] >= 80, np.inf, np.ones_like(x))

        @self.jit
        def gradients(dy, *floats):
            _, vjp = jax.vjp(function, *floats)
            return vjp((dy, floats[2]))

        dx, _, d_state = gradients(dy, x, arguments.coefficients, arguments.state)
        assert np.isfinite(dx[:, :80]).all() and np.isfinite(d_state).all()

    def test_causal(self):
        """The loss at a token has exactly no gradient on later ones, nor on an earlier document."""
        shape = Shape(name="c", length=100, width=2, size=2, resets=(45,))
        arguments = make_arguments(shape)
        function = function_of(arguments, self.implementation)

        def loss(x):
            return function(x, arguments.coefficients, arguments.state)[0][0, 70, 1]

        dx = np.asarray(self.jit(jax.grad(loss))(arguments.x))[0]
        assert not dx[71:].any() and not dx[:, 0].any() and dx[46:71, 1].all()
        assert not dx[:45].any()

    @given(data=st.data())
    @settings(
        max_examples=3,
        deadline=None,
        derandomize=True,
        # One method of several classes, which may run in one process.
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
        ],
    )
    def test_any_sizes(self, data):
        shape = Shape(
            name="drawn",
            rows=data.draw(st.integers(1, 3)),
            length=data.draw(st.integers(1, 300)),
            width=data.draw(st.integers(1, 4)),
            size=data.draw(st.integers(1, 4)),
            resets=tuple(data.draw(st.lists(st.integers(0, 299), max_size=9))),
        )
        arguments = make_arguments(shape, seed=data.draw(st.integers(0, 99)))
        found = self.run(arguments)
        assert_all_close(found, run(arguments, "reference"), 1e-5)

    def test_sharded(self):
        shape = BY_NAME["eight_rows"]
        arguments = make_arguments(shape)
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), auto)
        specs = {3: P("data", None, "tensor"), 2: P("tensor")}

        def place(x):
            spec = P("data", "tensor") if x.shape[-1] == shape.size and x.ndim == 3 else None
            return jax.device_put(x, NamedSharding(mesh, spec or specs[x.ndim]))

        with jax.set_mesh(mesh):
            found = self.run_sharded(mesh, arguments, place)
        assert_all_close(found, run(arguments, "reference"), 1e-5)

    def run_sharded(self, mesh, arguments, place):
        return self.run(arguments, place)


class TestXLA(Scan):
    implementation = "xla"

    def test_finite_differences(self):
        assert_finite_differences(self.implementation)

    @pytest.mark.parametrize("width", [12, 7])
    @pytest.mark.parametrize("resets", [(10, 12, 40), None])
    def test_blocks_of_channels(self, monkeypatch, width, resets):
        shape = Shape(name="wide", rows=2, length=300, width=width, size=3, resets=resets)
        arguments = make_arguments(shape)
        whole = self.run(arguments)
        monkeypatch.setattr(xla, "MIN_CHANNELS", 2)
        monkeypatch.setattr(xla, "MAX_CHANNELS", 4)
        jax.clear_caches()  # or the traces of before are taken
        blocks = self.run(arguments)
        program = str(jax.make_jaxpr(lambda: self.run(arguments))())
        jax.clear_caches()
        assert ("f32[2,300,4]" in program) == (width == 12)  # 7 has no divisor
        assert_all_close(blocks, whole, 1e-6)
        assert_all_close(blocks[0], numpy_scan(arguments), 1e-5)

    @pytest.mark.parametrize(
        "shape, gradients, resets, expected",
        [
            ((1, 1024, 256), True, True, 256),
            ((1, 1024, 256), True, False, 128),
            ((1, 1024, 128), True, False, 128),
            ((1, 1024, 1024), True, False, 256),
            ((1, 1024, 256), False, False, 64),  # 85 tables are as large as x
            ((8, 512, 256), False, False, 256),
            ((1, 64, 1000), True, False, 250),
            ((1, 64, 1000), False, False, 100),  # the least divisor from 64 on
            ((1, 1024, 37), False, False, 37),
            ((1, 1024, 509), True, False, 509),
        ],
    )
    def test_channels_at_once(self, shape, gradients, resets, expected):
        coefficients = xla.Coefficients(*(jnp.zeros((shape[2], 16)),) * 5)
        found = xla._channels_at_once(jnp.zeros(shape), coefficients, gradients, resets)
        assert found == expected

    def test_a_value_alone_takes_little_memory(self):
        """Tables no larger than the tokens: of all channels at once they are five times that."""
        shape = Shape(name="long", rows=1, length=1024, width=256, size=16, resets=None)
        arguments = make_arguments(shape)
        floats = (arguments.x, arguments.coefficients, arguments.state)
        value = jax.jit(function_of(arguments, self.implementation)).lower(*floats).compile()
        assert value.memory_analysis().temp_size_in_bytes < 2 * arguments.x.nbytes
        y, _ = value(*floats)
        (z, _), _ = self.run(arguments)
        assert_all_close(y, z, 1e-6)


class Kernels(Scan):
    """What an interpreted kernel must do besides; to compile it takes longer than to run it."""

    compiler_options = (("xla_backend_optimization_level", 0),)

    def test_float64_is_refused(self):
        arguments = make_arguments(BY_NAME["short"])
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="x has dtype float64"):
            self.run(arguments, lambda x: jnp.asarray(x, jnp.float64))

    def run_sharded(self, mesh, arguments, place):
        """Kernels are not partitioned automatically: they run inside shard_map."""
        x, table, state = P("data", None, "tensor"), P("tensor"), P("data", "tensor")

        def function(x_BTD, coefficients, state_BDN):
            sharded = jax.shard_map(
                lambda x, coefficients, state, reset: pallas_kernels.cema_scan(
                    x, *coefficients, state, reset, implementation=self.implementation
                ),
                in_specs=(x, table, state, P("data")),
                out_specs=(x, (state, state)),
                check_vma=False,
            )
            return sharded(x_BTD, coefficients, state_BDN, arguments.reset)

        floats = (arguments.x, arguments.coefficients, arguments.state)
        run = self.jit(functools.partial(value_and_gradients, function))
        return run(*jax.tree.map(place, floats))


class TestInterpret(Kernels):
    """The TPU kernels by the Pallas interpreter."""

    implementation = "interpret"


class TestGPUInterpreted(Kernels):
    """The Triton kernels by the Pallas interpreter."""

    implementation = "gpu"

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        def form(name, direction, options):
            assert name == "gpu"
            return functools.partial(getattr(gpu, direction), **options, interpret=True)

        monkeypatch.setattr(vjp, "_form", form)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("fft", "one"), ("fft", "odd"), ("fft", "blocks"), ("associative", "all_resets")],
)
def test_forms_to_compare_with(implementation, name):
    arguments = make_arguments(BY_NAME[name])
    found = run(arguments, implementation)
    assert_all_close(found[0], numpy_scan(arguments), 1e-5)
    assert_all_close(found, run(arguments, "reference"), 2e-5)


def test_default_is_the_portable_form():
    arguments = make_arguments(BY_NAME["resets"])
    jax.tree.map(np.testing.assert_array_equal, run(arguments, None), run(arguments, "xla"))


def test_default_serves_states_that_no_kernel_holds():
    arguments = make_arguments(Shape(name="wide_state", length=3, width=2, size=tpu.MAX_SIZE + 1))
    jax.tree.map(np.testing.assert_array_equal, run(arguments, None), run(arguments, "xla"))


def test_no_state_is_zero_state():
    arguments = make_arguments(BY_NAME["odd"])
    zeros = tuple(np.zeros_like(part) for part in arguments.state)
    none = pallas_kernels.cema_scan(arguments.x, *arguments.coefficients)
    jax.tree.map(
        np.testing.assert_array_equal,
        none,
        pallas_kernels.cema_scan(arguments.x, *arguments.coefficients, zeros),
    )


def arrays_in(jaxpr):
    """Every array computed anywhere in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


@pytest.mark.parametrize("implementation", ["xla", "associative"])
def test_no_array_grows_with_length_times_state(implementation):
    shape = Shape(name="long", length=4096, width=2, size=16, resets=(100,))
    arguments = make_arguments(shape)
    function = functools.partial(value_and_gradients, function_of(arguments, implementation))
    floats = (arguments.x, arguments.coefficients, arguments.state)
    largest = max(a.size for a in arrays_in(jax.make_jaxpr(function)(*floats).jaxpr))
    if implementation == "xla":
        assert largest <= arguments.x.size
    else:
        assert largest >= arguments.x.size * shape.size  # the walk does find such arrays


# Evidence without devices.


def structs_of(shape):
    """What `function(x, coefficients, state, reset)` and its gradient take, without values."""
    rows, length, width, size = shape.rows, shape.length, shape.width, shape.size

    def struct(sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    x = struct((rows, length, width), shape.dtype)
    coefficients = (struct((width, size), jnp.float32),) * 5
    state = (struct((rows, width, size), jnp.float32),) * 2
    return x, coefficients, state, None if shape.resets is None else struct((rows, length), bool)


def forward_of(implementation):
    def forward(x, coefficients, state, reset):
        return pallas_kernels.cema_scan(
            x, *coefficients, state, reset, implementation=implementation
        )

    return forward


def gradients_of(implementation):
    def gradients(x, coefficients, state, reset):
        def forward(*floats):
            return forward_of(implementation)(*floats, reset)

        out, vjp = jax.vjp(forward, x, coefficients, state)
        return out, vjp(out)

    return gradients


DEVICE = {shape.name: shape for shape in DEVICE_SHAPES}
every_compile = [("v5p", shape) for shape in SHAPES + DEVICE_SHAPES] + [
    (chip, DEVICE[name])
    for chip in ("v5e", "v6e")
    for name in ("megalodon_7b", "megalodon_7b_packed", "odd_sizes")
]


@pytest.mark.parametrize(
    ("chip", "shape"), every_compile, ids=[f"{chip}-{s.name}" for chip, s in every_compile]
)
def test_tpu_compile(chip, shape):
    compiled = evidence.compile_for_tpu(
        gradients_of("tpu"), structs_of(shape), evidence.TOPOLOGIES[chip]
    )
    text = compiled.as_text()
    assert "cema_scan_forward" in text and "cema_scan_backward" in text


def test_kernels_compile_for_tpu_with_64_bit_integers():
    with jax.enable_x64(True):
        evidence.compile_for_tpu(gradients_of("tpu"), structs_of(BY_NAME["resets"]))


def test_second_order():
    """Gradients of gradients of the default and the portable form beside the reference's."""
    arguments = make_arguments(BY_NAME["odd"])
    floats = arguments.x, arguments.coefficients, arguments.state

    def second(implementation):
        function = function_of(arguments, implementation)

        def along(*floats):
            out, vjp = jax.vjp(function, *floats)
            products = jax.tree.map(lambda g, x: (g * jnp.sin(x)).sum(), vjp(out), floats)
            return sum(jax.tree.leaves(products))

        return jax.jit(jax.grad(along, (0, 1, 2)))(*floats)

    expected = second("reference")
    for implementation in (None, "xla"):
        assert_all_close(second(implementation), expected, 1e-4)


@pytest.mark.parametrize("shape", SHAPES + DEVICE_SHAPES, ids=lambda shape: shape.name)
def test_cuda_lowering(shape):
    """One kernel where a call is a single segment of time, two where phases are needed."""
    found = evidence.lower_for_cuda(gradients_of("gpu"), structs_of(shape))
    assert len(found.kernels) == (3 if shape.length <= gpu.SEGMENT else 4)


@pytest.mark.parametrize("shape", SHAPES + DEVICE_SHAPES, ids=lambda shape: shape.name)
def test_shared_memory(shape):
    bounds = gpu_evidence.shared_memory_bounds(gradients_of("gpu"), *structs_of(shape))
    assert len(bounds) >= 3 and max(bounds) <= min(gpu_evidence.SHARED_MEMORY.values())


# With 32 numbers of state the compiler takes 40 s, and spills registers: see the README.
@pytest.mark.gpu_compiler
@pytest.mark.parametrize("shape", (*SHAPES, *DEVICE_SHAPES[:-1]), ids=lambda shape: shape.name)
def test_gpu_compile(gpu_compiler, shape):
    kernels = gpu_evidence.compile_for_gpu(gradients_of("gpu"), structs_of(shape))
    assert all(kernel.fits and not kernel.spilled for kernel in kernels)


def test_gpu_refuses_what_registers_cannot_hold():
    arguments = make_arguments(Shape(name="wide_state", length=3, width=2, size=gpu.MAX_SIZE + 1))
    with pytest.raises(NotImplementedError, match="keeps up to 32 complex numbers"):
        run(arguments, "gpu")


@pytest.mark.parametrize("name", list(DEVICE))
def test_bytes(name):
    """Traffic of forward and backward kernel beside x, y and their cotangents, each once."""
    shape = DEVICE[name]
    structs = structs_of(shape)
    forward, backward = evidence.kernel_traffic(gradients_of("tpu"), *structs)
    (alone,) = evidence.kernel_traffic(forward_of("tpu"), *structs)
    for call in (alone, forward, backward):
        assert call.total == call.declared
    if name.startswith("megalodon"):
        ideal = evidence.ideal_bytes(forward_of("tpu"), *structs)
        assert alone.total <= 1.05 * ideal
        assert forward.total <= 1.3 * ideal
        x = structs[0]
        more = x.size * x.dtype.itemsize  # backward reads x and dy, and writes dx
        assert backward.total <= 1.3 * (ideal + more)


class TestArguments:
    x = np.zeros((2, 3, 4), np.float32)
    c = np.zeros((4, 5), np.float32)
    s = np.zeros((2, 4, 5), np.float32)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(x=x[0]), ValueError, r"x has shape \(3, 4\); 3 axes are needed"),
            (dict(x=x.astype(np.int32)), TypeError, "x has dtype int32"),
            (dict(x=x.astype(np.float16)), TypeError, "x has dtype float16; float32, bfloat16"),
            (dict(x=x[:, :0]), ValueError, "every axis must be at least 1"),
            (dict(decay_re=c[:3]), ValueError, r"decay_re has shape \(3, 5\); \(4, 5\)"),
            (dict(output_im=c[:, :4]), ValueError, r"output_im has shape \(4, 4\); \(4, 5\)"),
            (dict(input_coeff=c.astype(int)), TypeError, "input_coeff has dtype int"),
            (dict(state=(s,)), TypeError, "must be a pair of arrays"),
            (dict(state=(s, s[:1])), ValueError, r"state\[1\] has shape \(1, 4, 5\)"),
            (dict(state=(s.astype(np.complex64), s)), TypeError, r"state\[0\] has dtype complex64"),
            (dict(reset=np.zeros((2, 3), int)), TypeError, "reset has dtype int.*; bool is needed"),
            (dict(reset=np.zeros((2, 4), bool)), ValueError, r"reset has shape \(2, 4\); \(2, 3\)"),
            (dict(x=None), TypeError, "x=None is no array"),
            (dict(decay_re=c[0]), ValueError, r"decay_re has shape \(5,\); 2 axes are needed"),
            (dict(decay_im=()), ValueError, r"decay_im has shape \(0,\)"),
            (dict(output_re={}), TypeError, "output_re={} is no array"),
            (dict(state=s), TypeError, "must be a pair of arrays"),
            (dict(state=(s, None)), TypeError, r"state\[1\]=None is no array"),
            (dict(state=(s[0], s[0])), ValueError, r"state\[0\] has shape \(4, 5\); 3 axes"),
            (dict(state=(s, s.astype(int))), TypeError, r"state\[1\] has dtype int"),
            (dict(reset=np.zeros(3, bool)), ValueError, r"reset has shape \(3,\); \(2, 3\)"),
            (dict(reset={}), TypeError, "reset={} is no array"),
            (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
            (dict(implementation=2), TypeError, "implementation=2 must be None or a string"),
            (dict(implementation="interpret_gpu"), ValueError, "is unknown; allowed are None"),
            (
                dict(implementation="fft", reset=np.zeros((2, 3), bool)),
                NotImplementedError,
                "cannot reset the state",
            ),
        ],
    )
    def test_errors(self, change, error, message):
        names = ("decay_re", "decay_im", "input_coeff", "output_re", "output_im")
        arguments = dict(x=self.x, **{name: self.c for name in names}) | change
        # Past the annotations, which only tests check.
        operation = pallas_kernels.cema_scan
        with pytest.raises(error, match=message):
            getattr(operation, "__wrapped__", operation)(**arguments)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
