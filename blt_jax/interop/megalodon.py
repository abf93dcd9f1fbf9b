"""Megalodon folders of its authors' code in and out, with safetensors in place of pickles.

config.json               {"model": options of the model, ...}
consolidate_config.json   {"model_parallel_size": ranks, ...}, absent for one rank
model.safetensors         the state dict of one rank, or shards of it with their index
consolidated.00.safetensors ...   instead: one file per model-parallel rank
"""

import json
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules
from blt_jax.interop.foreign_config import ForeignConfig, read_json
from blt_jax.interop.tensor_files import SplitFiles, TensorFiles, check_names, write_tensors
from blt_jax.interop.weights import (
    Weight,
    foreign_reader,
    foreign_shapes,
    heads_in,
    heads_out,
    linear,
    read_params,
    reshaped,
    same,
)
from blt_jax.layers.model import Model
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.models.megalodon_config import (
    AttentionDropout,
    EmaKind,
    GateKind,
    MegalodonConfig,
    NormKind,
    ResidualKind,
    WeightInit,
)

CONFIG, RANKS = "config.json", "consolidate_config.json"

SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_layers",
    "model_dim": "d_model",
    "num_heads": "num_heads",
    "z_dim": "qk_dim",
    "value_dim": "value_dim",
    "ffn_hidden_dim": "mlp_dim",
    "cema_ndim": "state_size",
    "chunk_size": "chunk_size",
    "norm_num_groups": "norm_groups",
}
"""Their integers, each of which a file must give, and ours."""

OPTIONS = {
    "norm_eps": ("norm_eps", float, 1e-5),
    "swiglu": ("swiglu", bool, False),
    "rescale_nffn": ("rescale_mlp", bool, False),
    "scale_emb": ("scale_embeddings", bool, False),
    "share_emb": ("tied_embeddings", bool, False),
    "dropout": ("dropout", float, 0.0),
    "hidden_dropout": ("hidden_dropout", float, 0.0),
    "attention_dropout": ("attention_dropout", float, 0.0),
}
"""Their other options: our name, type and their default."""

# ------------------------------------------------------------------------------------ config


def read_megalodon(attributes: dict[str, Any]) -> MegalodonConfig:
    """MegalodonConfig of the `model` section of config.json; ValueError for unknown options."""
    # The other sections are of training: data, optimiser, the cluster.
    where = f"{CONFIG}.model"
    with ForeignConfig(where, attributes.get("model")) as config:
        config.ignore("layerwise_ckpt")
        config.require(norm_affine=True)
        ours = {name: config.take(key, int) for key, name in SIZES.items()}
        ours |= {name: config.take(key, *rest) for key, (name, *rest) in OPTIONS.items()}
        output_size = config.take("output_size", int, -1)
        if output_size not in (-1, ours["vocab_size"]):
            raise ValueError(
                f"{where}: output_size={output_size} is not supported, only vocab_size or -1"
            )
        kind = config.take("init_mode", str, "he")
        allowed = {member.value: member for member in WeightInit} | {"none": WeightInit.HE}
        if kind not in allowed:
            raise ValueError(f"{where}: init_mode={kind!r}: allowed are {sorted(allowed)}")
        # The fused attention drops keys, the plain one weights.
        fused = config.take("efficient_attn", str, None) is not None
        return MegalodonConfig(
            **ours,
            rope=RopeConfig(theta=config.take("rope_base", float, 10_000.0)),
            initialization=allowed[kind],
            attention_dropout_kind=AttentionDropout.KEYS if fused else AttentionDropout.WEIGHTS,
        )


def write_megalodon(config: MegalodonConfig) -> dict[str, Any]:
    """config.json of a model; ValueError for options that the authors' code does not have."""
    plain = {
        "attention_window": 0,
        "prior_count": 0,
        "ema": EmaKind.COMPLEX,
        "norm": NormKind.TIMESTEP,
        "residual": ResidualKind.TWO_HOP,
        "gate": GateKind.MEGALODON,
        "input_phase": False,
        "rope": RopeConfig(theta=config.rope.theta, layout=RopeLayout.INTERLEAVED),
    }
    for name, only in plain.items():
        value = getattr(config, name)
        if value != only:
            raise ValueError(f"MegalodonConfig.{name}={value}: the authors' code has {only} alone")
    fused = config.attention_dropout_kind is AttentionDropout.KEYS
    return {
        "model": {key: getattr(config, name) for key, name in SIZES.items()}
        | {key: getattr(config, name) for key, (name, *_) in OPTIONS.items()}
        | {
            "rope_base": config.rope.theta,
            "init_mode": config.initialization.value,
            "efficient_attn": "fused" if fused else None,
        }
    }


# ------------------------------------------------------------------------------------ tensors


def megalodon_table(config: MegalodonConfig) -> list[Weight]:
    """Names of the authors' state dict; both codes rotate interleaved pairs."""
    D, N, H = config.d_model, config.state_size, config.num_heads
    E, J, K, Z = config.value_dim, config.value_width, config.head_dim, config.qk_dim

    def layer(make, ours, theirs, *shape, **options):
        name = "layers.{layer}." + theirs
        return make(("layers", ours), name, *shape, layers=config.num_layers, **options)

    gamma, parts = "mega.cema.gamma", ("ema_gamma_re", "ema_gamma_im")
    table = [
        same(("embed", "table"), "embed.weight"),
        layer(same, "norm_weight", "mega.timenorm.weight"),
        layer(same, "norm_bias", "mega.timenorm.bias"),
        layer(reshaped, "ema_alpha", "mega.cema.alpha", (D, N), (D, N, 1)),
        layer(reshaped, "ema_delta", "mega.cema.delta", (D, N), (D, N, 1)),
        layer(reshaped, "ema_theta", "mega.cema.theta", (D,), (D, 1, 1)),
        # Real and imaginary parts are one tensor there.
        *(
            layer(reshaped, part, gamma, (D, N), (D, N, 1), start=i, axis=2)
            for i, part in enumerate(parts)
        ),
        layer(reshaped, "ema_omega", "mega.cema.omega", (D,), (D, 1)),
        layer(same, "ema_norm_weight", "mega.rmsnorm.weight"),
        layer(heads_in, "z_kernel", "mega.wz.weight", H),
        layer(reshaped, "z_bias", "mega.wz.bias", (H, K), (Z,)),
        layer(reshaped, "qk_gain", "mega.gamma", (2, H, K), (2, Z)),
        layer(reshaped, "qk_offset", "mega.beta", (2, H, K), (2, Z)),
        layer(heads_in, "value_kernel", "mega.wv.weight", H),
        layer(reshaped, "value_bias", "mega.wv.bias", (H, J), (E,)),
        layer(heads_in, "gate_kernel", "mega.wr.weight", H),
        layer(reshaped, "gate_bias", "mega.wr.bias", (H, J), (E,)),
        layer(linear, "hidden_kernel", "mega.wh1.weight"),
        layer(same, "hidden_bias", "mega.wh1.bias"),
        layer(heads_out, "out_kernel", "mega.wh2.weight", H),
        layer(same, "mlp_norm_weight", "nffn.norm.weight"),
        layer(same, "mlp_norm_bias", "nffn.norm.bias"),
        layer(linear, "mlp_gate", "nffn.fc1.weight"),
        layer(linear, "mlp_down", "nffn.fc2.weight"),
        same(("norm_weight",), "output.final_norm.weight"),
        same(("norm_bias",), "output.final_norm.bias"),
    ]
    if config.swiglu:
        table.append(layer(linear, "mlp_up", "nffn.fc3.weight"))
    if config.rescale_mlp:
        table.append(layer(same, "mlp_scale", "nffn.alpha"))
    if not config.tied_embeddings:
        table.append(linear(("head", "kernel"), "output.output.weight"))
    return table


COUNT = "prior_count"
RANK_AXIS = dict.fromkeys(
    ("timenorm", "final_norm", "cema", "wz", "wv", "wr", "wh1", "fc1", "fc3"), 0
) | dict.fromkeys(("embed", "output", "mega", "wh2", "fc2"), 1)
"""Module that owns a tensor -> the axis along which model-parallel ranks hold its parts, where they
do; the other tensors, and the counts of the norms, are the same on every rank."""

PROJECTIONS = ("embed", "output", "wz", "wv", "wr", "wh1", "wh2", "fc1", "fc2", "fc3")
"""Modules whose tensors may have a narrow type; the others are float32 in the authors' code."""


def _module(name: str) -> str:
    return name.split(".")[-2]


def constants(config: MegalodonConfig) -> dict[str, np.ndarray]:
    """What a state dict holds besides parameters: rotary frequencies, and norms without priors."""
    K, zeros = config.head_dim, np.zeros(config.norm_groups, np.float32)
    frequencies = config.rope.theta ** (-np.arange(0, K, 2, dtype=np.float64) / K)
    norms = [f"layers.{i}.mega.timenorm" for i in range(config.num_layers)]
    values = {"rope.freqs": frequencies.astype(np.float32)}
    for norm in (*norms, "output.final_norm"):
        values |= {f"{norm}.{COUNT}": np.zeros((), np.int64)}
        values |= {f"{norm}.prior_mean": zeros, f"{norm}.prior_logv": zeros}
    return values


def rank_axis(name: str) -> int | None:
    """The axis along which model-parallel ranks hold parts of a tensor, None for all of it."""
    if name.endswith(COUNT) or "." not in name:
        return None
    return RANK_AXIS.get(_module(name))


# ------------------------------------------------------------------------------------ folders


def load_megalodon(
    path: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a folder of the authors' code whose pickles were made safetensors.

    dtype: of the parameters; None keeps that of the files. With a mesh the params are sharded by
    `sharding`. Raises ValueError naming every unknown option and every missing, unexpected or
    misshapen tensor, and for priors, rotary frequencies or tied tables other than config.json
    says; FileNotFoundError for missing files.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    config = read_megalodon(read_json(path / CONFIG))
    ranks = 1
    if (path / RANKS).exists():
        ranks = read_json(path / RANKS).get("model_parallel_size")
        if type(ranks) is not int or ranks < 1:
            raise ValueError(f"{path / RANKS}: model_parallel_size={ranks!r}: must be >= 1")
    model, table, fixed = config.build(sharding), megalodon_table(config), constants(config)
    if ranks == 1:
        files = TensorFiles(path, counters=(COUNT,))
    else:
        parts = [f"consolidated.{rank:02d}.safetensors" for rank in range(ranks)]
        files = SplitFiles(path, parts, rank_axis, counters=(COUNT,))
    with files:
        names = {*foreign_shapes(table, model), *fixed, "output.output.weight"}
        check_names(names, files.shapes, path)
        for name, value in fixed.items():
            stored = files.read(name).astype(np.float32)
            if stored.shape != value.shape or not np.allclose(stored, value, rtol=1e-5, atol=0):
                raise ValueError(f"{path}: {name} is {stored}, the config says {value}")
        if config.tied_embeddings:
            table_and_head = (files.read(n) for n in ("embed.weight", "output.output.weight"))
            if not np.array_equal(*table_and_head):
                raise ValueError(
                    f"{path}: share_emb=True, but output.output.weight is not embed.weight"
                )
        dtype = None if dtype is None else np.dtype(dtype)
        return model, read_params(files, table, model, mesh=mesh, dtype=dtype)


def save_megalodon(
    model: Model,
    params: dict[str, Any],
    path: str | pathlib.Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = np.float32,
) -> None:
    """Writes config.json and safetensors under the names of the authors' code, as one rank.

    dtype: of embeddings and projections; the other tensors stay float32. Raises ValueError for a
    model that the authors' code does not have, FileExistsError if weights are already there.
    """
    if not isinstance(model.config, MegalodonConfig):
        raise ValueError(f"{type(model.config).__name__}: only a MegalodonConfig can be written")
    config, path = model.config, pathlib.Path(path)
    attributes, table, fixed = write_megalodon(config), megalodon_table(config), constants(config)
    read_param = foreign_reader(table, params)

    def read(name: str) -> np.ndarray:
        tied = config.tied_embeddings and name == "output.output.weight"
        return fixed[name] if name in fixed else read_param("embed.weight" if tied else name)

    shapes = foreign_shapes(table, model) | {name: value.shape for name, value in fixed.items()}
    shapes.setdefault("output.output.weight", shapes["embed.weight"])
    own = {n: np.dtype(np.float32) for n in shapes if _module(n) not in PROJECTIONS}
    own |= {name: value.dtype for name, value in fixed.items()}
    write_tensors(path, shapes, read, np.dtype(dtype), max_shard_bytes, own)
    (path / CONFIG).write_text(json.dumps(attributes, indent=2, sort_keys=True) + "\n")
