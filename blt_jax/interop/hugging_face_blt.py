"""BLT of Hugging Face transformers with its patcher, our entropy model: attributes and tables.

Imports describe the released variant: doubled residuals, n-grams hashed with the oldest byte at
power 0, not averaged, padded with id 0 and reaching into the document before, patch queries pooled
anew at every encoder cross-attention.
"""

import dataclasses
from typing import Any

from blt_jax.interop.foreign_config import ForeignConfig, read_rope
from blt_jax.interop.hugging_face_llama import (
    HARMLESS,
    stack_attributes,
    stack_config,
    stack_table,
)
from blt_jax.interop.weights import Weight, heads_in, heads_out, linear, same
from blt_jax.layers.rope import RopeLayout
from blt_jax.layers.transformer import PositionEncoding, Softmax, TransformerConfig
from blt_jax.models import blt
from blt_jax.models.blt_ngrams import NgramConfig, NgramKind
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

INTERLEAVED = RopeLayout.INTERLEAVED
PATCHING = (
    "patch_in_forward", "patch_size", "patching_mode", "patching_threshold", "patching_batch_size",
    "max_patch_length",
)  # fmt: skip
PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")


# ----------------------------------------------------------------------------------- reading


def _window(config: ForeignConfig, name: str, window: int | None) -> int:
    """The window an attribute gives, or `window` where it is null or absent."""
    found = config.take(name, int, 0)
    if not found and window is None:
        raise ValueError(
            f"{config.where}: {name} gives no attention window, although the published models were "
            "trained with 512 bytes: pass window=512, or window=0 for none"
        )
    return found or window


def _part(attributes: dict[str, Any], name: str) -> ForeignConfig:
    if not isinstance(attributes.get(name), dict):
        raise ValueError(f"config.json: {name} is missing")
    return ForeignConfig(f"config.json.{name}", attributes[name])


def _stack(config: ForeignConfig, theta: float, window: int) -> TransformerConfig:
    config.ignore(*HARMLESS)
    config.require(tie_word_embeddings=False)
    rope = read_rope(config, theta, INTERLEAVED)
    stack = stack_config(config, rope, default_eps=1e-5, window=window)
    if stack.head_dim not in (0, stack.d_model // stack.num_heads):
        raise ValueError(f"{config.where}: head_dim={stack.head_dim} is not hidden_size / heads")
    return stack


def read_blt(attributes: dict[str, Any], window: int | None = None) -> blt.BLTConfig:
    """BLTConfig of a BltConfig; window as in `load_pretrained`. Unknown attributes are errors."""
    with ForeignConfig("config.json", attributes) as config:
        config.require(model_type="blt", vocab_size=260, tie_word_embeddings=False)
        # Rotary attributes count in the parts.
        config.ignore(*HARMLESS, *PATCHING, *PARTS, "rope_parameters", "rope_theta")
        config.require(rope_scaling=None)
        k = config.take("cross_attn_k", int, 2)
        window = _window(config, "local_attention_window_len", window)
        ngrams = NgramConfig.released(
            sizes=tuple(config.take("encoder_hash_byte_group_size", list, [3, 4, 5, 6, 7, 8])),
            vocab_size=config.take("encoder_hash_byte_group_vocab", int, 500_002),
            num_functions=config.take("encoder_hash_byte_group_nb_functions", int, 1),
        )
    with _part(attributes, "global_config") as config:
        latent = _stack(config, 500_000.0, window=0)
        config.require(model_type="blt_global_transformer")
        encoder_width = attributes["encoder_config"].get("hidden_size", 0)
        config.require(encoder_cross_output_size=k * encoder_width)
    locals_ = {}
    for side, default in (("encoder", False), ("decoder", True)):
        with _part(attributes, f"{side}_config") as config:
            stack = _stack(config, 500_000.0, window=window)
            config.require(model_type=f"blt_local_{side}", vocab_size=260, cross_attn_k=k)
            config.require(hidden_size_global=latent.d_model)
            if side == "encoder":
                config.require(sliding_window=window)
            locals_[side] = stack, config.take("cross_attn_all_layers", bool, default)
    (encoder, encoder_all), (decoder, decoder_all) = locals_["encoder"], locals_["decoder"]
    return blt.BLTConfig(
        local_encoder=encoder,
        latent=latent,
        local_decoder=decoder,
        ngrams=ngrams,
        cross_attn_k=k,
        encoder_cross_attention=(
            blt.EncoderCrossAttention.ALL if encoder_all else blt.EncoderCrossAttention.LAST
        ),
        decoder_cross_attention=(
            blt.DecoderCrossAttention.ALL if decoder_all else blt.DecoderCrossAttention.FIRST
        ),
        residual=blt.Residual.DOUBLED,
        pool_queries=blt.PoolQueries.PER_LAYER if encoder_all else blt.PoolQueries.ONCE,
    )


def read_entropy_model(
    attributes: dict[str, Any], window: int | None = None
) -> blt.EntropyModelConfig | None:
    """EntropyModelConfig of the patcher; None for a model that was saved without one."""
    if not attributes.get("patch_in_forward", True):
        return None
    with _part(attributes, "patcher_config") as config:
        config.require(model_type="blt_patcher", vocab_size=260)
        window = _window(config, "sliding_window", window)
        return blt.EntropyModelConfig(transformer=_stack(config, 10_000.0, window))


def read_patcher(attributes: dict[str, Any]) -> PatcherConfig:
    """The patching rule that goes with the entropy model, or patches of one byte."""
    mode = attributes.get("patching_mode", "entropy")
    longest = attributes.get("max_patch_length") or 0
    if mode == "byte":
        return PatcherConfig(kind=PatcherKind.BYTE)
    threshold = attributes.get("patching_threshold")
    if mode != "entropy" or threshold is None:
        raise ValueError(
            f"config.json: patching_mode={mode!r} with patching_threshold={threshold}: allowed are "
            "'entropy' with a threshold, and 'byte'"
        )
    return PatcherConfig(
        kind=PatcherKind.GLOBAL, threshold=float(threshold), max_patch_length=longest
    )


# ----------------------------------------------------------------------------------- writing


def write_blt(
    config: blt.BLTConfig,
    entropy_model: blt.EntropyModelConfig | None,
    patcher: PatcherConfig | None,
) -> dict[str, Any]:
    """Attributes of a BltConfig; ValueError naming every option that it cannot express.

    Without an entropy model the peer needs its patch lengths given.
    """
    _check_expressible(config, entropy_model, patcher)
    k, ngrams = config.cross_attn_k, config.ngrams
    local = {"vocab_size": 260, "cross_attn_k": k, "hidden_size_global": config.latent.d_model}
    sides = {
        "encoder": config.encoder_cross_attention is blt.EncoderCrossAttention.ALL,
        "decoder": config.decoder_cross_attention is blt.DecoderCrossAttention.ALL,
    }
    attributes = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": 260,
        "tie_word_embeddings": False,
        "cross_attn_k": k,
        "local_attention_window_len": config.local_encoder.window or None,
        "encoder_hash_byte_group_size": list(ngrams.sizes),
        "encoder_hash_byte_group_vocab": ngrams.vocab_size,
        "encoder_hash_byte_group_nb_functions": ngrams.num_functions,
        "patch_in_forward": entropy_model is not None,
        "global_config": {"model_type": "blt_global_transformer", **_attributes(config.latent)},
    }
    for side, all_layers in sides.items():
        attributes[f"{side}_config"] = {
            "model_type": f"blt_local_{side}",
            "cross_attn_all_layers": all_layers,
            **local,
            **_attributes(getattr(config, f"local_{side}")),
        }
    attributes["encoder_config"]["sliding_window"] = config.local_encoder.window or None
    if entropy_model is not None:
        attributes["patcher_config"] = {
            "model_type": "blt_patcher",
            "vocab_size": 260,
            "sliding_window": entropy_model.transformer.window or None,
            **_attributes(entropy_model.transformer),
        }
    if patcher is not None:
        byte = patcher.kind is PatcherKind.BYTE
        attributes["patching_mode"] = "byte" if byte else "entropy"
        attributes["patching_threshold"] = patcher.threshold
        attributes["max_patch_length"] = patcher.max_patch_length or None
    return attributes


def _attributes(stack: TransformerConfig) -> dict[str, Any]:
    rope = {"rope_theta": stack.rope.theta, "rope_type": "default"}
    attributes = stack_attributes(stack) | {"rope_parameters": rope, "dropout": 0.0}
    return attributes | {"max_position_embeddings": 24_576, "tie_word_embeddings": False}


def _check_expressible(config, entropy_model, patcher) -> None:
    released = NgramConfig.released(
        kind=NgramKind.HASH,
        sizes=config.ngrams.sizes,
        vocab_size=config.ngrams.vocab_size,
        num_functions=config.ngrams.num_functions,
    )
    stacks = {
        "local_encoder": config.local_encoder,
        "latent": config.latent,
        "local_decoder": config.local_decoder,
    }
    if entropy_model is not None:
        stacks["entropy_model"] = entropy_model.transformer
    encoder, decoder = config.local_encoder, config.local_decoder
    wrong = {
        "residual": config.residual is not blt.Residual.DOUBLED,
        "kv_from": config.kv_from is not blt.KeyValueSource.OUTPUT,
        "pooling": config.pooling is not blt.Pooling.MAX,
        "patch_window": config.patch_window != 1,
        "encoder_cross_attention": (
            config.encoder_cross_attention is blt.EncoderCrossAttention.NONE
        ),
        "decoder_cross_attention": (
            config.decoder_cross_attention is blt.DecoderCrossAttention.NONE
        ),
        "pool_queries": (
            config.num_encoder_cross_layers > 1
            and config.pool_queries is not blt.PoolQueries.PER_LAYER
        ),
        "ngrams": config.ngrams != released,
        "latent.window": config.latent.window != 0,
        "local_decoder.window": decoder.window != encoder.window,
        "encoder_cross_heads": config.cross_shape("encoder")
        != (encoder.num_heads, encoder.kv_heads, encoder.head_width),
        "decoder_cross_heads": config.cross_shape("decoder")
        != (decoder.num_heads, decoder.kv_heads, decoder.head_width),
        "patcher": patcher is not None and not _is_plain(patcher),
    }
    for name, stack in stacks.items():
        wrong[f"{name}.head_dim"] = stack.head_width * stack.num_heads != stack.d_model
        wrong[f"{name}.position_encoding"] = stack.position_encoding is not PositionEncoding.ROPE
        wrong[f"{name}.softmax"] = stack.softmax is not Softmax.STANDARD
        wrong[f"{name}.rope"] = (
            stack.rope.layout is not INTERLEAVED or stack.rope.scaling_factor != 1
        )
    if any(wrong.values()):
        names = [name for name, is_wrong in wrong.items() if is_wrong]
        raise ValueError(f"transformers cannot express these options of the model: {names}")


def _is_plain(patcher: PatcherConfig) -> bool:
    """Whether a rule is all that `read_patcher` can return."""
    if patcher.kind is not PatcherKind.GLOBAL or not patcher.threshold:
        return patcher == PatcherConfig(kind=PatcherKind.BYTE)
    plain = PatcherConfig(threshold=patcher.threshold, max_patch_length=patcher.max_patch_length)
    return dataclasses.replace(patcher, target_patch_size=0.0) == plain


# ------------------------------------------------------------------------------------ tables


def _cross_table(path: tuple[str, ...], name: str, shape, layers: int) -> list[Weight]:
    """Cross-attentions; layers 0: a single one that is not stacked on our side."""
    heads, kv_heads, _ = shape
    name = f"{name}.cross_attn_layers.{{layer}}." if layers else f"{name}.cross_attn_layers.0."
    path = (*path, "cross_attention")
    return [
        heads_in((*path, "query"), name + "q_proj.weight", heads, layers=layers),
        heads_in((*path, "key"), name + "k_proj.weight", kv_heads, layers=layers),
        heads_in((*path, "value"), name + "v_proj.weight", kv_heads, layers=layers),
        heads_out((*path, "out"), name + "o_proj.weight", heads, layers=layers),
        same((*path, "query_norm", "weight"), name + "q_norm.weight", layers=layers),
        same((*path, "key_norm", "weight"), name + "k_norm.weight", layers=layers),
    ]


def blt_table(config: blt.BLTConfig) -> list[Weight]:
    """Names of BltForCausalLM without its patcher, whose rotary pairs are interleaved as ours."""
    encoder, decoder = "model.local_encoder", "model.local_decoder"
    every = config.decoder_cross_attention is blt.DecoderCrossAttention.ALL
    in_decoder = ("local_decoder", "layers")
    table = [
        same(("byte_embedding", "table"), f"{encoder}.embed_tokens.weight"),
        *(
            same(
                ("ngram_embedding", f"f{function}_n{size}"),
                "model.encoder_hash_tok_embedding.weight",
                start=i * config.ngrams.vocab_size,
            )
            for i, (function, size) in enumerate(config.ngrams.tables)
        ),
        *stack_table(
            config.local_encoder, ("local_encoder", "layers"), f"{encoder}.layers", INTERLEAVED
        ),
        linear(
            ("patch_encoder", "patch_projection"), f"{encoder}.patch_embedding_projection.weight"
        ),
        *_cross_table(
            ("patch_encoder", "layers"),
            encoder,
            config.cross_shape("encoder"),
            config.num_encoder_cross_layers,
        ),
        *stack_table(
            config.latent,
            ("latent_transformer", "layers"),
            "model.global_transformer.layers",
            INTERLEAVED,
        ),
        linear(("context_projection", "kernel"), f"{decoder}.patch_embedding_projection.weight"),
        *_cross_table(
            in_decoder if every else ("local_decoder",),
            decoder,
            config.cross_shape("decoder"),
            config.local_decoder.num_layers if every else 0,
        ),
        *stack_table(
            config.local_decoder, (*in_decoder, "block"), f"{decoder}.layers", INTERLEAVED
        ),
        same(("output_norm", "weight"), f"{decoder}.norm.weight"),
        linear(("head", "kernel"), "lm_head.weight"),
    ]
    if config.patch_width != config.latent.d_model:
        name = "model.global_transformer.token_embedding_projection.weight"
        table.append(linear(("latent_projection", "kernel"), name))
    return table


def entropy_model_table(config: blt.EntropyModelConfig) -> list[Weight]:
    """Names of the patcher inside BltForCausalLM."""
    return [
        same(("byte_embedding", "table"), "model.patcher.embed_tokens.weight"),
        *stack_table(
            config.transformer, ("transformer", "layers"), "model.patcher.layers", INTERLEAVED
        ),
        same(("output_norm", "weight"), "model.patcher.norm.weight"),
        linear(("head", "kernel"), "model.patcher.lm_head.weight"),
    ]
