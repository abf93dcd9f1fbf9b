"""Megalodon: Efficient LLM Pretraining and Inference with Unlimited Context (arXiv 2404.08801).

A decoder whose attention is cut into chunks of fixed length, while a complex exponential moving
average in every block carries the history: linear cost in the length, a state of constant size.
Around it stand a normalisation over all tokens seen so far, attention between normalised vectors,
and a residual that skips the attention sublayer. Mega (arXiv 2209.10655) is its predecessor.

Axes: B batch, T tokens, D model width, N state size, G norm groups, Z all query features, H heads,
K query features per head, J value features per head, F feed-forward width, c chunk, V vocabulary.

Section 3.1, Eq. 2 (complex EMA)         ema_coefficients, moving_average
Section 3.2, Eq. 4 (timestep norm)       timestep_norm
Section 3.3 (normalised attention)       normalised_queries_keys, chunk_attention
Section 3.4 (two-hop residual)           block
Section 3.5 (chunk parallelism)          moving_average, timestep_norm: states across the mesh
Section 4.1, Table 1 of the release      mega_200m .. megalodon_7b, block_parameters
Mega, section 3.1 (damped EMA)           EmaKind.REAL
What each part does                      EmaKind.NONE, NormKind.LAYER, ResidualKind.PRE_NORM
Mega, section 3.2 (attention, gates)     GateKind.MEGA, AttentionKind
Section 4.4 (LRA, bidirectional)         MegalodonConfig.bidirectional, megalodon_classifier
Inference with a constant state          megalodon_decode
Statistics of recent chunks (release)    megalodon_truncated

Departures: the released code rather than Eq. 2, whose input term has the phase as well: other
implementations read weights so, and it is a rotation of gamma (`input_phase=True` has Eq. 2).
Statistics use shifted sums instead of compensated ones, which would be a loop over tokens. Tail
chunks may be short, so that a row may have any length.

Of Mega's block there is what can be exchanged alone: the real average, the gate with the SiLU of
the candidate before it, and the attention functions. The residual keeps two hops, and rotation
stands for Mega's position bias.

Measured (experiments/megalodon.py:proof_seeds, 2 CPU cores, 2026-11-22, three seeds): trained on
rows of 512 bytes, 1.869 bits per byte there and 1.839 +- 0.021 from 512 to 8,192; a Llama of equal
size 2.204 and 5.186 +- 0.362.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from blt_jax.dist.sharding import ShardingRules, constrain, parts_of, shard_by_names
from blt_jax.layers.attention import causal_attention, dense_causal_attention, masked_attention
from blt_jax.layers.cache import LayerCache, RowCache
from blt_jax.layers.embed import Embed, Head, check_token_ids
from blt_jax.layers.language_model import NextTokenModel
from blt_jax.layers.masks import NEGATIVE, causal_mask
from blt_jax.layers.mlp import swiglu
from blt_jax.layers.norms import layer_norm, rms_norm
from blt_jax.layers.projection import project, truncated_normal
from blt_jax.layers.rope import rope_table, rotate
from blt_jax.layers.sharded_attention import sharded_causal_attention
from blt_jax.models.megalodon_config import (  # noqa: F401
    AttentionDropout,
    AttentionKind,
    DecayInit,
    EmaKind,
    GateKind,
    MegalodonConfig,
    NormKind,
    ResidualKind,
    ScanForm,
    WeightInit,
    byte_level,
    mega_1_3b,
    mega_1_3b_pg19,
    mega_7_1b,
    mega_7_3b,
    mega_200m,
    megalodon_7b,
    small,
)
from blt_jax.models.megalodon_memory import (
    Documents,
    EmaCoefficients,
    NormState,
    State,
    decayed,
    documents_of,
    ema_coefficients,
    group_norm,
    moving_average,
    timestep_norm,
)

# -------------------------------------------------------- normalised attention in chunks (3.3)


def normalised_queries_keys(
    config: MegalodonConfig, w: dict[str, Any], x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Queries and keys from one shared vector per head, of length 1 before their gains."""
    z_BTHK = (project(x, w["z_kernel"]) + _along_rows(w["z_bias"], x)).astype(jnp.float32)
    z_BTHK *= lax.rsqrt(jnp.mean(jnp.square(z_BTHK), axis=-1, keepdims=True) + config.norm_eps)
    gain = (w["qk_gain"] + 1.0) * config.head_dim**-0.5

    def affine(i):
        y = z_BTHK * _along_rows(gain[i], z_BTHK) + _along_rows(w["qk_offset"][i], z_BTHK)
        return checkpoint_name(y.astype(x.dtype), "qkv")

    return affine(0), affine(1)


def mega_queries_keys(
    config: MegalodonConfig, w: dict[str, Any], x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Mega's queries and keys of SiLU vectors; those of a softmax are divided by its K^1/2."""
    z = jax.nn.silu(project(x, w["z_kernel"]) + _along_rows(w["z_bias"], x))
    q, k = (z * _along_rows(w["qk_gain"][i], x) + _along_rows(w["qk_offset"][i], x) for i in (0, 1))
    q = q if config.elementwise else q * config.head_dim**-0.5
    return checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv")


def function_of_scores(
    config: MegalodonConfig, scores: Float[Array, "B H T S"], mask: Bool[Array, "B #H T S"]
) -> Float[Array, "B H T S"]:
    """Weights of keys, 0 outside the mask; Mega's relu^2, or Laplace, which approximates it."""
    if not config.elementwise:
        return jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, NEGATIVE), axis=-1), 0.0)
    scores = scores / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(scores.dtype)
    if config.attention is AttentionKind.RELU_SQUARED:
        return jnp.where(mask, jnp.square(jax.nn.relu(scores)), 0.0)
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    below = 0.5 * (1.0 + lax.erf((scores - mean) / (deviation * math.sqrt(2.0))))
    return jnp.where(mask, below, 0.0)


def full_attention(
    config: MegalodonConfig,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H J"],
    mask: Bool[Array, "B T S"],
    key: jax.Array | None = None,
    itself: Bool[Array, "T S"] | None = None,
) -> Float[Array, "B T H J"]:
    """Attention of any kind with a full mask. key: of dropout, which leaves every query the key
    that is `itself`."""
    rate = config.attention_dropout if key is not None else 0.0
    if not rate and not config.elementwise:
        return masked_attention(q, k, v, mask, scale=1.0)
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    keep = jax.random.bernoulli(key, 1.0 - rate, scores.shape) if rate else True
    mask = mask[:, None]
    if rate and config.attention_dropout_kind is AttentionDropout.KEYS:
        # Or a query could be left with nothing.
        weights = function_of_scores(config, scores, mask & (keep | itself[None, None]))
    else:
        weights = jnp.where(keep, function_of_scores(config, scores, mask) / (1.0 - rate), 0.0)
    return jnp.einsum("bhts,bshj->bthj", weights.astype(v.dtype), v)


DENSE_CHUNK = 256
"""Longest chunk whose scores are kept whole: 10 ms for value and gradients where blocks take 13
(4 chunks of 256, value width 512, one CPU core), and a third of the time to compile."""


def chunk_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H J"],
    documents: Documents | None,
    config: MegalodonConfig,
    sharding: ShardingRules,
) -> Float[Array, "B T H J"]:
    """Attention with unscaled scores to the earlier tokens of the own chunk (or window)."""
    T, c, window = q.shape[1], config.chunk_size, config.attention_window
    apart = functools.partial(sharded_causal_attention, scale=1.0, sharding=sharding)
    if documents is not None:
        return apart(q, k, v, documents.attention, window=config.reach)
    whole_chunks = T // parts_of("length", sharding) % c == 0
    if parts_of("length", sharding) > 1 and (window or not whole_chunks):
        # Chunks that devices share are told apart like documents.
        chunks = lax.broadcasted_iota(jnp.int32, q.shape[:2], 1) // (T if window else c)
        return apart(q, k, v, chunks + 1, window=window)

    def attend(q, k, v):
        ones = jnp.ones(q.shape[:2], jnp.int32)
        if q.shape[1] <= DENSE_CHUNK:
            return dense_causal_attention(q, k, v, ones, window=window, scale=1.0)
        return causal_attention(q, k, v, ones, window=window, scale=1.0)

    def by_chunk(q, k, v):
        rows = [x.reshape(-1, c, *x.shape[2:]) for x in (q, k, v)]
        return attend(*rows).reshape(*q.shape[:2], *v.shape[2:])

    def local(q, k, v):
        """Whole chunks, and what is left of a row as a short one."""
        if window or c >= q.shape[1]:
            return attend(q, k, v)
        whole = q.shape[1] // c * c
        parts = [by_chunk(*(x[:, :whole] for x in (q, k, v)))]
        if whole < q.shape[1]:
            parts.append(attend(*(x[:, whole:] for x in (q, k, v))))
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    names = ("batch", "length", "heads_act", None)
    return shard_by_names(local, (names,) * 3, names, sharding)(q, k, v)


def dense_chunk_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H J"],
    documents: Documents | None,
    config: MegalodonConfig,
    key: jax.Array | None = None,
) -> Float[Array, "B T H J"]:
    """The same with all scores of blocks as long as the reach: for dropout of attention, looking
    ahead, and Mega's functions.

    Windows, and chunks of packed documents, begin anywhere: their blocks see those beside them.
    """
    B, T = q.shape[:2]
    window, size = config.attention_window, min(config.reach, T)
    group = None if documents is None else documents.attention
    if group is None:
        index = jnp.arange(T) // (T if window else size)
        group = jnp.broadcast_to(index + 1, (B, T))
    # A row that is looked at both ways is one document, which begins with the row.
    anywhere = size < T and bool(window or (documents is not None and not config.bidirectional))
    before, after = int(anywhere), int(anywhere and config.bidirectional)
    queries, keys = jnp.arange(size), jnp.arange(-before * size, (1 + after) * size)
    own, beside = (_in_blocks(group, size, *extra) for extra in ((0, 0), (before, after)))
    mask = causal_mask(queries, keys, own, beside, window)
    if config.bidirectional:
        mask |= jnp.swapaxes(causal_mask(keys, queries, beside, own, window), 1, 2)
    q = _in_blocks(q, size)
    k, v = (_in_blocks(x, size, before, after) for x in (k, v))
    out = full_attention(config, q, k, v, mask, key, queries[:, None] == keys[None, :])
    return out.reshape(B, -1, *out.shape[2:])[:, :T]


def _in_blocks(x: jax.Array, size: int, before: int = 0, after: int = 0) -> jax.Array:
    """[B, T, ...] as M blocks [B M, size, ...], 0 behind the last; with `before` and `after` blocks
    around each one, [B M, (before + 1 + after) size, ...]."""
    (B, T), rest = x.shape[:2], x.shape[2:]
    M = -(-T // size)
    x = jnp.pad(x, [(0, 0), (before * size, (M + after) * size - T)] + [(0, 0)] * len(rest))
    parts = [x[:, i * size : (i + M) * size] for i in range(before + 1 + after)]
    return jnp.concatenate([part.reshape(B * M, size, *rest) for part in parts], axis=1)


# ------------------------------------------------------------------- block with two hops (3.4)


@flax.struct.dataclass
class LayerState:
    """What one layer keeps of a row: a LayerCache of `reach` tokens, the moving average (re, im)
    [B, D, N], and the statistics of the norm."""

    attention: Any
    ema: Any
    norm: Any


def _along_rows(w: jax.Array, x: Float[Array, "B T ..."]) -> jax.Array:
    """w [...] for every token of x, in the type of x; its gradient is one sum over all tokens."""
    return jnp.broadcast_to(w.astype(x.dtype), (*x.shape[:2], *w.shape))


def dropped(x: jax.Array, rate: float, key: jax.Array | None, number: int) -> jax.Array:
    """Inverted dropout with the `number`th key of a layer; without a key, x."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def block(
    config: MegalodonConfig,
    sharding: ShardingRules,
    w: dict[str, Any],
    x: Float[Array, "B T D"],
    rope: Float[Array, "#B L K"],
    attend: Callable,
    *,
    documents: Documents | None = None,
    norm_state: NormState | None = None,
    ema_state: State | None = None,
    lengths: Int[Array, " B"] | None = None,
    packed: bool = False,
    coefficients: EmaCoefficients | None = None,
    key: jax.Array | None = None,
) -> tuple[Float[Array, "B T D"], LayerState]:
    """One layer. w: its parameters (`block_parameters`). attend(q, k, v) gives the attention
    output and what to keep of keys and values. rope: `rotation`. lengths: of right-padded rows
    whose moving average is wanted after their last token; packed: they hold several documents, or
    padding in front."""
    eps, norms = config.norm_eps, dict(config=config, sharding=sharding)
    with jax.named_scope("timestep_norm"):
        if config.bidirectional:
            affine = w["norm_weight"] + 1.0, w["norm_bias"]
            normed = group_norm(x, affine, documents.real, config)
        else:
            normed, norm_state = timestep_norm(x, w, "norm", norm_state, documents, **norms)
    with jax.named_scope("cema"):
        averaged = normed
        if config.ema is not EmaKind.NONE:
            rows = normed, documents, lengths, packed
            averaged, ema_state = _averaged(config, sharding, w, *rows, coefficients, ema_state)
        elif ema_state is None:
            ema_state = (jnp.zeros((x.shape[0], config.d_model, 0), jnp.float32),) * 2
    mixed = rms_norm(averaged, w["ema_norm_weight"] + 1.0, eps)
    mixed = dropped(mixed, config.hidden_dropout, key, 0)
    with jax.named_scope("attention"):
        normalised = config.attention is AttentionKind.NORMALISED
        q, k = (normalised_queries_keys if normalised else mega_queries_keys)(config, w, mixed)
        rope = _of_all_chunks(rope, x.shape[1])
        q, k = (rotate(each, rope, config.rope.layout) for each in (q, k))
        v = jax.nn.silu(project(normed, w["value_kernel"]) + _along_rows(w["value_bias"], x))
        v = checkpoint_name(v, "qkv")
        seen, kept = attend(q, k, v)
        gate = jax.nn.silu(project(mixed, w["gate_kernel"]) + _along_rows(w["gate_bias"], x))
        seen = dropped(seen * gate, config.hidden_dropout, key, 1)
        h = project(mixed, w["hidden_kernel"]) + _along_rows(w["hidden_bias"], x)
        h += project(seen, w["out_kernel"], num_input_axes=2)
        if config.gate is GateKind.MEGA:
            update = project(mixed, w["update_kernel"]) + _along_rows(w["update_bias"], x)
            y = x + jax.nn.sigmoid(update) * (dropped(jax.nn.silu(h), config.dropout, key, 2) - x)
        else:
            y = x + dropped(h, config.dropout, key, 2)
    with jax.named_scope("mlp"):
        h = layer_norm(y, w["mlp_norm_weight"] + 1.0, w["mlp_norm_bias"], eps)
        h = dropped(_mlp(config, sharding, w, h, key), config.dropout, key, 4)
        if config.rescale_mlp:
            h *= _along_rows(w["mlp_scale"], x)
    # Two hops: the stream gets the block's input, the attention only through the MLP.
    stream = x if config.residual is ResidualKind.TWO_HOP else y
    x = checkpoint_name(stream + h, "block_out")
    x = constrain(x, ("batch", "length", "embed_act"), sharding)
    return x, LayerState(kept, ema_state, norm_state)


def _averaged(config, sharding, w, x, documents, lengths, packed, coefficients, state):
    """The moving average of the rows x, with its skip connection, and the state after them."""
    if coefficients is None:
        coefficients = ema_coefficients(config, w)
    average = functools.partial(moving_average, form=config.scan_form, sharding=sharding)
    reset = None if documents is None else documents.reset
    if lengths is None:
        averaged, state = average(x, coefficients, state, reset)
    else:
        # Past its last token a row's state would decay on: read it off rows that end together.
        shift = x.shape[1] - lengths
        # A row that is one document starts from nothing without being told.
        reset = _shift_rows(reset[..., None], shift)[..., 0] if packed else None
        averaged, ended = average(_shift_rows(x, shift), coefficients, None, reset)
        if state is None:
            averaged, state = _shift_rows(averaged, lengths - x.shape[1]), ended
        else:
            averaged, _ = average(x, coefficients, state, None)
            before = decayed(coefficients, state, lengths, x.shape[1])
            state = jax.tree.map(jnp.add, before, ended)
    if config.bidirectional:
        backward = ema_coefficients(config, _backward_names(w))
        averaged += average(x[:, ::-1], backward, None, None)[0][:, ::-1]
    if config.ema is EmaKind.COMPLEX:
        averaged += x * _along_rows(w["ema_omega"], x)
    return averaged, state


def _mlp(config, sharding, w, x, key):
    if config.swiglu and not (config.hidden_dropout and key is not None):
        return swiglu(x, w["mlp_gate"], w["mlp_up"], w["mlp_down"], sharding)
    h = jax.nn.silu(project(x, w["mlp_gate"]))
    if config.swiglu:
        h *= project(x, w["mlp_up"])
    h = constrain(h, ("batch", "length", "mlp_act"), sharding)
    return project(dropped(h, config.hidden_dropout, key, 3), w["mlp_down"])


def _shift_rows(x: Shaped[Array, "B T D"], shift: Int[Array, " B"]) -> Shaped[Array, "B T D"]:
    """Row b moved by shift[b] tokens to the right, 0 where nothing comes from."""
    T = x.shape[1]
    index = jnp.arange(T)[None, :] - shift[:, None]
    moved = jnp.take_along_axis(x, jnp.clip(index, 0, T - 1)[..., None], axis=1)
    return jnp.where(((index >= 0) & (index < T))[..., None], moved, jnp.zeros((), x.dtype))


def _backward_names(w: dict[str, Any]) -> dict[str, jax.Array]:
    return {k.removeprefix("backward_"): v for k, v in w.items() if k.startswith("backward_")}


# --------------------------------------------------------------------- parameters and modules


def _projection_init(kind: WeightInit, fan_in: int, fan_out: int) -> Callable:
    if kind is WeightInit.XAVIER:
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    if kind is WeightInit.GAUSSIAN:
        return truncated_normal(fan_in**-0.5)
    return nn.initializers.normal(0.02 if kind is WeightInit.BERT else (3.0 * fan_in) ** -0.5)


def _logit(p: jax.Array) -> jax.Array:
    p = jnp.clip(p, 1e-6, 1.0 - 1e-6)
    return jnp.log(p) - jnp.log1p(-p)


def _theta_init(key, shape, dtype):
    """One random permutation of D^(-j/D), j = 1..D, spreads the frequencies over channels."""
    D = shape[0]
    j = jnp.arange(1, D + 1, dtype=dtype)
    return _logit(jax.random.permutation(key, jnp.exp(-j * (math.log(D) / D))))


def _log_uniform_init(longest: int) -> Callable:
    """Both factors of 1 - r the same, so that every memory adds about as much to the output."""

    def init(key, shape, dtype):
        del key
        steps = jnp.linspace(math.log(2.0), math.log(max(longest, 2)), shape[1], dtype=dtype)
        return jnp.tile(_logit(jnp.exp(-0.5 * steps))[None], (shape[0], 1))

    return init


def ema_parameters(config: MegalodonConfig) -> dict[str, tuple]:
    """Name, initialiser, shape and logical axes of the moving average's parameters."""
    if config.ema is EmaKind.NONE:
        return {}
    shape, names = (config.d_model, config.state_size), ("norm", None)
    normal = nn.initializers.normal
    decay = normal(0.2)
    if config.decay_init is DecayInit.LOG_UNIFORM:
        decay = _log_uniform_init(config.chunk_size)
    table = {"ema_alpha": (decay, shape, names), "ema_delta": (decay, shape, names)}
    if config.ema is EmaKind.REAL:
        return table | {
            "ema_beta": (normal(1.0), shape, names),
            "ema_eta": (normal(config.state_size**-0.5), shape, names),
        }
    cut = lambda key, shape, dtype: 0.25 * jax.random.truncated_normal(key, -4, 4, shape, dtype)  # noqa: E731
    return table | {
        "ema_theta": (_theta_init, shape[:1], names[:1]),
        "ema_gamma_re": (normal(1.0), shape, names),
        "ema_gamma_im": (nn.initializers.zeros_init(), shape, names),
        "ema_omega": (cut, shape[:1], names[:1]),
    }


def norm_parameters(config: MegalodonConfig, name: str) -> dict[str, tuple]:
    """The same of a timestep norm."""
    zeros = nn.initializers.zeros_init()
    table = {f"{name}_{part}": (zeros, (config.d_model,), ("norm",)) for part in ("weight", "bias")}
    if config.prior_count:
        for part in ("prior_mean", "prior_log_variance"):
            table[f"{name}_{part}"] = (zeros, (config.norm_groups,), ("norm",))
    return table


def block_parameters(config: MegalodonConfig, layer: jax.Array | int) -> dict[str, tuple]:
    """The same of a layer, in the order of the equations; layer: its index, from 0."""
    D, H, K, J = config.d_model, config.num_heads, config.head_dim, config.value_width
    F, zeros = config.mlp_dim, nn.initializers.zeros_init()

    def kernel(shape, names, fan_in, fan_out):
        return _projection_init(config.initialization, fan_in, fan_out), shape, names

    def to_heads(width):
        return kernel((D, H, width), ("embed", "heads", "head_dim"), D, H * width)

    def bias(*shape, names):
        return zeros, shape, names

    heads = ("heads", "head_dim")
    square, mlp = kernel((D, D), ("embed", None), D, D), kernel((D, F), ("embed", "mlp"), D, F)
    gain = bias(2, H, K, names=(None, *heads))
    if config.attention is not AttentionKind.NORMALISED:
        gain = nn.initializers.normal(0.02), *gain[1:]
    table = norm_parameters(config, "norm") | ema_parameters(config)
    if config.bidirectional:
        table |= {f"backward_{k}": v for k, v in ema_parameters(config).items() if "omega" not in k}
    table |= {
        "ema_norm_weight": bias(D, names=("norm",)),
        "z_kernel": to_heads(K),
        "z_bias": bias(H, K, names=heads),
        "qk_gain": gain,
        "qk_offset": bias(2, H, K, names=(None, *heads)),
        "value_kernel": to_heads(J),
        "value_bias": bias(H, J, names=heads),
        "gate_kernel": to_heads(J),
        "gate_bias": bias(H, J, names=heads),
        "hidden_kernel": square,
        "hidden_bias": bias(D, names=("norm",)),
        "out_kernel": kernel((H, J, D), (*heads, "embed"), H * J, D),
    }
    if config.gate is GateKind.MEGA:
        table |= {"update_kernel": square, "update_bias": bias(D, names=("norm",))}
    table |= {f"mlp_norm_{part}": bias(D, names=("norm",)) for part in ("weight", "bias")}
    table |= {"mlp_gate": mlp} | ({"mlp_up": mlp} if config.swiglu else {})
    table["mlp_down"] = kernel((F, D), ("mlp", "embed"), F, D)
    if config.rescale_mlp:
        scale = lambda key, shape, dtype: jnp.full(shape, 0.1 * 0.5 ** jnp.float32(layer), dtype)  # noqa: E731
        table["mlp_scale"] = (scale, (D,), ("norm",))
    return table


def declare(module: nn.Module, table: dict[str, tuple]) -> dict[str, jax.Array]:
    """The parameters of a table as those of a linen module."""
    return {
        name: module.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)
        for name, (init, shape, names) in table.items()
    }


class Block(nn.Module):
    """`block` with its parameters; emits its state where `lengths` are given, of the document that
    begins at `first` [B]; None: at 0."""

    config: MegalodonConfig
    sharding: ShardingRules

    @nn.compact
    def __call__(self, x, layer, key, rope, documents, lengths, first):
        config = self.config
        w = declare(self, block_parameters(config, layer))

        def attend(q, k, v):
            kept = None
            if lengths is not None:
                begin = jnp.zeros_like(lengths) if first is None else first
                kept = LayerCache.from_rows(k, v, begin, lengths, config.reach, k.dtype)
            dropout = config.attention_dropout and key is not None
            if config.bidirectional or config.elementwise or dropout:
                return dense_chunk_attention(q, k, v, documents, config, key), kept
            return chunk_attention(q, k, v, documents, config, self.sharding), kept

        x, state = block(
            config,
            self.sharding,
            w,
            x,
            rope,
            attend,
            documents=documents,
            lengths=lengths,
            packed=first is not None,
            key=key,
        )
        return x, None if lengths is None else state


@flax.struct.dataclass
class MegalodonCache(RowCache):
    """State of rows: layers, a tuple of LayerState; norm, the NormState of the final norm;
    lengths int32 [B], tokens read. Its size does not depend on them."""

    layers: Any
    norm: Any
    lengths: Any


@flax.struct.dataclass
class MegalodonOutput:
    """logits: float32 [B, T, V] or None; hidden: [B, T, D], what the head multiplies; cache: a
    MegalodonCache if lengths were given; aux: float32 scalar, 0 here."""

    logits: Any
    hidden: Any
    cache: Any
    aux: Any


def run_blocks(
    config: MegalodonConfig,
    sharding: ShardingRules,
    initializing,
    x,
    rope,
    documents,
    lengths,
    key,
    first=None,
) -> tuple[Float[Array, "B T D"], Any]:
    """The layers, inside a compact module; their states stacked on a leading axis."""
    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    keys = None if key is None else jax.random.split(key, config.num_layers)
    stack = nn.scan(
        config.remat.wrap(Block, config.scan_layers),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, *(nn.broadcast,) * 4),
        length=config.num_layers,
        unroll=1 if config.scan_layers else config.num_layers,
        check_constancy_invariants=initializing,  # the parameters' keys depend on it
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(config, sharding, name="layers")(x, layers, keys, rope, documents, lengths, first)


class Megalodon(NextTokenModel):
    """Embedding, blocks, a last timestep norm, head."""

    config: MegalodonConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        compute_logits: bool = True,
        key: jax.Array | None = None,
    ) -> MegalodonOutput:
        """segment_ids: 1.. = documents, 0 = padding; default one document per row. lengths: of
        right-padded rows, asks for the cache after them; of packed or left-padded ones, with
        segment_ids, for that of their last document. key: of dropout; None: none.

        Raises TypeError for ids of a float type, ValueError for rows without tokens and, outside
        jit, for lengths at which no document ends its row.
        """
        config = self.config
        check_token_ids("tokens", tokens)
        if not tokens.shape[1]:
            raise ValueError(f"tokens {tokens.shape}: must have at least one token per row")
        first, packed = None, segment_ids is not None and lengths is not None
        if lengths is not None and not packed:
            real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
            segment_ids = real.astype(jnp.int32)
        documents = None if segment_ids is None else documents_of(segment_ids, config)
        if packed:
            check_last_documents(segment_ids, lengths, tokens.shape)
            last = lengths[:, None] - 1
            first = (last - jnp.take_along_axis(documents.position, last, axis=1))[:, 0]
        embed = Embed(
            config.vocab_size, config.d_model, config.precision.dtype, self.sharding, name="embed"
        )
        x = embed(tokens)
        if config.scale_embeddings:
            x *= math.sqrt(config.d_model)
        x = dropped(x, config.dropout, key, config.num_layers)
        rope = rotation(config, tokens.shape[1], documents)
        rows = x, rope, documents, lengths
        x, states = run_blocks(config, self.sharding, self.is_initializing(), *rows, key, first)
        w = declare(self, norm_parameters(config, "norm"))
        norms = dict(config=config, sharding=self.sharding)
        x, norm_state = timestep_norm(x, w, "norm", None, documents, **norms)
        with jax.named_scope("head"):
            head = embed.logits
            if not config.tied_embeddings:
                head = Head(config.vocab_size, self.sharding, name="head")
            logits = head(x) if compute_logits or self.is_initializing() else None
        cache = None
        if lengths is not None:
            layers = tuple(
                jax.tree.map(lambda a, i=i: a[i], states) for i in range(config.num_layers)
            )
            read = lengths if first is None else lengths - first
            cache = MegalodonCache(layers, norm_state, read)
        return MegalodonOutput(logits, x, cache, jnp.float32(0.0))

    def example_inputs(self) -> tuple:
        return (jnp.zeros((1, 8), jnp.int32),)

    def inputs(self, batch: dict[str, jax.Array]) -> tuple:
        return batch["tokens"], batch.get("segment_ids")

    def has_dropout(self) -> bool:
        return self.config.has_dropout

    def flops_per_token(self, context_length: int) -> float:
        head = 2.0 * self.config.d_model * self.config.vocab_size
        return self.config.num_layers * block_flops(self.config, context_length) + head


def check_last_documents(segment_ids: Any, lengths: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless segment_ids have the shape [B, T] of the tokens and lengths [B] and,
    outside jit, unless the last token of every row is number lengths - 1."""
    if segment_ids.shape != shape or lengths.shape != shape[:1]:
        raise ValueError(
            f"segment_ids {segment_ids.shape} and lengths {lengths.shape}: must be {shape} and "
            f"{shape[:1]}, as the tokens"
        )
    if isinstance(segment_ids, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    ids, ends = np.asarray(segment_ids), np.asarray(lengths)
    found = np.where(ids > 0, np.arange(1, ids.shape[1] + 1)[None, :], 0).max(axis=1)
    if (found != ends).any() or not found.all():
        raise ValueError(
            f"lengths={ends.tolist()}: the last documents of segment_ids end at {found.tolist()}"
        )


def rotation(config, length: int, documents: Documents | None) -> Float[Array, "#B L K"]:
    """Rotary table of rows from their start; chunks begin at position 0.

    L is the length, or without documents that of a chunk: every chunk of every row has the same.
    """
    reach = length if config.attention_window else min(config.chunk_size, length)
    position = jnp.arange(reach)[None] if documents is None else documents.position
    if not config.attention_window:
        position = position % config.chunk_size
    return rope_table(position, config.rope, config.head_dim)


def _of_all_chunks(rope: Float[Array, "#B L K"], length: int) -> Float[Array, "#B T K"]:
    """The table of a chunk for all the chunks of rows; one of whole rows as it is."""
    if rope.shape[1] == length:
        return rope
    return jnp.tile(rope, (1, -(-length // rope.shape[1]), 1))[:, :length]


def block_flops(config: MegalodonConfig, context_length: int) -> float:
    """Forward FLOPs per token of a layer: products, attention within the reach, 12 per complex
    number of state of the moving average."""
    D, E, F = config.d_model, config.value_dim, config.mlp_dim
    gates = 2 if config.gate is GateKind.MEGA else 1
    kernels = D * config.qk_dim + 3 * D * E + gates * D * D + (3 if config.swiglu else 2) * D * F
    seen = min(config.reach, context_length)
    seen = seen if config.attention_window or config.bidirectional else (seen + 1) / 2
    attention = (config.qk_dim + E) * seen
    directions = 2 if config.bidirectional else 1
    return 2.0 * (kernels + attention) + 12.0 * directions * config.ema_size * D
