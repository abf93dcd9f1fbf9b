"""Meta's own Llama folders (params.json and safetensors with Meta's names) in."""

import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules
from blt_jax.interop.foreign_config import ForeignConfig, read_json
from blt_jax.interop.tensor_files import TensorFiles, check_names
from blt_jax.interop.weights import (
    Weight,
    foreign_shapes,
    heads_in,
    heads_out,
    linear,
    read_params,
    same,
)
from blt_jax.layers.model import Model
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models.llama3 import Llama3Config, feed_forward_width


def read_params_json(attributes: dict[str, Any], *, tied_embeddings: bool = False) -> Llama3Config:
    """Llama3Config of Meta's params.json; its rotary layout is INTERLEAVED, as the weights are.

    Raises ValueError naming unknown attributes.
    """
    with ForeignConfig("params.json", attributes) as config:
        config.ignore("max_batch_size", "max_seq_len")
        rope = RopeConfig(
            theta=config.take("rope_theta", float, 500_000.0), layout=RopeLayout.INTERLEAVED
        )
        factor = config.take("rope_scaling_factor", float, 8.0)
        high = config.take("rope_high_freq_factor", float, 4.0)
        if config.take("use_scaled_rope", bool, False):
            rope = RopeConfig(
                theta=rope.theta,
                layout=rope.layout,
                scaling_factor=factor,
                high_freq_factor=high,
            )
        d_model = config.take("dim", int)
        stack = TransformerConfig(
            num_layers=config.take("n_layers", int),
            d_model=d_model,
            num_heads=config.take("n_heads", int),
            num_kv_heads=config.take("n_kv_heads", int, 0),
            mlp_dim=feed_forward_width(
                d_model,
                config.take("ffn_dim_multiplier", float, 1.0),
                config.take("multiple_of", int, 256),
            ),
            norm_eps=config.take("norm_eps", float, 1e-5),
            rope=rope,
        )
        return Llama3Config(
            vocab_size=config.take("vocab_size", int),
            transformer=stack,
            tied_embeddings=tied_embeddings,
        )


def meta_table(config: Llama3Config) -> list[Weight]:
    """Names of Meta's code, whose queries and keys are laid out for interleaved rotation."""
    stack = config.transformer
    layers, H, G = stack.num_layers, stack.num_heads, stack.kv_heads
    path, name = ("transformer", "layers"), "layers.{layer}."
    attention, mlp = (*path, "attention"), (*path, "mlp")
    rope = dict(ours=stack.rope.layout, theirs=RopeLayout.INTERLEAVED, layers=layers)
    head = [linear(("head", "kernel"), "output.weight")]
    return [
        same(("embed", "table"), "tok_embeddings.weight"),
        same((*path, "attention_norm", "weight"), name + "attention_norm.weight", layers=layers),
        heads_in((*attention, "query"), name + "attention.wq.weight", H, **rope),
        heads_in((*attention, "key"), name + "attention.wk.weight", G, **rope),
        heads_in((*attention, "value"), name + "attention.wv.weight", G, layers=layers),
        heads_out((*attention, "out"), name + "attention.wo.weight", H, layers=layers),
        same((*path, "mlp_norm", "weight"), name + "ffn_norm.weight", layers=layers),
        linear((*mlp, "gate"), name + "feed_forward.w1.weight", layers=layers),
        linear((*mlp, "up"), name + "feed_forward.w3.weight", layers=layers),
        linear((*mlp, "down"), name + "feed_forward.w2.weight", layers=layers),
        same(("norm", "weight"), "norm.weight"),
        *([] if config.tied_embeddings else head),
    ]


def load_meta(
    path: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a folder with params.json and safetensors under Meta's names.

    The embeddings are tied if there is no output.weight; a stored table of rotary frequencies is
    ignored. Pickled `.pth` files are refused with the way to convert them.
    """
    path = pathlib.Path(path)
    with TensorFiles(path) as files:
        stored = set(files.shapes) - {"rope.freqs"}
        attributes = read_json(path / "params.json")
        config = read_params_json(attributes, tied_embeddings="output.weight" not in stored)
        model, table = config.build(sharding), meta_table(config)
        check_names(foreign_shapes(table, model), stored, path)
        dtype = None if dtype is None else np.dtype(dtype)
        return model, read_params(files, table, model, mesh=mesh, dtype=dtype)
