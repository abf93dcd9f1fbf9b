"""The training state: what a checkpoint holds, how it is made, where it lies on the mesh."""

import dataclasses
import enum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from blt_jax.dist.sharding import init_params, param_shapes, param_shardings
from blt_jax.layers.model import Model
from blt_jax.train.optimizer import opt_state_shardings


class Averaging(enum.Enum):
    """Parameter averaging during training."""

    OFF = "off"
    UNIFORM = "uniform"  # Polyak: the mean of all samples
    EMA = "ema"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AveragingConfig:
    """Average of the parameters after step `start`, `start + every`, ... in float32.

    start: -1 for the first step of the last phase. decay: of the EMA, per sample.
    """

    kind: Averaging = Averaging.OFF
    start: int = -1
    every: int = 1
    decay: float = 0.999

    def __post_init__(self):
        if self.start < -1:
            raise ValueError(f"AveragingConfig.start={self.start}: must be >= 0, or -1")
        if self.every < 1:
            raise ValueError(f"AveragingConfig.every={self.every}: must be >= 1")
        if not 0 < self.decay < 1:
            raise ValueError(f"AveragingConfig.decay={self.decay}: must be in (0, 1)")


@flax.struct.dataclass
class Average:
    """Running average of parameters: `params` in float32, `count` samples (int32 scalar)."""

    params: Any
    count: Any


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    step: int32 scalar, steps done; params, opt_state: trees; key: typed PRNG key, constant: step
    s uses fold_in(key, s); average: `Average`, or None when averaging is off.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any
    average: Any


def update_average(average: Average, params: Any, step: jax.Array, config: AveragingConfig):
    """The average after step number `step` (steps done so far, int32 scalar)."""
    due = (step >= config.start) & ((step - config.start) % config.every == 0)

    def take(average):
        count = average.count + 1
        if config.kind is Averaging.UNIFORM:
            weight = 1.0 / count.astype(jnp.float32)
        else:  # the first sample starts the average
            weight = jnp.where(count == 1, 1.0, 1.0 - config.decay)
        mean = jax.tree.map(
            lambda m, p: m + (p.astype(jnp.float32) - m) * weight, average.params, params
        )
        return Average(params=mean, count=count)

    return jax.lax.cond(due, take, lambda average: average, average)


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, averaging: AveragingConfig
) -> TrainState:
    """State before the first step, for given parameters."""
    average = None
    if averaging.kind is not Averaging.OFF:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        average = Average(params=zeros, count=jnp.zeros((), jnp.int32))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        average=average,
    )


def abstract_params(model: Model) -> Any:
    """Shapes and types of the parameters of `model`; nothing is allocated."""
    return param_shapes(model)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, averaging: AveragingConfig
) -> TrainState:
    """Shapes and types of the state; nothing is allocated."""
    params = abstract_params(model)
    return jax.eval_shape(
        lambda p: initial_state(p, optimizer, jax.random.key(0), averaging), params
    )


def state_shardings(
    model: Model,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """Shardings of every leaf of the state: moments and averages lie as their parameters."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(model, mesh)
    average = abstract.average
    if average is not None:
        average = Average(params=params, count=replicated)
    return TrainState(
        step=replicated,
        params=params,
        opt_state=opt_state_shardings(optimizer, abstract.opt_state, params, replicated),
        key=replicated,
        average=average,
    )


def create_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    averaging: AveragingConfig,
    key: jax.Array,
    mesh: Mesh,
    params: Any = None,
) -> TrainState:
    """A new state, created sharded on `mesh`; from `params` if given, else from `key`."""
    init_key, step_key = jax.random.split(key)
    shardings = state_shardings(model, optimizer, abstract_state(model, optimizer, averaging), mesh)
    if params is None:
        params = init_params(model, init_key, mesh)
    else:
        # A copy: the step donates its buffers, and the caller keeps the given parameters.
        params = jax.tree.map(jnp.copy, jax.device_put(params, shardings.params))
    with jax.set_mesh(mesh):
        make = jax.jit(
            lambda params, key: initial_state(params, optimizer, key, averaging),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return make(params, step_key)
