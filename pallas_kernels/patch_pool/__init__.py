"""Pooling bytes into patches, and attention between bytes and patches, linear in the bytes."""

from pallas_kernels.patch_pool.api import patch_attention, patch_gather_attention, patch_pool

__all__ = ["patch_attention", "patch_gather_attention", "patch_pool"]
