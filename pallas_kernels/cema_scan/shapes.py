"""The argument shapes that every implementation is tested with, and arguments for them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call: rows B, tokens T, channels D, complex numbers of state per channel N."""

    name: str
    rows: int = 1
    length: int
    width: int
    size: int
    resets: tuple[int, ...] | None = None
    """Tokens of row 0 that start a document; row b's lie b tokens later. None: no argument."""
    dtype: str = "float32"


SHAPES = (
    Shape(name="one", length=1, width=1, size=1),
    Shape(name="one_token", rows=2, length=1, width=5, size=3, resets=(0,)),
    Shape(name="short", rows=3, length=5, width=3, size=1),
    Shape(name="odd", rows=2, length=77, width=7, size=3),
    Shape(name="whole_chunks", rows=1, length=128, width=4, size=2, resets=()),
    Shape(name="blocks", rows=2, length=331, width=3, size=2),
    Shape(name="many_rows", rows=9, length=97, width=2, size=2),
    Shape(name="resets", rows=2, length=203, width=5, size=2, resets=(0, 1, 31, 64, 70, 71, 200)),
    Shape(name="all_resets", length=66, width=2, size=2, resets=tuple(range(66))),
    Shape(name="large_state", length=40, width=3, size=9, resets=(20,)),
    Shape(name="eight_rows", rows=8, length=70, width=16, size=2, resets=(40,)),
)

DEVICE_SHAPES = (
    Shape(name="megalodon_200m", rows=8, length=2048, width=1024, size=16, dtype="bfloat16"),
    Shape(name="megalodon_7b", length=4096, width=4096, size=16, dtype="bfloat16"),
    Shape(
        name="megalodon_7b_packed",
        length=4096,
        width=4096,
        size=16,
        resets=(0, 1000, 1001),
        dtype="bfloat16",
    ),
    Shape(name="megalodon_7b_32k", length=32768, width=4096, size=16, dtype="bfloat16"),
    Shape(name="megalodon_7b_float32", length=4096, width=4096, size=16),
    Shape(name="decode", rows=16, length=1, width=4096, size=16, dtype="bfloat16"),
    Shape(name="odd_sizes", rows=3, length=1001, width=200, size=3, resets=(7,)),
    Shape(name="large_state", rows=2, length=512, width=512, size=32, resets=(7,)),
)
"""Shapes only compiled for devices; the figures of the README are those of Megalodon-7B."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """x[B, T, D], five coefficients [D, N], the state's parts [B, D, N], reset[B, T] or None."""

    x: np.ndarray
    coefficients: tuple[np.ndarray, ...]
    state: tuple[np.ndarray, np.ndarray]
    reset: np.ndarray | None


def make_arguments(shape: Shape, seed: int = 0) -> Arguments:
    """Arguments in float32 with moduli of the decay from 0.5 to 0.999."""
    rng = np.random.default_rng(seed)
    rows, length, width, size = shape.rows, shape.length, shape.width, shape.size
    modulus = 1 - np.exp(rng.uniform(np.log(1e-3), np.log(0.5), (width, size)))
    phase = rng.uniform(0, 2 * np.pi, (width, size))

    def normal(*sizes):
        return rng.normal(size=sizes).astype(np.float32)

    coefficients = (
        (modulus * np.cos(phase)).astype(np.float32),
        (modulus * np.sin(phase)).astype(np.float32),
        rng.uniform(0.2, 0.8, (width, size)).astype(np.float32),
        normal(width, size) / np.float32(size**0.5),
        normal(width, size) / np.float32(size**0.5),
    )
    reset = None
    if shape.resets is not None:
        reset = np.zeros((rows, length), bool)
        for row in range(rows):
            reset[row, [t + row for t in shape.resets if t + row < length]] = True
    state = normal(rows, width, size), normal(rows, width, size)
    return Arguments(normal(rows, length, width), coefficients, state, reset)
