"""The peer of the Megalodon benchmarks and parity tests: megalodon-jax 0.2.1 (Equinox), with our
weights carried over."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

LAYER_NAMES = {
    "norm_weight": "attn.timenorm.weight",
    "norm_bias": "attn.timenorm.bias",
    "ema_alpha": "attn.cema.alpha",
    "ema_delta": "attn.cema.delta",
    "ema_theta": "attn.cema.theta",
    "ema_gamma_re": "attn.cema.gamma_real",
    "ema_gamma_im": "attn.cema.gamma_imag",
    "ema_omega": "attn.cema.omega",
    "ema_norm_weight": "attn.rmsnorm.gamma",
    "z_kernel": "attn.wz.weight",
    "z_bias": "attn.wz.bias",
    "qk_gain": "attn.gamma",
    "qk_offset": "attn.beta",
    "value_kernel": "attn.wv.weight",
    "value_bias": "attn.wv.bias",
    "gate_kernel": "attn.wr.weight",
    "gate_bias": "attn.wr.bias",
    "hidden_kernel": "attn.wh1.weight",
    "hidden_bias": "attn.wh1.bias",
    "out_kernel": "attn.wh2.weight",
    "mlp_norm_weight": "ffn.norm.weight",
    "mlp_norm_bias": "ffn.norm.bias",
    "mlp_gate": "ffn.fc1.weight",
    "mlp_up": "ffn.fc3.weight",
    "mlp_down": "ffn.fc2.weight",
    "mlp_scale": "ffn.alpha",
}


@contextlib.contextmanager
def its_settings():
    """Promotion as the peer needs it, where tests are strict."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def carried_over(tree: Any, params: dict[str, Any], num_layers: int) -> Any:
    """`tree` (the peer's model, or its gradient) with our parameters (or gradients) in it."""
    tree = _put(tree, "model.embed.weight", params["embed"]["table"])
    for part in ("weight", "bias"):
        tree = _put(tree, f"model.norm.{part}", params[f"norm_{part}"])
    if "head" in params:
        tree = _put(tree, "lm_head.weight", params["head"]["kernel"].T)
    for name, stacked in params["layers"].items():
        for layer in range(num_layers):
            value = stacked[layer]
            if name.endswith("kernel") or name in ("mlp_gate", "mlp_up", "mlp_down"):
                rows = value.size // value.shape[-1] if name == "out_kernel" else value.shape[0]
                value = value.reshape(rows, -1).T
            tree = _put(tree, f"model.layers.{layer}.{LAYER_NAMES[name]}", value)
    return tree


def _put(tree: Any, path: str, value: jax.Array) -> Any:
    import equinox as eqx

    def where(tree):
        for part in path.split("."):
            tree = tree[int(part)] if part.isdigit() else getattr(tree, part)
        return tree

    return eqx.tree_at(where, tree, jnp.reshape(value, where(tree).shape))


def make_peer(config: Any, params: dict[str, Any]) -> Any:
    """The peer's model for our config, with our parameters."""
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
    model = megalodon_jax.MegalodonForCausalLM(theirs, key=jax.random.key(0))
    return carried_over(model, params, config.num_layers)
