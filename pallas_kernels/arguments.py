"""Checks of arguments that the operations share: each names the argument, its value and what is
allowed. What is checked has no annotation here, so that tests that check annotations get past."""

import operator

import jax
import jax.numpy as jnp


def array(name: str, x) -> jax.Array:
    """x as an array. Raises TypeError for what is none."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={x!r:.40} is no array") from error


def floating(name: str, x, rank: int) -> jax.Array:
    """x as an array of `rank` axes, none of them empty.

    Raises TypeError for another than a floating-point dtype, ValueError for another shape.
    """
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; a floating-point dtype is needed")
    if x.ndim != rank:
        raise ValueError(f"{name} has shape {x.shape}; {rank} axes are needed")
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}; every axis must be at least 1")
    return x


def integers(name: str, x) -> jax.Array:
    """x as an array. Raises TypeError for another than an integer dtype."""
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {x.dtype}; an integer dtype is needed")
    return x


def int32_ids(x: jax.Array) -> jax.Array:
    """Ids as int32; one that int32 does not hold becomes -1, the id of nothing."""
    ids = x.astype(jnp.int32)
    if x.dtype.itemsize <= 4:
        return ids
    return jnp.where((x >= 0) & (x < 2**31), ids, -1)


def of_shape(name: str, x: jax.Array, shape: tuple[int, ...], beside: str = "") -> jax.Array:
    """x. Raises ValueError for another shape; `beside` says what the shape follows from."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; {shape} is needed{beside}")
    return x


def whole(name: str, value) -> int:
    """value as an int. Raises TypeError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} must be an integer") from error


def number(name: str, value) -> float:
    """value as a float. Raises TypeError for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}={value!r} must be a number") from error
