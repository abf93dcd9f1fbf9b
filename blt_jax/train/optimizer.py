"""AdamW, learning-rate schedules, parameter groups and clipping, declared as data."""

import dataclasses
import enum
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


class Decay(enum.Enum):
    """Shape of a learning-rate schedule after its warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    STABLE = "stable"  # constant, then linear over the last `decay_fraction` of the steps


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Schedule:
    """Linear warm-up to `learning_rate`, then `decay` to `final_ratio * learning_rate`.

    learning_rate 0 in a phase's own schedule: the rate at which the phase before ended.
    steps: length of the whole schedule, 0 for the steps that it serves.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay: Decay = Decay.COSINE
    final_ratio: float = 0.1
    decay_fraction: float = 0.2
    steps: int = 0

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"Schedule.learning_rate={self.learning_rate}: must be >= 0")
        if self.warmup_steps < 0 or self.steps < 0:
            raise ValueError(
                f"Schedule.warmup_steps={self.warmup_steps}, steps={self.steps}: must be >= 0"
            )
        if self.steps and self.warmup_steps > self.steps:
            raise ValueError(
                f"Schedule.warmup_steps={self.warmup_steps}: must be <= steps={self.steps}"
            )
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"Schedule.final_ratio={self.final_ratio}: must be in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"Schedule.decay_fraction={self.decay_fraction}: must be in (0, 1]")

    def ratio(self, step: jax.Array | int, total_steps: int) -> jax.Array:
        """Learning rate at `step` (from 0) of `total_steps`, as a fraction of the peak.

        Step 0 takes 1 / warmup_steps of the peak, the last warm-up step the peak; the decay ends
        at step `total_steps`, the first that is not taken any more. Returns a float32 scalar.
        """
        total = float(self.steps or total_steps)
        step = jnp.asarray(step, jnp.float32)
        warmup = float(self.warmup_steps)
        if self.decay is Decay.STABLE:
            start = max(warmup, total * (1.0 - self.decay_fraction))
        else:
            start = warmup
        progress = jnp.clip((step - start) / max(total - start, 1.0), 0.0, 1.0)
        if self.decay is Decay.CONSTANT:
            decayed = jnp.ones_like(progress)
        elif self.decay is Decay.COSINE:
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            decayed = self.final_ratio + (1.0 - self.final_ratio) * cosine
        else:
            decayed = 1.0 - (1.0 - self.final_ratio) * progress
        return jnp.where(step < warmup, (step + 1.0) / max(warmup, 1.0), decayed)

    def __call__(self, step: jax.Array | int, total_steps: int) -> jax.Array:
        """Learning rate at `step` (from 0) of `total_steps`; float32 scalar."""
        return self.learning_rate * self.ratio(step, total_steps)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ParameterGroup:
    """Parameters whose path (`layers/attention/query/kernel`) contains the regex `pattern`.

    multiplier: factor on the learning rate, 0 freezes the group.
    """

    pattern: str
    multiplier: float = 1.0

    def __post_init__(self):
        if self.multiplier < 0:
            raise ValueError(f"ParameterGroup.multiplier={self.multiplier}: must be >= 0")
        _compile(self.pattern, "ParameterGroup.pattern")


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (times the learning rate of the step) and clipping.

    clip_norm: largest global gradient norm, 0 for no clipping. groups: the first whose pattern
    fits a parameter's path applies. undecayed: regexes of paths without weight decay.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    groups: tuple[ParameterGroup, ...] = ()
    undecayed: tuple[str, ...] = ("norm", "bias")

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"OptimizerConfig.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("epsilon", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"OptimizerConfig.{name}={getattr(self, name)}: must be >= 0")
        for pattern in self.undecayed:
            _compile(pattern, "OptimizerConfig.undecayed")


def _compile(pattern: str, name: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r}: not a regular expression ({error})") from error


def path_name(path: tuple) -> str:
    """`layers/attention/query/kernel` of a jax key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def parameter_names(params: Any) -> list[str]:
    """Paths of all parameters, in the order of the leaves."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def multipliers(config: OptimizerConfig, params: Any) -> Any:
    """Tree of learning-rate factors (Python floats) beside `params`.

    Raises ValueError for a group whose pattern fits no parameter, naming them all.
    """
    names = parameter_names(params)
    for group in config.groups:
        if not any(re.search(group.pattern, name) for name in names):
            raise ValueError(
                f"ParameterGroup.pattern={group.pattern!r} fits no parameter; "
                f"the parameters are {', '.join(names)}"
            )

    def factor(path, _):
        for group in config.groups:
            if re.search(group.pattern, path_name(path)):
                return float(group.multiplier)
        return 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def decay_mask(config: OptimizerConfig, params: Any) -> Any:
    """Tree of bools beside `params`: true where weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(re.search(p, path_name(path)) for p in config.undecayed), params
    )


def make_optimizer(
    config: OptimizerConfig, params: Any, learning_rate: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """The optax transformation for `params` (arrays or their shapes).

    learning_rate: function of the number of updates made so far. Frozen groups have no moments,
    and their gradients are not part of the clipped norm.
    """
    factors = multipliers(config, params)
    steps = []
    if config.clip_norm:
        steps.append(_clip_by_global_norm(config.clip_norm))
    steps.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    if config.weight_decay:
        mask = decay_mask(config, params)
        steps.append(_add_decayed_weights(config.weight_decay, mask))
    if any(factor not in (0.0, 1.0) for factor in jax.tree.leaves(factors)):
        steps.append(_scale_by_tree(factors))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    chain = optax.chain(*steps)
    if all(factor for factor in jax.tree.leaves(factors)):
        return chain
    labels = jax.tree.map(lambda factor: "trained" if factor else "frozen", factors)
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def _is_masked(value: Any) -> bool:
    return isinstance(value, optax.MaskedNode)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    # optax selects between a gradient and its quotient, element by element, which XLA:CPU does
    # not fuse: with a table of 77M entries the whole update took twice as long as with a factor.
    def update(updates, state, params=None):
        del params
        factor = largest / jnp.maximum(optax.tree.norm(updates), largest)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_tree(factors: Any) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        scaled = jax.tree.map(
            lambda u, f: u if _is_masked(u) else u * f, updates, factors, is_leaf=_is_masked
        )
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _add_decayed_weights(weight_decay: float, mask: Any) -> optax.GradientTransformation:
    # optax's own masked form wraps the state in one more level and refuses partitioned trees.
    def update(updates, state, params=None):
        decayed = jax.tree.map(
            lambda u, p, m: u + weight_decay * p if m and not _is_masked(u) else u,
            updates,
            params,
            mask,
            is_leaf=_is_masked,
        )
        return decayed, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def opt_state_shardings(
    optimizer: optax.GradientTransformation, opt_state: Any, param_shardings: Any, replicated: Any
) -> Any:
    """Tree of shardings beside an (abstract) optimizer state: moments lie as their parameters."""
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if _is_masked(leaf) else sharding,
        opt_state,
        param_shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=_is_masked,
    )
