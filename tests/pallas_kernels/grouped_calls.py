"""Calls of the grouped products without values, for compilers and counts."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.grouped_matmul.shapes import MODEL_SHAPES

MODEL_SHAPE = {shape.name: shape for shape in MODEL_SHAPES}


def product_of(shape, product, implementation, dtype=jnp.bfloat16):
    """A function of two arrays and the sizes, and its arguments with the sizes unknown."""
    lhs = jax.ShapeDtypeStruct((shape.m, shape.k), dtype)
    rhs = jax.ShapeDtypeStruct((shape.local_groups, shape.k, shape.n), dtype)
    dout = jax.ShapeDtypeStruct((shape.m, shape.n), dtype)
    sizes = jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
    gmm = functools.partial(pallas_kernels.gmm, implementation=implementation)
    tgmm = functools.partial(pallas_kernels.tgmm, implementation=implementation)

    def metadata(sizes):
        return pallas_kernels.make_group_metadata(
            sizes,
            shape.m,
            group_offset=shape.offset if shape.local else None,
            num_local_groups=shape.local_groups,
        )

    return {
        "forward": (lambda x, w, s: gmm(x, w, metadata(s)), (lhs, rhs, sizes)),
        "d_lhs": (lambda g, w, s: gmm(g, w, metadata(s), transpose_rhs=True), (dout, rhs, sizes)),
        "d_rhs": (lambda x, g, s: tgmm(x, g, metadata(s)), (lhs, dout, sizes)),
    }[product]


def forward_and_backward(shape, implementation, dtype=jnp.bfloat16):
    """gmm and both gradients in one program, as training compiles them."""
    run, (lhs, rhs, sizes) = product_of(shape, "forward", implementation, dtype)
    dout = jax.ShapeDtypeStruct((shape.m, shape.n), dtype)

    def all_three(lhs, rhs, dout, sizes):
        out, vjp = jax.vjp(lambda lhs, rhs: run(lhs, rhs, sizes), lhs, rhs)
        return out, vjp(dout)

    return all_three, (lhs, rhs, dout, sizes)


def swiglu(m, k, n, groups, implementation, dtype):
    def run(lhs, rhs, sizes):
        return pallas_kernels.gmm(
            lhs, rhs, sizes, activation="swiglu", implementation=implementation
        )

    shapes = ((m, k), dtype), ((groups, k, 2 * n), dtype), ((groups,), jnp.int32)
    return run, tuple(jax.ShapeDtypeStruct(*x) for x in shapes)
