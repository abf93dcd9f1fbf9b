"""The patch operations beside their dense-mask forms, on this machine.

Forward plus gradients, float32, one row, patches of 4 bytes, width 128 (4 heads of 32, 2 vectors
per patch). Medians of calls. The dense forms are products with the whole [P, T] mask
(means) and softmax over it (attention); they are run at one size, and there is none for maxima,
which would take [P, T, D]. `ms` and `per doubling`, the time over that of half the bytes, are timed
alone, without the dense form and its large arrays in between; `ratio` is dense over fast with
calls of both in alternation.
"""

import functools

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.kernels import medians, with_gradients

PATCH, HEADS, HEAD_DIM, NUM_VECTORS = 4, 4, 32, 2
DENSE_BYTES = 8192
NUM_BYTES = (4096, DENSE_BYTES, 16384)


def rows() -> list[dict]:
    table, times = [], {}
    for num_bytes in NUM_BYTES:
        for name, (fast, dense, floats, ids) in cases(num_bytes).items():
            run = timed(fast, floats, ids)
            found = times[name, num_bytes] = medians({"fast": run}, alternations=15)["fast"]
            row = {"operation": name, "bytes": num_bytes, "ms": found}
            if (name, num_bytes // 2) in times:
                row["per doubling"] = found / times[name, num_bytes // 2]
            if dense is not None and num_bytes == DENSE_BYTES:
                beside = medians({"fast": run, "dense": timed(dense, floats, ids)}, limit=5.0)
                row |= {"ms beside dense": beside["fast"], "dense ms": beside["dense"]}
                row["ratio"] = beside["dense"] / beside["fast"]
            table.append(row)
    return table


def cases(num_bytes: int) -> dict:
    """name -> (fast, dense or None, floats, ids), the forms being functions of (*floats, ids)."""
    rng = np.random.default_rng(0)
    patches = num_bytes // PATCH
    ids = jnp.asarray(np.sort(rng.integers(0, patches, (1, num_bytes)), axis=1), jnp.int32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)

    def pool(mode):
        return lambda x, ids: pallas_kernels.patch_pool(x, ids, patches, mode)

    def dense_mean(x_BTD, ids_BT):
        patch_P = jnp.arange(patches, dtype=jnp.int32)
        mask_BPT = (ids_BT[:, None] == patch_P[None, :, None]).astype(jnp.float32)
        size_BP1 = jnp.maximum(mask_BPT.sum(2, keepdims=True), 1.0)
        return jnp.einsum("bpt,btd->bpd", mask_BPT, x_BTD) / size_BP1

    def attention(operation):
        return operation, functools.partial(operation, implementation="reference")

    x = normal(num_bytes, HEADS * HEAD_DIM)
    of_bytes = (num_bytes, HEADS, HEAD_DIM)
    of_patches = (patches, NUM_VECTORS, HEADS, HEAD_DIM)
    encoder = [normal(*of_patches), normal(*of_bytes), normal(*of_bytes)]
    decoder = [normal(*of_bytes), normal(*of_patches), normal(*of_patches)]
    return {
        "patch_pool max": (pool("max"), None, [x], ids),
        "patch_pool mean": (pool("mean"), dense_mean, [x], ids),
        "patch_attention": (*attention(pallas_kernels.patch_attention), encoder, ids),
        "patch_gather_attention": (*attention(pallas_kernels.patch_gather_attention), decoder, ids),
    }


def timed(function, floats, ids):
    """A call of the function and its gradients, compiled; the ids are an argument too."""
    run = with_gradients(function)
    return lambda: run(floats, ids)
