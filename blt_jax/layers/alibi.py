"""Attention with linear biases (arXiv 2108.12409): positions as a penalty on distance."""

import numpy as np


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 [num_heads]: what each head subtracts from a score per token of distance.

    2^(-8 i / n) for head i = 1..n where n heads are a power of two. Otherwise those of the largest
    power of two below, then every other one of twice that power (the released code's rule).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: must be >= 1")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(power)
    extra = _geometric(2 * power)[::2][: num_heads - power]
    return np.concatenate([slopes, extra]).astype(np.float32)


def _geometric(count: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)
