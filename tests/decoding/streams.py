"""Section 3.2 of arXiv 2309.17453 as a loop in float64: one token, one head, one key at a time."""

import numpy as np

from blt_jax.layers.rope import RopeLayout, rope_frequencies
from blt_jax.layers.transformer import Softmax


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * np.asarray(weight, np.float64)


def rotated(x, position, rope):
    """x [K] rotated by the angles of a position."""
    angle = position * rope_frequencies(rope, len(x)).astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    if rope.layout is RopeLayout.HALF_SPLIT:
        a, b = np.split(x, 2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])
    out = np.empty_like(x)
    out[0::2] = x[0::2] * cos - x[1::2] * sin
    out[1::2] = x[1::2] * cos + x[0::2] * sin
    return out


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def stream_blocks(
    stack, layers, inputs, num_sinks, window, original=False, include_current=True, caches=None
):
    """What all blocks make [T, D] of the inputs [T, D] of one row: the cache of a layer is a list
    of (index, unrotated key [G, K], value [G, K]) that tokens are appended to and taken from.

    caches: of rows that have read something.
    """
    H, G, K = stack.num_heads, stack.kv_heads, stack.head_width
    caches = [[] for _ in range(stack.num_layers)] if caches is None else caches
    slopes = np.zeros(H) if stack.rotates else np.asarray(stack.slopes())
    result = []
    for t, x in enumerate(np.asarray(inputs, np.float64), start=len(caches[0])):
        for number, cache in enumerate(caches):

            def weight(*names, number=number):
                found = layers
                for name in names:
                    found = found[name]
                return np.asarray(found[number], np.float64)

            h = rms(x, weight("attention_norm", "weight"), stack.norm_eps)
            q, k, v = (
                np.einsum("d,dhk->hk", h, weight("attention", name))
                for name in ("query", "key", "value")
            )
            cache.append((t, k, v))
            if include_current and len(cache) > num_sinks + window:
                del cache[num_sinks]
            _, ks, vs = zip(*cache, strict=True)
            ranks = [index if original else rank for rank, (index, _, _) in enumerate(cache)]
            heads = []
            for head in range(H):
                group = head // (H // G)
                query, keys = q[head], [k[group] for k in ks]
                if stack.rotates:
                    query = rotated(query, ranks[-1], stack.rope)
                    keys = [rotated(k, r, stack.rope) for k, r in zip(keys, ranks, strict=True)]
                scores = np.stack(keys) @ query / np.sqrt(K)
                scores -= slopes[head] * (ranks[-1] - np.asarray(ranks))
                if stack.softmax is not Softmax.STANDARD:
                    learned = stack.softmax is Softmax.LEARNED_SINK
                    sink = weight("attention", "sink")[head] if learned else 0.0
                    scores = np.append(scores, sink)
                weights = softmax(scores)[: len(keys)]
                heads.append(weights @ np.stack([v[group] for v in vs]))
            if not include_current and len(cache) > num_sinks + window:
                del cache[num_sinks]
            x = x + np.einsum("hk,hkd->d", np.stack(heads), weight("attention", "out"))
            h = rms(x, weight("mlp_norm", "weight"), stack.norm_eps)
            gate = h @ weight("mlp", "gate")
            x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("mlp", "up"))) @ weight("mlp", "down")
        result.append(x)
    return np.stack(result)


def stream_logits(model, params, tokens, num_sinks, window, original=False, include_current=True):
    """Logits [T, V] of one row of a language model."""
    stack, layers = model.config.transformer, params["transformer"]["layers"]
    first = params.get("sink_tokens", np.zeros((0, stack.d_model)))
    inputs = np.concatenate([first, np.asarray(params["embed"]["table"])[tokens]])
    x = stream_blocks(stack, layers, inputs, num_sinks, window, original, include_current)
    x = np.stack([rms(each, params["norm"]["weight"], stack.norm_eps) for each in x])
    return (x @ np.asarray(model.output_kernel(params), np.float64))[len(first) :]


def nats(logits, tokens):
    """-log p [T - 1] of the tokens after the first."""
    shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]
