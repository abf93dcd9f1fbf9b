"""What can be shown about a kernel without its device: TPU compiles, CUDA lowering, bytes moved.

`compile_for_tpu` runs the real TPU compiler (package libtpu) for a topology that is not there.
`lower_for_cuda` stops before PTX: it proves that Pallas lowers, not that the code runs or is fast.
`kernel_traffic` counts what the pipeline of a TPU `pallas_call` copies between HBM and the core,
by walking its grid and block index maps, `kernel_flops` the matrix products that its branches and
loops run; XLA's cost analysis only repeats the `cost_estimate` that the kernel's author declared.
Nothing here measures time. `gpu_evidence.py` has what Triton kernels need.
"""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}


# Compiling and lowering.


def tpu_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU topology such as "v5p:2x2x1", to compile for (they cannot run).

    Settings that libtpu reads when it is loaded are made here unless the environment has them.
    Raises RuntimeError when libtpu is missing or does not know the topology.
    """
    chip = topology.split(":")[0]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip}-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(topology, platform="tpu")
    except Exception as error:
        raise RuntimeError(f"topology={topology!r}: no compiler for it here ({error})") from error
    return description.devices


def compile_for_tpu(
    function: Callable[..., Any], args: Sequence[Any], topology: str = TOPOLOGIES["v5p"]
) -> jax.stages.Compiled:
    """Compiles function(*args) for one core of a topology; args are arrays or ShapeDtypeStructs.

    A ShapeDtypeStruct that carries a sharding over `tpu_devices(topology)` keeps it.
    """
    one = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])

    def placed(x):
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding or one)

    lowered = jax.jit(function).lower(*jax.tree.map(placed, tuple(args)))
    with warnings.catch_warnings():
        # Entries of a persistent cache cannot be loaded without the device; it compiles anew.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return lowered.compile()


def absent_gpu(device_kind: str = "NVIDIA H200") -> contextlib.AbstractContextManager[Any]:
    """Context in which Triton kernels are lowered for a GPU that is not there, as jax 0.11 asks to
    be told; earlier versions lower them without."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    sharding = jax.sharding
    gpu = sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = sharding.AbstractMesh(
        (1,), ("gpu",), axis_types=(sharding.AxisType.Auto,), abstract_device=gpu
    )
    return sharding.use_abstract_mesh(mesh)


@dataclasses.dataclass(frozen=True)
class CudaLowering:
    """The StableHLO module as text, its GPU custom calls, and the bytes of the export."""

    text: str
    kernels: tuple[str, ...]
    size: int


def lower_for_cuda(function: Callable[..., Any], args: Sequence[Any]) -> CudaLowering:
    """Lowers function(*args) for CUDA, Pallas kernels to Triton or Mosaic GPU modules.

    Needs no GPU. Triton modules are checked as MLIR; registers and shared memory are decided later
    by the compiler on the device. Mosaic GPU refuses too much shared memory already here.
    """
    targets = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi", "mosaic_gpu_v2", "mosaic_gpu")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in targets]
    export = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)
    with absent_gpu():
        exported = export(*args)
    text = exported.mlir_module()
    kernels = tuple(name for name in re.findall(r"custom_call @([\w$.]+)", text) if name in targets)
    return CudaLowering(text, kernels, len(exported.mlir_module_serialized))


# Bytes.


@dataclasses.dataclass(frozen=True)
class KernelTraffic:
    """One `pallas_call`: its grid, HBM bytes of each operand and result, and what it declares.

    `operands` starts with the scalar-prefetch operands. `declared` is the `bytes_accessed` of its
    `cost_estimate`, None without one.
    """

    name: str
    grid: tuple[int, ...]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    declared: int | None

    @property
    def total(self) -> int:
        return sum(self.operands) + sum(self.results)


def bytes_moved(function: Callable[..., Any], *args: Any) -> int:
    """The HBM bytes of all TPU kernels that function(*args) runs; see `kernel_traffic`."""
    return sum(call.total for call in kernel_traffic(function, *args))


def ideal_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of every argument and every result of function(*args), each once."""
    leaves = jax.tree.leaves((args, jax.eval_shape(function, *args)))
    return sum(_nbytes(np.shape(x), jnp.result_type(x)) for x in leaves)


def kernel_flops(function: Callable[..., Any], *args: Any) -> list[int]:
    """Floating-point operations of the matrix products of every TPU kernel in function(*args).

    Walks the grid as `kernel_traffic` does, on the same conditions, and inside the kernel follows
    branches and loops by the scalar-prefetch operands. Products are counted on whole blocks, parts
    beyond the arrays included. Raises ValueError when a branch with a product is undecided.
    """
    return _measured(_kernel_flops, function, args)


def kernel_traffic(function: Callable[..., Any], *args: Any) -> list[KernelTraffic]:
    """Walks the grid of every TPU `pallas_call` in function(*args), in the order of execution.

    Grid steps run with the last axis fastest. A block is copied when its index differs from that
    of the step before, as the pipeline does; parts of a block beyond the array are not copied.
    Scalar-prefetch operands are copied once. Arguments that grid sizes or scalar-prefetch operands
    depend on must be concrete arrays, all others may be ShapeDtypeStructs and cost nothing.
    Raises ValueError when such a value is unknown, NotImplementedError for operands left in HBM
    (memory space ANY, copied by the kernel itself) and for GPU kernels.
    """
    return _measured(_traffic, function, args)


def _measured(measure, function, args) -> list:
    flat, tree = jax.tree.flatten(args)

    def flat_function(*leaves):
        return function(*jax.tree.unflatten(tree, leaves))

    jaxpr = jax.make_jaxpr(flat_function)(*flat)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x) for x in flat]
    return list(_walk(jaxpr.jaxpr, jaxpr.consts, known, [], measure))


def _walk(jaxpr, consts, args, results: list, measure) -> Iterator[Any]:
    """Evaluates what concrete values allow (None is unknown); appends the outputs to `results`.

    Yields measure(operands, **parameters) of every `pallas_call`.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        outputs: list = []
        yield from _walk_equation(equation, operands, outputs, measure)
        values.update(zip(equation.outvars, outputs, strict=True))
    results.extend(read(atom) for atom in jaxpr.outvars)


def _walk_equation(equation, operands, outputs: list, measure) -> Iterator[Any]:
    name = equation.primitive.name
    unknown = [None] * len(equation.outvars)
    if name == "pallas_call":
        yield measure(operands, **equation.params)
        outputs.extend(unknown)
        return
    inner = list(jax.extend.core.jaxprs_in_params(equation.params))
    if not any(_has_kernel(jaxpr) for jaxpr in inner):
        if any(x is None for x in operands):
            outputs.extend(unknown)
        else:
            found = equation.primitive.bind(*operands, **equation.params)
            outputs.extend(found if equation.primitive.multiple_results else [found])
        return
    if name == "scan":
        body, length = equation.params["jaxpr"], equation.params["length"]
        num_consts = equation.params["num_consts"]
        known = operands[:num_consts] + [None] * (len(operands) - num_consts)
        yield from list(_walk(body.jaxpr, body.consts, known, [], measure)) * length
        outputs.extend(unknown)
        return
    body = _called(equation)
    yield from _walk(body.jaxpr, body.consts, operands, outputs, measure)


def _called(equation):
    """The closed jaxpr of a call-like equation, whose arguments and results are the equation's."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if key in equation.params:
            body = equation.params[key]
            return body if hasattr(body, "consts") else jax.extend.core.ClosedJaxpr(body, ())
    raise NotImplementedError(f"kernels inside {equation.primitive.name} are not counted")


def _has_kernel(jaxpr) -> bool:
    return any(
        equation.primitive.name == "pallas_call"
        or any(map(_has_kernel, jax.extend.core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _grid(operands, grid_mapping, compiler_params, name):
    """The sizes of the grid and the scalar-prefetch operands."""
    if compiler_params is not None and "mosaic." not in type(compiler_params).__module__:
        raise NotImplementedError(f"{name}: only TPU kernels have a pipeline that can be walked")
    bounds = operands[: grid_mapping.num_dynamic_grid_bounds]
    operands = operands[len(bounds) :]
    prefetched = operands[: grid_mapping.num_index_operands]
    if any(x is None for x in (*bounds, *prefetched)):
        raise ValueError(
            f"{name}: a grid size or scalar-prefetch operand depends on an argument without "
            "concrete values"
        )
    sizes = iter(bounds)
    grid = tuple(int(n) if isinstance(n, int) else int(next(sizes)) for n in grid_mapping.grid)
    return grid, prefetched


def _traffic(operands, *, grid_mapping, compiler_params, cost_estimate, name, **_):
    grid, prefetched = _grid(operands, grid_mapping, compiler_params, name)
    blocks = grid_mapping.block_mappings
    for block in blocks:
        space = str(block.transformed_block_aval.memory_space).lower()
        if space.endswith(("any", "hbm", "semaphore")):
            raise NotImplementedError(f"{name}: {block.origin} stays in HBM, not copied by blocks")
    starts = _block_starts(blocks, grid, prefetched) if math.prod(grid) else [None] * len(blocks)
    copied = [_block_bytes(*of_block) for of_block in zip(blocks, starts, strict=True)]
    scalars = [_nbytes(np.shape(x), jnp.result_type(x)) for x in prefetched]
    inputs, results = copied[: grid_mapping.num_inputs], copied[grid_mapping.num_inputs :]
    declared = None if cost_estimate is None else cost_estimate.bytes_accessed
    return KernelTraffic(name or "", grid, (*scalars, *inputs), tuple(results), declared)


def _block_bytes(block, starts) -> int:
    """Bytes that the pipeline copies for one operand or result; starts[steps, axes], None: none."""
    if starts is None:
        return 0
    shape, dtype = block.array_aval.shape, block.array_aval.dtype
    changed = np.ones(len(starts), bool)
    changed[1:] = (starts[1:] != starts[:-1]).any(axis=1)
    sizes = np.array([getattr(size, "block_size", 1) for size in block.block_shape], np.int64)
    inside = np.clip(np.array(shape, np.int64) - starts[changed], 0, sizes)
    return _nbytes((int(inside.prod(axis=1).sum()),), dtype)


def _block_starts(blocks, grid, prefetched) -> list[np.ndarray]:
    """First element of every block at every grid step in order: [steps, axes] of each."""
    steps = np.indices(grid, dtype=np.int32).reshape(len(grid), math.prod(grid))

    def start(step, prefetched):
        starts = (block.compute_start_indices_interpret(step, *prefetched) for block in blocks)
        return [[jnp.asarray(x, jnp.int32) for x in of_block] for of_block in starts]

    walk = jax.vmap(start, in_axes=(0, None), axis_size=steps.shape[1])
    columns = jax.jit(walk)(tuple(steps), tuple(prefetched))
    empty = np.zeros((steps.shape[1], 0), np.int64)
    return [
        np.stack(of_block, axis=1).astype(np.int64) if of_block else empty for of_block in columns
    ]


def _nbytes(shape, dtype) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


# Floating-point operations.


def _kernel_flops(operands, *, jaxpr, grid_mapping, compiler_params, name, **_) -> int:
    grid, prefetched = _grid(operands, grid_mapping, compiler_params, name)
    known = [np.asarray(x) for x in prefetched]
    refs = known + [None] * (len(jaxpr.invars) - len(known))
    return sum(_flops_of_step(jaxpr, (), refs, step, grid)[0] for step in np.ndindex(grid))


def _flops_of_step(jaxpr, consts, args, step, grid) -> tuple[int, list]:
    """Operations and results of a kernel's jaxpr at one grid step; None is unknown."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    total = 0
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        flops, outputs = _flops_of_equation(equation, operands, step, grid)
        total += flops
        values.update(zip(equation.outvars, outputs, strict=True))
    return total, [read(atom) for atom in jaxpr.outvars]


def _flops_of_equation(equation, operands, step, grid) -> tuple[int, list]:
    name, params = equation.primitive.name, equation.params
    unknown = [None] * len(equation.outvars)
    if name == "program_id":
        return 0, [np.int32(step[params["axis"]])]
    if name == "num_programs":
        return 0, [np.int32(grid[params["axis"]])]
    if name == "get":
        ref, *index = operands
        scalar = ref is not None and len(index) == ref.ndim and None not in index
        return 0, [ref[tuple(map(int, index))]] if scalar else unknown
    if name == "dot_general":
        ((contracted, _), _), left = params["dimension_numbers"], equation.invars[0].aval
        depth = math.prod(left.shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape), unknown
    inner = list(jax.extend.core.jaxprs_in_params(params))
    if not inner:
        if None in operands or name in ("swap", "addupdate"):
            return 0, unknown
        found = equation.primitive.bind(*operands, **params)
        return 0, list(found) if equation.primitive.multiple_results else [found]
    if name == "while":
        return _flops_of_loop(params, operands, step, grid)
    if name == "cond":
        if operands[0] is None:
            if any(map(_has_product, inner)):
                raise ValueError("a branch with a product depends on what is not known")
            return 0, unknown
        body = params["branches"][int(operands[0])]
        return _flops_of_step(body.jaxpr, body.consts, operands[1:], step, grid)
    body = _called(equation)
    return _flops_of_step(body.jaxpr, body.consts, operands, step, grid)


def _flops_of_loop(params, operands, step, grid) -> tuple[int, list]:
    limits = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_condition, of_body = operands[: limits[0]], operands[limits[0] : limits[1]]
    carry = operands[limits[1] :]
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    total = 0
    while True:
        inputs = [*of_condition, *carry]
        _, (more,) = _flops_of_step(condition.jaxpr, condition.consts, inputs, step, grid)
        if more is None:
            raise ValueError("how often a loop runs depends on what is not known")
        if not more:
            return total, list(carry)
        inputs = [*of_body, *carry]
        flops, carry = _flops_of_step(body.jaxpr, body.consts, inputs, step, grid)
        total += flops


def _has_product(jaxpr) -> bool:
    return any(
        equation.primitive.name == "dot_general"
        or any(map(_has_product, jax.extend.core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )
