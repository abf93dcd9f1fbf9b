"""Accumulation by sums, averages, FLOP counts, memory check, step metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules, init_params
from blt_jax.train import flops, memory, state, step
from blt_jax.train.optimizer import OptimizerConfig, ParameterGroup, make_optimizer
from tests.train.tiny_model import TinyConfig


def _batch(rows=8, length=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 260, size=(rows, length)).astype(np.int32)
    # Very different numbers of targets per row: averaging averages would show.
    mask = np.arange(length)[None, :] < rng.integers(1, length, size=(rows, 1))
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "target_mask": mask,
        "target_bytes": np.ones_like(tokens),
    }


def _one_device_mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def _one_step(accumulation, optimizer_config=None):
    config = optimizer_config or OptimizerConfig(epsilon=1e-3)
    model, mesh = TinyConfig().build(), _one_device_mesh()

    def learning_rate(count):
        return jnp.float32(1e-2)

    optimizer = make_optimizer(config, state.abstract_params(model), learning_rate)
    averaging = state.AveragingConfig()
    start = state.create_state(model, optimizer, averaging, jax.random.key(0), mesh)
    function = step.make_train_step(model.loss, optimizer, config, learning_rate, averaging)
    batch = step.put_batch(_batch(), accumulation, step.batch_sharding(mesh, ShardingRules()))
    with jax.set_mesh(mesh):
        return start, *jax.jit(function)(start, batch)


def test_accumulation_equals_the_large_batch():
    _, large, large_metrics = _one_step(1)
    _, small, small_metrics = _one_step(4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (large.params, large_metrics),
        (small.params, small_metrics),
    )


def test_metrics_of_a_step():
    start, end, metrics = _one_step(1)
    model, batch = TinyConfig().build(), _batch()

    def mean(params):
        sums = model.loss(params, jax.tree.map(jnp.asarray, batch))
        return sums.objective / sums.weight

    gradient = jax.grad(mean)(start.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(p)) for p in jax.tree.leaves(end.params)))
    np.testing.assert_allclose(metrics["parameter_norm"], norm, rtol=1e-5)
    assert float(metrics["weight"]) == batch["target_mask"].sum()
    assert int(end.step) == 1


def test_frozen_parameters_get_no_gradient():
    frozen = OptimizerConfig(groups=(ParameterGroup(pattern="embedding", multiplier=0.0),))
    start, end, _ = _one_step(1, frozen)
    np.testing.assert_array_equal(start.params["embedding"], end.params["embedding"])
    assert np.abs(start.params["head"] - end.params["head"]).max() > 1e-4


def test_rows_that_cannot_be_divided_are_refused():
    mesh = make_mesh(MeshConfig())
    sharding = step.batch_sharding(mesh, ShardingRules())
    with pytest.raises(ValueError, match="batch of 8 rows cannot be divided into 2 micro-batches"):
        step.put_batch(_batch(), 2, sharding)


def _average_over(config, samples):
    average = state.Average(params={"w": jnp.zeros(3, jnp.float32)}, count=jnp.zeros((), jnp.int32))
    update = jax.jit(lambda a, p, s: state.update_average(a, p, s, config))
    for index, sample in enumerate(samples):
        average = update(average, {"w": jnp.asarray(sample)}, jnp.int32(index + 1))
    return average


def test_uniform_average_is_the_mean_of_the_samples():
    samples = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    config = state.AveragingConfig(kind=state.Averaging.UNIFORM, start=4, every=3)
    average = _average_over(config, samples)
    taken = samples[[3, 6, 9]]  # after steps 4, 7 and 10
    assert int(average.count) == 3
    np.testing.assert_allclose(average.params["w"], taken.mean(0), rtol=1e-5)


def test_ema_starts_with_its_first_sample():
    samples = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    config = state.AveragingConfig(kind=state.Averaging.EMA, start=2, decay=0.9)
    expected = samples[1]
    for sample in samples[2:]:
        expected = 0.9 * expected + 0.1 * sample
    np.testing.assert_allclose(_average_over(config, samples).params["w"], expected, rtol=1e-5)


def test_flops_are_counted_through_scans_and_branches():
    w = jnp.zeros((8, 16))

    def product(x):
        return x @ w @ w.T

    def scanned(x):
        body = jax.checkpoint(lambda c, _: (product(c), None))
        y, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.cond(y.sum() > 0, product, lambda x: x, y)

    one = 2 * 2 * 4 * 8 * 16
    assert flops.count_flops(product, jnp.zeros((4, 8))) == one
    assert flops.count_flops(jax.jit(scanned), jnp.zeros((4, 8))) == 6 * one
    assert flops.count_flops(jax.vmap(product), jnp.zeros((3, 4, 8))) == 3 * one
    gradient = jax.grad(lambda x: scanned(x).sum())
    assert flops.count_flops(gradient, jnp.zeros((4, 8))) > 2 * 6 * one - 1

    def looped(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, product, x)

    assert flops.count_flops(looped, jnp.zeros((4, 8)), while_trips=7) == 7 * one
    with pytest.raises(ValueError, match="while_trips"):
        flops.count_flops(looped, jnp.zeros((4, 8)))


def test_flops_of_ragged_products_and_convolutions():
    ragged = flops.count_flops(
        jax.lax.ragged_dot, jnp.zeros((10, 4)), jnp.zeros((3, 4, 6)), jnp.array([2, 3, 5])
    )
    assert ragged == 2 * 10 * 4 * 6
    conv = flops.count_flops(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "VALID"),
        jnp.zeros((2, 3, 10)),
        jnp.zeros((5, 3, 4)),
    )
    assert conv == 2 * (2 * 5 * 7) * (3 * 4)


def _memory_of(model, mesh):
    config = OptimizerConfig()
    optimizer = make_optimizer(config, state.abstract_params(model), lambda count: 1e-3)
    abstract = state.abstract_state(model, optimizer, state.AveragingConfig())
    return abstract, state.state_shardings(model, optimizer, abstract, mesh)


def test_a_run_that_cannot_fit_says_so_before_allocating():
    model = TinyConfig(width=2**22, vocab_size=2**16).build()  # a tera-parameter
    abstract, shardings = _memory_of(model, _one_device_mesh())
    with pytest.raises(MemoryError, match=r"cannot fit.*blt_jax\.compile"):
        memory.check_memory(abstract, shardings, jax.devices()[0])


def test_bytes_per_device_follow_the_sharding():
    model = TinyConfig().build()
    one, _ = _memory_of(model, _one_device_mesh())
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(one.params))
    _, shardings = _memory_of(model, _one_device_mesh())
    assert memory.bytes_per_device(one.params, shardings.params) == total
    _, shardings = _memory_of(model, make_mesh(MeshConfig(data=1, fsdp=8)))
    split = memory.bytes_per_device(one.params, shardings.params)
    whole = 4 * (one.params["bias"].size + one.params["norm"].size)
    assert split == whole + (total - whole) // 8


def test_optimizer_state_lies_as_the_parameters():
    groups = (ParameterGroup(pattern="bias", multiplier=0.0),)
    config, mesh = OptimizerConfig(groups=groups), make_mesh(MeshConfig(data=1, fsdp=8))
    model = TinyConfig().build()
    optimizer = make_optimizer(config, state.abstract_params(model), lambda count: 1e-3)
    start = state.create_state(model, optimizer, state.AveragingConfig(), jax.random.key(0), mesh)
    spec = start.params["embedding"].sharding.spec
    assert "fsdp" in spec
    moments = [leaf for leaf in jax.tree.leaves(start.opt_state) if leaf.shape == (260, 16)]
    assert len(moments) == 2
    assert all(moment.sharding.spec == spec for moment in moments)


def test_given_parameters_are_copied_not_donated():
    model, mesh = TinyConfig().build(), _one_device_mesh()
    given = init_params(model, jax.random.key(3), mesh)
    optimizer = make_optimizer(OptimizerConfig(), given, lambda count: 1e-3)
    start = state.create_state(
        model, optimizer, state.AveragingConfig(), jax.random.key(0), mesh, given
    )
    np.testing.assert_array_equal(start.params["head"], given["head"])
    assert start.params["head"].unsafe_buffer_pointer() != given["head"].unsafe_buffer_pointer()


def test_micro_batches_take_every_nth_row_wherever_rows_lie():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = step.batch_sharding(mesh, ShardingRules())
    rows = np.arange(16, dtype=np.int32)
    placed = step.put_batch({"row": rows}, 2, sharding)["row"]
    np.testing.assert_array_equal(placed, [rows[0::2], rows[1::2]])
    # A device holds the same rows of the batch whatever the accumulation is.
    whole = step.put_batch({"row": rows}, 1, sharding)["row"]
    for a, b in zip(placed.addressable_shards, whole.addressable_shards, strict=True):
        np.testing.assert_array_equal(np.sort(np.ravel(a.data)), np.ravel(b.data))
    assert step.process_rows(16, sharding) == range(16)
    with pytest.raises(ValueError, match="12 rows cannot be divided into 2 micro-batches"):
        step.put_batch({"row": rows[:12]}, 2, sharding)
