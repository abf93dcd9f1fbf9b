"""ListOps and the training of a classifier on it."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_jax.data.loader import DataConfig
from blt_jax.data.synthetic import listops_row
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params
from blt_jax.recipes.classification import listops_batches
from blt_jax.train.pretraining import make_context
from experiments import megalodon as runs


def value_of(ids):
    """The value of an expression, read from its end with a stack."""
    stack, deepest, depth = [], 0, 0
    for number in reversed(ids.tolist()):
        if number < 10:
            stack.append(number)
            continue
        if number == 14:
            stack.append(None)
            depth += 1
            deepest = max(deepest, depth)
            continue
        depth -= 1
        values = []
        while (top := stack.pop()) is not None:
            values.append(top)
        assert len(values) >= 2
        if number == 13:
            stack.append(sum(values) % 10)
        elif number == 12:
            stack.append(int(statistics.median(values)))
        else:
            stack.append(min(values) if number == 10 else max(values))
    (value,) = stack
    return value, deepest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6), st.sampled_from([16, 64, 128]))
def test_values_of_expressions(seed, depth, values, length):
    if values ** (depth + 1) < length:  # all of them may be too short
        length = 8
    ids, value = listops_row(length, depth=depth, values=values, seed=seed)
    found, deepest = value_of(ids)
    assert found == value and deepest <= depth
    assert length // 4 <= len(ids) <= length and ids[0] >= 10 and ids[-1] == 14
    again, _ = listops_row(length, depth=depth, values=values, seed=seed)
    np.testing.assert_array_equal(ids, again)


def test_sizes_without_an_expression():
    with pytest.raises(ValueError, match="no expression of depth=1 and values=2 has 25 to 100 ids"):
        listops_row(100, depth=1, values=2, seed=0)
    with pytest.raises(ValueError, match="values"):
        listops_row(100, depth=1, values=1, seed=0)


def test_batches():
    data = DataConfig(sequence_length=32, batch_size=3)
    batches = listops_batches(data, 3, 4)
    first, second = next(batches), next(batches)
    assert first["tokens"].shape == (3, 32) and first["labels"].shape == (3,)
    assert (first["tokens"] != second["tokens"]).any()
    own = listops_batches(data, 3, 4, rows=(1,))
    np.testing.assert_array_equal(next(own)["tokens"], first["tokens"][1:2])
    for row in range(3):
        real = first["segment_ids"][row] > 0
        assert value_of(first["tokens"][row][real])[0] == first["labels"][row]


def test_a_run(tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    numbers = runs.listops_smoke().run(make_context(tmp_path, mesh, jax.random.key(0)))
    assert 0 <= numbers["accuracy"] <= 1 and 0.1 <= numbers["most_frequent"] < 0.3


def test_rows_of_padding_count_nothing():
    """An evaluation pads its last batch with such rows where a mesh divides it."""
    config = runs.listops_smoke().model
    model, batch = config.build(), next(listops_batches(DataConfig(sequence_length=32), 3, 4))
    params = init_params(model, jax.random.key(0))
    padded = {k: np.concatenate([v, np.zeros_like(v[:2])]) for k, v in batch.items()}
    alone, more = (
        jax.jit(model.loss)(params, jax.tree.map(jnp.asarray, each)) for each in (batch, padded)
    )
    assert alone.weight == more.weight == len(batch["labels"])
    np.testing.assert_allclose(more.objective, alone.objective, rtol=1e-5)
    assert alone.metrics["bytes"] == more.metrics["bytes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "ListOps.depth=0: must be >= 1"),
        ({"values": 1}, "ListOps.values=1: must be >= 2"),
        ({"data": DataConfig(sequence_length=3)}, "sequence_length=3: must be >= 4"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(runs.listops_smoke(), **changes)


def test_bad_models():
    smoke = runs.listops_smoke()
    few = dataclasses.replace(smoke.model, num_classes=4)
    with pytest.raises(ValueError, match="num_classes=4: must be 10"):
        dataclasses.replace(smoke, model=few)
    blocks = dataclasses.replace(smoke.model.blocks, vocab_size=12)
    with pytest.raises(ValueError, match="vocab_size=12: must be >= 15"):
        dataclasses.replace(smoke, model=dataclasses.replace(smoke.model, blocks=blocks))
