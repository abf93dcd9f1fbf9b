"""Tiles of the TPU kernels: as few bytes as the core's memory allows.

`gmm` walks the columns outermost and holds the weights [k, tn] of one group while the group's rows
pass, so every weight is read once and lhs once per column tile. `tgmm` holds one group's sum
[tk, tn] and reads lhs once per column tile of dout, dout once per column tile of lhs.
"""

import dataclasses
from collections.abc import Iterator

# Of the 64 MiB of a v5p core, the smallest since v5e; TPU v4 and older need their own `tiling`.
VMEM_LIMIT = 60 * 2**20
VMEM_BUDGET = 54 * 2**20
LANES = 128
# Traffic over the ideal from which on a block is kept in one buffer to make room for a larger one.
ENOUGH = 1.3


@dataclasses.dataclass(frozen=True)
class Tiles:
    """contracted and columns of `gmm`; columns of lhs and of dout for `tgmm`.

    buffers: how many copies of the largest block, the weights or the sum, the pipeline keeps.
    """

    inner: int
    outer: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """lhs[m, k], rhs[g, k, n]: item sizes of the arguments and the result, rows of a tile."""

    m: int
    k: int
    n: int
    groups: int
    tile_rows: int
    itemsize: int
    out_itemsize: int

    def ideal(self, of_weights: bool) -> int:
        """Bytes of the operands and the result, each once."""
        weights = self.groups * self.k * self.n
        out_itemsize, weight_itemsize = self.out_itemsize, self.itemsize
        if of_weights:
            out_itemsize, weight_itemsize = weight_itemsize, out_itemsize
        rows = self.m * self.k * self.itemsize + self.m * self.n * out_itemsize
        return rows + weights * weight_itemsize


def part_rows(rows: int) -> int:
    """Rows of the parts in which a tile that groups share is multiplied.

    Fewer than 128 would pass faster than a matrix unit loads its weights. At most 8 parts.
    """
    sizes = range(LANES, rows, LANES)
    return next((size for size in sizes if rows % size == 0 and rows <= 8 * size), rows)


def gmm_tiles(problem: Problem) -> Tiles:
    """The tiles of `gmm` with the least traffic that fit."""
    fitting = [t for t in _gmm_candidates(problem) if _gmm_memory(problem, t) <= VMEM_BUDGET]
    if not fitting:
        fitting = [_split_contraction(problem)]
    return _best(fitting, lambda t: gmm_traffic(problem, t), problem.ideal(False))


def gmm_traffic(problem: Problem, tiles: Tiles) -> int:
    """Bytes that `gmm` copies when no group is empty, scalars aside."""
    p = problem
    lhs = p.m * p.k * p.itemsize * _cdiv(p.n, tiles.outer)
    weights = p.groups * p.k * p.n * p.itemsize
    if tiles.inner < p.k:
        # Other parts of the weights pass in between: they are read again for every visit.
        visits = _cdiv(p.m, p.tile_rows) + p.groups - 1
        lhs = lhs // _cdiv(p.m, p.tile_rows) * visits
        weights = weights // p.groups * visits
    return lhs + weights + p.m * p.n * p.out_itemsize


def tgmm_tiles(problem: Problem) -> Tiles:
    """The tiles of `tgmm` with the least traffic that fit."""
    fitting = [
        Tiles(inner, outer, buffers)
        for buffers in (2, 1)
        for inner in _widths(problem.k)
        for outer in _widths(problem.n)
        if _tgmm_memory(problem, Tiles(inner, outer, buffers)) <= VMEM_BUDGET
    ]
    if not fitting:
        raise _too_many_rows(problem)
    return _best(fitting, lambda t: tgmm_traffic(problem, t), problem.ideal(True))


def tgmm_traffic(problem: Problem, tiles: Tiles) -> int:
    """Bytes that `tgmm` copies when the groups fill all rows, scalars aside."""
    p = problem
    lhs = p.m * p.k * p.itemsize * _cdiv(p.n, tiles.outer)
    dout = p.m * p.n * p.itemsize * _cdiv(p.k, tiles.inner)
    return lhs + dout + p.groups * p.k * p.n * p.out_itemsize


def _best(fitting: list[Tiles], traffic, ideal: int) -> Tiles:
    double = [t for t in fitting if t.buffers == 2]
    best = min(double, key=traffic, default=None)
    if best is not None and traffic(best) <= ENOUGH * ideal:
        return best
    return min(fitting, key=traffic)


def _gmm_candidates(problem: Problem) -> Iterator[Tiles]:
    for buffers in (2, 1):
        for width in _widths(problem.n):
            yield Tiles(problem.k, width, buffers)


def _gmm_memory(p: Problem, tiles: Tiles) -> int:
    lhs = 2 * p.tile_rows * tiles.inner * p.itemsize
    weights = tiles.buffers * tiles.inner * tiles.outer * p.itemsize
    # Two buffers of the result, the product in float32 and one more value of its size.
    return lhs + weights + p.tile_rows * tiles.outer * (2 * p.out_itemsize + 8)


def _tgmm_memory(p: Problem, tiles: Tiles) -> int:
    sums = tiles.inner * tiles.outer * (4 + tiles.buffers * p.out_itemsize)
    # Two buffers of either operand, and their masked copies in float32 on the way.
    return sums + p.tile_rows * (tiles.inner + tiles.outer) * (2 * p.itemsize + 6)


def _split_contraction(problem: Problem) -> Tiles:
    outer = min(_round_up(problem.n, LANES), 1024)
    inner = 4096
    while _gmm_memory(problem, Tiles(inner, outer, 2)) > VMEM_BUDGET:
        if max(inner, outer) == LANES:
            raise _too_many_rows(problem)
        if inner > LANES:
            inner //= 2
        else:
            outer = _round_up(outer // 2, LANES)
    return Tiles(inner, outer if outer < problem.n else problem.n, 2)


def _too_many_rows(problem: Problem) -> NotImplementedError:
    return NotImplementedError(
        f"tile_rows={problem.tile_rows}: a tile of so many rows does not fit the {VMEM_BUDGET} "
        "bytes of a TPU core; fewer are needed"
    )


def _widths(size: int) -> Iterator[int]:
    """Widths of even tiles that cover `size`, widest first."""
    yield size
    last = size
    for number in range(2, _cdiv(size, LANES) + 1):
        width = _round_up(_cdiv(size, number), LANES)
        if width < last:
            yield width
            last = width


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _cdiv(a, b) * b
