"""The programs of a run that `blt_jax.compile` compiles: train step, prefill, decode step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blt_jax.decoding.decoder import token_decoder
from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.model import Model
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
    models = (model, *_entropy_models(model, options.config))
    create = _decoder(models, options.config, length)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def prefill(*arguments):
        *params, tokens, lengths = arguments
        return create(*params).prefill(tokens, lengths)

    if options.program == "prefill":
        return compilation.inference_job(
            models, prefill, (tokens, lengths), mesh, tokens=batch * length, context=length
        )

    def step(*arguments):
        *params, tokens, cache = arguments
        return create(*params).step(tokens, cache)

    shapes = map(compilation.state_lib.abstract_params, models)
    _, cache = jax.eval_shape(prefill, *shapes, tokens, lengths)
    return compilation.inference_job(
        models, step, (lengths, cache), mesh, tokens=batch, context=2 * length
    )


def _entropy_models(model: Model, experiment: Any) -> tuple[Model, ...]:
    """The model that decides over patches beside a BLT, if its patcher asks one."""
    if not isinstance(model.config, BLTConfig) or not experiment.patcher.needs_model:
        return ()
    training = experiment.entropy_model
    if training is None:
        raise ValueError(
            f"--program=prefill and decode: patcher {experiment.patcher.kind.name} needs the "
            "config's entropy_model, which is None"
        )
    return (training.model.build(training.sharding),)


def _decoder(models: tuple[Model, ...], experiment: Any, capacity: int) -> Callable:
    """(params of each model) -> Decoder."""
    model = models[0]
    if not isinstance(model.config, BLTConfig):
        return lambda params: token_decoder(model, params, capacity)
    # Any threshold gives the same program; those of the run are known once it is calibrated.
    patcher = dataclasses.replace(experiment.patcher, threshold=1.0, relative_threshold=1.0)
    if len(models) == 1:
        return lambda params: BLTDecoder.create(model, params, patcher, capacity)
    return lambda params, entropy: BLTDecoder.create(
        model, params, patcher, capacity, models[1], entropy
    )
