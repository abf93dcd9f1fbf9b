"""Contrastive Decoding Improves Reasoning in Large Language Models (arXiv 2309.09117).

A training-free rule: the next token is one that a strong model, the expert, prefers more than a
weak one with the same tokenizer, the amateur, among the tokens that the expert itself finds
plausible. Li et al. (arXiv 2210.15097) introduced it as a difference of log-probabilities with
beam search; O'Brien and Lewis restate it in logits with a strength beta that does not depend on
the sampling temperature, and use it for chain-of-thought answers and for ranking. It is not
contrastive search, which penalises repetition within one model.

Axes: B batch, T prompt, C continuations, M new tokens, V vocabulary.

| paper | here |
|---|---|
| plausibility mask, alpha | `plausible` |
| logit form, beta; Li et al.'s form | `contrastive_logits`, `Form` |
| two models side by side | `ContrastiveDecoder`: greedy and sampling by `sampling.generate` |
| other functions of the logits of some models | `combined.CombinedDecoder` |
| amateur: smaller model, earlier checkpoint | any other `Decoder` |
| amateur: shortened context; negative prompt | `amateur_context`; `amateur_prompt` |
| amateur: n-grams (Li et al.) | `ngram.NgramDecoder` |
| beam search (Li et al.) | `contrastive_beam_search`, `BeamPool` |
| ranking of given answers | `contrastive_scores` |
| self-consistency, copying | `majority_vote`, `copy_rate` |

Departures: Li et al.'s code preselects beam candidates by the expert alone, which is an option
here (`BeamPool`), and uses no mask in greedy mode; here every search is masked as their paper says,
by alpha alone, where their beams keep two tokens at least. Over an amateur temperature their code
divides log-probabilities without normalising them again; here what is subtracted is a distribution.
LLaMA's norm by the likelihood of an
answer without its question is left to the caller: it is another call of `score_continuations`.
Where a stored text of the paper prints the cutoff with 1/alpha, its code and proof have alpha, as
here.

Measured with the run `proof_seeds` of experiments/contrastive_decoding.py (three seeds, CPU,
2026-11-22): on arithmetic stories with a known shortcut, greedy decoding solves 68 %. Beta 0.5
gains in every seed with a negative prompt (1 to 21 points) and a shortened context (3 to 9),
nothing over the seeds with a small amateur (-4 to 4) or an early checkpoint (-8 to 13), and loses
11 to 29 with an equally strong one (docs/results/contrastive_decoding.md).
"""

import collections
import enum
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Shaped

from blt_jax.decoding.beam_search import Beams, beam_search
from blt_jax.decoding.combined import LOWEST_LOGIT, ModelsInStep, shared_vocabulary
from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.logits import Temperature, check_number, known
from blt_jax.decoding.scoring import ContinuationScores, score_continuations
from blt_jax.layers.step import check_prompts


class Form(enum.Enum):
    """What is subtracted from what, for expert e and amateur a (over its temperature).

    LOGITS: (1 + beta) e - beta a. LOG_PROBABILITIES: the same of log-softmax(e) and
    log-softmax(a); equal to LOGITS within one position, and comparable between positions.
    DIFFERENCE: log-softmax(e) - beta log-softmax(a), of Li et al., whose beta is 1.
    """

    LOGITS = "logits"
    LOG_PROBABILITIES = "log_probabilities"
    DIFFERENCE = "difference"


class Masked(enum.Enum):
    """Scores of implausible tokens: EXCLUDED gives -inf, LOWEST the least one of the others."""

    EXCLUDED = "excluded"
    LOWEST = "lowest"


class BeamPool(enum.Enum):
    """Which pairs of beam and next token are compared by their contrastive scores: ALL, or the
    2 num_beams that the EXPERT finds most probable, whatever the score of the beam (the code of
    Li et al.)."""

    ALL = "all"
    EXPERT = "expert"


# ------------------------------------------------------------------------------- the rule


def plausible(expert: Float[Array, "*B V"], alpha: Any) -> Bool[Array, "*B V"]:
    """Tokens with at least `alpha` times the expert's highest probability (section 2).

    alpha: 0 keeps every token that the expert does not exclude, 1 only its most probable one.
    """
    expert = expert.astype(jnp.float32)
    cutoff = jnp.max(expert, axis=-1, keepdims=True) + jnp.log(jnp.asarray(alpha, jnp.float32))
    return (expert >= cutoff) & (expert > -jnp.inf)


def contrastive_logits(
    expert: Float[Array, "*B V"],
    amateur: Float[Array, "*B V"],
    alpha: Any = 0.1,
    beta: Any = 0.5,
    form: Form = Form.LOGITS,
    amateur_temperature: Any = 1.0,
    masked: Masked = Masked.EXCLUDED,
) -> Float[Array, "*B V"]:
    """Float32 scores of the next token; argmax is greedy, softmax(scores / t) samples.

    As a distribution: p_e (p_e / p_a) ** beta over the plausible tokens. The numbers may be
    traced. A row that holds NaN, or has no token left by the expert, becomes NaN, which
    `jax.experimental.checkify` reports. Raises ValueError for alpha outside 0..1, beta < 0,
    amateur_temperature <= 0 or different shapes.
    """
    check_strengths(alpha, beta, amateur_temperature)
    if expert.shape != amateur.shape:
        raise ValueError(f"expert {expert.shape} and amateur {amateur.shape}: must be equal")
    keep = plausible(expert, alpha)
    e = jnp.where(keep, expert.astype(jnp.float32), LOWEST_LOGIT)
    a = jnp.maximum(amateur.astype(jnp.float32) / amateur_temperature, LOWEST_LOGIT)
    if form is not Form.LOGITS:
        e = jax.nn.log_softmax(expert.astype(jnp.float32), axis=-1)
        e = jnp.where(keep, e, LOWEST_LOGIT)
        a = jax.nn.log_softmax(a, axis=-1)
    weight = 1.0 if form is Form.DIFFERENCE else 1.0 + beta
    scores = weight * e - beta * a
    floor = -jnp.inf
    if masked is Masked.LOWEST:
        floor = jnp.min(jnp.where(keep, scores, jnp.inf), axis=-1, keepdims=True)
    # No token is plausible then, and the argmax of an empty row would be id 0.
    lost = ~(jnp.max(expert, axis=-1, keepdims=True) > -jnp.inf)
    lost |= jnp.isnan(jnp.max(amateur, axis=-1, keepdims=True))
    checkify.debug_check(~jnp.any(lost), "logits of expert or amateur hold NaN, or are all -inf")
    return jnp.where(lost, jnp.nan, jnp.where(keep, scores, floor))


def check_strengths(alpha: Any, beta: Any, amateur_temperature: Any = 1.0) -> None:
    """ValueError as of `contrastive_logits`, for the numbers that are known, that is not traced."""
    check_number("alpha", alpha, lambda x: (x >= 0) & (x <= 1), "0..1 (0: no mask)")
    check_number("beta", beta, lambda x: (x >= 0) & (x < np.inf), ">= 0")
    Temperature.check("amateur_temperature", amateur_temperature)


# ------------------------------------------------------------------- two models in step


@flax.struct.dataclass
class ContrastiveDecoder(ModelsInStep):
    """Expert and amateur as one Decoder; make it with `create`, which checks the parts.

    alpha, beta, amateur_temperature, form, masked: of `contrastive_logits`; the numbers may change
    without a new compile. amateur_context: prompt tokens, the last ones, that the amateur reads,
    0 all (Li et al.: 1). amateur_prompt: (tokens [B, T'], lengths [B]) that it reads instead.
    allowed: bool [V], the only tokens that may follow, before plausibility is judged; None all.
    A repetition penalty belongs to the expert alone: make it a `logits.ProcessedDecoder`.
    expert_pool: beams of every prompt in a search with BeamPool.EXPERT, else 0.
    """

    expert: Decoder
    amateur: Decoder
    vocab_size: int = flax.struct.field(pytree_node=False)
    alpha: Any = 0.1
    beta: Any = 0.5
    amateur_temperature: Any = 1.0
    form: Form = flax.struct.field(pytree_node=False, default=Form.LOGITS)
    masked: Masked = flax.struct.field(pytree_node=False, default=Masked.EXCLUDED)
    amateur_context: int = flax.struct.field(pytree_node=False, default=0)
    amateur_prompt: Any = None
    allowed: Any = None
    expert_pool: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def create(
        cls, expert: Decoder, amateur: Decoder, vocab_size: int = 0, **settings: Any
    ) -> "ContrastiveDecoder":
        """vocab_size: ids that both tokenizers have, where a model pads its vocabulary; 0: all.

        Raises ValueError for different vocabularies, an amateur with too little capacity, and
        settings out of range, TypeError for an amateur_prompt of no integers. See
        `check_tokenizers`.
        """
        models = {"expert": expert, "amateur": amateur}
        size = shared_vocabulary(models, vocab_size, settings.get("allowed"))
        decoder = cls(expert, amateur, size, **settings)
        check_strengths(decoder.alpha, decoder.beta, decoder.amateur_temperature)
        if known(decoder.beta) and np.any(np.asarray(decoder.beta) > 2):
            warnings.warn(f"beta={decoder.beta} is strong: 0.5 is usual", stacklevel=2)
        if decoder.amateur_context < 0:
            raise ValueError(f"amateur_context={decoder.amateur_context}: must be >= 0")
        needed = expert.capacity
        if decoder.amateur_prompt is not None:
            if decoder.amateur_context:
                raise ValueError("amateur_context and amateur_prompt: give one of them")
            tokens, lengths = map(jnp.asarray, decoder.amateur_prompt)
            try:
                check_prompts(tokens, lengths, amateur.capacity, amateur.vocab_size)
            except (TypeError, ValueError) as error:
                raise type(error)(f"amateur_prompt: {error}") from None
            # A model that reads without end has the greatest capacity there is.
            needed = min(needed + tokens.shape[1] - 1, np.iinfo(np.int32).max)
        if amateur.capacity < needed:
            raise ValueError(
                f"the amateur has capacity={amateur.capacity}: must be >= {needed}; a shorter "
                "sight needs a model with a window"
            )
        return decoder

    names = ("expert", "amateur")

    @property
    def models(self) -> tuple[Decoder, Decoder]:
        return self.expert, self.amateur

    def with_models(self, expert: Decoder, amateur: Decoder) -> "ContrastiveDecoder":
        return self.replace(expert=expert, amateur=amateur)

    def _prompts(self, tokens, lengths):
        return (tokens, lengths), self._amateur_prompts(tokens, lengths)

    def _amateur_prompts(self, tokens, lengths):
        if self.amateur_prompt is not None:
            prompt, prompt_lengths = self.amateur_prompt
            if prompt.shape[0] != tokens.shape[0]:
                raise ValueError(
                    f"amateur_prompt has {prompt.shape[0]} rows: must be {tokens.shape[0]}"
                )
            return prompt, prompt_lengths
        if not 0 < self.amateur_context < tokens.shape[1]:
            return tokens, lengths
        first = jnp.maximum(lengths - self.amateur_context, 0)[:, None]
        index = first + jnp.arange(self.amateur_context, dtype=lengths.dtype)[None, :]
        shortened = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
        return shortened, jnp.minimum(lengths, self.amateur_context)

    def _combine(self, logits, beams):
        numbers = (self.alpha, self.beta, self.form, self.amateur_temperature, self.masked)
        scores = contrastive_logits(*logits, *numbers)
        if not self.expert_pool:
            return scores
        pool = most_probable_pairs(logits[0], beams or self.expert_pool, 2 * self.expert_pool)
        return jnp.where(pool | jnp.isnan(scores), scores, -jnp.inf)


def check_tokenizers(expert: Any, amateur: Any) -> None:
    """Raises ValueError unless two tokenizers have the same ids, bytes of ids and special ids."""
    for name in ("vocab_size", "bos_id", "eos_id", "stop_ids"):
        pair = getattr(expert, name), getattr(amateur, name)
        if pair[0] != pair[1]:
            raise ValueError(f"the tokenizers have {name}={pair[0]} and {pair[1]}: must be equal")
    for number in range(expert.vocab_size):
        pair = expert.decode([number]), amateur.decode([number])
        if pair[0] != pair[1]:
            raise ValueError(f"id {number} is {pair[0]!r} and {pair[1]!r} for the tokenizers")


# ---------------------------------------------------------------------- search and ranking


def most_probable_pairs(logits: Float[Array, "N V"], beams: int, count: int) -> Bool[Array, "N V"]:
    """The `count` most probable pairs of row and token of every `beams` rows that follow each
    other, by the probability of the token in its row."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p = log_p.reshape(-1, beams * logits.shape[1])
    _, places = jax.lax.top_k(log_p, min(count, log_p.shape[1]))
    prompt = jnp.arange(log_p.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(log_p.shape, bool).at[prompt, places].set(True).reshape(logits.shape)


def contrastive_beam_search(
    decoder: ContrastiveDecoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    num_beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    length_penalty: float = 0.0,
    pool: BeamPool = BeamPool.ALL,
) -> Beams:
    """`beam_search` by the sum of contrastive scores (Li et al.); raises as it does.

    Form LOGITS is replaced by LOG_PROBABILITIES, because logits of different positions do not
    compare.
    """
    settings = (num_beams, max_new_tokens, stop_ids, length_penalty)
    if pool is BeamPool.EXPERT:
        decoder = decoder.replace(expert_pool=num_beams)
    return beam_search(_comparable(decoder), tokens, lengths, *settings, normalize=False)


def contrastive_scores(
    decoder: ContrastiveDecoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    continuations: Shaped[Array | np.ndarray, "B C M"],
    continuation_lengths: Shaped[Array | np.ndarray, "B C"],
) -> ContinuationScores:
    """Sums of contrastive log-probabilities of given continuations, for `scoring.rank`.

    Tokens are not masked unless `masked` is LOWEST: an implausible token would give -inf.
    Raises as `score_continuations` does.
    """
    decoder = _comparable(decoder)
    if decoder.masked is Masked.EXCLUDED:
        decoder = decoder.replace(alpha=0.0)
    rows = (tokens, lengths, continuations, continuation_lengths)
    return score_continuations(decoder, *rows, normalize=False)


def _comparable(decoder: ContrastiveDecoder) -> ContrastiveDecoder:
    logits = decoder.form is Form.LOGITS
    return decoder.replace(form=Form.LOG_PROBABILITIES) if logits else decoder


# ------------------------------------------------------------------------------ evaluation


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer, the earliest of equally frequent ones; None counts as no answer."""
    counts = collections.Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)


def copy_rate(prompt: Sequence[Hashable], output: Sequence[Hashable]) -> float:
    """Share of the output's items (tokens, numbers) that the prompt holds; 0 for no output."""
    held = set(prompt)
    return sum(item in held for item in output) / max(len(output), 1)
