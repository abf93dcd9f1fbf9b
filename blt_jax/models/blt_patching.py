"""Patching of the Byte Latent Transformer (arXiv 2412.09871): where patches start.

Every patcher is a closed form over whole rows, `starts: bool [B, N+1]`, true where a token opens a
patch, over the tokens z[0..N] of a row (the N inputs and the last target). starts[t+1] depends on
z[0..t] alone, except for `topk_starts`, so the same boundaries come out byte by byte
(`PatcherConfig.next_start`). The first and the second token of every document start a patch under
every patcher: the first token (BOS) is a patch of its own, so that each byte has a complete patch
before it. Padding (segment 0) starts none.

H[t] is the entropy of the next-byte distribution after reading token t, in nats (the paper's
H(x_{t+1}), Eq. 1 with the missing minus sign; same boundaries).

Section 2.1 strided_starts    2.2 space_starts    2.3 global_starts, monotonic_starts, both_starts
Section 2.4 bpe_starts, bpe_patcher_starts and the incremental property   4.4 reset_segments
Released code only: topk_starts, max_patch_length, force_third_start, forbid_fourth_start
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers.segments import document_positions, index_of_last, segment_starts

BOE, BOS, EOS, BPE_DELIMITER = 0, 1, 2, 3
BYTE_OFFSET = 4
VOCAB_SIZE = 260
NEWLINE = 10 + BYTE_OFFSET


class PatcherKind(enum.Enum):
    """The rule that opens patches."""

    GLOBAL = "global"
    MONOTONIC = "monotonic"
    BOTH = "both"
    STRIDED = "strided"
    SPACE = "space"
    BPE = "bpe"
    BPE_PATCHER = "bpe_patcher"
    BYTE = "byte"
    TOPK = "topk"


ENTROPY_KINDS = (PatcherKind.GLOBAL, PatcherKind.MONOTONIC, PatcherKind.BOTH)


# ---------------------------------------------------------------- documents and patches of a row


def _segments(segment_ids, batch: int, length: int) -> Int[Array, "B M"]:
    if segment_ids is None:
        return jnp.ones((batch, length), jnp.int32)
    if segment_ids.shape != (batch, length):
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape}: patchers need one id per token of "
            f"z[0..N], the last target included: {(batch, length)}"
        )
    return segment_ids


def _with_document_starts(rule: Bool[Array, "B N"], segment_ids) -> Bool[Array, "B M"]:
    """Starts over N+1 tokens from rule[t], which asks for a patch start at t+1."""
    segment_ids = _segments(segment_ids, rule.shape[0], rule.shape[1] + 1)
    starts = jnp.pad(rule, ((0, 0), (1, 0)), constant_values=True)
    starts |= document_positions(segment_ids) <= 1
    return starts & (segment_ids > 0)


def patch_ids(starts: Bool[Array, "B M"]) -> Int[Array, "B M"]:
    """Patch index of every token of a row, from 0."""
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1


def encoder_ids(
    starts: Bool[Array, "B M"],
    segment_ids: Int[Array, "B N"] | None = None,
    pieces: int = 1,
    num_patches: int = 0,
) -> Int[Array, "B N"]:
    """Patch of every input byte; -1 on padding (segment 0). starts covers N+1 tokens.

    pieces: rows cut so hold patches p P/C.. in piece p, of P = num_patches; bytes of further
    patches of a piece get the id P.
    """
    if pieces == 1:
        ids = patch_ids(starts)[:, :-1]
    else:
        local = _patch_in_piece(starts, pieces)
        ids = _patch_in_row(local, num_patches).reshape(local.shape[0], -1)
    return ids if segment_ids is None else jnp.where(segment_ids > 0, ids, -1)


def decoder_ids(
    starts: Bool[Array, "B M"],
    segment_ids: Int[Array, "B N"] | None = None,
    pieces: int = 1,
    num_patches: int = 0,
) -> Int[Array, "B N"]:
    """Last patch that is complete before the byte each position predicts; -1 on padding.

    The last byte of a patch sees its own patch, every other byte the one before. pieces,
    num_patches: as `encoder_ids`; the first patch of a piece sees the last one before the piece.
    """
    if pieces == 1:
        ids = patch_ids(starts)[:, 1:] - 1
    else:
        local = _patch_in_piece(starts, pieces)
        complete = local - 1 + starts[:, 1:].reshape(local.shape).astype(jnp.int32)
        own = starts[:, :-1] if segment_ids is None else starts[:, :-1] & (segment_ids > 0)
        count_BC1 = own.reshape(local.shape).sum(-1, keepdims=True, dtype=jnp.int32)
        last_BC1 = jnp.where(count_BC1 > 0, _patch_in_row(count_BC1 - 1, num_patches), -1)
        before = jnp.pad(jax.lax.cummax(last_BC1, axis=1), ((0, 0), (1, 0), (0, 0)))[:, :-1]
        before = before.at[:, 0].set(-1)
        ids = jnp.where(complete >= 0, _patch_in_row(complete, num_patches), before)
        ids = ids.reshape(local.shape[0], -1)
    return ids if segment_ids is None else jnp.where(segment_ids > 0, ids, -1)


def _patch_in_piece(starts: Bool[Array, "B M"], pieces: int) -> Int[Array, "B C N"]:
    """Patch of every input byte inside its piece, from 0."""
    starts = starts[:, :-1].reshape(starts.shape[0], pieces, -1)
    return jnp.cumsum(starts, axis=2, dtype=jnp.int32) - 1


def _patch_in_row(local: Int[Array, "B C N"], num_patches: int) -> Int[Array, "B C N"]:
    """Patches of pieces numbered in the row; num_patches where a piece has too many."""
    size = num_patches // local.shape[1]
    first = size * jax.lax.broadcasted_iota(jnp.int32, local.shape, 1)
    return jnp.where(local < size, local + first, num_patches)


def patch_positions(segment_ids: Int[Array, "B P"]) -> Int[Array, "B P"]:
    """Index of every patch inside its document; unused patches (segment 0) do not count."""
    used = segment_ids > 0
    order = jnp.cumsum(used, axis=1, dtype=jnp.int32) - 1
    last_used = jnp.pad(index_of_last(used), ((0, 0), (1, 0)))[:, :-1]
    before = jnp.where(order > 0, jnp.take_along_axis(segment_ids, last_used, axis=1), 0)
    first = used & (segment_ids != before)
    return order - jnp.take_along_axis(order, index_of_last(first), axis=1)


def to_lengths(starts: Bool[Array, "B M"], max_patches: int) -> Int[Array, "B P"]:
    """Bytes of each patch over all tokens of the row, 0 where a row has fewer patches.

    Patches at or beyond max_patches are left out, so the sum is then below the row's length.
    """
    ids = patch_ids(starts)
    rows = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    ids = jnp.where(ids < 0, max_patches, ids)
    lengths = jnp.zeros((starts.shape[0], max_patches), jnp.int32)
    return lengths.at[rows, ids].add(1, mode="drop")


def from_lengths(lengths: np.ndarray, num_tokens: int) -> np.ndarray:
    """Starts bool [B, num_tokens] from patch lengths int [B, P]; on the host.

    Trailing zeros are unused patches. Raises ValueError if a row does not sum to num_tokens (N+1:
    the last target is covered too), holds a negative length or a zero before a patch in use, or
    if its first patch is longer than one token.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 2 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"lengths has shape {lengths.shape} and type {lengths.dtype}: must be integers [B, P]"
        )
    starts = np.zeros((lengths.shape[0], num_tokens), bool)
    for row, row_lengths in enumerate(lengths):
        used = np.flatnonzero(row_lengths)
        if (row_lengths < 0).any():
            raise ValueError(f"lengths[{row}] holds a negative length: {row_lengths.tolist()}")
        if row_lengths.sum() != num_tokens:
            raise ValueError(
                f"lengths[{row}] sums to {row_lengths.sum()}: must be {num_tokens}, the tokens of "
                "the row with the last target"
            )
        if len(used) != used[-1] + 1:
            raise ValueError(
                f"lengths[{row}] has a zero before its last patch: {row_lengths.tolist()}"
            )
        if row_lengths[0] != 1:
            raise ValueError(
                f"lengths[{row}][0]={row_lengths[0]}: the first patch must be exactly one token, "
                "or the bytes after it would see no complete patch"
            )
        starts[row, np.cumsum(row_lengths[: used[-1]])] = True
        starts[row, 0] = True
    return starts


# ------------------------------------------------------------------------------ patching rules


def strided_starts(
    batch: int, length: int, stride: int, segment_ids: Int[Array, "B M"] | None = None
) -> Bool[Array, "B M"]:
    """A patch every `stride` tokens, counted from the second token of each document.

    length: N+1. (Section 2.1; MegaByte.)
    """
    segment_ids = _segments(segment_ids, batch, length)
    position = document_positions(segment_ids)
    starts = (position == 0) | ((position - 1) % stride == 0)
    return starts & (segment_ids > 0)


def space_like(tokens: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Not a digit, an ASCII letter or a UTF-8 continuation byte; special ids are space-like."""
    byte = tokens - BYTE_OFFSET
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    upper = (byte >= ord("A")) & (byte <= ord("Z"))
    lower = (byte >= ord("a")) & (byte <= ord("z"))
    continuation = (byte >= 0x80) & (byte <= 0xBF)
    return ~(digit | upper | lower | continuation)


def _space_ends(tokens, previous):
    """A space-like byte closes its patch unless the one before did; special ids always do."""
    return (space_like(tokens) & ~space_like(previous)) | (tokens < BYTE_OFFSET)


def space_starts(
    tokens: Int[Array, "B N"], segment_ids: Int[Array, "B M"] | None = None
) -> Bool[Array, "B M"]:
    """A patch after each space-like byte that follows one that is not (section 2.2)."""
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return _with_document_starts(_space_ends(tokens, previous), segment_ids)


def _rise(entropies: Float[Array, "B N"]) -> Float[Array, "B N"]:
    return jnp.diff(entropies, axis=1, prepend=entropies[:, :1])


def _force_third(starts, segment_ids):
    segment_ids = _segments(segment_ids, *starts.shape)
    return starts | ((document_positions(segment_ids) == 2) & (segment_ids > 0))


def global_starts(
    entropies: Float[Array, "B N"],
    threshold: float | Float[Array, ""],
    segment_ids: Int[Array, "B M"] | None = None,
) -> Bool[Array, "B M"]:
    """A patch at t+1 where H[t] > threshold nats (section 2.3, global constraint)."""
    return _with_document_starts(entropies > threshold, segment_ids)


def monotonic_starts(
    entropies: Float[Array, "B N"],
    relative_threshold: float | Float[Array, ""],
    segment_ids: Int[Array, "B M"] | None = None,
    *,
    force_third_start: bool = False,
) -> Bool[Array, "B M"]:
    """A patch at t+1 where H[t] - H[t-1] > relative_threshold (approximate monotonic constraint).

    force_third_start: the third token of a document starts a patch too (released code).
    """
    starts = _with_document_starts(_rise(entropies) > relative_threshold, segment_ids)
    return _force_third(starts, segment_ids) if force_third_start else starts


def both_starts(
    entropies: Float[Array, "B N"],
    threshold: float | Float[Array, ""],
    relative_threshold: float | Float[Array, ""],
    segment_ids: Int[Array, "B M"] | None = None,
    *,
    force_third_start: bool = False,
    forbid_fourth_start: bool = False,
) -> Bool[Array, "B M"]:
    """A patch where the global and the monotonic rule agree.

    force_third_start, forbid_fourth_start: the released code always opens a patch at the third
    token of a document and never at the fourth.
    """
    rule = (entropies > threshold) & (_rise(entropies) > relative_threshold)
    starts = _with_document_starts(rule, segment_ids)
    if force_third_start:
        starts = _force_third(starts, segment_ids)
    if forbid_fourth_start:
        starts &= document_positions(_segments(segment_ids, *starts.shape)) != 3
    return starts


def bpe_starts(
    tokens: Int[Array, "B N"], segment_ids: Int[Array, "B M"] | None = None
) -> Bool[Array, "B M"]:
    """A patch after each delimiter id, which a tokenizer put after the bytes of its tokens."""
    return _with_document_starts(tokens == BPE_DELIMITER, segment_ids)


def bpe_patcher_starts(
    predictions: Int[Array, "B N"], segment_ids: Int[Array, "B M"] | None = None
) -> Bool[Array, "B M"]:
    """A patch at t+1 where a byte model's most probable next id is the delimiter.

    predictions[t]: argmax of the model's distribution after token t.
    """
    return _with_document_starts(predictions == BPE_DELIMITER, segment_ids)


def topk_starts(entropies: Float[Array, "B N"], patch_size: int) -> Bool[Array, "B M"]:
    """Patches after the N // patch_size - 2 most uncertain bytes of a whole row.

    Not causal: a byte later in the row moves boundaries before it. For analysis only, on rows of
    one document. Raises ValueError if the row is too short for one patch.
    """
    N = entropies.shape[1]
    count = N // patch_size - 2
    if count < 1:
        raise ValueError(f"topk_starts: {N} tokens are too few for patch_size={patch_size}")
    _, best = jax.lax.top_k(entropies[:, 1:], count)
    rows = jax.lax.broadcasted_iota(jnp.int32, best.shape, 0)
    rule = jnp.zeros(entropies.shape, bool).at[rows, best + 1].set(True)
    return _with_document_starts(rule, None)


def limit_patch_length(starts: Bool[Array, "B M"], max_patch_length: int) -> Bool[Array, "B M"]:
    """Splits patches longer than max_patch_length into pieces of that length and a remainder."""
    index = jax.lax.broadcasted_iota(jnp.int32, starts.shape, 1)
    offset = index - index_of_last(starts)
    return starts | (offset % max_patch_length == 0)


def reset_segments(
    tokens: Int[Array, "B N"], segment_ids: Int[Array, "B N"]
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """segment_ids and positions that make a model forget its context after every newline.

    For the entropy model only (section 4.4: on repetitive text entropies sink and patches grow).
    The newline itself still sees its line. Thresholds must be calibrated with the same setting.
    """
    after_newline = jnp.pad(tokens[:, :-1] == NEWLINE, ((0, 0), (1, 0)))
    first = segment_starts(segment_ids) | after_newline
    pieces = jnp.cumsum(first, axis=1, dtype=jnp.int32)
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return jnp.where(segment_ids > 0, pieces, 0), index - index_of_last(first)


# -------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PatcherConfig:
    """A patcher and its settings; 0 means unset.

    threshold: nats, on H (GLOBAL, BOTH). relative_threshold: nats, on the rise of H (MONOTONIC,
    BOTH). target_patch_size: mean bytes per patch that `calibrate` aims at, instead of a threshold
    given by hand; also the patch size of TOPK. stride: STRIDED. max_patch_length: splits longer
    patches. reset_at_newline: the entropy model forgets its context after a newline.
    """

    kind: PatcherKind = PatcherKind.GLOBAL
    threshold: float = 0.0
    relative_threshold: float = 0.0
    target_patch_size: float = 0.0
    stride: int = 4
    max_patch_length: int = 0
    reset_at_newline: bool = False
    force_third_start: bool = False
    forbid_fourth_start: bool = False

    def __post_init__(self):
        def reject(field, rule):
            raise ValueError(f"PatcherConfig.{field}={getattr(self, field)}: {rule}")

        kind = self.kind.name
        if self.threshold < 0:
            reject("threshold", "must be >= 0, entropies are not negative")
        if self.target_patch_size and self.target_patch_size <= 1:
            reject("target_patch_size", "must be above 1 byte per patch, or 0 for unset")
        if self.kind in (PatcherKind.GLOBAL, PatcherKind.BOTH) and not (
            self.threshold or self.target_patch_size
        ):
            reject("threshold", f"{kind} needs a threshold or a target_patch_size")
        if self.kind is PatcherKind.MONOTONIC and not (
            self.relative_threshold or self.target_patch_size
        ):
            reject("relative_threshold", f"{kind} needs it, or a target_patch_size")
        if self.kind is PatcherKind.BOTH and not self.relative_threshold:
            reject("relative_threshold", f"{kind} needs it; `calibrate` finds only the threshold")
        if self.kind is PatcherKind.TOPK and not self.target_patch_size:
            reject("target_patch_size", f"{kind} needs it")
        if self.kind is PatcherKind.TOPK and self.max_patch_length:
            reject("max_patch_length", f"not for {kind}, which is for analysis only")
        if self.stride < 1:
            reject("stride", "must be >= 1")
        if self.max_patch_length < 0:
            reject("max_patch_length", "must be >= 0 (0: no limit)")
        if self.force_third_start and self.kind not in (PatcherKind.MONOTONIC, PatcherKind.BOTH):
            reject("force_third_start", f"only for MONOTONIC and BOTH, not for {kind}")
        if self.forbid_fourth_start and self.kind is not PatcherKind.BOTH:
            reject("forbid_fourth_start", f"only for BOTH, not for {kind}")

    @property
    def needs_entropies(self) -> bool:
        """Whether `starts` wants entropies."""
        return self.kind in ENTROPY_KINDS or self.kind is PatcherKind.TOPK

    @property
    def needs_model(self) -> bool:
        """Whether decoding runs an entropy model: for its entropies or its predictions."""
        return self.needs_entropies or self.kind is PatcherKind.BPE_PATCHER

    def _check_calibrated(self) -> None:
        field = "relative_threshold" if self.kind is PatcherKind.MONOTONIC else "threshold"
        if self.kind in ENTROPY_KINDS and not getattr(self, field):
            raise ValueError(
                f"PatcherConfig.{field}=0: find it with calibrate() for target_patch_size="
                f"{self.target_patch_size} before patching"
            )

    def starts(
        self,
        tokens: Int[Array, "B N"],
        segment_ids: Int[Array, "B M"] | None = None,
        *,
        entropies: Float[Array, "B N"] | None = None,
        predictions: Int[Array, "B N"] | None = None,
    ) -> Bool[Array, "B M"]:
        """Starts over z[0..N] from the N tokens before the last; M = N + 1.

        segment_ids: documents over all N+1 tokens, 0 = padding; None: one document per row.
        entropies: H[t], for GLOBAL, MONOTONIC, BOTH, TOPK; predictions: for BPE_PATCHER.
        Raises ValueError if what the kind needs is missing.
        """
        self._check_calibrated()
        if self.needs_entropies and entropies is None:
            raise ValueError(f"patcher {self.kind.name} needs entropies")
        match self.kind:
            case PatcherKind.GLOBAL | PatcherKind.MONOTONIC | PatcherKind.BOTH:
                starts = self._entropy_starts(
                    entropies, self.threshold, self.relative_threshold, segment_ids
                )
            case PatcherKind.STRIDED:
                B, N = tokens.shape
                starts = strided_starts(B, N + 1, self.stride, segment_ids)
            case PatcherKind.SPACE:
                starts = space_starts(tokens, segment_ids)
            case PatcherKind.BPE:
                starts = bpe_starts(tokens, segment_ids)
            case PatcherKind.BPE_PATCHER:
                if predictions is None:
                    raise ValueError("patcher BPE_PATCHER needs predictions")
                starts = bpe_patcher_starts(predictions, segment_ids)
            case PatcherKind.BYTE:
                starts = _with_document_starts(jnp.ones(tokens.shape, bool), segment_ids)
            case PatcherKind.TOPK:
                if segment_ids is not None:
                    raise ValueError("patcher TOPK takes rows of one document, no segment_ids")
                return topk_starts(entropies, int(self.target_patch_size))
        return self._limited(starts, segment_ids)

    def _entropy_starts(self, entropies, threshold, relative_threshold, segment_ids):
        match self.kind:
            case PatcherKind.GLOBAL:
                return global_starts(entropies, threshold, segment_ids)
            case PatcherKind.MONOTONIC:
                return monotonic_starts(
                    entropies,
                    relative_threshold,
                    segment_ids,
                    force_third_start=self.force_third_start,
                )
            case PatcherKind.BOTH:
                return both_starts(
                    entropies,
                    threshold,
                    relative_threshold,
                    segment_ids,
                    force_third_start=self.force_third_start,
                    forbid_fourth_start=self.forbid_fourth_start,
                )

    def _limited(self, starts, segment_ids):
        if self.max_patch_length:
            starts = limit_patch_length(starts, self.max_patch_length)
        return starts if segment_ids is None else starts & (segment_ids > 0)

    def calibrate(self, entropies: Sequence[np.ndarray]) -> "PatcherConfig":
        """This patcher with the threshold at which a sample has target_patch_size bytes a patch.

        entropies: one array [n] per document. Kinds without entropies are returned as they are.
        """
        if self.kind not in ENTROPY_KINDS or not self.target_patch_size:
            return self
        value = calibrate_threshold(entropies, self.target_patch_size, self)
        if self.kind is PatcherKind.MONOTONIC:
            return dataclasses.replace(self, relative_threshold=value)
        return dataclasses.replace(self, threshold=value)

    def next_start(
        self,
        *,
        token: Int[Array, " B"],
        previous_token: Int[Array, " B"],
        position: Int[Array, " B"],
        patch_length: Int[Array, " B"],
        entropy: Float[Array, " B"] | None = None,
        previous_entropy: Float[Array, " B"] | None = None,
        prediction: Int[Array, " B"] | None = None,
    ) -> Bool[Array, " B"]:
        """Whether the token after `token` starts a patch: one step of `starts`, per row.

        position: of `token` in its document, from 0 (previous_* are not used at 0). patch_length:
        bytes of the open patch, `token` included. Raises ValueError for TOPK.
        """
        self._check_calibrated()
        if self.needs_entropies and (entropy is None or previous_entropy is None):
            raise ValueError(f"patcher {self.kind.name} needs entropy and previous_entropy")
        match self.kind:
            case PatcherKind.GLOBAL:
                start = entropy > self.threshold
            case PatcherKind.MONOTONIC:
                start = entropy - previous_entropy > self.relative_threshold
            case PatcherKind.BOTH:
                rise = entropy - previous_entropy
                start = (entropy > self.threshold) & (rise > self.relative_threshold)
            case PatcherKind.STRIDED:
                start = position % self.stride == 0
            case PatcherKind.SPACE:
                start = _space_ends(token, previous_token)
            case PatcherKind.BPE:
                start = token == BPE_DELIMITER
            case PatcherKind.BPE_PATCHER:
                if prediction is None:
                    raise ValueError("patcher BPE_PATCHER needs prediction")
                start = prediction == BPE_DELIMITER
            case PatcherKind.BYTE:
                start = jnp.ones(token.shape, bool)
            case PatcherKind.TOPK:
                raise ValueError("patcher TOPK is not causal: it has no incremental form")
        if self.force_third_start:
            start |= position == 1
        if self.forbid_fourth_start:
            start &= position != 2
        if self.max_patch_length:
            start |= patch_length >= self.max_patch_length
        return start | (position == 0)

    def document_starts(
        self,
        tokens: np.ndarray,
        entropies: np.ndarray | None = None,
        predictions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Starts bool [n] of one tokenised document [n] on the host, for the data packer.

        entropies, predictions: [n], the last of them unused.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"tokens has shape {tokens.shape}: one document of at least one id")
        inputs = {"entropies": entropies, "predictions": predictions}
        for name, value in inputs.items():
            if value is not None and np.shape(value) != tokens.shape:
                raise ValueError(f"{name} has shape {np.shape(value)}, tokens {tokens.shape}")
        # Powers of two, so that documents of all lengths share few compiled programs.
        length = max(1024, 1 << (len(tokens) - 1).bit_length())
        padding = (0, 0 if self.kind is PatcherKind.TOPK else length - len(tokens))
        rows = {
            name: jnp.asarray(np.pad(value, padding)[None, :-1])
            for name, value in inputs.items()
            if value is not None
        }
        row = jnp.asarray(np.pad(tokens, padding)[None, :-1])
        return np.asarray(_jitted_starts(self, row, rows))[0, : len(tokens)]


@jax.jit(static_argnums=0)
def _jitted_starts(config, tokens, rows):
    return config.starts(tokens, None, **rows)


@jax.jit(static_argnums=0)
def _jitted_count(config, entropies, threshold, segment_ids):
    starts = config._entropy_starts(
        entropies,
        threshold,
        threshold if config.kind is PatcherKind.MONOTONIC else config.relative_threshold,
        segment_ids,
    )
    return jnp.sum(config._limited(starts, segment_ids))


def calibrate_threshold(
    entropies: Sequence[np.ndarray],
    target_patch_size: float,
    config: PatcherConfig,
    *,
    tolerance: float = 0.02,
) -> float:
    """The threshold at which a sample has target_patch_size tokens per patch, by bisection.

    entropies: one float array [n] per document, H of every token. GLOBAL and BOTH: the threshold
    on H (BOTH with config.relative_threshold); MONOTONIC: the relative threshold. Exact in
    float32. Raises ValueError if no threshold comes within `tolerance` of the target.
    """
    if config.kind not in ENTROPY_KINDS:
        raise ValueError(f"patcher {config.kind.name} has no threshold to calibrate")
    if not len(entropies) or not all(len(document) for document in entropies):
        raise ValueError("calibrate_threshold needs entropies of at least one token per document")
    row = np.concatenate([np.asarray(document, np.float32) for document in entropies])
    if not np.isfinite(row).all():
        raise ValueError("calibrate_threshold: entropies must be finite")
    ids = np.repeat(np.arange(1, len(entropies) + 1), [len(document) for document in entropies])
    rise = np.diff(row)
    low, high = (rise.min(), rise.max()) if config.kind is PatcherKind.MONOTONIC else (0, row.max())
    row, ids = jnp.asarray(row[None, :-1]), jnp.asarray(ids[None].astype(np.int32))

    def patch_size(threshold):
        return ids.size / int(_jitted_count(config, row, jnp.float32(threshold), ids))

    low, high = float(low) - 1e-3, float(high) + 1e-3
    smallest, largest = patch_size(low), patch_size(high)
    best, error = low, abs(smallest - target_patch_size)
    for _ in range(60):
        middle = float(np.float32((low + high) / 2))
        size = patch_size(middle)
        if abs(size - target_patch_size) < error:
            best, error = middle, abs(size - target_patch_size)
        if middle in (low, high):
            break
        low, high = (middle, high) if size < target_patch_size else (low, middle)
    if error > tolerance * target_patch_size:
        raise ValueError(
            f"no threshold gives target_patch_size={target_patch_size} within {tolerance:.0%}: "
            f"this sample allows {smallest:.3g} to {largest:.3g}, and {best:.6g} comes closest"
        )
    return float(np.float32(best))


# ------------------------------------------------------------- entropies from byte n-gram counts


class NgramEntropy:
    """Entropies of a byte n-gram model with Witten-Bell back-off, without any training.

    Section 2.3: any next-byte distribution serves as a source of entropies, and one that sees few
    bytes can be a table. Holds one entropy per context seen in training, for context lengths 0 to
    order - 1; calling it looks up the longest one known.
    """

    def __init__(self, contexts: tuple[np.ndarray, ...], entropies: tuple[np.ndarray, ...]):
        self.contexts = contexts
        self.entropies = entropies

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """H float32 [n], nats, after each token of one tokenised document int [n]."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tokens.shape}: must be one document [n]")
        result = np.full(len(tokens), self.entropies[0][0], np.float32)
        for length in range(1, len(self.contexts)):
            keys = _context_keys(tokens, length)
            index = np.searchsorted(self.contexts[length], keys)
            index = np.minimum(index, len(self.contexts[length]) - 1)
            known = (self.contexts[length][index] == keys) & (np.arange(len(tokens)) >= length - 1)
            result = np.where(known, self.entropies[length][index], result)
        return result


def _context_keys(tokens: np.ndarray, length: int) -> np.ndarray:
    """The last `length` tokens up to each position as one integer, 9 bits a token."""
    padded = np.concatenate([np.zeros(length, np.int64), tokens.astype(np.int64)])
    keys = np.zeros(len(tokens), np.int64)
    for back in range(length):
        keys |= padded[length - back : len(padded) - back] << (9 * back)
    return keys


def ngram_entropy(documents: Iterable[np.ndarray], order: int = 4) -> NgramEntropy:
    """Counts byte n-grams up to `order` in tokenised documents and keeps their entropies.

    p(w | h) = (c(hw) + T(h) p(w | h')) / (c(h) + T(h)), T(h) the number of distinct ids seen after
    context h and h' the context without its oldest id; the last back-off is uniform over all 260
    ids. order: 1..6. Score other text than it was fitted on: in-sample entropies are too low.
    """
    if not 1 <= order <= 6:
        raise ValueError(f"order={order}: must be 1..6")
    documents = [np.asarray(document) for document in documents]
    if not documents:
        raise ValueError("ngram_entropy needs at least one document")
    tokens = np.concatenate(documents)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= VOCAB_SIZE):
        raise ValueError(f"token ids {tokens.min()}..{tokens.max()}: must be 0..{VOCAB_SIZE - 1}")
    position = np.concatenate([np.arange(len(document)) for document in documents])
    # Pairs (t, t + 1) of one document; position[t] + 1 tokens of context are there.
    inside = position[1:] > 0
    following, position = tokens[1:].astype(np.int64), position[:-1]

    contexts, entropies = [], []
    parents, parent_probability = None, None
    for length in range(order):
        seen = inside & (position >= length - 1)
        keys = _context_keys(tokens, length)[:-1][seen]
        pairs, counts = np.unique(keys << 9 | following[seen], return_counts=True)
        if not len(pairs):
            break
        known, first, distinct = np.unique(pairs >> 9, return_index=True, return_counts=True)
        total = np.add.reduceat(counts, first)
        last = length == order - 1
        entropy = np.zeros(len(known), np.float32)
        kept = np.zeros((0 if last else len(known), VOCAB_SIZE), np.float32)
        for begin in range(0, len(known), 4096):
            rows = slice(begin, min(begin + 4096, len(known)))
            if length == 0:
                back_off = np.full((1, VOCAB_SIZE), 1.0 / VOCAB_SIZE)
            else:
                shorter = known[rows] & ((1 << (9 * (length - 1))) - 1)
                back_off = parent_probability[np.searchsorted(parents, shorter)]
            begin_pair = first[rows.start]
            end_pair = first[rows.stop] if rows.stop < len(known) else len(pairs)
            count = np.zeros((rows.stop - rows.start, VOCAB_SIZE), np.float32)
            row_of_pair = np.repeat(np.arange(rows.stop - rows.start), distinct[rows])
            count[row_of_pair, pairs[begin_pair:end_pair] & 511] = counts[begin_pair:end_pair]
            weight = distinct[rows, None].astype(np.float32)
            probability = (count + weight * back_off) / (total[rows, None] + weight)
            entropy[rows] = -np.sum(probability * np.log(probability), axis=1)
            if not last:
                kept[rows] = probability
        contexts.append(known)
        entropies.append(entropy)
        parents, parent_probability = known, kept
    if not contexts:
        raise ValueError("ngram_entropy: no document has two tokens")
    return NgramEntropy(tuple(contexts), tuple(entropies))
