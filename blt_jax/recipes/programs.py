"""The programs of a run that `blt_jax.compile` compiles: train step, prefill, decode step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from blt_jax.decoding.decoder import token_decoder
from blt_jax.dist.mesh import AXES, MeshConfig
from blt_jax.dist.sharding import ShardingRules, param_shardings
from blt_jax.layers.cache import LayerCache
from blt_jax.layers.model import Model
from blt_jax.models.blt_config import BLTConfig
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.train import compilation
from blt_jax.train.compilation import Job
from blt_jax.train.memory import bytes_per_device


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
        return _inference_job(
            models, prefill, (tokens, lengths), mesh, tokens=batch * length, context=length
        )

    def step(*arguments):
        *params, tokens, cache = arguments
        return create(*params).step(tokens, cache)

    shapes = [compilation.state_lib.abstract_params(x) for x in models]
    with jax.sharding.use_abstract_mesh(_one_device(mesh)):
        _, cache = jax.eval_shape(prefill, *shapes, tokens, lengths)
    job = _inference_job(models, step, (lengths, cache), mesh, tokens=batch, context=2 * length)
    # As in a loop of steps: the cache is changed in place and stays where it lies.
    *_, cache = job.arguments
    kept = jax.tree.map(lambda x: x.sharding, cache)
    last = len(job.arguments) - 1
    return dataclasses.replace(job, donated=(last,), out_shardings=(None, kept))


def _one_device(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """A mesh of one device of this kind: types depend on the platform, shapes not on the mesh."""
    return AbstractMesh(
        (1,) * len(AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        abstract_device=mesh.abstract_mesh.abstract_device,
    )


def _inference_job(
    models: tuple[Model, ...],
    function: Callable,
    inputs: tuple,
    mesh: Mesh | AbstractMesh,
    *,
    tokens: int,
    context: int,
) -> Job:
    """`function(*params, *inputs)`, the parameters of every model as they lie in training."""
    params = [
        compilation.placed(compilation.state_lib.abstract_params(x), param_shardings(x, mesh))
        for x in models
    ]
    inputs = _placed_inputs(inputs, models[0].sharding, mesh)

    def size(tree):
        return bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))

    return Job(
        function=function,
        arguments=(*params, *inputs),
        out_shardings=None,
        donated=(),
        mesh=mesh,
        sizes={"parameters": size(params), "inputs": size(inputs)},
        model_flops=sum(x.flops_per_token(context) for x in models) * tokens,
        tokens=tokens,
        model=models[0],
        levers=("a smaller --batch", "a smaller --length", "more devices along fsdp or tensor"),
    )


def _placed_inputs(inputs: Any, rules: ShardingRules, mesh: Mesh | AbstractMesh) -> Any:
    """The inputs with shardings: rows, which come first in every array, are divided as `batch`, the
    heads of kept keys and values as `kv_heads`; what cannot be divided is whole everywhere."""

    def place(x, names):
        names = (names + (None,) * x.ndim)[: x.ndim]
        axes = (
            entry if size % _parts(entry, mesh) == 0 else None
            for size, entry in zip(x.shape, rules.spec(names), strict=True)
        )
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place_all(node):
        names = ("batch", "kv_heads") if isinstance(node, LayerCache) else ("batch",)
        return jax.tree.map(lambda x: place(x, names), node)

    return jax.tree.map(place_all, inputs, is_leaf=lambda node: isinstance(node, LayerCache))


def _parts(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


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
