"""Choosing the next token, and the generation loop in one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int, Shaped

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.logits import (
    AllowedIds,
    LogitsProcessor,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    allowed_tokens,
    constrained,
    only_allowed,
    process_logits,
    tokens_seen,
)
from blt_jax.layers.embed import check_token_ids
from blt_jax.layers.step import check_prompts, check_room


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SamplingConfig:
    """How the next token is drawn: a composition of `decoding.logits`, in the order
    repetition_penalty, allowed_ids, temperature, top_k, top_p, min_p.

    temperature: divides the logits, 0 is greedy. top_k: only the k most probable tokens, 0 all.
    top_p: only the smallest set of most probable tokens that holds this probability, 1 all.
    min_p: only tokens with at least this share of the highest probability, 0 all.
    repetition_penalty: of tokens that the prompt or the continuation holds, 1 none.
    allowed_ids: only these tokens, () all. Tokens that tie with the last one kept are kept too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    allowed_ids: tuple[int, ...] = ()

    def __post_init__(self):
        name = "SamplingConfig"
        if self.temperature != 0:
            Temperature.check(f"{name}.temperature", self.temperature, ", or 0 for greedy")
        if self.top_k != 0:
            TopK.check(f"{name}.top_k", self.top_k, ", or 0 for all")
        TopP.check(f"{name}.top_p", self.top_p)
        MinP.check(f"{name}.min_p", self.min_p)
        RepetitionPenalty.check(f"{name}.repetition_penalty", self.repetition_penalty)

    def processors(self, vocab_size: int) -> tuple[LogitsProcessor, ...]:
        """The processors of the settings that change something; none after the temperature
        when greedy, because they keep the argmax.

        Raises ValueError for allowed_ids outside the vocabulary.
        """
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenalty(self.repetition_penalty))
        if self.allowed_ids:
            found.append(AllowedIds.create(self.allowed_ids, vocab_size))
        if self.temperature == 0:
            return tuple(found)
        found.append(Temperature(self.temperature))
        if self.top_k:
            found.append(TopK(self.top_k))
        if self.top_p < 1:
            found.append(TopP(self.top_p))
        if self.min_p:
            found.append(MinP(self.min_p))
        return tuple(found)


def sample(
    logits: Float[Array, "B V"],
    key: jax.Array,
    config: SamplingConfig,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token id per row. key: one key, or one per row [B]; unused when greedy.

    seen: ids that each row holds, needed by a repetition penalty. Rows that hold NaN, or leave no
    token, give some id, which `jax.experimental.checkify` reports.
    """
    logits = process_logits(config.processors(logits.shape[-1]), logits, seen)
    some = jnp.max(logits, axis=-1) > -jnp.inf  # not so for NaN either
    checkify.debug_check(jnp.all(some), "logits hold NaN, or are all -inf")
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = key if key.ndim else row_keys(key, logits.shape[0])
    if keys.shape != logits.shape[:1]:
        raise ValueError(f"key has shape {keys.shape}: must be () or {logits.shape[:1]}")
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(key: jax.Array, num_rows: int) -> jax.Array:
    """Keys [num_rows] that do not depend on how many rows there are."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_rows))


@flax.struct.dataclass
class Generation:
    """tokens: int32 [B, M], stop ids included, 0 after the end of a row; lengths: int32 [B],
    tokens of each row; finished: bool [B], whether it ended with a stop id; stats: dict of
    int32 [B], what the counters of the cache gained after the prompt; cache: the last one, without
    the last token; seen: bool [B, V], ids that the rows hold, None where no processor asks."""

    tokens: Any
    lengths: Any
    finished: Any
    stats: Any
    cache: Any
    seen: Any = None


def generate(
    decoder: Decoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    config: SamplingConfig | None = None,
    max_new_tokens: int = 256,
    stop_ids: tuple[int, ...] = (),
    key: jax.Array | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
    previous: Generation | None = None,
) -> Generation:
    """Continues right-padded prompts until a stop id or max_new_tokens, in one compiled program.

    Rows are independent: a row gives the same tokens alone as in a batch when it has the same
    key. key: one key (folded with the row number) or one per row [B]; each token folds in its
    step. The last token is not read by the model. processors: applied before those of the config,
    but allowed ids before all others; their numbers may change without a new compile. Allowed ids
    also go to a decoder that excludes tokens itself. previous: what the prompts, which may then be
    empty, come after; give another key than it had. Raises ValueError when no id is allowed or
    prompts and new tokens exceed the capacity, and as Decoder.prefill and extend do. A model whose
    logits are NaN gives ids without meaning, see `sample`.
    """
    settings = (config, max_new_tokens, stop_ids, key, processors, previous)
    return _generate(decoder, *_check(decoder, tokens, lengths, *settings))


def compile_generation(
    decoder: Decoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    config: SamplingConfig | None = None,
    max_new_tokens: int = 256,
    stop_ids: tuple[int, ...] = (),
    key: jax.Array | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
    previous: Generation | None = None,
) -> Callable[..., Generation]:
    """`generate` compiled for these shapes and settings: a function of (tokens, lengths, key), and
    of the Generation that it continues if one is given here."""
    settings = (config, max_new_tokens, stop_ids)
    arguments = _check(decoder, tokens, lengths, *settings, key, processors, previous)
    compiled = _generate.lower(decoder, *arguments).compile()

    def run(tokens, lengths, key=None, previous=None) -> Generation:
        checked = _check(decoder, tokens, lengths, *settings, key, processors, previous)
        return compiled(decoder, *checked[:3], *checked[6:])

    return run


def _check(decoder, tokens, lengths, config, max_new_tokens, stop_ids, key, processors, previous):
    """The arguments of `_generate` after the decoder."""
    config = SamplingConfig() if config is None else config
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be >= 1")
    for stop in stop_ids:
        if not 0 <= stop < decoder.vocab_size:
            raise ValueError(f"stop_ids={stop_ids}: must be 0..{decoder.vocab_size - 1}")
    every = (*processors, *config.processors(decoder.vocab_size))
    allowed_tokens(every, decoder.vocab_size)
    tokens, lengths, before = jnp.asarray(tokens), jnp.asarray(lengths), None
    if previous is None:
        check_prompts(tokens, lengths, decoder.capacity, decoder.vocab_size)
        check_room(lengths, max_new_tokens, decoder.capacity)
    else:
        if previous.seen is None and any(p.needs_seen for p in every):
            raise ValueError("previous.seen=None: it was made without a repetition penalty")
        before = previous.cache, previous.seen
        tokens, lengths = _after(previous, tokens, lengths)
        check_prompts(tokens, lengths, decoder.capacity, decoder.vocab_size)
        check_room(previous.cache.lengths, lengths + max_new_tokens, decoder.capacity)
    if key is None:
        if config.temperature > 0:
            raise ValueError("key=None: needed unless temperature=0")
        key = jax.random.key(0)
    keys = key if key.ndim else row_keys(key, tokens.shape[0])
    if keys.shape != tokens.shape[:1]:
        raise ValueError(f"key has shape {keys.shape}: must be () or {tokens.shape[:1]}")
    stop_ids = tuple(stop_ids)
    return tokens, lengths, keys, config, max_new_tokens, stop_ids, processors, before


def _after(previous: Generation, tokens, lengths):
    """The prompts with the last token of the rows in front, which the model has not read."""
    check_token_ids("tokens", tokens)
    if tokens.shape[:1] != previous.lengths.shape:
        raise ValueError(f"tokens {tokens.shape}: previous has {len(previous.lengths)} rows")
    last_B1 = jnp.take_along_axis(previous.tokens, previous.lengths[:, None] - 1, axis=1)
    return jnp.concatenate([last_B1, tokens.astype(jnp.int32)], axis=1), lengths + 1


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _generate(decoder, tokens, lengths, keys, config, max_new_tokens, stop_ids, processors, before):
    B, V = tokens.shape[0], decoder.vocab_size
    every = (*processors, *config.processors(V))
    seen = tokens_seen(tokens, lengths, V) if any(p.needs_seen for p in every) else None
    decoder = constrained(decoder, every).prepare()
    if before is None:
        logits, cache = decoder.prefill(tokens, lengths)
    else:
        logits, cache = decoder.extend(tokens, lengths, before[0])
        seen = None if seen is None else seen | before[1]
    counted = cache.counters()

    def choose(logits, index, active, seen):
        logits, step_keys = only_allowed(every, logits.astype(jnp.float32)), keys
        logits = process_logits(processors, logits, seen)
        if config.temperature > 0:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        token = sample(logits, step_keys, config, seen)
        stops = jnp.zeros(active.shape, bool)
        for stop in stop_ids:
            stops |= token == stop
        if seen is not None:
            seen = seen.at[jnp.arange(B), jnp.where(active, token, V)].set(True, mode="drop")
        return jnp.where(active, token, 0), stops & active, seen

    def body(state):
        index, token, active, finished, result, counts, seen, cache = state
        logits, cache = decoder.step(token, cache, active)
        token, stops, seen = choose(logits, index, active, seen)
        result = result.at[:, index].set(token)
        counts += active.astype(jnp.int32)
        return index + 1, token, active & ~stops, finished | stops, result, counts, seen, cache

    active = jnp.ones((B,), bool)
    token, stops, seen = choose(logits, jnp.int32(0), active, seen)
    result = jnp.zeros((B, max_new_tokens), jnp.int32).at[:, 0].set(token)
    counts = jnp.ones((B,), jnp.int32)
    state = (jnp.int32(1), token, ~stops, stops, result, counts, seen, cache)
    state = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & jnp.any(s[2]), body, state)
    _, _, _, finished, result, counts, seen, cache = state
    stats = {name: value - counted[name] for name, value in cache.counters().items()}
    return Generation(result, counts, finished, stats, cache, seen)
