"""BLT and its entropy model against `transformers.BltForCausalLM` with the same random weights.

The peer computes single documents, doubles the residual of its cross-attentions, pools anew at
every layer when all encoder layers attend, and must run without its cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt.modeling_blt import byte_group_hash_function

from blt_jax.layers.rope import RopeConfig
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt, blt_patching
from blt_jax.models.blt_ngrams import PRIMES, HashOrder, NgramConfig, hash_ids
from blt_jax.models.blt_patching import PatcherConfig

WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Case:
    k: int = 2
    width: int = 16
    latent_width: int = 32
    heads: int = 4
    kv_heads: int = 4
    latent_kv_heads: int = 2
    encoder_layers: int = 1
    encoder_all: bool = False
    decoder_all: bool = True
    functions: int = 1
    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)


CASES = (
    Case(),
    Case(k=1, latent_width=24, kv_heads=2, encoder_layers=2, encoder_all=True, functions=2),
    Case(k=4, latent_width=64, kv_heads=1, decoder_all=False, sizes=(3, 5)),
    Case(k=2, latent_width=24, encoder_layers=2, functions=3, sizes=(2, 4)),
    Case(k=4, width=32, heads=2, kv_heads=2, latent_kv_heads=4, latent_width=32, sizes=(3,)),
)


def peer(case: Case) -> BltForCausalLM:
    local = {
        "hidden_size": case.width,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "intermediate_size": 24,
        "cross_attn_k": case.k,
        "hidden_size_global": case.latent_width,
        "max_position_embeddings": 128,
    }
    config = BltConfig(
        cross_attn_k=case.k,
        local_attention_window_len=WINDOW,
        encoder_hash_byte_group_size=list(case.sizes),
        encoder_hash_byte_group_vocab=101,
        encoder_hash_byte_group_nb_functions=case.functions,
        patcher_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "sliding_window": WINDOW,
            "max_position_embeddings": 128,
        },
        encoder_config=local
        | {"num_hidden_layers": case.encoder_layers, "cross_attn_all_layers": case.encoder_all},
        decoder_config=local | {"num_hidden_layers": 2, "cross_attn_all_layers": case.decoder_all},
        global_config={
            "hidden_size": case.latent_width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": case.latent_kv_heads,
            "intermediate_size": 40,
            "max_position_embeddings": 128,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = BltForCausalLM(config).eval()
    assert model.config.encoder_config.sliding_window == WINDOW
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norm weights start at one, which would hide a missing one.
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def ours(case: Case) -> blt.BLTConfig:
    local = TransformerConfig(
        num_layers=2,
        d_model=case.width,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        mlp_dim=24,
        window=WINDOW,
    )
    latent = TransformerConfig(
        num_layers=2,
        d_model=case.latent_width,
        num_heads=4,
        num_kv_heads=case.latent_kv_heads,
        mlp_dim=40,
    )
    encoder_cross = blt.EncoderCrossAttention.ALL if case.encoder_all else None
    decoder_cross = blt.DecoderCrossAttention.ALL if case.decoder_all else None
    return blt.BLTConfig(
        local_encoder=dataclasses.replace(local, num_layers=case.encoder_layers),
        latent=latent,
        local_decoder=local,
        ngrams=NgramConfig.released(num_functions=case.functions, sizes=case.sizes, vocab_size=101),
        cross_attn_k=case.k,
        encoder_cross_attention=encoder_cross or blt.EncoderCrossAttention.LAST,
        decoder_cross_attention=decoder_cross or blt.DecoderCrossAttention.FIRST,
        residual=blt.Residual.DOUBLED,
        pool_queries=blt.PoolQueries.PER_LAYER,
    )


# ----------------------------------------------------------------- their tensors, in our layout


def blocks(state, prefix: str, layers: int, heads: int, kv_heads: int):
    """Transformer layers, stacked; also a single cross-attention with layers=0."""

    def linear(name):
        return np.stack([state[f"{prefix}.{i}.{name}.weight"].T for i in range(layers)])

    def norm(name):
        return {"weight": np.stack([state[f"{prefix}.{i}.{name}.weight"] for i in range(layers)])}

    def attention(scope):
        q, o = linear(f"{scope}q_proj"), linear(f"{scope}o_proj")
        k, v = linear(f"{scope}k_proj"), linear(f"{scope}v_proj")
        width = q.shape[1] // heads
        return {
            "query": q.reshape(layers, -1, heads, width),
            "key": k.reshape(layers, -1, kv_heads, width),
            "value": v.reshape(layers, -1, kv_heads, width),
            "out": o.reshape(layers, heads, width, -1),
        }

    if "cross_attn" in prefix:
        return attention("") | {"query_norm": norm("q_norm"), "key_norm": norm("k_norm")}
    mlp = {name: linear(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    return {
        "attention": attention("self_attn."),
        "attention_norm": norm("input_layernorm"),
        "mlp": mlp,
        "mlp_norm": norm("post_attention_layernorm"),
    }


def params_of(state, case: Case):
    heads = case.heads, case.kv_heads
    encoder, decoder = "model.local_encoder", "model.local_decoder"
    cross_layers = case.encoder_layers if case.encoder_all else 1
    tables = np.split(
        state["model.encoder_hash_tok_embedding.weight"], case.functions * len(case.sizes)
    )
    names = [f"f{f}_n{n}" for f in range(case.functions) for n in case.sizes]
    local_decoder = {"layers": {"block": blocks(state, f"{decoder}.layers", 2, *heads)}}
    if case.decoder_all:
        cross = blocks(state, f"{decoder}.cross_attn_layers", 2, *heads)
        local_decoder["layers"]["cross_attention"] = cross
    else:
        cross = blocks(state, f"{decoder}.cross_attn_layers", 1, *heads)
        local_decoder["cross_attention"] = jax.tree.map(lambda x: x[0], cross)
    params = {
        "byte_embedding": {"table": state[f"{encoder}.embed_tokens.weight"]},
        "ngram_embedding": dict(zip(names, tables, strict=True)),
        "local_encoder": {
            "layers": blocks(state, f"{encoder}.layers", case.encoder_layers, *heads)
        },
        "patch_encoder": {
            "patch_projection": state[f"{encoder}.patch_embedding_projection.weight"].T,
            "layers": {
                "cross_attention": blocks(
                    state, f"{encoder}.cross_attn_layers", cross_layers, *heads
                )
            },
        },
        "latent_transformer": {
            "layers": blocks(state, "model.global_transformer.layers", 2, 4, case.latent_kv_heads)
        },
        "context_projection": {"kernel": state[f"{decoder}.patch_embedding_projection.weight"].T},
        "local_decoder": local_decoder,
        "output_norm": {"weight": state[f"{decoder}.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }
    projection = "model.global_transformer.token_embedding_projection.weight"
    assert (projection in state) == (case.k * case.width != case.latent_width)
    if projection in state:
        params["latent_projection"] = {"kernel": state[projection].T}
    return params


def entropy_params_of(state):
    return {
        "byte_embedding": {"table": state["model.patcher.embed_tokens.weight"]},
        "transformer": {"layers": blocks(state, "model.patcher.layers", 2, 2, 2)},
        "output_norm": {"weight": state["model.patcher.norm.weight"]},
        "head": {"kernel": state["model.patcher.lm_head.weight"].T},
    }


def numpy_state(model, gradients: bool = False) -> dict[str, np.ndarray]:
    named = model.named_parameters() if gradients else model.state_dict().items()
    return {
        name: ((torch.zeros_like(x) if x.grad is None else x.grad) if gradients else x)
        .detach()
        .numpy()
        for name, x in named
    }


def example(seed: int = 0, rows: int = 2, length: int = 40):
    """Tokens [B, N+1] that begin with BOS, and starts [B, N+1] of random patches."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, 260, (rows, length + 1)).astype(np.int32)
    tokens[:, 0] = 1
    starts = random.random((rows, length + 1)) < 0.3
    starts[:, :2] = True
    return tokens, starts


def lengths_of(starts: np.ndarray) -> torch.Tensor:
    most = int(starts.sum(1).max())
    lengths = np.asarray(blt_patching.to_lengths(jnp.asarray(starts), most))
    return torch.tensor(lengths, dtype=torch.long)


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def between(entropies: torch.Tensor) -> float:
    """A threshold near the median, in the middle of the widest gap: no ties."""
    values = np.sort(entropies.numpy().ravel())
    middle = slice(len(values) // 3, 2 * len(values) // 3)
    widest = middle.start + int(np.argmax(np.diff(values[middle])))
    assert values[widest + 1] - values[widest] > 2e-5
    return float((values[widest] + values[widest + 1]) / 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_gradients(case):
    reference = peer(case)
    tokens, starts = example()
    inputs, targets = torch.tensor(tokens[:, :-1]).long(), torch.tensor(tokens[:, 1:]).long()
    theirs = reference(inputs, patch_lengths=lengths_of(starts), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(theirs.reshape(-1, 260), targets.reshape(-1))
    loss.backward()

    model = ours(case).build()
    params = as_jax(params_of(numpy_state(reference), case))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.tree.map(lambda _: 0, _unboxed(shapes["params"]))
    )

    def objective(params):
        out = model.apply({"params": params}, jnp.asarray(tokens[:, :-1]), jnp.asarray(starts))
        log_p = jax.nn.log_softmax(out.logits)
        picked = jnp.take_along_axis(log_p, jnp.asarray(tokens[:, 1:])[..., None], axis=-1)
        return -jnp.mean(picked), out.logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(value, loss.item(), atol=1e-5)
    expected = params_of(numpy_state(reference, gradients=True), case)
    for (path, ours_), theirs_ in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            ours_, theirs_, rtol=1e-3, atol=5e-5, err_msg=jax.tree_util.keystr(path)
        )
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-3


def _unboxed(tree):
    import flax.linen as nn

    return nn.unbox(tree)


def test_entropies_and_patch_lengths():
    reference = peer(CASES[0])
    tokens, _ = example(seed=1, rows=3, length=60)
    with torch.no_grad():
        theirs, _, logits = reference.model.patcher(torch.tensor(tokens).long())
        threshold = between(theirs)
        _, lengths, _ = reference.model.patcher(
            torch.tensor(tokens).long(), patch_size=4, threshold=threshold
        )
    stack = TransformerConfig(
        num_layers=2,
        d_model=16,
        num_heads=2,
        mlp_dim=24,
        window=WINDOW,
        rope=RopeConfig(theta=10_000.0),
    )
    model = blt.EntropyModelConfig(transformer=stack).build()
    params = as_jax(entropy_params_of(numpy_state(reference)))
    out = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(out.logits, logits.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(out.aux, theirs.numpy(), atol=1e-4, rtol=0)
    # Their lengths cover the N inputs; H of the last input only matters for the token after it.
    patcher = PatcherConfig(threshold=threshold)
    starts = patcher.starts(jnp.asarray(tokens)[:, :-1], entropies=out.aux[:, :-1])
    for row, row_starts in zip(lengths.numpy(), np.asarray(starts), strict=True):
        ends = np.cumsum(row)
        begins = np.unique(np.concatenate([[0], ends[row > 0]]))
        assert begins[begins < tokens.shape[1]].tolist() == np.flatnonzero(row_starts).tolist()
    assert 30 < np.asarray(starts).sum() < 150


def test_forward_with_their_patcher():
    reference = peer(CASES[0])
    tokens, _ = example(seed=2, rows=1, length=50)
    with torch.no_grad():
        entropies = reference.model.patcher(torch.tensor(tokens[:, :-1]).long())[0]
        reference.model.config.patching_threshold = threshold = between(entropies)
        theirs = reference(torch.tensor(tokens[:, :-1]).long(), use_cache=False).logits
    model = ours(CASES[0]).build()
    params = as_jax(params_of(numpy_state(reference), CASES[0]))
    inputs = jnp.asarray(tokens[:, :-1])
    patcher = PatcherConfig(threshold=threshold)
    starts = patcher.starts(inputs, entropies=jnp.asarray(entropies.numpy()))
    assert 10 < int(starts.sum()) < 40
    logits = model.apply({"params": params}, inputs, starts).logits
    np.testing.assert_allclose(logits, theirs.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", range(2, 9))
def test_hash_ids(size):
    tokens, _ = example(seed=3)
    for prime in PRIMES:
        theirs = byte_group_hash_function(torch.tensor(tokens).long(), size, prime, 500_002)
        ids = hash_ids(jnp.asarray(tokens), size, prime, 500_002, HashOrder.OLDEST_FIRST)
        np.testing.assert_array_equal(ids, theirs.numpy())
