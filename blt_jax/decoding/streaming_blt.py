"""The Byte Latent Transformer on streams without end: sinks and a window of patches.

The byte-level parts of a BLT attend in windows already; its latent transformer, over patches, gets
the cache of StreamingLLM (arXiv 2309.17453), whose first tokens and recent tokens are patches here.
Their number, not that of the bytes, counts for positions and sizes.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.decoding.streaming_llm import (
    MAX_TOKENS,
    Policy,
    SinkCache,
    StreamingConfig,
    check_cache,
    check_stack,
    stream_step,
)
from blt_jax.layers import step
from blt_jax.models.blt_decode import BLTCache, BLTDecoder


@dataclasses.dataclass(frozen=True)
class _LatentStep:
    """`stream_step` of a config, equal for equal configs."""

    config: StreamingConfig

    def __call__(self, *arguments: Any) -> Any:
        return stream_step(self.config, *arguments)


@flax.struct.dataclass
class StreamingBLTDecoder:
    """Decoder of a BLT with sinks and a window of patches: rows never run full.

    Make it with `create`, which checks the parts.
    """

    blt: BLTDecoder
    config: StreamingConfig = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, blt: BLTDecoder, config: StreamingConfig) -> "StreamingBLTDecoder":
        """From a decoder of any capacity, with policy SINKS or WINDOW.

        Raises ValueError for another policy, byte-level parts without a window, a window over
        patches, and a patcher whose patches may be of any length.
        """
        if config.policy not in (Policy.SINKS, Policy.WINDOW):
            raise ValueError(f"policy {config.policy.name}: a BLT streams with SINKS or WINDOW")
        check_stack(config, blt.config.latent)
        for name, stack in cls._byte_stacks(blt).items():
            if not stack.window:
                raise ValueError(f"{name}.window=0: a stream without end needs a window of bytes")
        if blt.config.patch_window > 1:
            raise ValueError(f"patch_window={blt.config.patch_window}: must be 1 on a stream")
        blt = blt.replace(capacity=MAX_TOKENS, latent_step=_LatentStep(config))
        if blt.longest_patch == MAX_TOKENS:
            raise ValueError(
                f"patcher {blt.patcher.kind.name} has max_patch_length=0: patches of any length "
                "need slots without end"
            )
        return cls(blt=blt, config=config)

    @staticmethod
    def _byte_stacks(blt: BLTDecoder) -> dict[str, Any]:
        config = blt.config
        stacks = {"local_encoder": config.local_encoder, "local_decoder": config.local_decoder}
        if blt.entropy_model is not None:
            stacks["entropy_model"] = blt.entropy_model.config.transformer
        return stacks

    capacity = MAX_TOKENS
    """Bounded by the type of the positions alone."""

    @property
    def vocab_size(self) -> int:
        return self.blt.vocab_size

    def prepare(self) -> "StreamingBLTDecoder":
        """As Decoder.prepare."""
        return self.replace(blt=self.blt.prepare())

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """As Decoder.prefill, byte by byte after the first one."""
        step.check_prompts(tokens, lengths, self.capacity, self.vocab_size)
        decoder = self.prepare()
        state = decoder._first_byte(tokens[:, :1])
        return step.extend_by_steps(decoder.step, tokens, lengths, state, first=1)

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: BLTCache
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """As Decoder.extend, byte by byte. Raises ValueError or TypeError for a cache of another
        decoder."""
        self._check_cache(cache, tokens.shape[0])
        return self.blt.extend(tokens, lengths, cache)

    def step(
        self, tokens: Int[Array, " B"], cache: BLTCache, active: Bool[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """As Decoder.step. Raises ValueError or TypeError for a cache of another decoder."""
        self._check_cache(cache, tokens.shape[0])
        return self.blt.step(tokens, cache, active)

    def _check_cache(self, cache, rows):
        check_cache(self.config, self.blt.config.latent, cache.latent, rows)

    def _first_byte(self, tokens):
        """Logits and cache after one byte per row, by the full pass of a decoder of few slots."""
        windows = [stack.window for stack in self._byte_stacks(self.blt).values()]
        short = self.blt.replace(capacity=max(*windows, self.blt.longest_patch))
        logits, cache = short.prefill(tokens, jnp.ones(tokens.shape[:1], jnp.int32))
        stack, B = self.blt.config.latent, tokens.shape[0]
        latent = SinkCache.create(self.config, stack, B, self.blt.config.precision.dtype)
        # The patch at position 0, if it is complete: rotation by 0 leaves its key as it is.
        pairs = zip(latent.layers, cache.latent.layers, strict=True)
        layers = tuple(
            layer.write(old.key[0][:, :, 0], old.value[0][:, :, 0], jnp.zeros((B,), jnp.int32))
            for layer, old in pairs
        )
        latent = latent.replace(layers=layers, read=cache.latent.lengths)
        return logits, cache.replace(latent=latent)
