"""Threads, memory and barriers: what they do when all is well. `test_faults` is about when it is not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
if native.why_not() is None:
    from tests.ptx.machine import Checks, LaunchError
    from tests.ptx.snippets import run, snippet

# The address of this thread's word of array 0 in %q1, its number in the grid in %r1, its number in the block in %r2.
MINE = """
  mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x; mad.lo.s32 %r1, %r3, %r4, %r2;
  ld.param.u64 %q1, [p0]; cvta.to.global.u64 %q1, %q1; mad.wide.u32 %q1, %r1, 4, %q1;
"""
STORE = "st.global.u32 [%q1], %r10;"


def words(n: int) -> np.ndarray:
    return np.zeros(n, np.uint32)


def at_a_sector(n: int) -> np.ndarray:
    """Bytes that start at a multiple of 32, as a GPU's allocations do."""
    memory = np.zeros(n + 32, np.uint8)
    start = -memory.ctypes.data % 32
    return memory[start : start + n]


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_special_registers():
    names = ["tid.x", "ntid.x", "ctaid.x", "nctaid.x", "laneid", "cluster_ctarank", "cluster_nctarank", "clusterid.x",
             "nclusterid.x", "tid.y", "ntid.y", "nctaid.z", "lanemask_lt", "lanemask_ge"]  # fmt: skip
    out = {name: words(256) for name in names}
    body = MINE + "".join(
        f"ld.param.u64 %q2, [p{i}]; mad.wide.u32 %q2, %r1, 4, %q2; mov.u32 %r10, %{name}; st.global.u32 [%q2], %r10;"
        for i, name in enumerate(names)
    )
    run(body, *out.values(), threads=64, grid=4, cluster=2)
    thread = np.arange(256)
    lane = thread % 32
    expected = {
        "tid.x": thread % 64, "ntid.x": 64, "ctaid.x": thread // 64, "nctaid.x": 4, "laneid": lane,
        "cluster_ctarank": thread // 64 % 2, "cluster_nctarank": 2, "clusterid.x": thread // 128, "nclusterid.x": 2,
        "tid.y": 0, "ntid.y": 1, "nctaid.z": 1, "lanemask_lt": (1 << lane) - 1, "lanemask_ge": (1 << 32) - (1 << lane),
    }  # fmt: skip
    for name, value in expected.items():
        assert np.array_equal(out[name], np.broadcast_to(value, 256)), name


def test_threads_branch_apart_and_meet_again():
    """A loop that each thread leaves after its own number of turns, and code behind it that all run together."""
    out = words(96)
    counts = run(
        MINE
        + """mov.u32 %r10, 0; mov.u32 %r11, 0; and.b32 %r12, %r2, 7;
        $loop: setp.ge.u32 %p1, %r11, %r12; @%p1 bra $done;
        add.s32 %r10, %r10, %r11; add.s32 %r11, %r11, 1; bra.uni $loop;
        $done: shfl.sync.idx.b32 %r13, %r10, 7, 31, -1; add.s32 %r10, %r10, %r13;"""
        + STORE,
        out, threads=48, grid=2,
    )  # fmt: skip
    turns = np.arange(48) % 8
    assert np.array_equal(out.reshape(2, 48)[0], turns * (turns - 1) // 2 + 21)
    assert np.array_equal(out.reshape(2, 48)[1], out.reshape(2, 48)[0])
    assert counts.pipes["synchronise"] == 96


def test_threads_leave_at_different_places():
    out = np.full(64, 9, np.uint32)
    run(MINE + "setp.lt.u32 %p1, %r2, 5; @%p1 exit; setp.gt.u32 %p2, %r2, 50; @%p2 bra $out; mov.u32 %r10, %r2;"
        + STORE + "$out: ret;", out, threads=64)  # fmt: skip
    thread = np.arange(64)
    assert np.array_equal(out, np.where((thread < 5) | (thread > 50), 9, thread))


def test_many_blocks_give_what_few_at_a_time_give():
    results = []
    for width in (64, 100_000):
        out = words(64 * 50)
        run(MINE + "mul.lo.s32 %r10, %r1, %r1;" + STORE, out, threads=64, grid=50, checks=Checks(width=width))
        results.append(out)
    assert np.array_equal(*results) and results[0][77] == 77 * 77


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "type_", "count"), [("v2", "u32", 2), ("v4", "u32", 4), ("v2", "u64", 2), ("v4", "u16", 4)]
)
def test_vector_loads_and_stores(vector, type_, count):
    size = int(type_[1:]) // 8
    source, target = at_a_sector(32 * count * size), at_a_sector(32 * count * size)
    source[:] = np.arange(len(source)) * 7
    names = ", ".join(f"%{ {2: 'h', 4: 'r', 8: 'q'}[size] }{10 + i}" for i in range(count))
    body = f"""mov.u32 %r2, %tid.x; ld.param.u64 %q1, [p0]; ld.param.u64 %q2, [p1];
      mad.wide.u32 %q3, %r2, {count * size}, %q1; mad.wide.u32 %q4, %r2, {count * size}, %q2;
      ld.global.L1::no_allocate.L2::128B.{vector}.{type_} {{{names}}}, [%q3 + 0];
      st.global.cs.{vector}.{type_} [%q4], {{{names}}};"""
    counts = run(body, source, target)
    assert np.array_equal(source, target) and counts.loaded == counts.stored == source.nbytes
    assert counts.sectors_loaded == counts.sectors_stored == source.nbytes // 32


def test_sectors_count_what_a_warp_touches():
    strided = at_a_sector(32 * 64)
    body = "mov.u32 %r2, %tid.x; ld.param.u64 %q1, [p0]; mad.wide.u32 %q1, %r2, 64, %q1; st.global.u32 [%q1], %r2;"
    counts = run(body, strided)
    assert counts.stored == 128 and counts.sectors_stored == 32


def test_narrow_accesses_are_extended():
    source, out = np.array([0x80, 0x7F, 0xFF, 1] * 8, np.uint8), words(32)
    load = "mov.u32 %r5, %tid.x; ld.param.u64 %q2, [p1]; cvt.u64.u32 %q3, %r5; add.s64 %q2, %q2, %q3; "
    run(MINE + load + "ld.global.u8 %r10, [%q2];" + STORE, out, source)
    assert np.array_equal(out, source)
    run(MINE + load + "ld.global.s8 %r10, [%q2];" + STORE, out, source)
    assert np.array_equal(out.view(np.int32), source.view(np.int8))
    run(MINE + load + "mov.u32 %r10, 0x1234567; st.global.u8 [%q2], %r10;" + STORE, out, source)
    assert (source == 0x67).all()


def test_cache_policies_change_nothing():
    out, source = words(32), np.arange(32, dtype=np.uint32)
    run(MINE + """createpolicy.fractional.L2::evict_first.b64 %q5, 1.0; ld.param.u64 %q2, [p1];
        mad.wide.u32 %q2, %r2, 4, %q2; ld.global.L1::evict_first.L2::cache_hint.b32 { %r10 }, [ %q2 + 0 ], %q5;"""
        + STORE, out, source)  # fmt: skip
    assert np.array_equal(out, source)


def test_parameters_are_read_at_constant_and_computed_addresses():
    out, other = words(32), words(1)
    address = other.ctypes.data
    read = "mov.b64 %q5, p1; ld.param.u32 %r11, [p1]; ld.param.u32 %r12, [%q5+4]; xor.b32 %r10, %r11, %r12;"
    run(MINE + read + STORE, out, other)
    assert (out == (address & 0xFFFFFFFF) ^ (address >> 32)).all()


def test_shared_memory_carries_values_between_threads():
    """Static and dynamic variables lie apart; an address may be a variable plus an offset."""
    out = words(64)
    run(
        """.shared .align 4 .b8 fixed[256];"""
        + MINE
        + """mov.u32 %r5, memory; mov.u32 %r6, fixed; shl.b32 %r7, %r2, 2; add.s32 %r5, %r5, %r7; add.s32 %r6, %r6, %r7;
        st.shared.u32 [%r5], %r2; add.s32 %r8, %r2, 1000; st.shared::cta.u32 [%r6], %r8; bar.sync 0;
        xor.b32 %r7, %r7, 124; mov.u32 %r5, memory; add.s32 %r5, %r5, %r7; ld.shared.u32 %r10, [%r5];
        ld.shared.u32 %r11, [fixed+8]; add.s32 %r10, %r10, %r11;"""
        + STORE,
        out, threads=64, shared=256,
    )  # fmt: skip
    assert np.array_equal(out, (np.arange(64) ^ 31) + 1002)


def test_every_block_has_shared_memory_of_its_own():
    out = words(128)
    run(MINE + """mov.u32 %r5, memory; setp.eq.s32 %p1, %r2, 0; @%p1 st.shared.u32 [%r5], %r3; bar.sync 0;
        ld.shared.u32 %r10, [%r5];""" + STORE, out, threads=32, grid=4, shared=4)  # fmt: skip
    assert np.array_equal(out, np.repeat(np.arange(4), 32))


def test_local_memory_belongs_to_a_thread_and_generic_addresses_find_every_space():
    out = words(32)
    body = (
        ".local .align 8 .b8 mine[16];"
        + MINE
        + """mov.u64 %q5, mine; cvta.local.u64 %q6, %q5; st.local.u32 [%q5+4], %r2; ld.u32 %r11, [%q6+4];
        mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r5, %r5, %r6; cvt.u64.u32 %q7, %r5; cvta.shared.u64 %q8, %q7;
        st.u32 [%q8], %r11; ld.shared.u32 %r12, [%r5];
        and.b32 %r13, %r2, 1; setp.eq.s32 %p1, %r13, 0; selp.b64 %q9, %q8, %q6, %p1; @!%p1 st.u32 [%q6], %r12;
        ld.u32 %r10, [%q9]; st.u32 [%q1], %r10;"""
    )
    run(body, out, shared=128)
    assert np.array_equal(out, np.arange(32))


# ---- warps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "b", "source"),
    [
        ("bfly", 5, lambda lane: lane ^ 5),
        ("idx", 9, lambda lane: np.full_like(lane, 9)),
        ("down", 3, lambda lane: np.where(lane + 3 > 31, lane, lane + 3)),
    ],
)
def test_shuffles(mode, b, source):
    out, lane = words(64), np.arange(64) % 32
    run(MINE + f"add.s32 %r5, %r2, 100; shfl.sync.{mode}.b32 %r10, %r5, {b}, 31, -1;" + STORE, out, threads=64)
    assert np.array_equal(out, np.arange(64) // 32 * 32 + source(lane) + 100)


def test_shuffles_say_whether_their_source_is_inside():
    out, lane = words(32), np.arange(32)
    run(MINE + "shfl.sync.up.b32 %r11|%p1, %r2, 2, 0, -1; selp.b32 %r10, %r11, 77, %p1;" + STORE, out)
    assert np.array_equal(out, np.where(lane < 2, 77, lane - 2))


def test_shuffles_in_a_part_of_a_warp():
    """The upper half exchanges alone, while the lower half is elsewhere."""
    out, lane = words(32), np.arange(32)
    run(MINE + """mov.u32 %r10, 5; setp.lt.u32 %p1, %r2, 16; @%p1 bra $out;
        shfl.sync.bfly.b32 %r10, %r2, 1, 31, 0xffff0000;
        $out:""" + STORE, out)  # fmt: skip
    assert np.array_equal(out, np.where(lane < 16, 5, lane ^ 1))


def test_votes():
    for mode, type_, expected in (
        ("ballot", "b32", 0xFFFFFFF0),
        ("any", "pred", 1),
        ("all", "pred", 0),
        ("uni", "pred", 0),
    ):
        out = words(32)
        target = "%r10" if type_ == "b32" else "%p2"
        run(MINE + f"setp.gt.u32 %p1, %r2, 3; vote.sync.{mode}.{type_} {target}, %p1, -1;"
            + ("" if type_ == "b32" else "selp.b32 %r10, 1, 0, %p2;") + STORE, out)  # fmt: skip
        assert (out == expected).all(), mode


def test_reductions_in_a_warp():
    values = np.random.default_rng(1).integers(-1000, 1000, 64).astype(np.int32)
    load = MINE + "ld.param.u64 %q2, [p1]; mad.wide.u32 %q2, %r1, 4, %q2; ld.global.u32 %r11, [%q2];"
    for opcode, function in (
        ("max.s32", np.max),
        ("min.s32", np.min),
        ("add.s32", np.sum),
        ("or.b32", np.bitwise_or.reduce),
    ):
        out = words(64)
        run(load + f"redux.sync.{opcode} %r10, %r11, -1;" + STORE, out, values, threads=64)
        expected = np.repeat(function(values.reshape(2, 32), 1), 32)
        assert np.array_equal(out.view(np.int32), expected), opcode
    floats, out = values.astype(np.float32), words(64)
    floats[3] = np.nan
    run(
        load + "mov.b32 %f1, %r11; redux.sync.max.f32 %f2, %f1, -1; mov.b32 %r10, %f2;" + STORE, out, floats, threads=64
    )
    assert np.array_equal(out.view(np.float32), np.repeat(np.fmax.reduce(floats.reshape(2, 32), 1), 32))
    run(
        load + "mov.b32 %f1, %r11; redux.sync.max.NaN.f32 %f2, %f1, -1; mov.b32 %r10, %f2;" + STORE,
        out,
        floats,
        threads=64,
    )
    assert np.isnan(out.view(np.float32)).tolist() == [True] * 32 + [False] * 32


def test_a_warp_barrier_orders_the_warp():
    out = words(64)
    run(MINE + """mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r5, %r5, %r6; st.shared.u32 [%r5], %r2;
        bar.warp.sync -1; xor.b32 %r6, %r6, 4; mov.u32 %r5, memory; add.s32 %r5, %r5, %r6; ld.shared.u32 %r10, [%r5];"""
        + STORE, out, threads=64, shared=256)  # fmt: skip
    assert np.array_equal(out, np.arange(64) ^ 1)


# ---- atomic operations -----------------------------------------------------------------------------------------------


def test_atomic_operations():
    total, out = np.array([100], np.uint32), words(96)
    atomic = "ld.param.u64 %q2, [p1]; atom.global.add.u32 %r10, [%q2], 2; membar.gl; fence.acq_rel.gpu;"
    run(MINE + atomic + STORE, out, total, threads=32, grid=3)
    assert total[0] == 292 and np.array_equal(np.sort(out), np.arange(100, 292, 2))
    for operation, value, expected in (("max.s32", 500, 500), ("exch.b32", 7, 7), ("and.b32", 3, 3), ("min.u32", 1, 1)):
        run(f"ld.param.u64 %q2, [p0]; mov.u32 %r5, {value}; red.global.{operation} [%q2], %r5;", total)
        assert total[0] == expected
    run("ld.param.u64 %q2, [p0]; atom.global.cas.b32 %r1, [%q2], 1, 42;", total)
    assert total[0] == 42
    run("ld.param.u64 %q2, [p0]; atom.global.inc.u32 %r1, [%q2], 60;", total)
    assert total[0] == (42 + 32) % 61
    number = np.array([0.5], np.float32)
    run("ld.param.u64 %q2, [p0]; red.relaxed.gpu.global.add.f32 [%q2], 0f3F800000;", number)
    assert number[0] == 32.5


def test_atomic_operations_on_shared_memory():
    out = words(32)
    run(MINE + """mov.u32 %r5, memory; setp.eq.s32 %p1, %r2, 0; @%p1 st.shared.u32 [%r5], 0; bar.sync 0;
        atom.shared.add.u32 %r6, [%r5], 3; bar.sync 0; ld.shared.u32 %r10, [%r5];"""
        + STORE, out, shared=4)  # fmt: skip
    assert (out == 96).all()


LAST_BLOCK = (
    MINE
    + """st.global.u32 [%q1], %r1; membar.gl; bar.sync 0; mov.u32 %r5, memory;
  setp.ne.u32 %p1, %r2, 0; @%p1 bra $counted;
  ld.param.u64 %q2, [p1]; atom.global.add.u32 %r6, [%q2], 1; st.shared.u32 [%r5], %r6;
$counted: bar.sync 0; ld.shared.u32 %r6, [%r5]; mov.u32 %r7, %nctaid.x; add.s32 %r7, %r7, -1;
  setp.ne.u32 %p2, %r6, %r7; @%p2 bra $end;
  ld.param.u64 %q3, [p0]; mad.wide.u32 %q3, %r2, 4, %q3; mov.u32 %r10, 0; mov.u32 %r11, 0;
$sum: ld.global.u32 %r12, [%q3]; add.s32 %r10, %r10, %r12; add.s64 %q3, %q3, 128; add.s32 %r11, %r11, 1;
  setp.le.u32 %p3, %r11, %r7; @%p3 bra $sum;
  ld.param.u64 %q4, [p2]; mad.wide.u32 %q4, %r2, 4, %q4; st.global.u32 [%q4], %r10;
$end:"""
)


@pytest.mark.parametrize("width", [32, 4096])
def test_the_last_block_sees_what_the_others_stored(width):
    """Stores, a barrier, an atomic operation: enough for the ledger of global memory."""
    values, counter, sums = words(32 * 6), words(1), words(32)
    run(LAST_BLOCK, values, counter, sums, grid=6, shared=4, checks=Checks(order_global=True, width=width))
    assert np.array_equal(sums, np.arange(32 * 6).reshape(6, 32).sum(0))


# ---- clusters --------------------------------------------------------------------------------------------------------

RING = (
    MINE
    + """mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r5, %r5, %r6; mov.u32 %r7, %cluster_ctarank;
  mov.u32 %r8, %cluster_nctarank; add.s32 %r9, %r7, 1; rem.u32 %r9, %r9, %r8;
  barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
  mapa.shared::cluster.u32 %r11, %r5, %r9; st.shared::cluster.u32 [%r11], %r1;
  barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
  ld.shared.u32 %r10, [%r5];"""
    + STORE
)


def test_blocks_of_a_cluster_write_into_each_other():
    """Every block stores its threads' numbers in the next one."""
    out = words(8 * 64)
    counts = run(RING, out, threads=64, grid=8, cluster=4, shared=256)
    assert np.array_equal(out.reshape(2, 4, 64), np.roll(np.arange(8 * 64).reshape(2, 4, 64), 1, 1))
    assert counts.cluster_barriers == 16


def test_blocks_of_a_cluster_read_each_other():
    out = words(4 * 32)
    run(MINE + """mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r5, %r5, %r6; st.shared.u32 [%r5], %r1;
        barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r7, %cluster_ctarank; xor.b32 %r7, %r7, 1;
        mapa.shared::cluster.u32 %r8, %r5, %r7; ld.shared::cluster.u32 %r10, [%r8];
        barrier.cluster.arrive; barrier.cluster.wait;""" + STORE, out, grid=4, cluster=2, shared=128)  # fmt: skip
    assert np.array_equal(out.reshape(4, 32), np.arange(128).reshape(4, 32)[[1, 0, 3, 2]])


# ---- asynchronous operations -----------------------------------------------------------------------------------------

WAIT = """{{ .reg .pred done;
  waiting: mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64 done, [%r20], {parity};
  @!done bra waiting; }}"""
COPY = (
    MINE
    + """mov.u32 %r20, memory; add.s32 %r21, %r20, 128; setp.ne.s32 %p1, %r2, 0; ld.param.u64 %q2, [p1];
  mad.wide.u32 %q2, %r3, 128, %q2;
  @%p1 bra $ready; mbarrier.init.shared::cta.b64 [%r20], 1; $ready: bar.sync 0;
  @%p1 bra $issued; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 128;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%q2], 128, [%r20];
  $issued:"""
    + WAIT.format(scope="cta", parity=0)
    + "shl.b32 %r22, %r2, 2; add.s32 %r22, %r22, %r21; ld.shared.u32 %r10, [%r22];"
)


def test_a_bulk_copy_lands_before_its_wait_ends():
    out, source = words(64), np.arange(500, 564, dtype=np.uint32)
    counts = run(COPY + STORE, out, source, threads=32, grid=2, shared=256)
    assert np.array_equal(out, source) and counts.copied == 256 and counts.in_flight == 128


def test_a_bulk_copy_reads_its_source_as_late_as_it_may():
    """A store to the source before the wait is seen: a GPU may go either way, so a kernel must not do it."""
    out, source = words(32), np.arange(32, dtype=np.uint32)
    early = COPY.replace("$issued:", "$issued: setp.eq.s32 %p2, %r2, 9; @%p2 st.global.u32 [%q2+20], 777;")
    run(early + STORE, out, source, shared=256)
    assert out[5] == 777


def test_phases_of_an_mbarrier():
    """Two copies through one mbarrier, one after the other: parity 0, then 1."""
    out, source = words(32), np.arange(64, dtype=np.uint32)
    again = """bar.sync 0; @%p1 bra $again; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 128;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%q2+128], 128, [%r20];
      $again:""" + WAIT.format(scope="cta", parity=1)
    run(COPY + "mov.u32 %r11, %r10;" + again + "ld.shared.u32 %r10, [%r22]; sub.s32 %r10, %r10, %r11;" + STORE,
        out, source, shared=256)  # fmt: skip
    assert (out == 32).all()


EXCHANGE = (
    MINE
    + """mov.u32 %r20, memory; add.s32 %r21, %r20, 16; setp.ne.s32 %p1, %r2, 0; mov.u32 %r7, %cluster_ctarank;
  @%p1 bra $ready; mbarrier.init.shared::cta.b64 [%r20], 1; fence.mbarrier_init.release.cluster;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 16;
  $ready: barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
  setp.ge.u32 %p2, %r2, 4; @%p2 bra $sent;
  mapa.shared::cluster.u32 %r11, %r20, %r2; shl.b32 %r12, %r7, 2; add.s32 %r13, %r21, %r12;
  mapa.shared::cluster.u32 %r13, %r13, %r2; add.s32 %r14, %r7, 40;
  st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r13], %r14, [%r11];
  $sent:"""
    + WAIT.format(scope="cluster", parity=0)
    + "and.b32 %r15, %r2, 3; shl.b32 %r15, %r15, 2; add.s32 %r15, %r15, %r21; ld.shared.u32 %r10, [%r15];"
)


def test_asynchronous_stores_reach_every_block_of_a_cluster():
    out = words(4 * 32)
    run(EXCHANGE + STORE, out, grid=4, cluster=4, shared=64)
    assert np.array_equal(out.reshape(4, 8, 4), np.broadcast_to([40, 41, 42, 43], (4, 8, 4)))


def test_an_mbarrier_that_is_given_up_may_be_used_again():
    run(
        """mov.u32 %r20, memory; mov.u32 %r2, %tid.x; setp.ne.s32 %p1, %r2, 0; @%p1 bra $end;
        mbarrier.init.shared.b64 [%r20], 3; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r20], 0;
        mbarrier.arrive.shared::cta.b64 _, [%r20], 2; mbarrier.inval.shared.b64 [%r20];
        mbarrier.init.shared.b64 [%r20], 1; fence.proxy.async; $end:""",
        shared=8,
    )


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": 2, "grid": 2, "target": "sm_80"}, "no clusters"),
        ({"cluster": 2, "grid": 3}, "grid of 3"),
        ({"cluster": 16, "grid": 16}, "clusters of 16"),
        ({"threads": 1025}, "at most 1024"),
        ({"shared": 228 * 1024}, "bytes of shared memory"),
        ({"shared": 164 * 1024, "target": "sm_80"}, "bytes of shared memory"),
        ({"grid": 0}, "grid of 0"),
    ],
)
def test_launches_that_a_gpu_refuses(options, message):
    with pytest.raises(LaunchError, match=message):
        run("mov.u32 %r1, 0;", **options)


def test_an_empty_kernel_is_an_error():
    with pytest.raises(LaunchError, match="empty"):
        run("")
    assert snippet("").is_empty and not snippet("mov.u32 %r1, 0;").is_empty
