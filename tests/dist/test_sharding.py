import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blt_jax.dist.mesh import AXES, MeshConfig, make_mesh
from blt_jax.dist.sharding import (
    ShardingRules,
    constrain,
    init_params,
    logical_axes,
    param_shapes,
    param_shardings,
    shard_by_names,
    sharding_report,
)
from blt_jax.models import llama3

RULES = ShardingRules()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


@pytest.fixture(scope="module")
def model():
    return llama3.byte_level(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2).build()


def test_spec():
    assert RULES.spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert RULES.spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp"), "context", None)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"logical axis 'model' in .*: allowed are .*'embed'"):
        RULES.spec(("model",))


def test_axis_used_twice():
    with pytest.raises(ValueError, match=r"used twice: logical names \('heads', 'mlp'\)"):
        RULES.spec(("heads", "mlp"))
    same = ShardingRules(heads=("tensor", "tensor"))
    with pytest.raises(ValueError, match="used twice"):
        same.spec(("heads",))


def test_constrain_outside_a_mesh_does_nothing():
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", "embed_act"), RULES) is x
    with pytest.raises(ValueError, match=r"shape \(3, 5\) has 2 axes, but names are"):
        constrain(x, ("batch",), RULES)


@pytest.mark.parametrize("devices", [0, 1], ids=["outside a mesh", "on one device"])
def test_wrong_names_are_errors_where_nothing_is_divided(devices):
    x = jnp.ones((3, 5))
    one = make_mesh(devices=jax.devices()[:devices]) if devices else None
    with jax.set_mesh(one) if one else contextlib.nullcontext():
        with pytest.raises(ValueError, match="logical axis 'nonsense'"):
            constrain(x, ("nonsense", "batch"), RULES)
        with pytest.raises(ValueError, match="used twice"):
            constrain(x, ("heads_act", "mlp_act"), RULES)
        for names in ([("nonsense", None)], ("batch",)), ([("batch",)], ("nonsense",)):
            with pytest.raises(ValueError, match="logical axis 'nonsense'"):
                shard_by_names(jnp.sin, *names, RULES)
        assert constrain(x, ("batch", "embed_act"), RULES) is x


def test_constrain_on_a_mesh(mesh):
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x: constrain(x, ("batch", "mlp_act"), RULES))
        y = f(jnp.ones((8, 6)))
        wanted = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
        assert y.sharding.is_equivalent_to(wanted, 2)
        with pytest.raises(ValueError, match=r"'batch' of size 6 .* cannot be divided .* of 4"):
            f(jnp.ones((6, 6)))
        with pytest.raises(ValueError, match="logical axis 'rows'"):
            constrain(jnp.ones(8), ("rows",), RULES)
        stages = ShardingRules(mlp_act=("stage",))
        with pytest.raises(ValueError, match="maps to mesh axis 'stage': the mesh has"):
            constrain(jnp.ones((8, 8)), (None, "mlp_act"), stages)


def test_params_are_created_sharded_with_the_same_values(mesh, model):
    key = jax.random.key(3)
    plain = init_params(model, key)
    sharded = init_params(model, key, mesh)
    with jax.set_mesh(mesh):  # an entered mesh does not matter
        entered = init_params(model, key, mesh)
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)
    jax.tree.map(np.testing.assert_array_equal, plain, entered)
    gate = sharded["transformer"]["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 8, 128)
    same = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), sharded, param_shardings(model, mesh)
    )
    assert jax.tree.all(same)
    assert type(sharded) is dict and type(sharded["embed"]) is dict


def test_logical_axes_cover_every_axis(mesh, model):
    axes, shapes = logical_axes(model), param_shapes(model)
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    flat = jax.tree.leaves(axes, is_leaf=is_names)
    for names, leaf in zip(flat, jax.tree.leaves(shapes), strict=True):
        assert len(names) == leaf.ndim and None not in names
    with jax.set_mesh(mesh):
        assert jax.tree.leaves(logical_axes(model), is_leaf=is_names) == flat


def test_report_of_where_parameters_lie(mesh, model):
    rows = {row["name"]: row for row in sharding_report(model, mesh)}
    params = init_params(model, jax.random.key(0), mesh)
    paths = jax.tree_util.tree_leaves_with_path(params)
    assert list(rows) == ["/".join(key.key for key in path) for path, _ in paths]
    assert rows["embed/table"]["logical"] == ["vocab", "embed"]
    assert rows["embed/table"]["physical"] == [["tensor"], ["fsdp"]]
    key = rows["transformer/layers/attention/key"]
    assert key["logical"] == ["layers", "embed", "kv_heads", "head_dim"]
    assert key["physical"] == [[], ["fsdp"], ["tensor"], []]
    assert rows["norm/weight"]["physical"] == [[]]
    for row, (_, leaf) in zip(rows.values(), paths, strict=True):
        assert row["shape"] == list(leaf.shape)
        assert row["bytes_per_device"] == leaf.addressable_shards[0].data.nbytes
    both = model.config.build(ShardingRules(embed=("data", "fsdp")))
    (table,) = [row for row in sharding_report(both, mesh) if row["name"] == "embed/table"]
    assert table["physical"] == [["tensor"], ["data", "fsdp"]]


def test_indivisible_parameter(mesh):
    model = llama3.byte_level(d_model=30, num_heads=3, num_kv_heads=3, mlp_dim=32).build()
    with pytest.raises(ValueError, match=r"cannot be divided over mesh axes"):
        init_params(model, jax.random.key(0), mesh)
    replicated = ShardingRules(heads=(), kv_heads=(), heads_act=(), embed=())
    init_params(model.config.build(replicated), jax.random.key(0), mesh)


def test_rule_with_an_axis_twice_in_a_parameter(mesh, model):
    rules = ShardingRules(embed=("tensor",))
    with pytest.raises(ValueError, match="a mesh axis is used twice"):
        init_params(model.config.build(rules), jax.random.key(0), mesh)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2, 1, 1)),
        (MeshConfig(data=1, expert=2, context=4), (1, 1, 1, 2, 4)),
    ],
)
def test_mesh_shapes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape


def test_bad_meshes():
    with pytest.raises(ValueError, match=r"MeshConfig\.tensor=0: must be >= 1, or -1"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match="at most one axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="8 devices cannot be divided by 3"):
        make_mesh(MeshConfig(tensor=3))
    with pytest.raises(ValueError, match="needs 4 devices, but there are 8"):
        make_mesh(MeshConfig(data=2, tensor=2))
    with pytest.raises(ValueError, match=r"MeshConfig.slices=3: the 8 devices are in 1 slices"):
        make_mesh(MeshConfig(slices=3))


@dataclasses.dataclass(frozen=True)
class _Device:
    """What the mesh maker reads of a device of a GPU host or of a TPU slice."""

    id: int
    process_index: int
    device_kind: str = "cpu"
    platform: str = "cpu"


def test_slices_divide_the_data_axis():
    devices = [_Device(i, i // 4) for i in (5, 0, 7, 1, 2, 6, 3, 4)]
    mesh = make_mesh(MeshConfig(fsdp=2, slices=2), devices)
    assert mesh.devices.shape == (4, 2, 1, 1, 1)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert (hosts[:2] == 0).all() and (hosts[2:] == 1).all()
    assert len({device.id for device in mesh.devices.flat}) == 8
    with pytest.raises(ValueError, match="data=1 cannot be divided over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8, slices=2), devices)
