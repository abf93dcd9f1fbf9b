"""Shapes of the grouped products: small ones for values, those of real models for compilers.

Groups of equal size flatter every implementation; the generators below draw what routers produce.
"""

import dataclasses
import enum

import numpy as np


class Sizes(enum.Enum):
    """How rows fall on groups."""

    MULTINOMIAL = "every row picks a group uniformly"
    ZIPF = "every row picks group i with weight 1 / (i + 1)"
    ONE_HOT = "all rows in one group"
    HALF_EMPTY = "every second group is empty, the others multinomial"


def draw_sizes(kind: Sizes, num_rows: int, num_groups: int, seed: int = 0) -> np.ndarray:
    """int32[num_groups] with the sum num_rows."""
    rng = np.random.default_rng(seed)
    if kind is Sizes.MULTINOMIAL:
        weights = np.ones(num_groups)
    elif kind is Sizes.ZIPF:
        weights = 1 / np.arange(1, num_groups + 1)
    elif kind is Sizes.ONE_HOT:
        weights = np.arange(num_groups) == num_groups // 2
    else:
        weights = np.arange(num_groups) % 2 == (num_groups > 1)
    return rng.multinomial(num_rows, weights / weights.sum()).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """lhs[m, k], rhs[groups, k, n]; the sizes are given or drawn.

    local: (offset, number) of the local groups, all of them if None.
    """

    name: str
    m: int
    k: int
    n: int
    groups: int
    sizes: tuple[int, ...] | Sizes = Sizes.MULTINOMIAL
    local: tuple[int, int] | None = None

    @property
    def offset(self) -> int:
        return self.local[0] if self.local else 0

    @property
    def local_groups(self) -> int:
        return self.local[1] if self.local else self.groups


SHAPES = (
    Shape(name="uneven", m=40, k=24, n=16, groups=4, sizes=(7, 20, 1, 12)),
    Shape(name="empty_first", m=33, k=8, n=12, groups=3, sizes=(0, 13, 20)),
    Shape(name="empty_middle", m=37, k=20, n=7, groups=5, sizes=(9, 0, 0, 27, 1)),
    Shape(name="empty_last", m=24, k=5, n=9, groups=3, sizes=(16, 8, 0)),
    Shape(name="one_group_has_all", m=48, k=8, n=8, groups=4, sizes=(0, 0, 48, 0)),
    Shape(name="all_empty", m=9, k=4, n=6, groups=2, sizes=(0, 0)),
    Shape(name="tail", m=50, k=16, n=10, groups=3, sizes=(11, 0, 18)),
    Shape(name="one_row", m=1, k=3, n=5, groups=2, sizes=(0, 1)),
    Shape(name="groups_of_one", m=12, k=8, n=8, groups=12, sizes=(1,) * 12),
    Shape(
        name="more_groups_than_rows", m=5, k=8, n=8, groups=9, sizes=(0, 2, 0, 1) + (0,) * 4 + (2,)
    ),
    Shape(name="single_group", m=21, k=8, n=8, groups=1, sizes=(21,)),
    Shape(name="offset", m=45, k=12, n=8, groups=6, sizes=(4, 9, 0, 13, 8, 5), local=(1, 3)),
    Shape(name="offset_tail", m=45, k=12, n=8, groups=4, sizes=(14, 9, 3, 8), local=(2, 2)),
    Shape(name="many_tiles", m=300, k=40, n=36, groups=3, sizes=Sizes.ZIPF),
    # Tiles of 256 rows, shared by groups.
    Shape(name="large_tiles", m=2060, k=24, n=20, groups=4, sizes=(300, 0, 1001, 700)),
)


# Both products of an expert's MLP are gmm over [k, n] and [n, k]; the second is the first's
# transposed gradient, so one entry stands for both. Rows are tokens times experts per token.
MODEL_SHAPES = (
    # MoMa 1.4B: width 2048, MLP 8192, four experts per modality, 4096 tokens of 2 modalities.
    Shape(name="moma_1b4", m=8192, k=2048, n=8192, groups=4),
    # Mixtral 8x7B: width 4096, MLP 14336, 2 of 8 experts, 4096 tokens.
    Shape(name="mixtral_8x7b", m=8192, k=4096, n=14336, groups=8),
    # Mixtral 8x7B, 256 tokens at a time, as in decoding.
    Shape(name="mixtral_8x7b_decode", m=512, k=4096, n=14336, groups=8),
    # Fine-grained experts, as in DeepSeek's models: width 2048, MLP 1408, 6 of 64.
    Shape(name="fine_grained", m=24576, k=2048, n=1408, groups=64, sizes=Sizes.ZIPF),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """float32 lhs[m, k], rhs[g, k, n], dout[m, n] and int32 group_sizes[G], all numpy."""

    lhs: np.ndarray
    rhs: np.ndarray
    dout: np.ndarray
    group_sizes: np.ndarray


def make_arguments(shape: Shape, seed: int = 0) -> Arguments:
    """Random arguments; `rhs` holds the local groups."""
    rng = np.random.default_rng(seed)
    sizes = shape.sizes
    if isinstance(sizes, Sizes):
        sizes = draw_sizes(sizes, shape.m, shape.groups, seed)

    def normal(*sizes):
        return rng.normal(size=sizes).astype(np.float32)

    return Arguments(
        lhs=normal(shape.m, shape.k),
        rhs=normal(shape.local_groups, shape.k, shape.n),
        dout=normal(shape.m, shape.n),
        group_sizes=np.asarray(sizes, np.int32),
    )
