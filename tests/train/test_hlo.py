"""Reading an optimised program: loops, collectives, mesh axes of device groups, bytes."""

import pytest

from blt_jax.train.hlo import Program, array_bytes, group_axes

TEXT = """HloModule step

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %ag = bf16[32,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%i, %x)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

%sliced (a: f32[10,64], j: s32[]) -> f32[1,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%a, %j, %j), dynamic_slice_sizes={1,64}
}

ENTRY %main (q: (s32[], bf16[8,128]), w: f32[10,64]) -> f32[1,64] {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %w = f32[10,64]{1,0} parameter(1)
  %loop = (s32[], bf16[8,128]{1,0}) while(%q), condition=%condition, body=%body
  %k = s32[] get-tuple-element(%loop), index=0
  %r = f32[64]{0} all-reduce(%w), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %f = f32[1,64]{1,0} fusion(%w, %k), kind=kLoop, calls=%sliced
}
"""
MESH = {"data": 2, "fsdp": 4}


def test_collectives_are_counted_in_loops():
    gather, reduce = Program(TEXT).collectives(MESH)
    assert (gather.kind, gather.axes, gather.count) == ("all-gather", ("fsdp",), 5)
    assert gather.bytes == 32 * 128 * 2 and gather.sent == 5 * gather.bytes * 3 / 4
    assert (reduce.kind, reduce.axes, reduce.count) == ("all-reduce", ("data",), 1)
    assert reduce.bytes == 2560 and reduce.sent == 2560


def test_a_sliced_array_counts_its_slice():
    traffic = Program(TEXT).traffic()
    assert traffic.products == 0
    assert traffic.others == 64 * 4 + 4 + 64 * 4


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("source_target_pairs={{0,1},{1,2}}", ("fsdp",)),
        ("replica_groups={}", ("data", "fsdp")),
    ],
)
def test_axes_of_device_groups(text, axes):
    assert group_axes(text, MESH) == axes


def test_unknown_texts():
    with pytest.raises(ValueError, match="cannot read"):
        group_axes("replica_groups=somehow", MESH)
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("nothing")


def test_loops_whose_length_depends_on_data_are_counted_once():
    known = Program(TEXT)
    unknown = Program(TEXT.replace("s32[] constant(5)", "s32[] parameter(1)"))
    assert known.counts_all_loops() and not unknown.counts_all_loops()
    counts = [{x.kind: x.count for x in program.collectives(MESH)} for program in (known, unknown)]
    assert max(counts[0].values()) == 5 * max(counts[1].values())


def test_bytes_of_types():
    assert array_bytes("(bf16[4,2]{1,0:T(8,128)(2,1)}, pred[3]{0}, s32[])") == [16, 3, 4]
    assert array_bytes("f32[8]{0:T(128)S(1)}", memory_only=True) == [0]
