"""The grouped products beside `jax.lax.ragged_dot` and one dense product of the same work.

Rows m=2048, k=512, n=1024, 8 groups, float32; the sizes are traced, one compiled program serves all
of them. `forward` is gmm, `gradients` the two gradients at a given cotangent, without the
forward product (for the dense product: its two transposed products). Medians of calls in
alternation. `over ragged_dot` is its time over ours, `of dense` the dense product's time over ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.kernels import medians
from pallas_kernels.grouped_matmul.shapes import Sizes, draw_sizes

ROWS, WIDTH, COLUMNS, GROUPS = 2048, 512, 1024, 8


def rows() -> list[dict]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    lhs, rhs, dout = normal(ROWS, WIDTH), normal(GROUPS, WIDTH, COLUMNS), normal(ROWS, COLUMNS)
    compiled = {
        "forward": {name: jax.jit(product) for name, product in PRODUCTS.items()},
        "gradients": {name: jax.jit(gradients(product)) for name, product in PRODUCTS.items()},
    }
    table = []
    for pass_name, forms in compiled.items():
        for kind in Sizes:
            sizes = jnp.asarray(draw_sizes(kind, ROWS, GROUPS))
            arguments = (lhs, rhs, sizes) + ((dout,) if pass_name == "gradients" else ())
            runs = {name: functools.partial(form, *arguments) for name, form in forms.items()}
            found = medians(runs, alternations=7, limit=2.5)
            table.append(
                {
                    "pass": pass_name,
                    "sizes": kind.name.lower(),
                    "gmm ms": found["gmm"],
                    "ragged_dot ms": found["ragged_dot"],
                    "dense ms": found["dense"],
                    "over ragged_dot": found["ragged_dot"] / found["gmm"],
                    "of dense": found["dense"] / found["gmm"],
                }
            )
    return table


def _ragged_dot(lhs, rhs, sizes):
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def _dense(lhs, rhs, sizes):
    del sizes
    return lhs @ rhs[0]


PRODUCTS = {"gmm": pallas_kernels.gmm, "ragged_dot": _ragged_dot, "dense": _dense}


def gradients(product):
    """Both gradients of a product at a cotangent."""

    def run(lhs, rhs, sizes, dout):
        if product is _dense:
            rhs = rhs[:1]  # one weight, so that no zeros are written for the others
        _, vjp = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
        return vjp(dout)

    return run
