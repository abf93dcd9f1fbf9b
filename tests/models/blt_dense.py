"""BLT in plain float64 numpy with dense masks: the definition, for the tests of its options."""

import numpy as np

from blt_jax.models.blt import (
    DecoderCrossAttention,
    EncoderCrossAttention,
    KeyValueSource,
    Pooling,
    PoolQueries,
    Residual,
)
from blt_jax.models.blt_ngrams import PRIMES, HashOrder, NgramStart


def norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight["weight"]


def softmax(scores, mask):
    if not mask.any():
        return np.zeros_like(scores)
    weights = np.where(mask, np.exp(scores - scores[mask].max()), 0)
    return weights / weights.sum()


def attend(q, k, v, mask):
    """q [T, H, K], k and v [S, G, K], mask [T, S]."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            weights = softmax(k[:, h // group] @ q[t, h] / np.sqrt(q.shape[2]), mask[t])
            out[t, h] = weights @ v[:, h // group]
    return out


def rope(x, positions, theta):
    pairs = np.arange(x.shape[-1] // 2)
    angle = positions[:, None] * theta ** (-2 * pairs / x.shape[-1])[None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def block(x, p, config, positions, segments):
    h = norm(x, p["attention_norm"])
    a = p["attention"]
    q, k, v = (np.einsum("td,dhk->thk", h, a[name]) for name in ("query", "key", "value"))
    q, k = rope(q, positions, config.rope.theta), rope(k, positions, config.rope.theta)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))[None]
    mask = (distance >= 0) & (segments[:, None] == segments[None]) & (segments[:, None] > 0)
    mask &= distance < (config.window or len(x))
    x = x + np.einsum("thk,hkd->td", attend(q, k, v, mask), a["out"])
    h = norm(x, p["mlp_norm"])
    gate, up = h @ p["mlp"]["gate"], h @ p["mlp"]["up"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]


def layer(params, index):
    return {
        name: layer(value, index) if isinstance(value, dict) else value[index]
        for name, value in params.items()
    }


def cross(x, context, p, mask):
    q = np.einsum("td,dhk->thk", norm(x, p["query_norm"]), p["query"])
    h = norm(context, p["key_norm"])
    k, v = (np.einsum("td,dhk->thk", h, p[name]) for name in ("key", "value"))
    return np.einsum("thk,hkd->td", attend(q, k, v, mask), p["out"])


def embed(params, config, tokens, positions):
    x = params["byte_embedding"]["table"][tokens]
    grams = config.ngrams
    for f, n in grams.tables:
        for t in range(len(tokens)):
            reach = t if grams.cross_documents else positions[t]
            if reach < n - 1 and grams.start is NgramStart.SKIP:
                continue
            window = [int(tokens[t - j]) if j <= reach else 0 for j in range(n)]
            if grams.order is HashOrder.OLDEST_FIRST:
                window = window[::-1]
            total = sum(token * PRIMES[f] ** j for j, token in enumerate(window)) % 2**64
            total -= 2**64 if total >= 2**63 else 0
            x[t] = x[t] + params["ngram_embedding"][f"f{f}_n{n}"][total % grams.vocab_size]
    return x / (len(grams.tables) + 1) if grams.normalize and grams.tables else x


def pool(h, ids, num_patches, config):
    pooled = np.zeros((num_patches, config.num_pooled * h.shape[1]))
    for patch in range(num_patches):
        own = h[ids == patch]
        if not len(own):
            continue
        if config.pooling is Pooling.FIRST_BYTES:
            parts = list(own[: config.pooled_bytes])
        else:
            parts = [getattr(own, mode)(0) for mode in config.pooling.value.split("_")]
        row = np.concatenate(parts)
        pooled[patch, : len(row)] = row
    return pooled


def blt_logits(params, config, tokens, starts, segments):
    """Logits [N, V] of one row: tokens [N], starts [N+1], segments [N]."""
    N, D, k = len(tokens), config.local_encoder.d_model, config.cross_attn_k
    first = np.concatenate([[True], segments[1:] != segments[:-1]])
    positions = np.arange(N) - np.maximum.accumulate(np.where(first, np.arange(N), 0))
    patch = np.cumsum(starts) - 1
    P = config.max_patches or N
    ids = np.where(segments > 0, patch[:-1], -1)
    decoder_ids = np.where(segments > 0, patch[1:] - 1, -1)
    patch_segments = np.array([segments[ids == p][0] if (ids == p).any() else 0 for p in range(P)])
    patch_positions = np.array([(patch_segments[:p] == patch_segments[p]).sum() for p in range(P)])
    reach = np.arange(P)[:, None] - ids[None]
    sees = (reach >= 0) & (reach < config.patch_window) & (ids >= 0)[None]
    sees &= patch_segments[:, None] == segments[None]
    double = 2.0 if config.residual is Residual.DOUBLED else 1.0

    x = embed(params, config, tokens, positions)
    inputs, outputs = [], []
    for index in range(config.local_encoder.num_layers):
        inputs.append(x)
        p = layer(params["local_encoder"]["layers"], index)
        x = block(x, p, config.local_encoder, positions, segments)
        outputs.append(x)
    states = inputs if config.kv_from is KeyValueSource.INPUT else outputs
    if config.encoder_cross_attention is not EncoderCrossAttention.ALL:
        none = config.encoder_cross_attention is EncoderCrossAttention.NONE
        states = (outputs if none else states)[-1:]
    projection = params["patch_encoder"]["patch_projection"]
    patches = (pool(states[0], ids, P, config) @ projection).reshape(P * k, D)
    for index in range(config.num_encoder_cross_layers):
        if config.pool_queries is PoolQueries.PER_LAYER:
            patches = (pool(states[index], ids, P, config) @ projection).reshape(P * k, D)
        p = layer(params["patch_encoder"]["layers"]["cross_attention"], index)
        patches = double * patches + cross(patches, states[index], p, np.repeat(sees, k, 0))

    o = patches.reshape(P, k * D)
    if "latent_projection" in params:
        o = o @ params["latent_projection"]["kernel"]
    for index in range(config.latent.num_layers):
        p = layer(params["latent_transformer"]["layers"], index)
        o = block(o, p, config.latent, patch_positions, patch_segments)
    context = (o @ params["context_projection"]["kernel"]).reshape(-1, D)

    back = decoder_ids[:, None] - np.arange(P)[None]
    sees = (back >= 0) & (back < config.patch_window)
    sees &= (segments[:, None] == patch_segments[None]) & (decoder_ids < P)[:, None]
    sees = np.repeat(sees, k, 1)
    kind = config.decoder_cross_attention
    if kind is DecoderCrossAttention.NONE:
        known = (decoder_ids >= 0) & (decoder_ids < P)
        x = x + np.where(known[:, None], context[np.clip(decoder_ids, 0, P - 1)], 0)
    for index in range(config.local_decoder.num_layers):
        p = layer(params["local_decoder"]["layers"], index)
        if kind is DecoderCrossAttention.ALL:
            x = double * x + cross(x, context, p["cross_attention"], sees)
        elif kind is DecoderCrossAttention.FIRST and index == 0:
            x = double * x + cross(x, context, params["local_decoder"]["cross_attention"], sees)
        x = block(x, p["block"], config.local_decoder, positions, segments)
    return norm(x, params["output_norm"]) @ params["head"]["kernel"]
