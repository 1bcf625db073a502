"""Planted hazards: missing barriers, memory that was never written, lanes that disagree. The same kernels without them pass."""

from pathlib import Path

import numpy as np
import pytest
import torch

from proof import draw, triton_launches
from proof.execute import execute
from ptx import Launch, Memory, PtxError, parse, run
from ptx.snippets import module

KERNELS = parse((Path(__file__).parent / "kernels.ptx").read_text()).kernels
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
# Thread t has 4 t in %r2; %r3 is where thread t + 32 (or around) of 64 is, %r4 where t ^ 1 is.
HEAD = ("ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; xor.b32 %r4, %r2, 4;"
        "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; mov.u32 %r9, 0;\n")
WRITE, READ, OTHER, NEAR = "st.shared.u32 [%r2], %r1;\n", "ld.shared.u32 %r9, [%r2];\n", "ld.shared.u32 %r9, [%r3];\n", "ld.shared.u32 %r9, [%r4];\n"
BARRIER, END = "bar.sync 0;\n", "st.global.u32 [%rd2], %r9; ret;"


def execute_snippet(body, block=64, grid=1):
    """The words that 64 threads of a block store."""
    memory, out = Memory(), np.zeros(block, u32)
    kernel = module(HEAD + body + END, ".param .u64 p0", ".shared .align 8 .b8 s[512];\n")
    run(kernel, grid, block, u64(memory.map(out)).tobytes(), memory)
    return out.tolist()


def refused(match, body, **options):
    with pytest.raises(PtxError, match=match) as caught:
        execute_snippet(body, **options)
    return str(caught.value)


def test_a_read_of_what_another_warp_writes():
    assert execute_snippet(WRITE + BARRIER + OTHER) == [t ^ 32 for t in range(64)]
    message = refused(r"is read by warp 0 and was written by warp 1 at line \d+: no barrier stands between", WRITE + OTHER)
    assert "ld.shared.u32 %r9, [%r3]\n  thread (0, 0, 0) of block (0, 0, 0): shared address 0x80 " in message
    for fence in ("membar.cta;\n", "fence.acq_rel.cta;\n", "bar.warp.sync -1;\n"):
        refused("no barrier", WRITE + fence + OTHER)
    refused("no barrier", WRITE + OTHER, grid=3)
    refused(r"shared address 0x0 is read by warp 1 and was written by warp 0",
            f"setp.ge.u32 %p1, %r1, 32; @!%p1 {WRITE} @%p1 {OTHER}")


def test_a_write_over_what_another_warp_reads():
    again = "st.shared.u32 [%r2], 7;\n"
    assert execute_snippet(WRITE + BARRIER + OTHER + BARRIER + again) == [t ^ 32 for t in range(64)]
    refused("is written by warp 0 and was read by warp 1", WRITE + BARRIER + OTHER + again)
    refused("is written by warp 0 and was read by warp 1", WRITE + BARRIER + OTHER + "membar.cta;\n" + again)
    loop = "mov.u32 %r10, 0; L: {0} bar.sync 0; {1} {2} add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 3; @%p1 bra L;\n"
    assert execute_snippet(loop.format(WRITE, OTHER, BARRIER)) == [t ^ 32 for t in range(64)]
    refused("was read by warp", loop.format(WRITE, OTHER, ""))


def test_a_write_over_what_another_warp_writes():
    refused("is written by warp 0 and was written by warp 1", "st.shared.u32 [s], 1;\n")  # in one instruction, too
    two = "st.shared.u32 [%r2], %r1; {} st.shared.u32 [%r3], 5;\n"
    refused("is written by warp 0 and was written by warp 1", two.format(""))
    assert execute_snippet(two.format(BARRIER) + BARRIER + READ) == [5] * 64


def test_within_a_warp_and_around_a_barrier_nothing_is_refused():
    assert execute_snippet(WRITE + NEAR + "bar.warp.sync -1;\n" + WRITE) == [t ^ 1 for t in range(64)]
    assert execute_snippet(WRITE + READ + WRITE + READ + BARRIER + OTHER + OTHER + NEAR) == [t ^ 1 for t in range(64)]
    generic = "cvt.u64.u32 %rd5, %r2; cvta.shared.u64 %rd5, %rd5; cvt.u64.u32 %rd6, %r3; cvta.shared.u64 %rd6, %rd6; st.u32 [%rd5], %r1;{}ld.u32 %r9, [%rd6];"
    assert execute_snippet(generic.format(BARRIER)) == [t ^ 32 for t in range(64)]
    refused("no barrier", generic.format(""))
    # Warps that write different bytes of one word are in no need of an order.
    code = ("shr.u32 %r5, %r1, 5; and.b32 %r6, %r1, 31; mad.lo.u32 %r5, %r6, 2, %r5; cvt.u16.u32 %h1, %r1; st.shared.u8 [%r5], %h1; {}"
            "xor.b32 %r5, %r5, {}; ld.shared.u8 %r9, [%r5];\n")
    assert execute_snippet(code.format("", 0)) == list(range(64))
    assert execute_snippet(code.format(BARRIER, 1)) == [t ^ 32 for t in range(64)]
    refused("no barrier", code.format("", 1))


def test_wide_accesses_are_seen_word_by_word():
    wide = "shl.b32 %r5, %r1, 3; st.shared.v2.u32 [%r5], {%r1, %r1}; BAR xor.b32 %r6, %r5, 260; ld.shared.u32 %r9, [%r6];\n"
    assert execute_snippet(wide.replace("BAR", BARRIER)) == [t ^ 32 for t in range(64)]
    assert "thread (0, 0, 0) of block (0, 0, 0): shared address 0x104 is read" in refused("no barrier", wide.replace("BAR", ""))


def test_atomics_are_in_order_among_themselves():
    start = "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [s], 0;\n"
    add = "atom.shared.add.u32 %r8, [s], 1;\nred.shared.add.u32 [s], 1;\n"
    assert execute_snippet(start + BARRIER + add + BARRIER + "ld.shared.u32 %r9, [s];\n") == [128] * 64
    refused("is changed by warp 1 and was written by warp 0", start + add)
    refused("is read by warp 0 and was changed by warp 1", start + BARRIER + add + "ld.shared.u32 %r9, [s];\n")
    refused("is written by warp 0 and was changed by warp 1", start + BARRIER + add + start)
    refused("never written", add)


def test_a_barrier_for_some_warps_orders_those():
    pair = "setp.ge.u32 %p2, %r1, 64; @%p2 bra A;\n" + WRITE + "bar.sync 1, 64;\n" + OTHER + "A: "
    assert execute_snippet(pair, block=96)[:64] == [t ^ 32 for t in range(64)]
    late = pair + "bar.sync 0; and.b32 %r5, %r2, 255; ld.shared.u32 %r9, [%r5];\n"
    assert execute_snippet(late, block=96) == [t % 64 for t in range(96)]
    refused("is read by warp 2 and was written by warp 0", late.replace("bar.sync 0;", ""), block=96)
    # Warps that ended have arrived.
    ended = WRITE + "setp.ge.u32 %p1, %r1, 32; @%p1 ret;\n" + BARRIER + OTHER
    assert execute_snippet(ended)[:32] == list(range(32, 64))
    refused("was written by warp 1", ended.replace("bar.sync 0", "membar.cta"))


def test_memory_that_was_never_written():
    assert "thread (0, 0, 0) of block (0, 0, 0): 4 bytes at shared address 0x0 " in refused("never written", READ)
    part = "setp.ne.u32 %p1, %r1, 37; @%p1 st.shared.u32 [%r2], %r1;\n"
    assert r"ld.shared.u32 %r9, [%r2]" in refused(r"thread \(37, 0, 0\) .* 4 bytes at shared address 0x94 are read, of which some were never", part + READ)
    assert execute_snippet(part + "@%p1 " + READ)[36:39] == [36, 0, 38]
    refused(r"shared address 0x0 .* never written", "st.shared.u16 [%r2+2], %h1;\n".replace("%h1", "1") + READ)
    assert execute_snippet("st.shared.u16 [%r2], 1; st.shared.u16 [%r2+2], 1;\n" + READ) == [65537] * 64
    local = ".local .align 8 .b8 l[64]; st.local.u32 [l+8], %r1; {} ld.local.v2.u32 {{%r9, %r10}}, [l+8];\n"
    assert execute_snippet(local.format("st.local.u32 [l+12], 5;")) == list(range(64))
    refused(r"thread \(0, .* 8 bytes at local address 0x8 are read, of which some", local.format(""))
    refused(r"thread \(9, .* 8 bytes at local", local.format("setp.ne.u32 %p1, %r1, 9; @%p1 st.local.u32 [l+12], 5;"))
    mixed = ("and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0; cvt.u64.u32 %rd5, %r2; cvta.shared.u64 %rd5, %rd5; selp.b64 %rd6, %rd2, %rd5, %p1;"
             "ld.u32 %r9, [%rd6];\n")
    refused(r"thread \(1, 0, 0\) .* shared address 0x4 ", mixed)


def test_lanes_that_store_different_values_to_one_address():
    base = "and.b32 %r5, %r1, 62; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd5, %rd1, %rd5;\n"
    assert execute_snippet(base + "st.global.u32 [%rd5], %r5; ld.global.u32 %r9, [%rd2];\n")[:4] == [0, 0, 2, 0]
    message = refused(r"thread \(0, 0, 0\) of block \(0, 0, 0\): global address 0x\w+ is given another value by thread \(1, 0, 0\) of block \(0, 0, 0\)",
                      base + "st.global.u32 [%rd5], %r1;\n")
    assert "st.global.u32 [%rd5], %r1" in message
    assert execute_snippet(base + "setp.eq.u32 %p1, %r5, %r1; @%p1 st.global.u32 [%rd5], %r1; ld.global.u32 %r9, [%rd2];\n")[:4] == [0, 0, 2, 0]
    refused("another value", "st.global.u32 [%rd1], %r1;\n")  # one address for all
    refused("another value by thread", "and.b32 %r5, %r1, 60; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd5, %rd1, %rd5;"
            "st.global.v2.u32 [%rd5], {1, %r1};\n")
    refused(r"by thread \(0, 0, 0\) of block \(1, 0, 0\)", "mov.u32 %r6, %ctaid.x; st.global.u32 [%rd2], %r6;\n", grid=2)
    assert execute_snippet("st.global.u32 [%rd1], 5;\n")
    refused(r"shared address 0x0 is given another value by thread \(31, ", "st.shared.u32 [s], %r1;\n", block=32)
    assert execute_snippet("st.shared.u32 [s], 9; ld.shared.u32 %r9, [s];\n", block=32) == [9] * 32


def barriers(kernel):
    return [n for n, i in enumerate(kernel.instructions) if i.opcode == "bar"]


def without(kernel, places):
    for n in places:
        kernel = kernel.replaced(n, "membar.cta")
    return kernel


def test_cuda_kernels_without_their_barriers():
    x, sums, memory = np.arange(5000, dtype=u32), np.zeros(3, u32), Memory()
    params = np.array([memory.map(x), memory.map(sums), 5000], u64).tobytes()[:20]
    kernel = KERNELS["block_sum"]
    run(kernel, 3, 128, params, memory)
    first, second, third = barriers(kernel)
    for gone in ([first], [second], [first, second, third]):
        with pytest.raises(PtxError, match="is read by warp 0 and was written by warp [12] at line"):
            run(without(kernel, gone), 3, 128, params, memory)
    run(without(kernel, [third]), 3, 128, params, memory)  # what follows it, the warp that reads it has written itself
    y, z = np.arange(256, dtype=u16), np.zeros(256, u16)
    params = np.array([memory.map(y), memory.map(z)], u64).tobytes()
    run(KERNELS["reversed"], 4, 64, params, memory, shared=128)
    with pytest.raises(PtxError, match="no barrier"):
        run(without(KERNELS["reversed"], barriers(KERNELS["reversed"])), 4, 64, params, memory, shared=128)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("op", ["fold_in", "run_keys"])
def test_triton_kernels_without_their_barriers(op, arch):
    """Right results are no proof: with fences for barriers they are as right, here."""
    for i in range(9):
        given, expected = next((given, expected) for name, given, expected in draw.key_cases(i) if name == op)
        recording = triton_launches.record(arch, op, *given)
        (launch,) = recording.launches
        if launch.shared:
            break
    execute(recording, [recording.result])
    assert torch.equal(recording.result, torch.from_numpy(expected))
    places = barriers(launch.kernel)
    assert len(places) == 3
    for gone in (*([n] for n in places), places):
        changed = Launch(without(launch.kernel, gone), launch.grid, launch.block, launch.params, launch.shared)
        with pytest.raises(PtxError, match="no barrier stands between"):
            execute(recording._replace(launches=[changed]), [recording.result])
