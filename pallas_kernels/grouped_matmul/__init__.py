"""Grouped matrix products: rows sorted by group, one weight matrix per group."""

from pallas_kernels.grouped_matmul.api import gmm, make_group_metadata, tgmm
from pallas_kernels.grouped_matmul.expert_parallel import expert_parallel_ffn
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.routing import Routing, sort_by_expert, sort_rows, unsort_rows

__all__ = [
    "GroupMetadata",
    "Routing",
    "expert_parallel_ffn",
    "gmm",
    "make_group_metadata",
    "sort_by_expert",
    "sort_rows",
    "tgmm",
    "unsort_rows",
]
