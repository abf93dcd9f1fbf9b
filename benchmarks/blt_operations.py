"""The linear operations of BLT beside their dense forms, alternating, on this machine.

    python -m benchmarks.blt_operations [--quick]

Forward plus gradients, float32, 2 rows. Wall time and CPU time of the process (its threads
together, which other load disturbs less): medians of five alternations. The dense forms build the
whole mask and are run on the smaller size only.
"""

import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import reporting
from blt_jax.layers.attention import causal_attention, dense_causal_attention

ROWS, HEADS, WINDOW, NUM_VECTORS, PATCH = 2, 4, 512, 2, 4
ALTERNATIONS = 5


def with_gradients(function):
    """function(floats, integers) and its gradients, compiled; integers are arguments too."""

    @jax.jit
    def run(floats, integers):
        out, vjp = jax.vjp(lambda *x: function(*x, *integers), *floats)
        return out, vjp(out)

    return run


def cases(num_bytes: int) -> dict:
    """name -> (fast form, dense form, floats, integers)."""
    rng = np.random.default_rng(0)
    patches = num_bytes // PATCH
    ids = np.sort(rng.integers(0, patches, (ROWS, num_bytes)), axis=1).astype(np.int32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(ROWS, *shape)), jnp.float32)

    def attention(length, width, window):
        floats = [normal(length, HEADS, width) for _ in range(3)]
        forms = (causal_attention, dense_causal_attention)
        forms = [lambda *x, f=f: f(*x, window=window) for f in forms]
        return *forms, floats, [jnp.ones((ROWS, length), jnp.int32)]

    def operation(function, floats):
        forms = [lambda *x, i=i: function(*x, implementation=i) for i in ("xla", "reference")]
        return *forms, floats, [jnp.asarray(ids)]

    def pool(x, ids, implementation):
        return pallas_kernels.patch_pool(x, ids, patches, implementation=implementation)

    of_bytes, of_patches = (num_bytes, HEADS, 32), (patches, NUM_VECTORS, HEADS, 32)
    encoder = [normal(*of_patches), normal(*of_bytes), normal(*of_bytes)]
    decoder = [normal(*of_bytes), normal(*of_patches), normal(*of_patches)]
    return {
        f"attention, window {WINDOW}, {num_bytes} bytes": attention(num_bytes, 32, WINDOW),
        f"attention, {patches} patches": attention(patches, 64, 0),
        f"max pool, {num_bytes} bytes": operation(pool, [normal(num_bytes, 128)]),
        f"patch_attention, {num_bytes} bytes": operation(pallas_kernels.patch_attention, encoder),
        f"patch_gather_attention, {num_bytes} bytes": operation(
            pallas_kernels.patch_gather_attention, decoder
        ),
    }


def measure(runs: dict) -> dict:
    """Medians in milliseconds (wall, CPU) of functions run in alternation."""
    times = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(ALTERNATIONS):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: 1e3 * np.median(values, axis=0) for name, values in times.items()}


def main(argv: list[str]) -> None:
    sizes = (512, 1024) if "--quick" in argv else (4096, 8192)
    rows = []
    for num_bytes in sizes:
        for name, (fast, dense, floats, integers) in cases(num_bytes).items():
            forms = {"fast": fast} | ({"dense": dense} if num_bytes == sizes[0] else {})
            forms = {key: with_gradients(form) for key, form in forms.items()}
            runs = {
                key: lambda f=form, a=floats, b=integers: f(a, b) for key, form in forms.items()
            }
            row = {"operation": name}
            for key, (wall, cpu) in measure(runs).items():
                row |= {f"{key}_wall_ms": float(wall), f"{key}_cpu_ms": float(cpu)}
            rows.append(row)
            print(row, flush=True)
    if "--quick" not in argv:
        print(reporting.save("blt_operations", __doc__, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
