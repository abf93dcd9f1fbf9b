"""Byte-level, multi-modal, sparse and retrieval-augmented language models in JAX."""

__version__ = "0.1.0"
