"""Several models that read the same text in step, each with its own cache, and one function of
their logits.

Contrastive decoding is one such function (`contrastive_decoding`), a weighted sum another: DExperts
(arXiv 2105.03023) and proxy tuning (arXiv 2401.08565) add alpha times the difference of an expert
and an anti-expert to a base model, `WeightedSum((1.0, alpha, -alpha))` of (base, expert,
anti-expert).

Axes: B batch, T prompt, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.logits import AllowedIds
from blt_jax.layers.cache import RowCache

# A model that excludes a token has a very low logit for it, since an infinite one gives NaN.
LOWEST_LOGIT = -1e9


@runtime_checkable
class CombineLogits(Protocol):
    """A function of one array of logits [B, V] per model; a pytree, so that its numbers may change
    without a new compile (`jax.tree_util.Partial` makes one of a function)."""

    def __call__(self, *logits: jax.Array) -> jax.Array:
        """The combined float32 logits [B, V]."""


@flax.struct.dataclass
class WeightedSum:
    """The sum of logits times `weights`, one per model, in float32.

    Tokens that the first model excludes (-inf) stay excluded; another model that excludes one has
    LOWEST_LOGIT for it. Raises ValueError for another number of weights.
    """

    weights: Any

    def __call__(self, *logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The combined logits."""
        if len(self.weights) != len(logits):
            raise ValueError(f"weights: {len(self.weights)} for {len(logits)} models")
        total = jnp.zeros(logits[0].shape, jnp.float32)
        for weight, each in zip(self.weights, logits, strict=True):
            total += weight * jnp.maximum(each.astype(jnp.float32), LOWEST_LOGIT)
        return jnp.where(logits[0] == -jnp.inf, -jnp.inf, total)


@flax.struct.dataclass
class CombinedCache(RowCache):
    """The cache of every model."""

    caches: tuple[Any, ...]

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: tokens that the first model read."""
        return self.caches[0].lengths

    def counters(self) -> dict[str, jax.Array]:
        """Those of the first model."""
        return self.caches[0].counters()


class ModelsInStep:
    """What decoders of several models share. A subclass has `vocab_size`, `allowed`, `models`,
    `with_models`, `names` (of the profile) and `_combine`, and may have other `_prompts`."""

    @property
    def capacity(self) -> int:
        return self.models[0].capacity

    def constrained(self, allowed: Bool[Array, " V"]) -> "ModelsInStep":
        """The decoder of these tokens alone: the first model has no others, so that what is made
        of its logits always leaves one."""
        if self.allowed is not None:
            allowed = allowed & self.allowed
        return self.replace(allowed=allowed)

    def prepare(self) -> "ModelsInStep":
        """As Decoder.prepare, of all models."""
        return self.with_models(*(model.prepare() for model in self.models))

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], CombinedCache]:
        """As Decoder.prefill, of all models; the logits are the combined ones."""
        prompts = self._prompts(tokens, lengths)
        calls = [(model.prefill, *own) for model, own in zip(self.models, prompts, strict=True)]
        return self._in_step(calls, beams=1)

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: CombinedCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], CombinedCache]:
        """As Decoder.step, of all models."""
        pairs = zip(self.models, cache.caches, strict=True)
        return self._in_step([(model.step, tokens, own, active) for model, own in pairs])

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: CombinedCache
    ) -> tuple[Float[Array, "B V"], CombinedCache]:
        """As Decoder.extend: all models read all these tokens."""
        pairs = zip(self.models, cache.caches, strict=True)
        calls = [(model.extend, tokens, lengths, own) for model, own in pairs]
        return self._in_step(calls, beams=1)

    def _prompts(self, tokens, lengths):
        """The prompts of each model."""
        return [(tokens, lengths)] * len(self.models)

    def _in_step(self, calls, beams=None):
        found = []
        for name, (call, *arguments) in zip(self.names, calls, strict=True):
            with jax.named_scope(name):
                found.append(call(*arguments))
        logits, caches = zip(*found, strict=True)
        logits = [each[:, : self.vocab_size] for each in logits]
        if self.allowed is not None:
            logits[0] = jnp.where(self.allowed[None, :], logits[0], -jnp.inf)
        with jax.named_scope("combine"):
            return self._combine(logits, beams), CombinedCache(caches)


def shared_vocabulary(models: dict[str, Decoder], vocab_size: int, allowed: Any) -> int:
    """The ids that the models have in common: vocab_size, or the whole vocabulary for 0.

    Raises ValueError where they differ and vocab_size is 0, for one that a model does not have,
    and for `allowed` of another size.
    """
    sizes = {name: model.vocab_size for name, model in models.items()}
    if not vocab_size and len(set(sizes.values())) > 1:
        raise ValueError(
            f"{' and '.join(sizes)} have vocab_size={' and '.join(map(str, sizes.values()))}: "
            "must be equal; give vocab_size if one of them is padded"
        )
    if not 0 <= vocab_size <= min(sizes.values()):
        raise ValueError(f"vocab_size={vocab_size}: must be 0..{min(sizes.values())}")
    vocab_size = vocab_size or min(sizes.values())
    if allowed is not None:
        AllowedIds(allowed).check_size(vocab_size)
    return vocab_size


@flax.struct.dataclass
class CombinedDecoder(ModelsInStep):
    """Some models as one Decoder; make it with `create`, which checks the parts.

    combine: a CombineLogits. allowed: bool [V], the only tokens that may follow; None all.
    """

    models: tuple[Decoder, ...]
    combine: Any
    vocab_size: int = flax.struct.field(pytree_node=False)
    allowed: Any = None

    @classmethod
    def create(
        cls,
        models: Sequence[Decoder],
        combine: CombineLogits,
        vocab_size: int = 0,
        allowed: Bool[Array, " V"] | None = None,
    ) -> "CombinedDecoder":
        """vocab_size: ids that all tokenizers have, where a model pads its vocabulary; 0: all.

        Raises ValueError for no models, different vocabularies, and a model with less capacity than
        the first.
        """
        if not models:
            raise ValueError("models is empty: there must be one at least")
        named = {f"models[{i}]": model for i, model in enumerate(models)}
        size = shared_vocabulary(named, vocab_size, allowed)
        for name, model in named.items():
            if model.capacity < models[0].capacity:
                raise ValueError(
                    f"{name} has capacity={model.capacity}: must be >= {models[0].capacity}"
                )
        return cls(tuple(models), combine, size, allowed)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"model_{i}" for i in range(len(self.models)))

    def with_models(self, *models: Decoder) -> "CombinedDecoder":
        return self.replace(models=models)

    def _combine(self, logits, beams):
        del beams
        return self.combine(*logits)
