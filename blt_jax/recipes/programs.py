"""The programs of a run that `blt_jax.compile` compiles: train step, prefill, decode step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blt_jax.decoding.decoder import token_decoder
from blt_jax.dist.mesh import MeshConfig
from blt_jax.models.blt_config import BLTConfig
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.train import compilation
from blt_jax.train.compilation import Job


def make_job(options: Any, make_mesh: Callable[[MeshConfig], Any]) -> Job:
    """The job of the flags of `blt_jax.compile`; make_mesh: of devices that are not here.

    Raises ValueError for what the run does not have.
    """
    mesh = make_mesh(options.config.mesh)
    prefix, config = compilation.select_part(options.config, options.part)
    phase = compilation.select_phase(config, options.phase)
    if options.program == "train":
        return compilation.train_job(config, phase, mesh, prefix)
    model = (phase.model or config.model).build(config.sharding)
    length = options.length or config.phase_data(phase).sequence_length
    batch = options.batch or mesh.size
    create = _decoder(model, options.config, length)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def prefill(params, tokens, lengths):
        return create(params).prefill(tokens, lengths)

    if options.program == "prefill":
        return compilation.inference_job(
            model, prefill, (tokens, lengths), mesh, tokens=batch * length, context=length
        )

    def step(params, tokens, cache):
        return create(params).step(tokens, cache)

    shapes = compilation.state_lib.abstract_params(model)
    _, cache = jax.eval_shape(prefill, shapes, tokens, lengths)
    return compilation.inference_job(
        model, step, (lengths, cache), mesh, tokens=batch, context=2 * length
    )


def _decoder(model, experiment, capacity: int):
    if not isinstance(model.config, BLTConfig):
        return lambda params: token_decoder(model, params, capacity)
    if experiment.patcher.needs_entropies:
        raise ValueError(
            "--program=prefill and decode of a BLT need a patcher without an entropy model: "
            "--config.patcher.kind=STRIDED"
        )
    return lambda params: BLTDecoder.create(model, params, experiment.patcher, capacity)
