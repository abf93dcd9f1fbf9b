"""Rows cut into pieces of whole patches, on one device and divided over several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules, param_shardings
from blt_jax.layers.transformer import PositionEncoding
from blt_jax.models import blt, blt_patching
from blt_jax.models.blt_ngrams import NgramConfig, NgramStart
from tests.models.gradients import assert_leaves_close
from tests.models.test_blt import SHORT, build, config, objective, packed

PIECES, LENGTH, PATCHES = 4, 16, 12
"""Pieces of a row, bytes and patches of a piece."""

MESHES = {
    "one device": MeshConfig(data=1),
    "context": MeshConfig(data=1, fsdp=2, context=4),
    "data and context": MeshConfig(data=2, context=4),
    "context and tensor": MeshConfig(data=1, tensor=2, context=2),
}

OPTIONS = {
    "defaults": config(**SHORT, local_decoder=SHORT["local_encoder"]),
    "input, last, first, whole row": config(
        latent=SHORT["latent"],
        local_decoder=dataclasses.replace(SHORT["local_encoder"], window=0),
        kv_from=blt.KeyValueSource.INPUT,
        encoder_cross_attention=blt.EncoderCrossAttention.LAST,
        decoder_cross_attention=blt.DecoderCrossAttention.FIRST,
        pooling=blt.Pooling.MEAN,
    ),
    "no cross-attention": config(
        **SHORT,
        local_decoder=SHORT["local_encoder"],
        encoder_cross_attention=blt.EncoderCrossAttention.NONE,
        decoder_cross_attention=blt.DecoderCrossAttention.NONE,
        pooling=blt.Pooling.FIRST_BYTES,
        pooled_bytes=3,
        ngrams=NgramConfig(
            sizes=(3, 5), vocab_size=104, start=NgramStart.SKIP, cross_documents=True
        ),
    ),
}


def cut(batch):
    """The rows with each piece filled by as many whole patches as fit, and padding after them."""
    names = [name for name in batch if name != "starts"]
    rows = batch["tokens"].shape[0]
    found = {name: np.zeros((rows, PIECES * LENGTH), batch[name].dtype) for name in names}
    found["starts"] = np.zeros((rows, PIECES * LENGTH + 1), bool)
    ids = np.asarray(blt_patching.encoder_ids(batch["starts"], batch["segment_ids"]))
    starts = np.asarray(batch["starts"])
    for row in range(rows):
        piece, filled, patches = 0, 0, 0
        for patch in range(ids[row].max() + 1):
            (here,) = np.nonzero(ids[row] == patch)
            if filled + len(here) > LENGTH or patches == PATCHES:
                assert filled >= 5  # what windows and n-grams reach
                piece, filled, patches = piece + 1, 0, 0
            at = piece * LENGTH + filled + np.arange(len(here))
            for name in names:
                found[name][row, at] = np.asarray(batch[name])[row, here]
            found["starts"][row, at] = starts[row, here]
            found["starts"][row, at[-1] + 1] = starts[row, here[-1] + 1]
            filled, patches = filled + len(here), patches + 1
        assert 1 < piece < PIECES
    return {name: jnp.asarray(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def batch():
    found = packed(seed=1, rows=4, sizes=(26, 7, 14), padding=2)
    assert found["tokens"].shape[1] < PIECES * LENGTH
    return found


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("defaults", ["one device", "context", "data and context"]),
        ("input, last, first, whole row", ["context"]),
        ("no cross-attention", ["context and tensor"]),
    ],
)
def test_cut_rows_equal_whole_rows_on_every_mesh(name, meshes, batch):
    model, params = build(OPTIONS[name])
    (value, sums), gradients = objective(model, params, batch)
    in_pieces = dataclasses.replace(
        model.config, row_pieces=PIECES, max_patches=PIECES * PATCHES
    ).build()
    rows = cut(batch)
    for mesh in (MESHES[mesh] for mesh in meshes):
        count = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
        mesh = make_mesh(mesh, jax.devices()[:count])
        placed = jax.device_put(params, param_shardings(model, mesh))
        with jax.set_mesh(mesh):
            (other, other_sums), other_gradients = objective(in_pieces, placed, rows)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        assert other_sums.metrics.keys() == sums.metrics.keys()
        for key in ("bytes", "patches", "dropped_targets"):
            assert other_sums.metrics[key] == sums.metrics[key]
        assert_leaves_close(other_gradients, gradients)


def test_ids_of_pieces_count_whole_patches(batch):
    rows = cut(batch)
    segments = rows["segment_ids"]
    total = PIECES * PATCHES
    ids = blt_patching.encoder_ids(rows["starts"], segments, PIECES, total)
    seen = blt_patching.decoder_ids(rows["starts"], segments, PIECES, total)
    plain = blt_patching.encoder_ids(batch["starts"], batch["segment_ids"])
    plain_seen = blt_patching.decoder_ids(batch["starts"], batch["segment_ids"])
    for row in range(4):
        real = np.asarray(segments[row]) > 0
        count = real.sum()
        used = np.unique(np.asarray(ids[row])[real])  # ids of the pieces in order
        np.testing.assert_array_equal(used[np.asarray(plain[row, :count])], ids[row][real])
        before = np.asarray(plain_seen[row, :count])
        expected = np.where(before >= 0, used[before], -1)
        mask = np.asarray(batch["target_mask"][row, :count])
        np.testing.assert_array_equal(expected[mask], np.asarray(seen[row])[real][mask])


def test_patches_beyond_those_of_a_piece_are_left_out(batch):
    rows = cut(batch)
    few = 4 * PIECES
    ids = np.asarray(
        blt_patching.encoder_ids(rows["starts"], rows["segment_ids"], PIECES, few)
    ).reshape(4, PIECES, LENGTH)
    for piece in range(PIECES):
        kept = ids[:, piece][(ids[:, piece] >= 0) & (ids[:, piece] < few)]
        assert (kept // 4 == piece).all()
    assert (ids == few).any()


def test_rows_that_are_cut_wrongly_are_found_before_they_reach_a_device(batch):
    model = config(row_pieces=PIECES, max_patches=PIECES * PATCHES).build()
    rows = {name: np.array(value) for name, value in cut(batch).items()}
    model.check_batch(rows)
    rows["starts"][2, LENGTH] = False
    with pytest.raises(ValueError, match=r"starts\[2, 16\] is false: every one of the 4 pieces"):
        model.check_batch(rows)


def test_bad_configurations():
    with pytest.raises(ValueError, match="max_patches=6: must be a multiple of row_pieces=4"):
        config(row_pieces=4, max_patches=6)
    with pytest.raises(ValueError, match="patch_window=2: must be 1 with row_pieces=4"):
        config(row_pieces=4, max_patches=8, patch_window=2)
    alibi = dataclasses.replace(config().latent, position_encoding=PositionEncoding.ALIBI)
    with pytest.raises(ValueError, match=r"latent\.position_encoding=ALIBI: must be ROPE with"):
        config(row_pieces=4, max_patches=8, latent=alibi)
    assert config().piece_halo == 5
    model = config(row_pieces=4, max_patches=8).build()
    short = packed(sizes=(9, 8), padding=2)
    with pytest.raises(ValueError, match="18 cannot be divided into 4 pieces"):
        model.init(jax.random.key(0), short["tokens"], short["starts"], short["segment_ids"])
    whole = packed(sizes=(9, 6), padding=2)
    whole["starts"] = whole["starts"].at[:, 2:].set(False).at[:, 9:11].set(True)
    with pytest.raises(ValueError, match=r"starts\[0, 4\] is false: every one of the 4 pieces"):
        model.init(jax.random.key(0), whole["tokens"], whole["starts"], whole["segment_ids"])
    rules = ShardingRules(patches=())
    with (
        jax.set_mesh(make_mesh(MeshConfig(context=4))),
        pytest.raises(ValueError, match="must divide rows over the same devices"),
    ):
        whole = packed(sizes=(9, 6), padding=2)
        config().build(rules).init(
            jax.random.key(0), whole["tokens"], whole["starts"], whole["segment_ids"]
        )
