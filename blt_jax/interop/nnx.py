"""Our linen modules inside flax.nnx programs.

`nnx.bridge.ToNNX(model).lazy_init(...)` fails outside a mesh, because it applies the logical axis
names that our modules carry. The recipe: make the params here, sharded or not, and hand them over.

    model, params = load_pretrained(path)         # or config.build() and init_params
    llama = to_nnx(model, params)
    logits = llama(tokens).logits                 # works under nnx.jit, nnx.grad, nnx.split
"""

from typing import Any

import flax.linen as nn
from flax import nnx
from flax.nnx.bridge import variables


def to_nnx(model: nn.Module, params: dict[str, Any]) -> nnx.Module:
    """An nnx module that computes `model.apply({"params": params}, ...)`; its Params are ours."""
    module = nnx.bridge.ToNNX(model)
    for name, value in variables.linen_vars_to_nnx_attrs({"params": params}).items():
        setattr(module, name, nnx.data(value))
    return module


def from_nnx(module: nnx.Module) -> dict[str, Any]:
    """The params of a module made by `to_nnx`, as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
