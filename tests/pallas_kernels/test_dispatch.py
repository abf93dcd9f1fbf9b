"""The choice by platform: what is traced, and that transformations keep the choice."""

import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch


def double(x):
    return {"y": 2.0 * x["x"]}


def triple(x):
    return {"y": 3.0 * x["x"]}


def refuses(x):
    raise AssertionError("a form of another platform was traced")


def chosen(x, **forms):
    return dispatch.by_platform({"x": x}, xla=double, **forms)["y"]


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint])
def test_other_platforms_are_not_traced(transformation):
    function = transformation(lambda x: chosen(x, tpu=refuses, gpu=refuses))
    np.testing.assert_array_equal(function(X), 2.0 * X)


def test_the_platform_of_the_program_is_traced():
    function = jax.jit(lambda x: chosen(x, tpu=refuses))
    with pytest.raises(AssertionError, match="was traced"):
        function.trace(X).lower(lowering_platforms=("tpu",))
    function.trace(X).lower(lowering_platforms=("cuda",))


def test_one_export_holds_every_platform():
    function = jax.jit(jax.vmap(lambda x: chosen(x, tpu=triple, gpu=double)))
    platforms = ("cpu", "tpu", "cuda")
    exported = jax.export.export(function, platforms=platforms)(X)
    assert exported.platforms == platforms
    text = exported.mlir_module()
    assert "3.0" in text and "2.0" in text and "stablehlo.case" in text
    np.testing.assert_array_equal(exported.call(X), 2.0 * X)
    only = jax.export.export(function, platforms=("tpu",))(X).mlir_module()
    assert "3.0" in only and "2.0" not in only


def test_vmap_of_some_arguments():
    def multiply(x, y):
        return x * y

    def function(x, y):
        return dispatch.by_platform(x, y, xla=multiply, tpu=refuses)

    found = jax.jit(jax.vmap(function, (None, 1), 1))(X, jnp.stack([X, 2 * X], 1))
    np.testing.assert_array_equal(found, jnp.stack([X * X, 2 * X * X], 1))


def test_eager_calls_ask_where_the_arrays_are(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_array_equal(chosen(jnp.asarray(X), tpu=refuses), 2.0 * X)
    with pytest.raises(AssertionError, match="was traced"):
        chosen(X, tpu=refuses)  # of numpy: where the default backend is


def test_derivatives_are_those_of_the_portable_form():
    def function(x):
        return chosen(x, tpu=refuses).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(function))(X), 2.0 * np.ones_like(X))
    value, tangent = jax.jvp(function, (X,), (np.ones_like(X),))
    assert (value, tangent) == (2.0 * X.sum(), 2.0 * X.size)


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    function = jax.shard_map(
        lambda x: chosen(x, tpu=refuses), mesh=mesh, in_specs=rows, out_specs=rows
    )
    np.testing.assert_array_equal(jax.jit(function)(x), 2.0 * x)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
