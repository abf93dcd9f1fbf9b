"""What a Triton kernel needs of a GPU that is not here: shared memory and registers.

`shared_memory_bounds` reads jaxprs and needs nothing else. `compile_for_gpu` runs the Triton
compiler in jax's CUDA plugin and NVIDIA's assembler. Neither needs a GPU; they come with
jax[cuda13], or alone by

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-nvvm nvidia-cuda-nvcc

(the plugin in jax's version). Nothing here runs a kernel or measures time.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from pallas_kernels.evidence import absent_gpu

# Bytes that one block may use, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"): A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50.
SHARED_MEMORY = {
    "8.0": 163 * 1024,
    "8.6": 99 * 1024,
    "8.9": 99 * 1024,
    "9.0": 227 * 1024,
    "10.0": 227 * 1024,
    "12.0": 99 * 1024,
}
DEFAULT_STAGES = 3


# From jaxprs alone.


def shared_memory_bounds(function: Callable[..., Any], *args: Any) -> list[int]:
    """Bytes of shared memory of every Triton kernel in function(*args), in order of appearance.

    Operands of a matrix product are staged there, `num_stages` times inside a loop. Reductions and
    changes of layout pass one array at a time through the same bytes while nothing is staged: the
    largest array of the kernel stands for them. Left out: padding between rows, barriers, and
    arrays that pass through while a loop has operands staged.
    args: arrays or ShapeDtypeStructs.
    """
    return [_bound(**call.params) for call in _kernel_calls(jax.make_jaxpr(function)(*args).jaxpr)]


def _kernel_calls(jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from _kernel_calls(inner)


def _bound(*, jaxpr, compiler_params, name, **_) -> int:
    if compiler_params is None or "triton" not in type(compiler_params).__module__:
        raise NotImplementedError(f"{name}: only Triton kernels stage operands in shared memory")
    staged = _staged(jaxpr, compiler_params.num_stages or DEFAULT_STAGES, looped=False)
    return max(staged, _largest(jaxpr))


def _staged(jaxpr, stages: int, looped: bool) -> int:
    """Bytes of the distinct operands of products, those in loops once per stage."""
    operands, inside = set(), 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            operands.update(equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            inside += _staged(inner, stages, looped or name in ("while", "scan"))
    return inside + sum(_nbytes(operand) for operand in operands) * (stages if looped else 1)


def _largest(jaxpr) -> int:
    """Bytes of the largest array that a kernel computes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += map(_nbytes, equation.outvars)
        sizes += map(_largest, jax.extend.core.jaxprs_in_params(equation.params))
    return max(sizes)


def _nbytes(variable) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize if hasattr(aval, "shape") else 0


# By the compiler.


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A compiled kernel: bytes of shared memory per block, registers and spilled bytes a thread."""

    name: str
    capability: str
    num_warps: int
    shared_memory: int
    registers: int
    spilled: int

    @property
    def fits(self) -> bool:
        return self.shared_memory <= SHARED_MEMORY[self.capability]


def gpu_compiler_missing() -> str | None:
    """Why `compile_for_gpu` cannot run here, None if it can."""
    from jax._src.lib import triton

    jax.devices("cpu")  # loads the plugins that are installed
    if not triton.has_compilation_handler("CUDA"):
        return "no CUDA plugin of jax is installed"
    return None if _ptxas() else "ptxas (package nvidia-cuda-nvcc) is not installed"


def compile_for_gpu(
    function: Callable[..., Any], args: Sequence[Any], capability: str = "9.0"
) -> list[GpuKernel]:
    """Compiles every Triton kernel in function(*args) for a compute capability, to machine code.

    args: arrays or ShapeDtypeStructs. Raises ValueError for a capability that is not in
    SHARED_MEMORY, RuntimeError when the compilers are missing.
    """
    if capability not in SHARED_MEMORY:
        allowed = ", ".join(map(repr, SHARED_MEMORY))
        raise ValueError(f"capability={capability!r} is unknown; allowed are {allowed}")
    if reason := gpu_compiler_missing():
        raise RuntimeError(
            f"cannot compile for a GPU: {reason}; see pallas_kernels/gpu_evidence.py"
        )
    with absent_gpu():
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    module = lowered.compiler_ir("stablehlo").operation
    return [_compile_kernel(call, capability) for call in _triton_calls(module)]


def _triton_calls(operation) -> Iterator[dict[str, Any]]:
    """The attributes of every Triton kernel below an operation of the module."""
    if operation.name == "stablehlo.custom_call":
        target = operation.attributes["call_target_name"].value
        if target == "__gpu$xla.gpu.triton":
            yield {a.name: a.attr for a in operation.attributes["mhlo.backend_config"]}
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _triton_calls(inner.operation)


def _compile_kernel(call: dict[str, Any], capability: str) -> GpuKernel:
    from jax._src.lib import triton

    num_warps, num_stages = call["num_warps"].value, call["num_stages"].value
    compiled = triton.compile(
        "CUDA",
        call["ir"].value_bytes,
        capability,
        num_warps=num_warps,
        num_ctas=1,
        num_stages=num_stages,
    )
    registers, spilled = _assemble(compiled.asm)
    shared = compiled.smem_bytes
    return GpuKernel(call["name"].value, capability, num_warps, shared, registers, spilled)


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers and bytes of spilled stores of a thread."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [_ptxas(), "-v", f"-arch={target}", source, "-o", source.with_suffix(".cubin")]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = r"Used (\d+) registers", r"(\d+) bytes spill stores"
    return tuple(int(re.search(pattern, found)[1]) for pattern in patterns)


def _ptxas() -> str | None:
    packages = importlib.util.find_spec("nvidia")
    places = packages.submodule_search_locations if packages else ()
    bundled = (path for place in places for path in pathlib.Path(place).glob("*/bin/ptxas"))
    return next(map(str, bundled), None) or shutil.which("ptxas")
