"""Llama of Hugging Face transformers: config attributes and table of weights, and those of a stack
of transformer blocks in general."""

import dataclasses
from typing import Any

import jax

from blt_jax.interop.foreign_config import ForeignConfig, read_rope, write_rope
from blt_jax.interop.weights import (
    Weight,
    change_rope_layout,
    heads_in,
    heads_out,
    linear,
    same,
)
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import PositionEncoding, Softmax, TransformerConfig
from blt_jax.models.llama3 import Llama3, Llama3Config

# Attributes of every transformers configuration that change no value of a forward pass.
HARMLESS = (
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip


def stack_config(
    config: ForeignConfig, rope: RopeConfig, default_eps: float, window: int = 0
) -> TransformerConfig:
    """The TransformerConfig of the attributes that all stacks of blocks share.

    Raises ValueError for biases, dropout and activations that our blocks do not have.
    """
    config.require(hidden_act="silu", attention_bias=False, mlp_bias=False)
    config.require(attention_dropout=0.0, dropout=0.0, is_encoder_decoder=False)
    return TransformerConfig(
        num_layers=config.take("num_hidden_layers", int),
        d_model=config.take("hidden_size", int),
        num_heads=config.take("num_attention_heads", int),
        num_kv_heads=config.take("num_key_value_heads", int, 0),
        head_dim=config.take("head_dim", int, 0),
        mlp_dim=config.take("intermediate_size", int),
        norm_eps=config.take("rms_norm_eps", float, default_eps),
        window=window,
        rope=rope,
    )


def stack_attributes(stack: TransformerConfig) -> dict[str, Any]:
    """The attributes that `stack_config` reads; ValueError for what they cannot express."""
    for name, default in (
        ("position_encoding", PositionEncoding.ROPE),
        ("softmax", Softmax.STANDARD),
    ):
        if getattr(stack, name) is not default:
            raise ValueError(
                f"TransformerConfig.{name}={getattr(stack, name).name}: Hugging Face's blocks have "
                f"{default.name} alone"
            )
    return {
        "num_hidden_layers": stack.num_layers,
        "hidden_size": stack.d_model,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_width,
        "intermediate_size": stack.mlp_width,
        "rms_norm_eps": stack.norm_eps,
        "hidden_act": "silu",
    }


def stack_table(
    stack: TransformerConfig,
    path: tuple[str, ...],
    name: str,
    theirs: RopeLayout,
) -> list[Weight]:
    """Weights of blocks stacked at our `path`, named `name`.{layer}. there; theirs: their rotary
    layout."""
    name, layers = name + ".{layer}.", stack.num_layers
    ours, H, G = stack.rope.layout, stack.num_heads, stack.kv_heads
    attention, mlp = (*path, "attention"), (*path, "mlp")
    rope = dict(ours=ours, theirs=theirs, layers=layers)
    return [
        same((*path, "attention_norm", "weight"), name + "input_layernorm.weight", layers=layers),
        heads_in((*attention, "query"), name + "self_attn.q_proj.weight", H, **rope),
        heads_in((*attention, "key"), name + "self_attn.k_proj.weight", G, **rope),
        heads_in((*attention, "value"), name + "self_attn.v_proj.weight", G, layers=layers),
        heads_out((*attention, "out"), name + "self_attn.o_proj.weight", H, layers=layers),
        same(
            (*path, "mlp_norm", "weight"), name + "post_attention_layernorm.weight", layers=layers
        ),
        linear((*mlp, "gate"), name + "mlp.gate_proj.weight", layers=layers),
        linear((*mlp, "up"), name + "mlp.up_proj.weight", layers=layers),
        linear((*mlp, "down"), name + "mlp.down_proj.weight", layers=layers),
    ]


def read_llama(attributes: dict[str, Any]) -> Llama3Config:
    """Llama3Config of a LlamaConfig; its rotary layout is HALF_SPLIT, as the weights are."""
    with ForeignConfig("config.json", attributes) as config:
        config.require(model_type="llama")
        config.ignore(*HARMLESS, "pretraining_tp")
        rope = read_rope(config, 10_000.0, RopeLayout.HALF_SPLIT)
        return Llama3Config(
            vocab_size=config.take("vocab_size", int),
            transformer=stack_config(config, rope, default_eps=1e-6),
            tied_embeddings=config.take("tie_word_embeddings", bool, False),
        )


def write_llama(config: Llama3Config) -> dict[str, Any]:
    """Attributes of a LlamaConfig; ValueError for what it cannot express."""
    stack = config.transformer
    if stack.window:
        raise ValueError(f"TransformerConfig.window={stack.window}: a LlamaConfig has no window")
    if stack.position_encoding is not PositionEncoding.ROPE:
        raise ValueError("TransformerConfig.position_encoding=ALIBI: a LlamaConfig has ROPE alone")
    if stack.softmax is not Softmax.STANDARD:
        name = stack.softmax.name
        raise ValueError(f"TransformerConfig.softmax={name}: a LlamaConfig has STANDARD alone")
    if config.sink_tokens:
        raise ValueError(
            f"Llama3Config.sink_tokens={config.sink_tokens}: a LlamaConfig has no sink tokens"
        )
    if config.sink_tokens:
        raise ValueError(
            f"Llama3Config.sink_tokens={config.sink_tokens}: a LlamaConfig has no sink tokens"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": None,
        "eos_token_id": None,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 131_072 if config.transformer.rope.scaling_factor > 1 else 8192,
        **stack_attributes(config.transformer),
        **write_rope(config.transformer.rope),
    }


def llama_table(config: Llama3Config) -> list[Weight]:
    """Names of LlamaForCausalLM, whose queries and keys are laid out for half-split rotation."""
    head = [linear(("head", "kernel"), "lm_head.weight")]
    return [
        same(("embed", "table"), "model.embed_tokens.weight"),
        *stack_table(
            config.transformer, ("transformer", "layers"), "model.layers", RopeLayout.HALF_SPLIT
        ),
        same(("norm", "weight"), "model.norm.weight"),
        *([] if config.tied_embeddings else head),
    ]


def with_rope_layout(
    model: Llama3, params: dict[str, Any], layout: RopeLayout
) -> tuple[Llama3, dict[str, Any]]:
    """The same function with queries and keys laid out for `layout` (HF HALF_SPLIT, Meta the
    other)."""
    source = model.config.transformer.rope.layout
    rope = dataclasses.replace(model.config.transformer.rope, layout=layout)
    stack = dataclasses.replace(model.config.transformer, rope=rope)
    config = dataclasses.replace(model.config, transformer=stack)
    params = jax.tree.map(lambda leaf: leaf, params)
    attention = params["transformer"]["layers"]["attention"]
    for name in ("query", "key"):
        attention[name] = change_rope_layout(attention[name], source, layout)
    return config.build(model.sharding), params
