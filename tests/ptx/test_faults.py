"""Kernels with one fault each: what a GPU may leave unseen, the interpreter must name.

Most are a sound kernel of `test_machine` with one line changed, so that nothing but that line can be what is found.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
if native.why_not() is None:
    from tests.ptx.machine import Checks, Fault
    from tests.ptx.snippets import run
    from tests.ptx.test_machine import COPY, EXCHANGE, LAST_BLOCK, MINE, RING, STORE, WAIT, words


def finds(text: str, body: str, *arrays, **options) -> str:
    """Runs `body` and expects a fault that says `text`; returns all that it says."""
    with pytest.raises(Fault, match=text) as error:
        run(body, *arrays, **options)
    return str(error.value)


def replaced(kernel: str, old: str, new: str, times: int = 1) -> str:
    """`kernel` with one piece changed, which must be there so often."""
    assert kernel.count(old) == times, old
    return kernel.replace(old, new)


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-4, 128, 1 << 20])
def test_global_memory_out_of_bounds(offset):
    message = finds("out of bounds", MINE + f"ld.global.u32 %r10, [%q1+{offset}];" + STORE, words(32))
    assert "thread 0 of block 0" in message and "array 0" in message
    assert f"[%q1+{offset}]" in message and "line" in message


def test_only_the_thread_that_leaves_the_tensor_is_named():
    message = finds("out of bounds", MINE + "st.global.u32 [%q1+4], %r2;", words(32))
    assert "thread 31 of block 0" in message and "0 bytes behind array 0" in message


def test_a_thread_that_does_not_execute_an_access_may_have_any_address():
    run(MINE + "setp.lt.u32 %p1, %r2, 31; @%p1 st.global.u32 [%q1+4], %r2;", words(32))


@pytest.mark.parametrize(
    ("access", "size"), [("ld.global.u32 %r10, [%q1+2]", 4), ("ld.global.v2.u32 {%r10, %r11}, [%q1+4]", 8)]
)
def test_misaligned_global_accesses(access, size):
    finds(f"accesses {size} bytes at .* misaligned", MINE + access + ";" + STORE, words(64))


def test_misaligned_shared_accesses():
    body = MINE + "mov.u32 %r5, memory; st.shared.v2.u32 [%r5+4], {%r2, %r2};"
    finds("misaligned", body, words(32), shared=64, threads=1)


@pytest.mark.parametrize("offset", [-4, 256])
def test_shared_memory_out_of_bounds(offset):
    body = f"mov.u32 %r5, memory; mov.u32 %r1, 0; st.shared.u32 [%r5+{offset}], %r1;"
    finds(f"at byte {offset} of its block's 256 bytes", body, shared=256, threads=1)


def test_an_address_of_zero_is_no_shared_memory():
    finds("shared memory", "mov.u32 %r5, 0; ld.shared.u32 %r1, [%r5];", shared=2048, threads=1)


def test_local_memory_and_parameters_out_of_bounds():
    finds("local memory", ".local .align 8 .b8 mine[8]; mov.u64 %q5, mine; ld.local.u32 %r1, [%q5+8];")
    finds("outside of a parameter", "mov.b64 %q5, p0; ld.param.u64 %q6, [%q5+8];", words(1))


def test_division_by_zero():
    finds(
        "thread 7 of block 0 divides by zero", MINE + "add.s32 %r5, %r2, -7; div.s32 %r10, %r2, %r5;" + STORE, words(32)
    )


def test_a_trap():
    finds("thread 5 of block 0 traps", MINE + "setp.eq.s32 %p1, %r2, 5; @%p1 trap;", words(32))


# ---- shared memory ---------------------------------------------------------------------------------------------------

# Every thread stores a word, and reads that of the thread 32 further on.
PASS_ON = (
    MINE
    + """mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r7, %r5, %r6; st.shared.u32 [%r7], %r2; bar.sync 0;
  xor.b32 %r6, %r6, 128; add.s32 %r7, %r5, %r6; ld.shared.u32 %r10, [%r7]; bar.sync 0; st.shared.u32 [%r7], %r10;"""
    + STORE
)


def test_the_sound_kernel_has_no_fault():
    out = words(64)
    run(PASS_ON, out, threads=64, shared=256)
    assert np.array_equal(out, np.arange(64) ^ 32)


def test_shared_memory_that_nobody_wrote():
    finds("nobody wrote", replaced(PASS_ON, "st.shared.u32 [%r7], %r2;", ""), words(64), threads=64, shared=256)


def test_a_read_without_a_barrier_after_the_write():
    body = replaced(PASS_ON, "st.shared.u32 [%r7], %r2; bar.sync 0;", "st.shared.u32 [%r7], %r2;")
    message = finds("reads what thread 32 of block 0 wrote", body, words(64), threads=64, shared=256)
    assert "thread 0 of block 0 reads" in message


def test_a_write_without_a_barrier_after_the_read():
    body = replaced(PASS_ON, "ld.shared.u32 %r10, [%r7]; bar.sync 0;", "ld.shared.u32 %r10, [%r7];")
    body = replaced(
        body, "st.shared.u32 [%r7], %r10;", "add.s32 %r7, %r7, 4; and.b32 %r7, %r7, -129; st.shared.u32 [%r7], %r10;"
    )
    finds("overwrites what thread .* read", body, words(64), threads=64, shared=512)


def test_two_writes_to_one_place():
    body = replaced(PASS_ON, "st.shared.u32 [%r7], %r2;", "st.shared.u32 [%r5], %r2;")
    finds("overwrites what thread 0 of block 0 wrote", body, words(64), threads=64, shared=256)


def test_one_value_from_all_threads_of_a_warp_is_one_write():
    """What Triton does with the result of a reduction; two warps that do it are two writes all the same."""
    body = MINE + "mov.u32 %r5, memory; mov.u32 %r6, 7; st.shared.u32 [%r5], %r6;"
    run(body, words(64), shared=4)
    finds("overwrites what thread 0 of block 0 wrote", body, words(64), threads=64, shared=4)


def test_a_shuffle_orders_no_memory():
    body = replaced(PASS_ON, "xor.b32 %r6, %r6, 128", "xor.b32 %r6, %r6, 4")
    body = body.replace(
        "st.shared.u32 [%r7], %r2; bar.sync 0;", "st.shared.u32 [%r7], %r2; shfl.sync.bfly.b32 %r9, %r2, 1, 31, -1;"
    )
    finds("nothing between them", body, words(32), shared=128)


def test_a_warp_barrier_orders_no_other_warp():
    body = PASS_ON.replace("st.shared.u32 [%r7], %r2; bar.sync 0;", "st.shared.u32 [%r7], %r2; bar.warp.sync -1;")
    finds("nothing between them", body, words(64), threads=64, shared=256)


def test_readers_of_several_warps_are_all_remembered():
    """Thread 0 overwrites what thread 40 read: the last reader is another one."""
    body = MINE + """mov.u32 %r5, memory; setp.eq.s32 %p1, %r2, 0; @%p1 st.shared.u32 [%r5], 1; bar.sync 0;
      ld.shared.u32 %r10, [%r5]; bar.warp.sync -1; @%p1 st.shared.u32 [%r5], 2;"""  # fmt: skip
    run(body, words(32), shared=4)
    finds("overwrites what thread", body, words(64), threads=64, shared=4)


# ---- global memory ---------------------------------------------------------------------------------------------------


def test_the_last_block_without_a_barrier_before_its_count():
    body = LAST_BLOCK.replace("membar.gl; bar.sync 0; mov.u32 %r5, memory;", "membar.gl; mov.u32 %r5, memory;")
    checks = Checks(order_global=True)
    finds(
        "reads what thread 1 of block 0 wrote", body, words(192), words(1), words(32), grid=6, shared=4, checks=checks
    )


def test_blocks_that_write_over_each_other():
    body = MINE + "ld.param.u64 %q2, [p0]; mad.wide.u32 %q2, %r2, 4, %q2; st.global.u32 [%q2], %r3;"
    checks = Checks(order_global=True)
    finds("overwrites what thread 0 of block 0 wrote", body, words(64), grid=2, checks=checks)


def test_a_block_that_reads_what_another_one_overwrites():
    """Block 1 reads what block 0 writes, or has written: the hazard of a gradient in place of its logits."""
    body = MINE + """ld.param.u64 %q2, [p0]; setp.eq.s32 %p1, %r3, 0; @%p1 bra $write; ld.global.u32 %r10, [%q2];
      bra.uni $end; $write: st.global.u32 [%q1], %r2; $end:"""  # fmt: skip
    finds("overwrites what thread . of block 1 read", body, words(64), grid=2, checks=Checks(order_global=True))
    finds("reads what thread 0 of block 0 wrote", body, words(64), grid=2, checks=Checks(order_global=True, width=32))


def test_a_store_to_the_source_of_a_copy_under_way():
    early = replaced(COPY, "$issued:", "$issued: setp.eq.s32 %p2, %r2, 9; @%p2 st.global.u32 [%q2+20], 777;")
    source = np.arange(32, dtype=np.uint32)
    checks = Checks(order_global=True)
    finds("overwrites the source of a bulk copy", early + STORE, words(32), source, shared=256, checks=checks)


# ---- barriers --------------------------------------------------------------------------------------------------------


def test_a_barrier_that_threads_reach_at_two_places():
    body = MINE + "setp.lt.u32 %p1, %r2, 16; @%p1 bra $b; bar.sync 0; bra.uni $end; $b: bar.sync 0; $end:"
    message = finds("divergent barrier", body, words(32))
    assert "thread 16 of block 0 and 15 others wait" in message and "thread 0 of block 0 and 15 others" in message


def test_a_barrier_that_some_threads_never_reach():
    """They wait for the others elsewhere. Threads that have left do not count (PTX ISA, 9.7.13.1)."""
    body = "setp.lt.u32 %p1, %r2, 32; @%p1 bra $b; bar.sync 0; $b: shfl.sync.bfly.b32 %r5, %r2, 1, 31, {mask};"
    run(MINE + body.format(mask=-1).replace("@%p1 bra $b", "@%p1 ret"), words(64), threads=64)
    deadlock = "setp.eq.u32 %p1, %r2, 3; @%p1 bra $b; bar.sync 0; $b: shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1;"
    finds("divergent barrier", MINE + deadlock, words(64), threads=64)


def test_a_shuffle_that_a_lane_of_the_mask_does_not_reach():
    body = MINE + "setp.eq.u32 %p1, %r2, 5; @%p1 bra $wait; shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1; $wait: bar.sync 0;"
    finds("divergent barrier", body, words(32))


def test_a_shuffle_from_a_lane_outside_of_the_mask():
    body = MINE + """setp.gt.u32 %p1, %r2, 15; @%p1 bra $end; shfl.sync.bfly.b32 %r5, %r2, 16, 31, 0xffff; $end:"""
    finds("a thread that is not there", body, words(32))


def test_a_thread_outside_of_its_own_mask():
    finds("not in its own member mask", MINE + "bar.warp.sync 0xffff;", words(32))


def test_cluster_barriers_out_of_step():
    finds("arrives twice", "barrier.cluster.arrive; barrier.cluster.arrive;", cluster=2, grid=2)
    finds("without having arrived", "barrier.cluster.wait;", cluster=2, grid=2)
    lone = "mov.u32 %r7, %cluster_ctarank; setp.eq.u32 %p1, %r7, 0; @%p1 bra $b; barrier.cluster.arrive; bra.uni $end;"
    stay = "$b: mov.u32 %r20, memory; mbarrier.init.shared.b64 [%r20], 1;"
    body = lone + stay + WAIT.format(scope="cta", parity=0) + "$end:"
    finds("a wait without end", body, cluster=2, grid=2, shared=8, threads=1)


# ---- clusters --------------------------------------------------------------------------------------------------------

CLUSTER = {"threads": 64, "grid": 8, "cluster": 4, "shared": 256}
FIRST = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;\n  mapa"
LAST = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def test_a_peer_that_may_not_have_begun():
    finds("which may not have begun", replaced(RING, FIRST, "mapa"), words(512), **CLUSTER)


def test_a_peer_s_store_without_a_cluster_barrier():
    message = finds("(reads|leaves|nobody wrote)", replaced(RING, LAST, ""), words(512), **CLUSTER)
    assert "block" in message


def test_a_relaxed_arrival_orders_no_store():
    body = replaced(RING, "arrive.release.aligned", "arrive.relaxed.aligned")
    finds("reads what thread 0 of block 3 wrote", body, words(512), **CLUSTER)


def test_a_block_barrier_orders_no_other_block():
    finds("(reads what|nobody wrote)", replaced(RING, LAST, "bar.sync 0;"), words(512), **CLUSTER)


def test_a_block_that_leaves_while_a_peer_may_still_write_to_it():
    body = replaced(RING, LAST + "\n  ld.shared.u32 %r10, [%r5];", "mov.u32 %r10, 0;")
    finds("block . leaves, and with it its shared memory", body, words(512), **CLUSTER)


def test_a_block_that_leaves_while_a_peer_may_still_read_from_it():
    body = MINE + """mov.u32 %r5, memory; shl.b32 %r6, %r2, 2; add.s32 %r5, %r5, %r6; st.shared.u32 [%r5], %r1;
        barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r7, %cluster_ctarank; xor.b32 %r7, %r7, 1;
        mapa.shared::cluster.u32 %r8, %r5, %r7; ld.shared::cluster.u32 %r10, [%r8];"""  # fmt: skip
    finds("leaves, and with it", body + STORE, words(128), grid=4, cluster=2, shared=128)


def test_an_access_to_a_block_that_has_left():
    body = """mov.u32 %r5, memory; mov.u32 %r7, %cluster_ctarank; setp.eq.u32 %p1, %r7, 1; mov.u32 %r1, 3;
      barrier.cluster.arrive; barrier.cluster.wait; @%p1 ret; mapa.shared::cluster.u32 %r8, %r5, 1;
      st.shared::cluster.u32 [%r8], %r1;"""
    finds("accesses block 1, which has left", body, cluster=2, grid=2, shared=4, threads=1)


def test_a_block_that_is_not_in_the_cluster():
    finds("maps to block 2 of a cluster of 2", "mov.u32 %r5, memory; mapa.shared::cluster.u32 %r8, %r5, 2;",
          cluster=2, grid=2, shared=4)  # fmt: skip


# ---- mbarriers, copies, asynchronous stores --------------------------------------------------------------------------

SOURCE = np.arange(500, 532, dtype=np.uint32)
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 128;"


def faulty_copy(text: str, old: str, new: str, checks: Checks | None = None) -> str:
    return finds(text, replaced(COPY, old, new) + STORE, words(32), SOURCE, shared=256, checks=checks or Checks())


def test_a_copy_that_is_read_before_its_mbarrier():
    faulty_copy("has not waited for", WAIT.format(scope="cta", parity=0), "")


def test_a_copy_that_nobody_waits_for():
    body = COPY[: COPY.index("{ .reg .pred done")]
    finds("leaves, and with it its shared memory, while byte 128", body, words(32), SOURCE, shared=256)


def test_an_mbarrier_without_the_bytes_that_it_waits_for():
    """An arrival alone completes the phase, with the copy still under way; no arrival at all, and nobody goes on."""
    faulty_copy("has not waited for", EXPECT, "mbarrier.arrive.shared::cta.b64 _, [%r20];")
    message = faulty_copy("a wait without end", EXPECT, "")
    assert "arrivals still to come 1, bytes announced and not here yet -128" in message


@pytest.mark.parametrize(("announced", "left"), [(112, -16), (144, 16)])
def test_an_mbarrier_that_waits_for_a_wrong_number_of_bytes(announced, left):
    message = faulty_copy("a wait without end", EXPECT, EXPECT.replace("128", str(announced)))
    assert f"bytes announced and not here yet {left}" in message


def test_a_wait_for_the_wrong_parity():
    """Parity 1 is the phase before the first, which counts as over."""
    faulty_copy("has not waited for", "[%r20], 0;\n", "[%r20], 1;\n")


def test_a_wait_that_acquires_nothing():
    faulty_copy("has not waited for", "try_wait.parity.acquire.cta", "try_wait.parity.relaxed.cta")


def test_one_thread_waits_and_no_barrier_tells_the_others():
    wait = WAIT.format(scope="cta", parity=0)
    faulty_copy("has not waited for", wait, "@%p1 bra $known;" + wait + "$known:")
    run(replaced(COPY, wait, "@%p1 bra $known;" + wait + "$known: bar.sync 0;") + STORE, words(32), SOURCE, shared=256)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[%r21], [%q2], 128", "[%r21], [%q2], 120"),
        ("[%r21], [%q2]", "[%r21+8], [%q2]"),
        ("[%r21], [%q2]", "[%r21], [%q2+8]"),
    ],
)
def test_copies_in_other_units_than_16_bytes(old, new):
    faulty_copy("not all are multiples of 16", old, new)


def test_copies_out_of_bounds():
    faulty_copy("global memory out of bounds", "[%r21], [%q2], 128", "[%r21], [%q2+16], 128")
    faulty_copy("of its block's 256 bytes", "[%r21], [%q2], 128", "[%r21+16], [%q2], 128")


def test_an_mbarrier_that_nobody_initialised():
    faulty_copy("that nobody initialised", "mbarrier.init.shared::cta.b64 [%r20], 1;", "")


def test_an_mbarrier_whose_initialisation_is_not_known_yet():
    faulty_copy("nothing that orders it after its initialisation", "$ready: bar.sync 0;", "$ready:")


def test_an_mbarrier_that_is_initialised_twice():
    init = "mbarrier.init.shared::cta.b64 [%r20], 1;"
    faulty_copy("is one already", init, init + init)


def test_more_arrivals_than_an_mbarrier_counts():
    faulty_copy("more often, or expects more bytes", EXPECT, EXPECT + "mbarrier.arrive.shared::cta.b64 _, [%r20];")


def test_asynchronous_stores_need_the_cluster_s_scope():
    """acquire.cta sees what this block did, not what its peers stored."""
    body = replaced(EXCHANGE, "acquire.cluster.shared::cta", "acquire.cta.shared::cta")
    finds("has not waited for", body + STORE, words(128), grid=4, cluster=4, shared=64)


def test_a_relaxed_arrival_publishes_an_mbarrier_only_behind_its_fence():
    body = replaced(EXCHANGE, "fence.mbarrier_init.release.cluster;", "")
    finds("nothing that orders it after its initialisation", body + STORE, words(128), grid=4, cluster=4, shared=64)


def test_an_asynchronous_store_that_is_read_before_its_mbarrier():
    body = replaced(EXCHANGE, WAIT.format(scope="cluster", parity=0), "")
    finds("has not waited for", body + STORE, words(128), grid=4, cluster=4, shared=64)


def test_a_block_that_leaves_before_its_asynchronous_stores_have_arrived():
    body = EXCHANGE[: EXCHANGE.index("{ .reg .pred done")]
    finds("leaves, and with it", body, words(128), grid=4, cluster=4, shared=64)


def test_an_asynchronous_store_in_a_cluster_of_one():
    """PTX ISA, 9.7.9.12: the cluster must have more than one block."""
    body = EXCHANGE.replace("setp.ge.u32 %p2, %r2, 4", "setp.ge.u32 %p2, %r2, 1").replace(
        "_, [%r20], 16;", "_, [%r20], 4;"
    )
    finds("in a cluster of one block", body + STORE, words(32), shared=64)


def test_a_store_that_signals_an_mbarrier_of_another_block():
    body = replaced(EXCHANGE, "mapa.shared::cluster.u32 %r11, %r20, %r2;", "mapa.shared::cluster.u32 %r11, %r20, 0;")
    finds("signals an mbarrier of another", body + STORE, words(128), grid=4, cluster=4, shared=64)
