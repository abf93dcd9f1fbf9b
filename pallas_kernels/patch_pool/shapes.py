"""The argument shapes that every implementation is tested with, and arguments for them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call: rows, bytes, patches, vectors per patch, heads, head width."""

    name: str
    rows: int = 2
    num_bytes: int
    num_patches: int
    num_vectors: int = 2
    num_heads: int = 2
    head_dim: int = 4
    window: int = 1
    segments: bool = False
    empty_patches: tuple[int, ...] = ()
    ignored_bytes: tuple[int, ...] = ()
    """Bytes with an id out of range, counted from either end."""


SHAPES = (
    Shape(name="one", rows=1, num_bytes=1, num_patches=1, num_vectors=1, num_heads=1, head_dim=1),
    Shape(name="one_byte", num_bytes=1, num_patches=4, empty_patches=(0, 1, 3)),
    Shape(name="one_patch", num_bytes=9, num_patches=1, window=3),
    Shape(name="odd", rows=3, num_bytes=29, num_patches=7, num_heads=3, head_dim=5),
    Shape(name="empty_groups", num_bytes=20, num_patches=9, empty_patches=(0, 3, 4, 8)),
    Shape(name="ignored", num_bytes=21, num_patches=6, ignored_bytes=(0, 1, 9, -2, -1)),
    Shape(name="all_ignored", num_bytes=3, num_patches=2, ignored_bytes=(0, 1, 2)),
    Shape(name="window", num_bytes=24, num_patches=8, window=3, ignored_bytes=(0, -1)),
    Shape(name="wide_window", num_bytes=12, num_patches=5, window=9, empty_patches=(2,)),
    Shape(name="segments", num_bytes=26, num_patches=9, window=4, segments=True),
    Shape(name="segments_alone", num_bytes=26, num_patches=9, segments=True),
    Shape(name="more_patches_than_bytes", num_bytes=5, num_patches=11, num_vectors=3),
    Shape(name="eight_rows", rows=8, num_bytes=16, num_patches=5, window=2, segments=True),
    Shape(
        name="several_tiles",
        num_bytes=700,
        num_patches=150,
        num_heads=1,
        ignored_bytes=(0, 300, -1),
    ),
    Shape(
        name="patches_longer_than_tiles",
        rows=1,
        num_bytes=900,
        num_patches=270,
        num_vectors=1,
        empty_patches=(0, *range(2, 130), *range(131, 269)),
    ),
)

TRAINING_SHAPES = (
    # BLT-1B and 8B (arXiv 2412.09871): rows of 8k and 16k bytes, patches of 4.5 bytes.
    Shape(
        name="blt_1b",
        rows=2,
        num_bytes=8192,
        num_patches=1820,
        num_vectors=2,
        num_heads=16,
        head_dim=64,
    ),
    Shape(
        name="blt_8b",
        rows=1,
        num_bytes=16384,
        num_patches=3640,
        num_vectors=4,
        num_heads=20,
        head_dim=64,
    ),
)
"""Shapes of training in bfloat16, to compile and count bytes of only: too large to interpret."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """float32 and int32 numpy arrays; segments are None where the shape has none."""

    patch_ids: np.ndarray
    segment_ids: np.ndarray | None
    patch_segment_ids: np.ndarray | None
    bytes_q: np.ndarray
    bytes_key: np.ndarray
    bytes_value: np.ndarray
    patches_q: np.ndarray
    patches_key: np.ndarray
    patches_value: np.ndarray


def make_arguments(shape: Shape, seed: int = 0) -> Arguments:
    """Random arguments; bytes_* are [B, T, H, K] and patches_* [B, P, Q, H, K]."""
    rng = np.random.default_rng(seed)
    rows, num_bytes, num_patches = shape.rows, shape.num_bytes, shape.num_patches
    allowed = np.setdiff1d(np.arange(num_patches), shape.empty_patches)
    ids = np.sort(rng.choice(allowed, (rows, num_bytes)), axis=1).astype(np.int32)
    for count, index in enumerate(shape.ignored_bytes):
        ids[:, index] = -1 if count % 2 else num_patches + count
    segments = patch_segments = None
    if shape.segments:
        segments = np.sort(rng.integers(1, 4, (rows, num_bytes)), axis=1).astype(np.int32)
        patch_segments = np.sort(rng.integers(1, 4, (rows, num_patches)), axis=1).astype(np.int32)
    heads = (shape.num_heads, shape.head_dim)

    def normal(*sizes):
        return rng.normal(size=sizes + heads).astype(np.float32)

    of_bytes = [normal(rows, num_bytes) for _ in range(3)]
    of_patches = [normal(rows, num_patches, shape.num_vectors) for _ in range(3)]
    return Arguments(ids, segments, patch_segments, *of_bytes, *of_patches)
