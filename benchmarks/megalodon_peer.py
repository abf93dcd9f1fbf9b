"""The peer of the Megalodon benchmarks and parity tests: megalodon-jax 0.2.1 (Equinox), with our
weights carried over."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from blt_jax.interop.megalodon import megalodon_table
from blt_jax.interop.weights import foreign_reader, foreign_shapes

ITS_PARTS = {
    "output.final_norm": "model.norm",
    "output.output": "lm_head",
    "rmsnorm.weight": "rmsnorm.gamma",
    "layers.": "model.layers.",
    "embed.": "model.embed.",
    ".mega.": ".attn.",
    ".nffn.": ".ffn.",
}
"""Parts of the names of the authors' state dict as the peer has them."""


@contextlib.contextmanager
def its_settings():
    """Promotion as the peer needs it, where tests are strict."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def carried_over(tree: Any, params: dict[str, Any], config: Any) -> Any:
    """`tree` (the peer's model, or its gradient) with our parameters (or gradients) in it."""
    table = megalodon_table(config)
    read = foreign_reader(table, params)
    for name in foreign_shapes(table, config.build()):
        value, path = jnp.asarray(read(name)), name
        for theirs, its in ITS_PARTS.items():
            path = path.replace(theirs, its)
        if name.endswith("cema.gamma"):
            for i, part in enumerate(("real", "imag")):
                tree = _put(tree, f"{path}_{part}", value[..., i])
        else:
            tree = _put(tree, path, value)
    return tree


def _put(tree: Any, path: str, value: jax.Array) -> Any:
    import equinox as eqx

    def where(tree):
        for part in path.split("."):
            tree = tree[int(part)] if part.isdigit() else getattr(tree, part)
        return tree

    return eqx.tree_at(where, tree, jnp.reshape(value, where(tree).shape))


def fresh_peer(config: Any) -> Any:
    """The peer's model for our config, with its own parameters."""
    import megalodon_jax

    theirs = megalodon_jax.MegalodonConfig(
        vocab_size=config.vocab_size,
        model_dim=config.d_model,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        z_dim=config.qk_dim,
        value_dim=config.value_dim,
        ffn_hidden_dim=config.mlp_dim,
        cema_ndim=config.state_size,
        chunk_size=config.chunk_size,
        attention_window=config.attention_window or None,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        rope_base=config.rope.theta,
        swiglu=config.swiglu,
        rescale_nffn=config.rescale_mlp,
        scale_emb=config.scale_embeddings,
        share_emb=config.tied_embeddings,
    )
    return megalodon_jax.MegalodonForCausalLM(theirs, key=jax.random.key(0))


def make_peer(config: Any, params: dict[str, Any]) -> Any:
    """The peer's model for our config, with our parameters."""
    return carried_over(fresh_peer(config), params, config)
