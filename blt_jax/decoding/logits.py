"""Logits processors: what happens to logits before a token is chosen, composed in order.

Each is a pytree, so its numbers may be arrays that change without a new compile (TopK.k may not).
Numbers that are known, that is not traced, must be in the range of the class, or ValueError is
raised. The order of the classes is the order in which `SamplingConfig` applies them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.decoding.decoder import Decoder
from blt_jax.layers.cache import RowCache


@runtime_checkable
class LogitsProcessor(Protocol):
    """A function of float32 logits [B, V] and `seen` bool [B, V]: the tokens of the row so far.

    needs_seen: whether it reads `seen`, which is None otherwise. Excluded tokens become -inf.
    """

    needs_seen: bool

    def __call__(self, logits: jax.Array, seen: jax.Array | None) -> jax.Array:
        """The new logits [B, V]."""


def process_logits(
    processors: Sequence[LogitsProcessor],
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Float32 logits after all processors, in order, but allowed ids before any of them: a filter
    that ran first could keep none of these.

    Raises ValueError if one of them needs `seen` and it is None, and as `allowed_tokens`.
    """
    logits = only_allowed(processors, logits.astype(jnp.float32))
    for processor in processors:
        if processor.needs_seen and seen is None:
            raise ValueError(f"seen=None: {type(processor).__name__} needs the tokens of the rows")
        logits = processor(logits, seen)
    return logits


def allowed_tokens(processors: Sequence[LogitsProcessor], vocab_size: int) -> Any:
    """bool [V]: the tokens that all AllowedIds keep; None if there are none of them.

    Raises ValueError if they share no token, or are of another vocabulary.
    """
    found = [p for p in processors if isinstance(p, AllowedIds)]
    if not found:
        return None
    for processor in found:
        processor.check_size(vocab_size)
    allowed = functools.reduce(jnp.logical_and, [p.allowed for p in found])
    if known(allowed) and not bool(allowed.any()):
        raise ValueError("allowed_ids: the processors and the config allow no token in common")
    return allowed


def only_allowed(
    processors: Sequence[LogitsProcessor], logits: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """The logits, -inf where any AllowedIds of `processors` excludes a token."""
    allowed = allowed_tokens(processors, logits.shape[1])
    return logits if allowed is None else jnp.where(allowed[None, :], logits, -jnp.inf)


def constrained(decoder: Decoder, processors: Sequence[LogitsProcessor]) -> Decoder:
    """The decoder with the hard constraints of `processors` inside it, where it can take them.

    One that excludes tokens itself, and could leave no allowed one, has `constrained(allowed)`.
    """
    allowed = allowed_tokens(processors, decoder.vocab_size)
    if allowed is None or not hasattr(decoder, "constrained"):
        return decoder
    return decoder.constrained(allowed)


def tokens_seen(
    tokens: Int[Array, "B T"], lengths: Int[Array, " B"], vocab_size: int
) -> Bool[Array, "B V"]:
    """Which ids right-padded rows hold."""
    B, T = tokens.shape
    real_BT = jnp.arange(T)[None, :] < lengths[:, None]
    ids_BT = jnp.where(real_BT, tokens, vocab_size)
    row_B1 = jnp.arange(B)[:, None]
    return jnp.zeros((B, vocab_size), bool).at[row_B1, ids_BT].set(True, mode="drop")


def known(number: Any) -> bool:
    """Whether it is a number, or an array of them, whose value can be looked at."""
    number_like = isinstance(number, (int, float, np.generic, np.ndarray, jax.Array))
    return number_like and not isinstance(number, jax.core.Tracer)


def check_number(
    name: str, number: Any, holds: Callable[[np.ndarray], np.ndarray], allowed: str
) -> None:
    """ValueError saying what is `allowed` unless a number that is known satisfies `holds`."""
    if known(number) and not np.all(holds(np.asarray(number))):
        raise ValueError(f"{name}={number}: must be {allowed}")


@flax.struct.dataclass
class RepetitionPenalty:
    """Divides positive logits of tokens that the row holds, and multiplies negative ones, by
    `penalty` (arXiv 1909.05858, section 4.1); 1 changes nothing, above 1 discourages."""

    penalty: Any
    needs_seen = True

    def __post_init__(self):
        self.check("RepetitionPenalty.penalty", self.penalty)

    @staticmethod
    def check(name: str, penalty: Any) -> None:
        """ValueError unless above 0."""
        check_number(name, penalty, lambda x: (x > 0) & (x < np.inf), "above 0")

    def __call__(self, logits, seen):
        penalized = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(seen, penalized, logits)


@flax.struct.dataclass
class AllowedIds:
    """Keeps the tokens where `allowed` bool [V] holds."""

    allowed: Any
    needs_seen = False

    def __post_init__(self):
        if not known(self.allowed):
            return
        if self.allowed.dtype != bool:
            raise TypeError(
                f"AllowedIds.allowed has dtype {self.allowed.dtype}: must be bool [V] "
                "(AllowedIds.create takes ids)"
            )
        if not np.any(self.allowed):
            raise ValueError("AllowedIds.allowed excludes every token: one must be allowed")

    @classmethod
    def create(cls, ids: tuple[int, ...], vocab_size: int) -> "AllowedIds":
        """From the ids. Raises ValueError for none, or for one outside the vocabulary."""
        if not ids:
            raise ValueError("allowed_ids is empty: at least one token must be allowed")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"allowed_ids={ids}: must be 0..{vocab_size - 1}")
        allowed = np.zeros((vocab_size,), bool)
        allowed[list(ids)] = True
        return cls(jnp.asarray(allowed))

    def check_size(self, vocab_size: int) -> None:
        """ValueError unless made for this vocabulary."""
        if self.allowed.shape != (vocab_size,):
            raise ValueError(
                f"AllowedIds.allowed has shape {self.allowed.shape}: must be ({vocab_size},)"
            )

    def __call__(self, logits, seen):
        self.check_size(logits.shape[-1])
        return jnp.where(self.allowed[None, :], logits, -jnp.inf)


@flax.struct.dataclass
class Temperature:
    """Divides the logits by `temperature` > 0."""

    temperature: Any
    needs_seen = False

    def __post_init__(self):
        self.check("Temperature.temperature", self.temperature)

    @staticmethod
    def check(name: str, temperature: Any, or_zero: str = "") -> None:
        """ValueError unless above 0; or_zero: what the message adds about 0."""
        check_number(name, temperature, lambda x: (x > 0) & (x < np.inf), "above 0" + or_zero)

    def __call__(self, logits, seen):
        return logits / self.temperature


@flax.struct.dataclass
class TopK:
    """Keeps the k most probable tokens, and those that tie with the last of them."""

    k: int = flax.struct.field(pytree_node=False)
    needs_seen = False

    def __post_init__(self):
        self.check("TopK.k", self.k)

    @staticmethod
    def check(name: str, k: int, or_zero: str = "") -> None:
        """ValueError unless at least 1; or_zero as of Temperature."""
        check_number(name, k, lambda x: x >= 1, ">= 1" + or_zero)

    def __call__(self, logits, seen):
        if self.k >= logits.shape[-1]:
            return logits
        smallest = jax.lax.top_k(logits, self.k)[0][:, -1:]
        return jnp.where(logits < smallest, -jnp.inf, logits)


@flax.struct.dataclass
class TopP:
    """Keeps the smallest set of most probable tokens that holds probability p, and ties."""

    p: Any
    needs_seen = False

    def __post_init__(self):
        self.check("TopP.p", self.p)

    @staticmethod
    def check(name: str, p: Any) -> None:
        """ValueError unless above 0 and at most 1."""
        check_number(name, p, lambda x: (x > 0) & (x <= 1), "above 0 and <= 1")

    def __call__(self, logits, seen):
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < self.p, descending, jnp.inf)
        return jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)


@flax.struct.dataclass
class MinP:
    """Keeps the tokens with at least `share` of the highest probability."""

    share: Any
    needs_seen = False

    def __post_init__(self):
        self.check("MinP.share", self.share)

    @staticmethod
    def check(name: str, share: Any) -> None:
        """ValueError unless 0..1."""
        check_number(name, share, lambda x: (x >= 0) & (x <= 1), "0..1")

    def __call__(self, logits, seen):
        probability = jax.nn.softmax(logits, axis=-1)
        highest = jnp.max(probability, axis=-1, keepdims=True)
        return jnp.where(probability < self.share * highest, -jnp.inf, logits)


# -------------------------------------------------------------- processors inside a decoder


@flax.struct.dataclass
class ProcessedCache(RowCache):
    """The cache of a decoder, and the ids that each row holds (bool [B, V])."""

    cache: Any
    seen: Any

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: tokens read."""
        return self.cache.lengths

    def counters(self) -> dict[str, jax.Array]:
        return self.cache.counters()


@flax.struct.dataclass
class ProcessedDecoder:
    """A Decoder whose logits went through processors.

    For what the sampler does not reach: beam search, scores of continuations, and one of the
    models of a ContrastiveDecoder.
    """

    decoder: Decoder
    processors: tuple[LogitsProcessor, ...]

    @property
    def capacity(self) -> int:
        return self.decoder.capacity

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    def constrained(self, allowed: Bool[Array, " V"]) -> "ProcessedDecoder":
        """With the constraint before its processors, and in the decoder inside."""
        return self.replace(processors=(AllowedIds(allowed), *self.processors))

    def prepare(self) -> "ProcessedDecoder":
        return self.replace(decoder=self._inside.prepare())

    @property
    def _inside(self) -> Decoder:
        """The decoder with the hard constraints of the processors."""
        return constrained(self.decoder, self.processors)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], ProcessedCache]:
        """As Decoder.prefill."""
        logits, cache = self._inside.prefill(tokens, lengths)
        seen = tokens_seen(tokens, lengths, self.vocab_size)
        return process_logits(self.processors, logits, seen), ProcessedCache(cache, seen)

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: ProcessedCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], ProcessedCache]:
        """As Decoder.step."""
        logits, inner = self._inside.step(tokens, cache.cache, active)
        ids = tokens if active is None else jnp.where(active, tokens, self.vocab_size)
        seen = cache.seen.at[jnp.arange(tokens.shape[0]), ids].set(True, mode="drop")
        return process_logits(self.processors, logits, seen), ProcessedCache(inner, seen)

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: ProcessedCache
    ) -> tuple[Float[Array, "B V"], ProcessedCache]:
        """As Decoder.extend."""
        logits, inner = self._inside.extend(tokens, lengths, cache.cache)
        seen = cache.seen | tokens_seen(tokens, lengths, self.vocab_size)
        return process_logits(self.processors, logits, seen), ProcessedCache(inner, seen)
