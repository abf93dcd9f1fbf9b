"""The two parts of Megalodon (arXiv 2404.08801) that look back without limit.

The complex exponential moving average (section 3.1) and the timestep normalisation (3.2), over
whole rows, over rows continued from a state, over packed documents, and over a length that is
sharded over a mesh (3.5). Axis letters as in `megalodon`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from blt_jax.dist.sharding import ShardingRules, axes_of, shard_by_names
from blt_jax.layers.norms import layer_norm
from blt_jax.layers.reductions import group_sums
from blt_jax.layers.segments import document_positions, index_of_last, segment_starts
from blt_jax.models.megalodon_config import EmaKind, MegalodonConfig, NormKind, ScanForm
from pallas_kernels import cema_scan

# ------------------------------------------------------------------- documents of packed rows


class Documents(NamedTuple):
    """Packed or padded rows, [B, T] each: real tokens, first tokens of documents, positions in
    their document, and what may attend to each other (chunks, or documents with a window, by the
    index after their first token; 0 is padding)."""

    real: jax.Array
    reset: jax.Array
    position: jax.Array
    attention: jax.Array


def documents_of(segment_ids: Int[Array, "B T"], config: MegalodonConfig) -> Documents:
    """Everything starts anew with a document: statistics, moving average, chunks, rotation."""
    real = segment_ids > 0
    reset = segment_starts(segment_ids) & real
    position = document_positions(segment_ids)
    within = position if config.attention_window else position % config.chunk_size
    index = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    return Documents(real, reset, position, jnp.where(real, index - within + 1, 0))


# ----------------------------------------------------- complex exponential moving average (3.1)

State = tuple[jax.Array, jax.Array]


class EmaCoefficients(NamedTuple):
    """[D, N] each, as `pallas_kernels.cema_scan` names them."""

    decay_re: jax.Array
    decay_im: jax.Array
    input: jax.Array
    output_re: jax.Array
    output_im: jax.Array


def ema_coefficients(config: MegalodonConfig, w: dict[str, Any]) -> EmaCoefficients | None:
    """Eq. 2 as released: h = r e^(i phi) h + p x, y = Re(g h). Mega's for EmaKind.REAL."""
    if config.ema is EmaKind.NONE:
        return None
    p = jax.nn.sigmoid(w["ema_alpha"])
    # 1 - p d loses the distance to 1 only below 1e-7 of it, where 16 million tokens are kept.
    modulus = 1.0 - p * jax.nn.sigmoid(w["ema_delta"])
    zero = jnp.zeros_like(p)
    if config.ema is EmaKind.REAL:
        return EmaCoefficients(modulus, zero, p * w["ema_beta"], w["ema_eta"], zero)
    index_N = jnp.arange(1, config.state_size + 1, dtype=jnp.float32) * (2 * math.pi)
    phase = jax.nn.sigmoid(w["ema_theta"])[:, None] * (index_N / config.state_size)[None, :]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    scale = config.state_size**-0.5
    g_re, g_im = w["ema_gamma_re"] * scale, w["ema_gamma_im"] * scale
    if config.input_phase:
        g_re, g_im = g_re * cos - g_im * sin, g_re * sin + g_im * cos
    return EmaCoefficients(modulus * cos, modulus * sin, p, g_re, g_im)


def _multiply(a: State, b: State) -> State:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def ema_step(x: Float[Array, "B D"], c: EmaCoefficients, state: State) -> tuple[jax.Array, State]:
    """One token of the moving average."""
    re, im = _multiply((c.decay_re[None], c.decay_im[None]), state)
    re = re + c.input[None] * x.astype(re.dtype)[:, :, None]
    y = jnp.sum(c.output_re[None] * re - c.output_im[None] * im, axis=-1)
    return y.astype(x.dtype), (re, im)


def decayed(
    c: EmaCoefficients, state: State, steps: Int[Array, " B"], most: int
) -> tuple[jax.Array, jax.Array]:
    """The state [B, D, N] after `steps` tokens of 0, at most `most`: by squaring."""
    factor = c.decay_re[None], c.decay_im[None]
    for bit in range(most.bit_length()):
        taken = ((steps >> bit) & 1).astype(bool)[:, None, None]
        after = _multiply(factor, state)
        state = tuple(jnp.where(taken, a, b) for a, b in zip(after, state, strict=True))
        factor = _multiply(factor, factor)
    return state


def moving_average(
    x: Float[Array, "B T D"],
    coefficients: EmaCoefficients,
    state: State | None,
    reset: Bool[Array, "B T"] | None,
    *,
    form: ScanForm,
    sharding: ShardingRules,
) -> tuple[Float[Array, "B T D"], State]:
    """The recurrence over rows, and the state [B, D, N] (re, im) after them.

    On a mesh it runs per device. Where the length is sharded, every device starts from 0, the
    states at the ends are exchanged, and what was before is added (section 3.5, without a wave).
    """
    if x.shape[1] == 1 and state is not None and reset is None:
        y, state = ema_step(x[:, 0], coefficients, state)
        return y[:, None], state
    scan = functools.partial(
        cema_scan, implementation=None if form is ScanForm.AUTO else form.value
    )
    if state is None:
        zeros = jnp.zeros((x.shape[0], *coefficients.input.shape), jnp.float32)
        state = zeros, zeros
    axes = axes_of("length", sharding)
    rows, sequence = ("batch",), ("batch", "length")

    def local(x, coefficients, state, reset):
        if not axes:
            return scan(x, *coefficients, state, reset)
        zeros = jax.tree.map(jnp.zeros_like, state)
        y, own = scan(x, *coefficients, zeros, reset)
        across = _power(coefficients[:2], x.shape[1])
        kept = jnp.ones(x.shape[:1], bool) if reset is None else ~jnp.any(reset, axis=1)

        def join(before, after):
            kept, after = after
            before = _multiply(tuple(part[None] for part in across), before)
            return tuple(
                jnp.where(kept[:, None, None], a, 0.0) + b
                for a, b in zip(before, after, strict=True)
            )

        before, state = _before_and_after(join, state, (kept, own), axes)
        return y + scan(jnp.zeros_like(x), *coefficients, before, reset)[0], state

    run = shard_by_names(local, (sequence, (), rows, sequence), (sequence, rows), sharding)
    return run(x, coefficients, state, reset)


def _power(base: State, exponent: int) -> State:
    """A complex number to a power, by squaring."""
    result = jnp.ones_like(base[0]), jnp.zeros_like(base[0])
    while exponent:
        if exponent % 2:
            result = _multiply(result, base)
        base, exponent = _multiply(base, base), exponent // 2
    return result


def _before_and_after(join: Callable, start: Any, own: Any, axes: tuple[str, ...]):
    """Inside shard_map: what lies before this device's part of the length, and after all parts.

    join(before, own of a device) gives what lies after that device.
    """
    everyone = lax.all_gather(own, axes)
    after, before = lax.scan(lambda state, own: (join(state, own), state), start, everyone)
    me = lax.axis_index(axes)
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, me, 0, False), before), after


# ------------------------------------------------------------------ timestep normalisation (3.2)

SUM_BLOCK = 64
"""Tokens whose running sums are one triangular product."""


@flax.struct.dataclass
class NormState:
    """Statistics of the tokens so far: count int32 [B], mean and variance float32 [B, G]."""

    count: Any
    mean: Any
    variance: Any


def running_sums(x: Float[Array, "B T W"], document: Int[Array, "B T"] | None):
    """Sums over the tokens of the document up to and with each one, [B, T, W].

    document: one number for all tokens of a document, which no other of the row has; None: one
    document. Within blocks a triangular product; the blocks' totals are summed in the same way.
    """
    B, T, W = x.shape
    C = min(SUM_BLOCK, T)
    pad = -T % C
    x_BMCW = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, W)
    lower_CC = jnp.tril(jnp.ones((C, C), jnp.float32))
    if document is None:
        sums = jnp.einsum("ij,bmjw->bmiw", lower_CC, x_BMCW, precision="highest")
    else:
        document = jnp.pad(document, ((0, 0), (0, pad)), mode="edge").reshape(B, -1, C)
        same = document[:, :, :, None] == document[:, :, None, :]
        weights = jnp.where(same, lower_CC[None, None], 0.0)
        sums = jnp.einsum("bmij,bmjw->bmiw", weights, x_BMCW, precision="highest")
    if T > C:
        last = None if document is None else document[:, :-1, -1]
        before = running_sums(sums[:, :-1, -1], last)[:, :, None]
        if document is not None:
            before = jnp.where((document[:, 1:] == last[:, :, None])[..., None], before, 0.0)
        sums += jnp.pad(before, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return sums.reshape(B, T + pad, W)[:, :T]


def running_statistics(
    mean: Float[Array, "B T G"],
    variance: Float[Array, "B T G"],
    start: NormState,
    fresh: NormState,
    documents: Documents | None,
) -> tuple[Int[Array, "B T"], Float[Array, "B T G"], Float[Array, "B T G"]]:
    """Eq. 4: count, mean and variance after each token, from the moments within tokens.

    start: the statistics before the row; fresh: before every later document. Sums are of
    differences to one of the first means, or squares would cancel.
    """
    G = mean.shape[-1]
    base = jax.tree.map(lambda x: x[:, None], start)
    anchor = mean[:, :1]
    real = jnp.ones((*mean.shape[:2], 1), jnp.float32)
    last_reset = None
    if documents is not None:
        last_reset = index_of_last(documents.reset, none=-1)
        begun = last_reset >= 0
        base = jax.tree.map(
            lambda a, b: jnp.where(begun.reshape(begun.shape + (1,) * (a.ndim - 2)), b[:, None], a),
            base,
            fresh,
        )
        first = jnp.maximum(last_reset, 0)[..., None]
        anchor = jnp.take_along_axis(mean, first, axis=1, mode="promise_in_bounds")
        real = documents.real[..., None].astype(jnp.float32)
    before = base.count.astype(jnp.float32)[..., None]
    anchor = lax.stop_gradient(jnp.where(before > 0, base.mean, anchor))
    shifted = mean - anchor
    parts = jnp.concatenate([real, real * shifted, real * (variance + shifted**2)], axis=-1)
    new, first, second = jnp.split(running_sums(parts, last_reset), [1, 1 + G], axis=-1)
    offset = base.mean - anchor
    total = jnp.maximum(before + new, 1.0)
    first = (first + before * offset) / total
    second = (second + before * (base.variance + offset**2)) / total
    count = base.count + jnp.round(new[..., 0]).astype(jnp.int32)
    return count, anchor + first, jnp.maximum(second - first**2, 0.0)


def fresh_norm_state(config: MegalodonConfig, w: dict[str, Any], name: str, rows: int):
    """Statistics before any token: none, or the learned prior."""
    G = config.norm_groups
    mean, variance = jnp.zeros((G,), jnp.float32), jnp.zeros((G,), jnp.float32)
    if config.prior_count:
        mean, variance = w[f"{name}_prior_mean"], jnp.exp(w[f"{name}_prior_log_variance"])
    count = jnp.full((rows,), config.prior_count, jnp.int32)
    return NormState(count, jnp.tile(mean[None], (rows, 1)), jnp.tile(variance[None], (rows, 1)))


def timestep_norm(
    x: Float[Array, "B T D"],
    w: dict[str, Any],
    name: str,
    state: NormState | None,
    documents: Documents | None,
    *,
    config: MegalodonConfig,
    sharding: ShardingRules,
) -> tuple[Float[Array, "B T D"], NormState]:
    """Group normalisation with the statistics of all tokens so far, padding 0; and the state.
    For NormKind.LAYER layer norm, and the state as it was.

    w: `<name>_weight`, `<name>_bias` (and prior) of the parameters. Where the length is sharded,
    the statistics of every device's part are exchanged.
    """
    fresh = fresh_norm_state(config, w, name, x.shape[0])
    start = fresh if state is None else state
    affine = w[f"{name}_weight"] + 1.0, w[f"{name}_bias"]
    if config.norm is NormKind.LAYER:
        return layer_norm(x, *affine, config.norm_eps), start
    axes = axes_of("length", sharding)
    if not axes:
        return _timestep_norm(x, affine, start, fresh, documents, config)
    rows, sequence = ("batch",), ("batch", "length")

    def local(x, affine, start, fresh, documents):
        none = jax.tree.map(jnp.zeros_like, start)
        own = _timestep_norm(x, affine, none, fresh, documents, config)[1]
        kept = jnp.ones(x.shape[:1], bool)
        if documents is not None:
            kept = ~jnp.any(documents.reset, axis=1)

        def join(before, after):
            kept, own = after
            count = jnp.where(kept, before.count, 0)
            return merge_statistics(before.replace(count=count), own)

        before, state = _before_and_after(join, start, (kept, own), axes)
        return _timestep_norm(x, affine, before, fresh, documents, config)[0], state

    names = (sequence, (), rows, rows, sequence)
    run = shard_by_names(local, names, (sequence, rows), sharding)
    return run(x, affine, start, fresh, documents)


def _timestep_norm(x, affine, start, fresh, documents, config):
    B, T, D = x.shape
    G = config.norm_groups
    x_BTGD = x.astype(jnp.float32).reshape(B, T, G, D // G)
    mean, variance = token_moments(x_BTGD)
    count, mean, variance = running_statistics(mean, variance, start, fresh, documents)
    y = normalised(x_BTGD, mean, jnp.sqrt(variance + config.norm_eps), *affine)
    y = y.reshape(B, T, D)
    if documents is not None:
        y = jnp.where(documents.real[..., None], y, 0.0)
    state = NormState(count[:, -1], mean[:, -1], variance[:, -1])
    return y.astype(x.dtype), state


@jax.custom_vjp
def token_moments(x: Float[Array, "B T G D"]):
    """Mean and population variance within every group of one token, [B, T, G]."""
    mean = group_sums(x) / x.shape[-1]
    return mean, group_sums(jnp.square(x - mean[..., None])) / x.shape[-1]


def _moments_forward(x):
    mean, variance = token_moments(x)
    return (mean, variance), (x, mean)


def _moments_backward(residuals, cotangents):
    # The mean of x - mean is 0, so that the variance sees no change of the mean.
    x, mean = residuals
    d_mean, d_variance = (g[..., None] / x.shape[-1] for g in cotangents)
    return (d_mean + 2.0 * d_variance * (x - mean[..., None]),)


token_moments.defvjp(_moments_forward, _moments_backward)


@jax.custom_vjp
def normalised(x: Float[Array, "B T G D"], mean, deviation, weight, bias):
    """(x - mean) / deviation per group, times the weight, plus the bias [G D]: keeps x and the
    statistics, and one pass over rows gives all gradients."""
    shape = (1, 1, *x.shape[2:])
    unit = (x - mean[..., None]) / deviation[..., None]
    return unit * weight.reshape(shape) + bias.reshape(shape)


def _normalised_forward(x, mean, deviation, weight, bias):
    return normalised(x, mean, deviation, weight, bias), (x, mean, deviation, weight)


def _normalised_backward(residuals, g):
    x, mean, deviation, weight = residuals
    centred = x - mean[..., None]
    # Everything else is made of this quotient: XLA:CPU computes a division once, but a product
    # again, with all that g is made of, wherever it is used.
    g /= deviation[..., None]
    d_x = g * weight.reshape(1, 1, *x.shape[2:])
    d_deviation = -group_sums(d_x * centred) / deviation
    d_weight = jnp.sum(g * centred, axis=(0, 1)).reshape(-1)
    d_bias = jnp.sum(g * deviation[..., None], axis=(0, 1)).reshape(-1)
    return d_x, -group_sums(d_x), d_deviation, d_weight, d_bias


normalised.defvjp(_normalised_forward, _normalised_backward)


def merge_statistics(a: NormState, b: NormState) -> NormState:
    """The statistics of both sets of tokens; either may be empty."""
    count_a, count_b = (s.count.astype(jnp.float32)[:, None] for s in (a, b))
    share = count_b / jnp.maximum(count_a + count_b, 1.0)
    # An empty set's mean is arbitrary and must not round the other's.
    base = jnp.where(count_a > 0, a.mean, b.mean)
    difference = b.mean - base
    variance = a.variance * (1.0 - share) + b.variance * share
    return NormState(
        a.count + b.count,
        base + difference * share,
        variance + jnp.square(difference) * share * (1.0 - share),
    )


def group_norm(x: Float[Array, "B T D"], affine, real: Bool[Array, "B T"], config):
    """Ordinary group normalisation over all real tokens of a row (section 4.4)."""
    B, T, D = x.shape
    x_BTGD = x.astype(jnp.float32).reshape(B, T, config.norm_groups, -1)
    weight = real[:, :, None, None].astype(jnp.float32)
    total = jnp.maximum(weight.sum((1, 3), keepdims=True) * x_BTGD.shape[3], 1.0)
    mean = (x_BTGD * weight).sum((1, 3), keepdims=True) / total
    centred = x_BTGD - mean
    variance = (jnp.square(centred) * weight).sum((1, 3), keepdims=True) / total
    y = (centred * lax.rsqrt(variance + config.norm_eps)).reshape(B, T, D)
    y = y * affine[0][None, None] + affine[1][None, None]
    return jnp.where(real[..., None], y, 0.0).astype(x.dtype)
