"""Array operations with several implementations: a plain reference, portable XLA, device kernels.

Needs only jax and numpy. Every operation takes `implementation=None`, see `dispatch.py`.
"""

from pallas_kernels.patch_pool import patch_attention, patch_gather_attention, patch_pool

__all__ = ["patch_attention", "patch_gather_attention", "patch_pool"]
