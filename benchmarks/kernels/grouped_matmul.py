"""The grouped products beside `jax.lax.ragged_dot` and one dense product of the same work.

Rows m=2048, k=512, n=1024, 8 groups, float32; the sizes are traced, one compiled program serves all
of them. `forward` is gmm, `gradients` the two gradients at a given cotangent, without the
forward product (for the dense product: its two transposed products). Medians of calls in
alternation. `over ragged_dot` is its time over ours, `of dense` the dense product's time over ours,
`of known` that of one product per group in a program compiled for these very sizes.
`tokens`: forward and both gradients from 1024 tokens with 2 of 8 experts (these sizes) or 6 of 64
(n=176), gathered inside of gmm beside `sort_rows` before it, whose time over ours is `over sorted`.
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
    one_rhs = rhs[0]
    compiled = {
        "forward": {name: jax.jit(product) for name, product in PRODUCTS.items()},
        "gradients": {name: jax.jit(gradients(product)) for name, product in PRODUCTS.items()},
    }
    table = []
    for pass_name, forms in compiled.items():
        for kind in Sizes:
            sizes = jnp.asarray(draw_sizes(kind, ROWS, GROUPS))
            behind = (sizes, dout) if pass_name == "gradients" else (sizes,)
            weights = {"gmm": rhs, "ragged_dot": rhs, "dense": one_rhs}
            runs = {
                name: functools.partial(form, lhs, weights[name], *behind)
                for name, form in forms.items()
            }
            known = known_sizes(draw_sizes(kind, ROWS, GROUPS).tolist())
            known = jax.jit(gradients(known) if pass_name == "gradients" else known)
            runs["known sizes"] = functools.partial(known, lhs, rhs, *behind)
            found = medians(runs, alternations=7, limit=2.5)
            table.append(
                {
                    "pass": pass_name,
                    "sizes": kind.name.lower(),
                    "gmm ms": found["gmm"],
                    "ragged_dot ms": found["ragged_dot"],
                    "dense ms": found["dense"],
                    "known sizes ms": found["known sizes"],
                    "over ragged_dot": found["ragged_dot"] / found["gmm"],
                    "of dense": found["dense"] / found["gmm"],
                    "of known": found["known sizes"] / found["gmm"],
                }
            )
    return table + [_tokens(*case) for case in ((2, 8, COLUMNS), (6, 64, 176))]


def _tokens(choices: int, experts: int, columns: int) -> dict:
    """A row for tokens gathered inside of the product."""
    rng, count = np.random.default_rng(0), 1024

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = jnp.asarray(rng.integers(0, experts, (count, choices)), jnp.int32)
    arguments = (
        normal(count, WIDTH),
        normal(experts, WIDTH, columns),
        normal(count * choices, columns),
        pallas_kernels.sort_by_expert(ids, experts),
    )

    def program(product):
        def run(x, weights, dout, routing):
            out, vjp = jax.vjp(functools.partial(product, routing), x, weights)
            return out, vjp(dout)

        return functools.partial(jax.jit(run), *arguments)

    def gathered(routing, x, weights):
        return pallas_kernels.gmm(x, weights, routing.group_sizes, routing=routing)

    def sorted_before(routing, x, weights):
        rows = pallas_kernels.sort_rows(x, routing)
        return pallas_kernels.gmm(rows, weights, routing.group_sizes)

    runs = {"gathered": program(gathered), "sorted": program(sorted_before)}
    found = medians(runs, alternations=7, limit=2.5)
    return {
        "pass": "tokens",
        "sizes": f"{choices} of {experts}",
        "gmm ms": found["gathered"],
        "sorted ms": found["sorted"],
        "over sorted": found["sorted"] / found["gathered"],
    }


def _ragged_dot(lhs, rhs, sizes):
    return jax.lax.ragged_dot(lhs, rhs, sizes)


def _dense(lhs, rhs, sizes):
    del sizes
    return lhs @ rhs


PRODUCTS = {"gmm": pallas_kernels.gmm, "ragged_dot": _ragged_dot, "dense": _dense}


def known_sizes(sizes):
    """One product per group, of sizes known at compile time; they are not read again."""

    def run(lhs, rhs, traced_sizes):
        del traced_sizes
        ends = np.cumsum(sizes)
        groups = zip(range(len(sizes)), ends - sizes, ends, strict=True)
        rows = [lhs[start:end] @ rhs[group] for group, start, end in groups if end > start]
        return jnp.concatenate(rows)

    return run


def gradients(product):
    """Both gradients of a product at a cotangent."""

    def run(lhs, rhs, sizes, dout):
        _, vjp = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
        return vjp(dout)

    return run
