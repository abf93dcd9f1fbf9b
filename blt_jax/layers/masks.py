"""Attention masks as one predicate over row indices and segments."""

from jaxtyping import Array, Bool, Int

NEGATIVE = -1e30


def causal_mask(
    query_index: Int[Array, " T"],
    key_index: Int[Array, " S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    window: int = 0,
) -> Bool[Array, "B T S"]:
    """True where the key is not later, of the same document (not 0), and inside the window.

    A window of w shows the query itself and the w - 1 positions before it; 0 means no window.
    """
    distance_TS = query_index[:, None] - key_index[None, :]
    near_TS = distance_TS >= 0
    if window:
        near_TS &= distance_TS < window
    same_BTS = query_segments[:, :, None] == key_segments[:, None, :]
    return near_TS[None] & same_BTS & (query_segments > 0)[:, :, None]
