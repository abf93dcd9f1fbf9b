"""Optimizer and schedules against plain optax and hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blt_jax.train import optimizer as opt


def _params():
    rng = np.random.default_rng(0)
    return {
        "embedding": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(3,)), jnp.float32),
        },
        "norm": jnp.asarray(rng.normal(size=(3,)), jnp.float32),
    }


def _gradients(step):
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), _params())


def _take(optimizer, params, steps):
    @jax.jit
    def step(params, state, gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for index in range(steps):
        params, state = step(params, state, _gradients(index))
    return params, state


def _learning_rate(step):
    return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


def test_equals_optax_adamw():
    config = opt.OptimizerConfig(clip_norm=0.5, weight_decay=0.1, beta1=0.8, beta2=0.9)
    params, _ = _take(opt.make_optimizer(config, _params(), _learning_rate), _params(), 5)
    mask = {"embedding": True, "layers": {"kernel": True, "bias": False}, "norm": False}
    plain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(_learning_rate, b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.1, mask=mask),
    )
    expected, _ = _take(plain, _params(), 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), params, expected)


def test_decay_mask_is_data():
    config = opt.OptimizerConfig(undecayed=("norm", "embed"))
    mask = opt.decay_mask(config, _params())
    assert mask == {"embedding": False, "layers": {"kernel": True, "bias": True}, "norm": False}


def test_group_multiplies_the_learning_rate():
    groups = (opt.ParameterGroup(pattern="^embedding$", multiplier=0.25),)
    base = opt.OptimizerConfig(clip_norm=0.0)
    grouped = opt.OptimizerConfig(clip_norm=0.0, groups=groups)
    start = _params()
    plain, _ = _take(opt.make_optimizer(base, start, _learning_rate), start, 1)
    scaled, _ = _take(opt.make_optimizer(grouped, start, _learning_rate), start, 1)
    np.testing.assert_allclose(
        scaled["embedding"] - start["embedding"],
        0.25 * (plain["embedding"] - start["embedding"]),
        rtol=1e-4,
        atol=1e-7,
    )
    np.testing.assert_array_equal(scaled["norm"], plain["norm"])


def test_frozen_group_stays_and_does_not_count_in_the_clipped_norm():
    groups = (opt.ParameterGroup(pattern="embed", multiplier=0.0),)
    config = opt.OptimizerConfig(clip_norm=0.1, groups=groups)
    start = _params()
    params, state = _take(opt.make_optimizer(config, start, _learning_rate), start, 3)
    np.testing.assert_array_equal(params["embedding"], start["embedding"])
    rest = {name: value for name, value in start.items() if name != "embedding"}
    plain = opt.make_optimizer(opt.OptimizerConfig(clip_norm=0.1), rest, _learning_rate)
    plain_state = plain.init(rest)
    for index in range(3):
        gradients = {name: value for name, value in _gradients(index).items() if name in rest}
        with jax.numpy_dtype_promotion("standard"):
            updates, plain_state = plain.update(gradients, plain_state, rest)
        rest = optax.apply_updates(rest, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        {name: params[name] for name in rest},
        rest,
    )
    # No moments for what is frozen.
    assert not any(leaf.shape == (5, 3) for leaf in jax.tree.leaves(state))


def test_group_without_parameters_is_refused():
    config = opt.OptimizerConfig(groups=(opt.ParameterGroup(pattern="atention"),))
    with pytest.raises(ValueError, match=r"'atention' fits no parameter.*layers/kernel"):
        opt.make_optimizer(config, _params(), _learning_rate)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (opt.Schedule(learning_rate=2.0, decay=opt.Decay.CONSTANT), {0: 2.0, 9: 2.0}),
        (
            opt.Schedule(learning_rate=1.0, warmup_steps=4, decay=opt.Decay.CONSTANT),
            {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0},
        ),
        (
            opt.Schedule(learning_rate=1.0, decay=opt.Decay.COSINE, final_ratio=0.1),
            {0: 1.0, 5: 0.55, 10: 0.1, 20: 0.1},
        ),
        (
            opt.Schedule(
                learning_rate=1.0, warmup_steps=2, decay=opt.Decay.LINEAR, final_ratio=0.0
            ),
            {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0},
        ),
        (
            opt.Schedule(
                learning_rate=1.0, decay=opt.Decay.STABLE, final_ratio=0.0, decay_fraction=0.4
            ),
            {0: 1.0, 6: 1.0, 8: 0.5, 10: 0.0},
        ),
        (
            opt.Schedule(learning_rate=1.0, decay=opt.Decay.COSINE, final_ratio=0.0, steps=20),
            {10: 0.5, 20: 0.0},
        ),
    ],
)
def test_schedule_values(schedule, expected):
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step, 10), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: opt.Schedule(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: opt.Schedule(final_ratio=2.0), "final_ratio=2.0"),
        (lambda: opt.Schedule(warmup_steps=5, steps=4), "warmup_steps=5"),
        (lambda: opt.OptimizerConfig(beta2=1.0), "beta2=1.0"),
        (lambda: opt.OptimizerConfig(undecayed=("(",)), "not a regular expression"),
        (lambda: opt.ParameterGroup(pattern="x", multiplier=-1.0), "multiplier=-1.0"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
