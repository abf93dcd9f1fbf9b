"""Hugging Face folders (config.json and safetensors) in and out, without torch or transformers.

`load_pretrained` and `save_pretrained` serve the models of `FAMILIES`; each family is a config
reader, a config writer and a table of weights.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules
from blt_jax.interop.foreign_config import ForeignConfig, read_json, read_rope, write_rope
from blt_jax.interop.tensor_files import TensorFiles, check_names, write_tensors
from blt_jax.interop.weights import (
    Weight,
    change_rope_layout,
    foreign_reader,
    foreign_shapes,
    heads_in,
    heads_out,
    linear,
    read_params,
    same,
)
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import TransformerConfig
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
    """The TransformerConfig of the attributes that all stacks of blocks share."""
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
    """The attributes that `stack_config` reads."""
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
    stack: TransformerConfig, path: tuple[str, ...], name: str, theirs: RopeLayout
) -> list[Weight]:
    """Weights of a stack of blocks at our `path`, named `name`.{layer}. there."""
    path, name, layers = (*path, "layers"), name + ".{layer}.", stack.num_layers
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


# ------------------------------------------------------------------------------------- Llama


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
    if config.transformer.window:
        raise ValueError(
            f"TransformerConfig.window={config.transformer.window}: a LlamaConfig has no window"
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
        *stack_table(config.transformer, ("transformer",), "model.layers", RopeLayout.HALF_SPLIT),
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


# ---------------------------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model family is written by transformers.

    parts: name of a part -> prefixes of tensors that belong to it; the part None is the model
    itself and owns all other tensors.
    """

    config_type: type[ModelConfig]
    read: Callable[[dict[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], list[Weight]]


FAMILIES = {
    "llama": Family(
        config_type=Llama3Config, read=read_llama, write=write_llama, table=llama_table
    ),
}


def load_pretrained(
    path: str | pathlib.Path,
    *,
    part: str | None = None,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a local Hugging Face folder of the family its config names.

    dtype: type of the parameters; None keeps that of the files. With a mesh the params are sharded
    by `sharding`. Raises ValueError naming every unknown attribute, missing, unexpected or
    misshapen tensor, and FileNotFoundError for missing files.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (nothing is downloaded here)")
    attributes = read_json(path / "config.json")
    kind = attributes.get("model_type") if isinstance(attributes, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{path}/config.json: model_type={kind!r}: allowed are {list(FAMILIES)}")
    family = FAMILIES[kind]
    if part is not None:
        raise ValueError(f"part={part!r}: a {kind} model has no parts")
    model = family.read(attributes).build(sharding)
    table = family.table(model.config)
    with TensorFiles(path) as files:
        if getattr(model.config, "tied_embeddings", False) and "lm_head.weight" in files.shapes:
            raise ValueError(
                f"{path}: config.json ties the embeddings, yet the files hold lm_head.weight: drop "
                "one of them"
            )
        check_names(foreign_shapes(table, model), files.shapes, path)
        params = read_params(files, table, model, mesh=mesh, dtype=_dtype(dtype))
    return model, params


def save_pretrained(
    model: Model,
    params: dict[str, Any],
    path: str | pathlib.Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = ml_dtypes.bfloat16,
) -> None:
    """Writes config.json and safetensors that transformers loads, one shard in memory at a time.

    Raises ValueError for a model that no family of transformers expresses and FileExistsError for
    a folder that already holds weights.
    """
    found = [f for f in FAMILIES.values() if type(model.config) is f.config_type]
    if not found:
        allowed = [family.config_type.__name__ for family in FAMILIES.values()]
        raise ValueError(f"{type(model.config).__name__}: only {allowed} can be written")
    family, dtype = found[0], _dtype(dtype)
    attributes = family.write(model.config)
    table = family.table(model.config)
    path = pathlib.Path(path)
    write_tensors(
        path, foreign_shapes(table, model), foreign_reader(table, params), dtype, max_shard_bytes
    )
    attributes["torch_dtype"] = dtype.name
    (path / "config.json").write_text(json.dumps(attributes, indent=2, sort_keys=True) + "\n")


def _dtype(dtype: Any) -> np.dtype | None:
    return None if dtype is None else np.dtype(dtype)
