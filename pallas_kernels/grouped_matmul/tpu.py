"""The grouped products as TPU kernels.

The grid's length is the number of visits, known at run time only; which group and row tile a step
works on comes from scalars loaded ahead (`metadata.py`). A row tile shared by several groups stays
in the core's memory until the last of them wrote its rows. Tokens are gathered before: a tile of
rows is loaded once for every tile of columns, a whole one in one copy, single rows in one each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tiling as tiling_lib
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.sequential import one_by_one
from pallas_kernels.grouped_matmul.tiling import Problem, Tiles

DTYPES = (jnp.float32, jnp.bfloat16)


def gmm(
    lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling, interpret=False
) -> jax.Array:
    """See `api.gmm`."""
    _refuse_dtypes(lhs.dtype, out_dtype)
    lhs, metadata = metadata.rows_of(lhs), metadata.of_rows()
    problem = _problem(lhs.shape, rhs.shape[1 if transpose_rhs else 2], metadata, lhs, out_dtype)
    tiles = tiling_lib.gmm_tiles(problem) if tiling is None else _given(tiling, problem)
    call = functools.partial(_gmm_call, problem, tiles, transpose_rhs, False, out_dtype, interpret)
    return one_by_one(call)(lhs, rhs, metadata)


def swiglu(lhs, rhs, metadata: GroupMetadata, out_dtype, tiling, interpret=False) -> jax.Array:
    """silu(lhs @ gate) * (lhs @ up) for rhs = [gate | up], with no pre-activation in HBM."""
    _refuse_dtypes(lhs.dtype, out_dtype)
    lhs, metadata = metadata.rows_of(lhs), metadata.of_rows()
    columns = rhs.shape[2] // 2
    problem = _problem(lhs.shape, columns, metadata, lhs, out_dtype)
    tiles = swiglu_tiles(problem, interpret) if tiling is None else _given(tiling, problem)
    if tiles.inner < problem.k or columns % tiles.outer:
        raise NotImplementedError(
            f"the TPU kernel with activation='swiglu' takes the whole width {problem.k} and "
            f"a tile of columns that divides {columns}; tiling={tiling}"
        )
    call = functools.partial(_gmm_call, problem, tiles, False, True, out_dtype, interpret)
    return one_by_one(call)(lhs, rhs, metadata)


def swiglu_tiles(problem: Problem, interpret=False) -> Tiles:
    """Tiles whose columns divide the result's: gate and up are blocks of one array, whole lanes
    wide but in the interpreter."""
    for width in sorted(set(tiling_lib._widths(problem.n)), reverse=True):
        both = Tiles(problem.k, 2 * width, 2)
        if (
            problem.n % width == 0
            and (interpret or width % tiling_lib.LANES == 0)
            and tiling_lib._gmm_memory(problem, both) <= tiling_lib.VMEM_BUDGET
        ):
            return Tiles(problem.k, width, 2)
    raise NotImplementedError(
        f"the TPU kernel with activation='swiglu': no multiple of 128 columns divides "
        f"{problem.n} and fits beside a width of {problem.k}"
    )


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling, interpret=False) -> jax.Array:
    """See `api.tgmm`."""
    _refuse_dtypes(lhs.dtype, out_dtype)
    lhs, metadata = metadata.rows_of(lhs), metadata.of_rows()
    problem = _problem(lhs.shape, dout.shape[1], metadata, lhs, out_dtype)
    tiles = tiling_lib.tgmm_tiles(problem) if tiling is None else _given(tiling, problem)
    call = functools.partial(_tgmm_call, problem, tiles, out_dtype, interpret)
    return one_by_one(call)(lhs, dout, metadata)


def _gmm_call(problem, tiles, transpose_rhs, gated, out_dtype, interpret, lhs, rhs, metadata):
    rows, tiles_k = problem.tile_rows, -(-problem.k // tiles.inner)
    tiles_n = -(-problem.n // tiles.outer)

    def weights_at(shift):
        def index(n, visit, k, bounds, groups, row_tiles, weights):
            column = n + shift * tiles_n
            return (weights[visit], column, k) if transpose_rhs else (weights[visit], k, column)

        block = (tiles.outer, tiles.inner) if transpose_rhs else (tiles.inner, tiles.outer)
        return pl.BlockSpec((None, *block), index, pipeline_mode=pl.Buffered(tiles.buffers))

    num_weights = 2 if gated else 1
    kernel = functools.partial(
        _gmm_kernel,
        num_groups=problem.groups,
        width=problem.k,
        contract=((1,), (1 if transpose_rhs else 0,)),
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((problem.m, problem.n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tiles_n, metadata.num_visits[0], tiles_k),
            in_specs=[
                pl.BlockSpec((rows, tiles.inner), lambda n, v, k, b, g, t, w: (t[v], k)),
                *(weights_at(shift) for shift in range(num_weights)),
            ],
            out_specs=pl.BlockSpec((rows, tiles.outer), lambda n, v, k, b, g, t, w: (t[v], n)),
            scratch_shapes=[pltpu.VMEM((rows, tiles.outer), jnp.float32)] * (tiles_k > 1),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiling_lib.VMEM_LIMIT,
        ),
        cost_estimate=_gmm_cost(problem, tiles, metadata, num_weights),
        interpret=interpret,
        name="gmm",
    )(
        metadata.bounds,
        metadata.visit_groups,
        metadata.visit_tiles,
        metadata.visit_weights,
        lhs,
        *[rhs] * num_weights,
    )


def _gmm_kernel(bounds, groups, row_tiles, weights, lhs, *refs, num_groups, width, contract):
    del weights
    tiles_k = pl.cdiv(width, lhs.shape[1])
    rhs, (out, *scratch) = (refs[:-2], refs[-2:]) if tiles_k > 1 else (refs[:-1], refs[-1:])
    visit, k = pl.program_id(1), pl.program_id(2)
    group, begin = groups[visit], row_tiles[visit] * out.shape[0]
    low, high = bounds[group] - begin, bounds[group + 1] - begin
    local = (group > 0) & (group <= num_groups)

    def product(at, weight):
        left, right = lhs[at], weight[...]
        if width % lhs.shape[1]:
            left = _only_below(left, width - k * lhs.shape[1], 1)
            right = _only_below(right, width - k * lhs.shape[1], contract[1][0])
        return _dot(left, right, contract)

    def store(at, total, whole):
        # Rows of other groups keep what they hold: their own visits write them.
        if not whole:
            row = at.start + lax.broadcasted_iota(jnp.int32, total.shape, 0)
            own = (row >= low) & (row < high)
            total = jnp.where(own, total, out[at].astype(jnp.float32))
        out[at] = total.astype(out.dtype)

    @pl.when((k == tiles_k - 1) & jnp.logical_not(local))
    def _():
        store(pl.ds(0, out.shape[0]), jnp.zeros(out.shape, jnp.float32), whole=False)

    def multiply(at, whole):
        if tiles_k == 1:
            first = product(at, rhs[0])
            gated = len(rhs) == 2
            store(at, jax.nn.silu(first) * product(at, rhs[1]) if gated else first, whole)
            return

        @pl.when(k == 0)
        def _():
            scratch[0][at] = jnp.zeros((at.size, out.shape[1]), jnp.float32)

        scratch[0][at] += product(at, rhs[0])

        @pl.when(k == tiles_k - 1)
        def _():
            store(at, scratch[0][at], whole)

    rows = out.shape[0]
    if tiling_lib.part_rows(rows) < rows:
        _for_rows_of_the_group(multiply, local, low, high, rows)
    else:  # a second copy of the product would only save the mask
        pl.when(local)(lambda: multiply(pl.ds(0, rows), False))


def _for_rows_of_the_group(multiply, wanted, low, high, rows: int) -> None:
    """multiply(rows, whole): a tile of one group at once, of a shared one only the parts it holds.

    low, high: the group's first row and the row behind its last, counted from the tile's first.
    """
    whole = (low <= 0) & (high >= rows)

    @pl.when(wanted & whole)
    def _():
        multiply(pl.ds(0, rows), True)

    @pl.when(wanted & jnp.logical_not(whole))
    def _():
        size = tiling_lib.part_rows(rows)

        def part(i, _):
            multiply(pl.ds(pl.multiple_of(i * size, size), size), False)

        # `lax.div`: `//` asks for the sign, whose lowering asks for a device.
        first = lax.div(jnp.maximum(low, 0), jnp.int32(size))
        behind = lax.div(jnp.minimum(high, rows) + (size - 1), jnp.int32(size))
        lax.fori_loop(first, behind, part, None)


def _gmm_cost(problem, tiles, metadata, num_weights) -> pl.CostEstimate:
    wide = problem if num_weights == 1 else _with_weights_of_both(problem)
    scalars = (metadata.bounds, metadata.visit_groups, metadata.visit_tiles, metadata.visit_weights)
    traffic = tiling_lib.gmm_traffic(wide, tiles)
    if num_weights == 2:
        # lhs and the result are those of one half.
        traffic -= wide.m * wide.n * wide.out_itemsize // 2
        traffic -= wide.m * wide.k * wide.itemsize * (wide.n // tiles.outer) // 2
    return pl.CostEstimate(
        flops=2 * wide.m * wide.k * wide.n,
        bytes_accessed=traffic + 4 * sum(x.size for x in scalars),
        transcendentals=problem.m * problem.n * (num_weights - 1),
    )


def _with_weights_of_both(problem: Problem) -> Problem:
    return Problem(**(vars(problem) | dict(n=2 * problem.n)))


def _tgmm_call(problem, tiles, out_dtype, interpret, lhs, dout, metadata):
    rows = problem.tile_rows
    scalars = (metadata.bounds, metadata.update_groups, metadata.update_tiles)
    return pl.pallas_call(
        _tgmm_kernel,
        out_shape=jax.ShapeDtypeStruct((problem.groups, problem.k, problem.n), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(
                pl.cdiv(problem.k, tiles.inner),
                pl.cdiv(problem.n, tiles.outer),
                metadata.num_updates[0],
            ),
            in_specs=[
                pl.BlockSpec((rows, tiles.inner), lambda k, n, u, b, g, t: (t[u], k)),
                pl.BlockSpec((rows, tiles.outer), lambda k, n, u, b, g, t: (t[u], n)),
            ],
            out_specs=pl.BlockSpec(
                (None, tiles.inner, tiles.outer),
                lambda k, n, u, b, g, t: (g[u], k, n),
                pipeline_mode=pl.Buffered(tiles.buffers),
            ),
            scratch_shapes=[pltpu.VMEM((tiles.inner, tiles.outer), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiling_lib.VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * problem.m * problem.k * problem.n,
            bytes_accessed=tiling_lib.tgmm_traffic(problem, tiles)
            + 4 * sum(x.size for x in scalars),
            transcendentals=0,
        ),
        interpret=interpret,
        name="tgmm",
    )(*scalars, lhs, dout)


def _tgmm_kernel(bounds, groups, row_tiles, lhs, dout, out, total):
    update, last = pl.program_id(2), pl.num_programs(2) - 1
    group, begin = groups[update], row_tiles[update] * lhs.shape[0]
    low, high = bounds[group + 1] - begin, bounds[group + 2] - begin

    @pl.when((update == 0) | (groups[jnp.maximum(update - 1, 0)] != group))
    def _():
        total[...] = jnp.zeros_like(total)

    def multiply(at, whole):
        own = [
            x[at] if whole else _only_rows(x[at], low - at.start, high - at.start)
            for x in (lhs, dout)
        ]
        total[...] += _dot(*own, ((0,), (0,)))

    _for_rows_of_the_group(multiply, high > low, low, high, lhs.shape[0])

    @pl.when((update == last) | (groups[jnp.minimum(update + 1, last)] != group))
    def _():
        out[...] = total[...].astype(out.dtype)


def _dot(left, right, contract) -> jax.Array:
    return lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)


def _only_rows(x, low, high) -> jax.Array:
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return _select((row >= low) & (row < high), x)


def _only_below(x, limit, axis) -> jax.Array:
    return _select(lax.broadcasted_iota(jnp.int32, x.shape, axis) < limit, x)


def _select(mask, x) -> jax.Array:
    """x where the mask holds, else 0; by way of float32, whose layout the mask has."""
    return jnp.where(mask, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _problem(lhs_shape, columns, metadata, lhs, out_dtype) -> Problem:
    return Problem(
        m=lhs_shape[0],
        k=lhs_shape[1],
        n=columns,
        groups=metadata.num_local_groups,
        tile_rows=metadata.tile_rows,
        itemsize=lhs.dtype.itemsize,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
    )


def _given(tiling, problem: Problem) -> Tiles:
    return Tiles(min(tiling[1], problem.k), min(tiling[2], problem.n), 2)


def _refuse_dtypes(dtype, out_dtype) -> None:
    for name, given in (("lhs", dtype), ("preferred_element_type", jnp.dtype(out_dtype))):
        if given not in DTYPES:
            raise NotImplementedError(
                f"the TPU kernel: {name} has dtype {given}; allowed are float32, bfloat16"
            )
