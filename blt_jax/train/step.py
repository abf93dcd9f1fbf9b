"""One optimizer step: gradients of sums over micro-batches, divided once, then the update."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.model import LossSums
from blt_jax.train.optimizer import OptimizerConfig, multipliers, path_name
from blt_jax.train.state import Averaging, AveragingConfig, TrainState, update_average

LossFunction = Callable[[Any, dict[str, jax.Array], jax.Array], LossSums]


def batch_sharding(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> NamedSharding:
    """Sharding of a batch [accumulation, rows, ...]: rows over the axes of `batch`."""
    return NamedSharding(mesh, PartitionSpec(None, *rules.spec(("batch",))))


def row_parts(sharding: NamedSharding) -> int:
    """Into how many parts the rows of a batch are divided."""
    axes = sharding.spec[1] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([sharding.mesh.shape[axis] for axis in axes], initial=1))


def _own_parts(sharding: NamedSharding) -> list[int]:
    """The parts of the rows that lie on this process."""
    rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[1]))
    slices = rows.addressable_devices_indices_map((row_parts(sharding),)).values()
    return sorted({index[0].start or 0 for index in slices})


def check_rows(rows: int, accumulation: int, sharding: NamedSharding) -> None:
    """Raises ValueError if `rows` cannot be divided over micro-batches and devices."""
    parts = row_parts(sharding)
    if rows % (accumulation * parts):
        raise ValueError(
            f"batch of {rows} rows cannot be divided into {accumulation} micro-batches over "
            f"{parts} devices (mesh {dict(sharding.mesh.shape)}): change batch_size, "
            "accumulation or the mesh"
        )


def process_rows(batch_size: int, sharding: NamedSharding) -> Sequence[int]:
    """Which rows of a batch the devices of this process hold, in increasing order.

    All of them where the batch axes of the mesh do not reach over several processes. Raises
    ValueError if the rows cannot be divided over the devices.
    """
    if jax.process_count() == 1:
        return range(batch_size)
    check_rows(batch_size, 1, sharding)
    size = batch_size // row_parts(sharding)
    return [part * size + row for part in _own_parts(sharding) for row in range(size)]


def put_batch(
    batch: dict[str, np.ndarray], accumulation: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """The rows of this process (see `process_rows`) as global arrays [accumulation, rows, ...].

    Micro-batch a holds the rows a, a + accumulation, ... of the batch on any number of processes.
    Raises ValueError if the rows cannot be divided over micro-batches and devices.
    """
    parts, own = row_parts(sharding), len(_own_parts(sharding))
    placed = {}
    for name, value in batch.items():
        rows = value.shape[0] * parts // own
        check_rows(rows, accumulation, sharding)
        value = value.reshape(-1, accumulation, *value.shape[1:]).swapaxes(0, 1)
        shape = (accumulation, rows // accumulation, *value.shape[2:])
        placed[name] = jax.make_array_from_process_local_data(sharding, value, shape)
    return placed


def _add(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


def accumulate_gradients(
    loss: LossFunction, params: Any, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[Any, LossSums]:
    """Gradient of the summed objective and the sums, over micro-batches [A, B, ...].

    The gradients are float32 sums; the caller divides by `sums.weight` once.
    """

    def objective(params, micro_batch, key):
        sums = loss(params, micro_batch, key)
        return sums.objective, sums

    gradient = jax.grad(objective, has_aux=True)
    accumulation = next(iter(batch.values())).shape[0]
    if accumulation == 1:
        return gradient(params, jax.tree.map(lambda x: x[0], batch), key)

    def body(carry, inputs):
        micro_batch, key = inputs
        return _add(carry, gradient(params, micro_batch, key)), None

    keys = jax.random.split(key, accumulation)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, first, keys[0]),
    )
    totals, _ = jax.lax.scan(body, zeros, (batch, keys))
    return totals


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    learning_rate: Callable[[jax.Array], jax.Array],
    averaging: AveragingConfig,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function (state, batch [A, B, ...]) -> (state, metrics); not jitted.

    metrics: float32 scalars: `objective`, `weight` and the model's sums, and `gradient_norm`
    (before clipping), `parameter_norm` (after the step), `learning_rate`.
    """

    def step(state: TrainState, batch: dict[str, jax.Array]):
        factors = multipliers(config, state.params)
        trained = jax.tree.map(bool, factors)

        def masked_loss(params, micro_batch, key):
            # Gradients of frozen parameters are zeros that the compiler never computes.
            params = jax.tree.map(
                lambda p, t: p if t else jax.lax.stop_gradient(p), params, trained
            )
            return loss(params, micro_batch, key)

        key = jax.random.fold_in(state.key, state.step)
        gradients, sums = accumulate_gradients(masked_loss, state.params, batch, key)
        with jax.named_scope("update"):
            scale = 1.0 / jnp.maximum(sums.weight, 1.0)
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
            # optax mixes Python powers with integer counts.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            done = state.step + 1
            average = state.average
            if averaging.kind is not Averaging.OFF:
                average = update_average(average, params, done, averaging)
        metrics = {
            "objective": sums.objective,
            "weight": sums.weight,
            **sums.metrics,
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": learning_rate(state.step),
        }
        new_state = TrainState(
            step=done, params=params, opt_state=opt_state, key=state.key, average=average
        )
        return new_state, metrics

    return step


def compile_step(step: Callable, state: TrainState, shardings: TrainState, batch: Any, mesh: Mesh):
    """The step compiled for these shapes; the state's buffers are donated."""
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.lower(state, batch).compile()


def is_embedding(name: str) -> bool:
    """True for parameter paths of embedding tables (token, byte, position, hash n-gram)."""
    return re.search(r"embed|ngram|table", name) is not None


def parameter_table(params: Any) -> tuple[str, int, int]:
    """Text table of parameters, number of all, and number of those that are not embeddings."""
    rows, total, rest = [], 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, size = path_name(path), int(np.prod(leaf.shape))
        total += size
        rest += 0 if is_embedding(name) else size
        rows.append((name, "x".join(map(str, leaf.shape)) or "scalar", f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.append(f"  parameters {total:,}, without embeddings {rest:,}")
    return "\n".join(lines), total, rest
