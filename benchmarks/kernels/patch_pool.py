"""The patch operations beside their dense-mask forms, on this machine.

Forward plus gradients, float32, one row, patches of 4 bytes, width 128 (4 heads of 32, 2 vectors
per patch). Medians of calls in alternation. The dense forms build the whole [P, T] mask and are
run at one size. `ratio` is dense over fast; `per doubling` the time over that of half the bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.kernels import medians

PATCH, HEADS, HEAD_DIM, NUM_VECTORS = 4, 4, 32, 2
DENSE_BYTES = 8192
NUM_BYTES = (4096, DENSE_BYTES, 16384)


def rows() -> list[dict]:
    table, times = [], {}
    for num_bytes in NUM_BYTES:
        for name, (function, floats, ids) in cases(num_bytes).items():
            forms = {"fast": None} | ({"dense": "reference"} if num_bytes == DENSE_BYTES else {})
            runs = {form: timed(function, floats, ids, i) for form, i in forms.items()}
            found = times[name, num_bytes] = medians(runs)
            row = {"operation": name, "bytes": num_bytes, "ms": found["fast"]}
            if "dense" in found:
                row |= {"dense ms": found["dense"], "ratio": found["dense"] / found["fast"]}
            if (name, num_bytes // 2) in times:
                row["per doubling"] = found["fast"] / times[name, num_bytes // 2]["fast"]
            table.append(row)
    return table


def cases(num_bytes: int) -> dict:
    """name -> (function(*floats, ids, implementation=), floats, ids)."""
    rng = np.random.default_rng(0)
    patches = num_bytes // PATCH
    ids = jnp.asarray(np.sort(rng.integers(0, patches, (1, num_bytes)), axis=1), jnp.int32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)

    def pool(x, ids, implementation):
        return pallas_kernels.patch_pool(x, ids, patches, implementation=implementation)

    of_bytes = (num_bytes, HEADS, HEAD_DIM)
    of_patches = (patches, NUM_VECTORS, HEADS, HEAD_DIM)
    encoder = [normal(*of_patches), normal(*of_bytes), normal(*of_bytes)]
    decoder = [normal(*of_bytes), normal(*of_patches), normal(*of_patches)]
    return {
        "patch_pool max": (pool, [normal(num_bytes, HEADS * HEAD_DIM)], ids),
        "patch_attention": (pallas_kernels.patch_attention, encoder, ids),
        "patch_gather_attention": (pallas_kernels.patch_gather_attention, decoder, ids),
    }


def timed(function, floats, ids, implementation):
    """A call of the function and its gradients, compiled; the ids are an argument too."""

    @jax.jit
    def run(floats, ids):
        out, vjp = jax.vjp(lambda *x: function(*x, ids, implementation=implementation), *floats)
        return out, vjp(out)

    return lambda: run(floats, ids)
