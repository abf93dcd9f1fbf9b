"""Array operations with several implementations: a plain reference, portable XLA, device kernels.

Needs only jax and numpy. Every operation takes `implementation=None`, see `dispatch.py`.
"""

from pallas_kernels.cema_scan import cema_scan
from pallas_kernels.grouped_matmul import (
    GroupMetadata,
    expert_parallel_ffn,
    gmm,
    make_group_metadata,
    sort_by_expert,
    sort_rows,
    tgmm,
    unsort_rows,
)
from pallas_kernels.patch_pool import patch_attention, patch_gather_attention, patch_pool

__all__ = [
    "GroupMetadata",
    "cema_scan",
    "expert_parallel_ffn",
    "gmm",
    "make_group_metadata",
    "patch_attention",
    "patch_gather_attention",
    "patch_pool",
    "sort_by_expert",
    "sort_rows",
    "tgmm",
    "unsort_rows",
]
