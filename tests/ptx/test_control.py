"""Threads as if each ran alone: divergence, barriers, early returns; and what must be an error."""

import numpy as np
import pytest

from ptx import Memory, PtxError, run
from ptx.snippets import elementwise, module

u32 = np.uint32


def execute(body, block=32, grid=1, size=256, declarations="", **options):
    """Runs a body with %rd1 the address of ``size`` words of which thread t's is at %rd2; the words and the counts."""
    out, memory = np.zeros(size, u32), Memory()
    address = memory.map(out, name="out")
    kernel = module("ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;"
                    "mad.lo.s32 %r4, %r2, %r3, %r1; mul.wide.u32 %rd2, %r4, 4; add.s64 %rd2, %rd1, %rd2;\n" + body, ".param .u64 p0", declarations)
    counts = run(kernel, grid, block, np.uint64(address).tobytes(), memory, **options)
    return out, counts


def refused(match, body, *args, **options):
    with pytest.raises(PtxError, match=match) as caught:
        execute(body, *args, **options)
    return str(caught.value)


def test_random_programs_equal_threads_alone():
    """Random branches and loops: a whole block gives what each thread gives alone, and what Python gives."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        steps = int(rng.integers(5, 14))
        lines, program = ["mov.u32 %r10, 0;"], []
        for k in range(steps):
            kind, a, b = rng.choice(["add", "skip", "back", "exit"], p=[0.45, 0.25, 0.25, 0.05]), int(rng.integers(1, 99)), int(rng.integers(0, 7))
            to = int(rng.integers(k + 1, steps + 1)) if kind == "skip" else int(rng.integers(0, k + 1))
            program.append((kind, a, b, to))
            lines.append(f"L{k}: add.u32 %r10, %r10, 1; mad.lo.u32 %r11, %r12, 7, %r10; shr.u32 %r13, %r11, {b}; and.b32 %r13, %r13, 1;"
                         "setp.ne.u32 %p1, %r13, 0;")
            lines.append({"add": f"@%p1 mad.lo.u32 %r12, %r12, 5, {a};", "skip": f"@%p1 bra L{to};", "exit": "@%p1 bra END;",
                          "back": f"setp.lt.and.u32 %p1, %r10, 60, %p1; @%p1 bra L{to};"}[kind])
        code = f"mov.u32 %r12, %a0; {' '.join(lines)} L{steps}: add.u32 %r12, %r12, 1000; END: mad.lo.u32 %d0, %r10, 65536, %r12;"
        x = rng.integers(0, 2**32, 96, dtype=u32)
        (got,) = elementwise(code, [x], [u32])
        for i, v in enumerate(map(int, x)):
            at, count = 0, 0
            while at < steps:
                kind, a, b, to = program[at]
                count, at = count + 1, at + 1
                p = (v * 7 + count) % 2**32 >> b & 1
                if kind == "add" and p:
                    v = (v * 5 + a) % 2**32
                elif kind in ("skip", "back") and p and (kind == "skip" or count < 60):
                    at = to
                elif kind == "exit" and p:
                    break
            else:
                v = (v + 1000) % 2**32
            assert got[i] == (count * 65536 + v) % 2**32, (seed, i)
        alone = [elementwise(code, [x[i:i + 1]], [u32], block=1)[0][0] for i in range(0, 96, 19)]
        assert alone == got[::19].tolist()


def test_indexed_branches():
    code = ("and.b32 %r1, %a0, 3; L: .branchtargets A, B, C, B;\n brx.idx %r1, L; A: mov.u32 %d0, 10; bra E; B: mov.u32 %d0, 20; bra E;"
            "C: add.u32 %d0, %a0, 5; E:")
    x = np.arange(64, dtype=u32)
    (got,) = elementwise(code, [x], [u32])
    assert got.tolist() == [[10, 20, v + 5, 20][v & 3] for v in range(64)]
    with pytest.raises(PtxError, match=r"thread \(4, 0, 0\) .* index 4 of 4 targets"):
        elementwise(code.replace("and.b32 %r1, %a0, 3", "mov.u32 %r1, %a0"), [x[:5]], [u32])


def test_values_flow_through_shared_memory():
    """Each thread reads its neighbour's number, ten times over."""
    body = ("mov.u32 %r6, %r1; mov.u32 %r7, 0; shl.b32 %r8, %r1, 2; add.u32 %r9, %r8, 4; rem.u32 %r9, %r9, 384; mov.u32 %r20, s; add.u32 %r8, %r8, %r20;"
            "add.u32 %r9, %r9, %r20; L: st.shared.u32 [%r8], %r6; bar.sync 0; ld.shared.u32 %r6, [%r9]; barrier.sync.aligned 1;"
            "add.u32 %r7, %r7, 1; setp.lt.u32 %p1, %r7, 10; @%p1 bra L; st.global.u32 [%rd2], %r6; ret;")
    out, counts = execute(body, 96, 2, declarations=".shared .align 4 .b8 s[384];")
    assert out[:192].tolist() == [(t + 10) % 96 for t in range(96)] * 2
    assert counts.barriers == 2 * 10 * 2 and counts.divergent_branches == 0


def test_generic_addresses():
    body = ("mov.u64 %rd3, s; cvta.shared.u64 %rd4, %rd3; mul.wide.u32 %rd5, %r1, 8; add.s64 %rd4, %rd4, %rd5; mul.wide.u32 %rd6, %r1, 3;"
            "st.u64 [%rd4], %rd6; bar.sync 0; xor.b32 %r5, %r1, 1; mul.wide.u32 %rd5, %r5, 8; add.s64 %rd5, %rd3, %rd5; cvta.shared.u64 %rd5, %rd5;"
            "and.b32 %r6, %r1, 2; setp.ne.u32 %p1, %r6, 0; selp.b64 %rd7, %rd5, %rd2, %p1; ld.u32 %r7, [%rd7]; mov.u64 %rd8, p0; cvta.param.u64 %rd8, %rd8;"
            "ld.u64 %rd9, [%rd8]; sub.s64 %rd9, %rd9, %rd1; cvt.u32.u64 %r8, %rd9; add.u32 %r7, %r7, %r8; cvta.to.shared.u64 %rd10, %rd5;"
            "ld.shared.u32 %r9, [%rd10]; add.u32 %r7, %r7, %r9; st.u32 [%rd2], %r7; ret;")
    out, _ = execute(body, 32, declarations=".shared .align 8 .b8 s[256];")
    assert out[:32].tolist() == [3 * (t ^ 1) * (2 if t & 2 else 1) for t in range(32)]


def test_a_barrier_counts_ended_threads_as_arrived():
    out, counts = execute("setp.gt.u32 %p1, %r1, 9; @%p1 ret; bar.sync 0; st.global.u32 [%rd2], 1; ret;", 64)
    assert out[:64].tolist() == [1] * 10 + [0] * 54 and counts.barriers == 1


def test_barriers_that_are_never_released():
    message = refused("never released", "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1; bra E; A: bar.sync 2; E: ret;", 64)
    assert "32 threads at line" in message and "bar.sync 1" in message and "bar.sync 2" in message
    refused("threads of one warp wait at different barriers", "setp.lt.u32 %p1, %r1, 5; @%p1 bra A; bar.sync 0; bra E; A: bar.sync 0; E: ret;", 32)
    out, counts = execute("setp.lt.u32 %p1, %r1, 5; @%p1 bra A; barrier.sync 0; bra E; A: barrier.sync 0; E: st.global.u32 [%rd2], 1; ret;", 32)
    assert out[:32].all() and counts.barriers == 1
    refused("never released", "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0, 64; A: ret;", 96 - 32)
    refused("never arrive", "and.b32 %r5, %r1, 1; setp.ne.u32 %p1, %r5, 0; @%p1 bra A; bar.sync 0; A: shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1; bar.sync 0; ret;")


def test_loops_without_end():
    refused("this loop seems to have no end", "L: add.u32 %r5, %r4, 1; bra L;", steps=10000)
    refused("this loop seems to have no end", "L: ld.volatile.global.u32 %r5, [%rd1]; setp.eq.u32 %p1, %r5, 0; @%p1 bra L; ret;", steps=10000)


def test_a_pair_of_which_one_half_was_never_written():
    """A compiler leaves the upper half of a pair undefined where only the lower one is of use. Each half is followed on its own:
    through arithmetic, through the ends of chunks, and where threads part and meet."""
    pack = "mov.b32 %r5, 0f3F800000; mov.b64 %rd5, {%r5, %r6}; add.rn.f32x2 %rd5, %rd5, %rd5; mov.b64 {%r7, %r8}, %rd5;"
    use = "st.global.u32 [%rd2], %r"
    read = f"{use}7; ret;"
    some = "setp.lt.u32 %p1, %r1, 7;"
    parted = pack.replace("mov.b64 {", "@%p1 bra A; add.u32 %r10, %r1, 1; A: shfl.sync.bfly.b32 %r11, %r1, 1, 31, -1; mov.b64 {")
    there = f"{some} @%p1 mov.b32 %r6, 0f40000000;"
    two = [0x40000000] * 32
    assert execute(pack + read)[0][:32].tolist() == two
    assert execute(some + parted + read)[0][:32].tolist() == two
    assert execute(there + parted + "@%p1 mov.u32 %r7, %r8;" + read)[0][:32].tolist() == [0x40800000] * 7 + two[7:]
    refused(r"thread \(7, .*%r8 is read before", there + parted + f"{use}8; ret;")
    refused(r"thread \(0, .*%r7 is read before", there.replace("@", "@!") + parted.replace("{%r5, %r6}", "{%r6, %r5}") + read)
    because = "the register %r8 is read before it is written: it was made from %rd5, that from %r6, which was not"
    refused(because, pack + f"{use}8; ret;")
    refused("%rd5 is read before", pack + "st.global.u64 [%rd1], %rd5; ret;")
    refused("%r7 is read before", pack + "add.u64 %rd6, %rd5, 1; mov.b64 {%r7, %r8}, %rd6;" + read)


def test_registers_that_were_never_written():
    refused(r"st.global.u32 \[%rd2\], %r5\s+thread \(0, 0, 0\) of block .*register %r5 is read before it is written", "st.global.u32 [%rd2], %r5; ret;")
    refused(r"thread \(7, 0, 0\) .*%r5", "setp.eq.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r5, 1; A: st.global.u32 [%rd2], %r5; ret;")
    refused(r"thread \(7, 0, 0\) .*%r5", "setp.ne.u32 %p1, %r1, 7; @%p1 mov.u32 %r5, 1; st.global.u32 [%rd2], %r5; ret;")
    refused(r"the register %p1 ", "@%p1 bra A; A: ret;")
    refused(r"thread \(7, .*the register %r7 is read before it is written: it was made from %r6, that from %r5, which was not",
            "setp.ne.u32 %p1, %r1, 7; @%p1 ld.global.u32 %r5, [%rd2]; add.u32 %r6, %r5, 1; neg.s32 %r7, %r6; st.global.u32 [%rd2], %r7; ret;")
    refused(r"%p2", "setp.eq.u32 %p2, %r5, 1; @%p2 bra A; A: ret;")
    refused(r"%p2", "setp.eq.u32 %p2, %r5, 1; @%p2 st.global.u32 [%rd2], 1; ret;")
    refused(r"%p2", "setp.eq.u32 %p2, %r5, 1; selp.b32 %r6, 1, 2, %p2; st.global.u32 [%rd2], %r6; ret;")
    refused(r"%r5", "div.u32 %r6, %r1, %r5; ret;")
    refused(r"%r5", "shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; ret;")
    refused(r"%r5", "red.global.add.u32 [%rd1], %r5; ret;")
    refused(r"the register %rd5 ", "st.global.u32 [%rd5], 1; ret;")
    # A copy of what was never written is no use of it, nor is a use under a guard that does not hold.
    out, _ = execute("setp.eq.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r5, 3; A: mov.u32 %r6, %r5; @%p1 bra B; add.u32 %r7, %r6, 1;"
                     "B: @!%p1 st.global.u32 [%rd2], %r7; @!%p1 mov.u32 %r8, %r7; ret;")
    assert out[:32].tolist() == [0 if t == 7 else 4 for t in range(32)]
    refused(r"thread \(7, 0, 0\) .*%r7.*%r6.*%r5", "setp.eq.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r5, 3; A: mov.u32 %r6, %r5;"
            "add.u32 %r7, %r6, 1; st.global.u32 [%rd2], %r7; ret;")
    # What a compiler computes ahead of the branch that needs it, and what a selection leaves out.
    out, _ = execute("setp.eq.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r5, 3; A: neg.s32 %r6, %r5; selp.b32 %r7, 9, %r6, %p1; st.global.u32 [%rd2], %r7; ret;")
    assert out[:32].tolist() == [9 if t == 7 else 2**32 - 3 for t in range(32)]
    refused(r"thread \(7, ", "setp.eq.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r5, 3; A: neg.s32 %r6, %r5; selp.b32 %r7, %r6, 9, %p1; st.global.u32 [%rd2], %r7; ret;")


def test_counts():
    out, counts = execute("and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra A; add.u32 %r1, %r1, 100; A: st.global.u32 [%rd2], %r1; ret;", 48, 2)
    assert out[:96].tolist() == [t + 100 * (t & 1) for t in range(48)] * 2
    assert counts.instructions["st.global.u32"] == 96 and counts.issued["st.global.u32"] == 4 and counts.requests["st", "global"] == 4
    assert counts.instructions["add.u32"] == 48 and counts.issued["add.u32"] == 4 and counts.divergent_branches == 4
    assert counts.stored["global"] == 384 and counts.loaded == {"param": 8 * 96} and counts.widths == {("st", "global", 4): 96}
    assert counts.total == sum(counts.instructions.values()) == 96 * 12 + 48
    assert set(counts.by_index) == set(range(len(counts.by_index))) and counts.by_index.total() == counts.total and counts.steps == 13
    twice = counts + counts
    assert twice.total == 2 * counts.total and twice.divergent_branches == 8


def test_sectors():
    """Words that one warp reads side by side fill 4 sectors, of every other word 8, a column of rows 32."""
    for stride, sectors in ((4, 4), (8, 8), (32, 32), (128, 32), (0, 1)):
        memory, at = Memory(), 1 << 40
        memory.sparse(at, 1 << 20)
        kernel = module(f"ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; xor.b32 %r1, %r1, 5; mul.wide.u32 %rd2, %r1, {stride};"
                        "add.s64 %rd1, %rd1, %rd2; ld.global.u32 %r2, [%rd1]; ret;", ".param .u64 p0")
        counts = run(kernel, 1, 64, np.uint64(at).tobytes(), memory)
        assert counts.sectors_loaded["global"] == 2 * sectors if stride else 2


def test_special_registers():
    body = "".join(f"mov.u32 %r{k}, {name}; mul.lo.u32 %r30, %r30, 7; add.u32 %r30, %r30, %r{k};" for k, name in enumerate(
        ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
         "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_ge"), 5))
    kernel = module("ld.param.u64 %rd1, [p0]; mov.u32 %r30, 0;" + body + "mov.u32 %r1, %ctaid.z; mad.lo.u32 %r1, %r1, 3, %r11; mov.u32 %r2, %ctaid.y;"
                    "mov.u32 %r1, %ctaid.z; mad.lo.u32 %r1, %r1, 3, %r2; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r1, 2, %r2; mov.u32 %r2, %tid.z;"
                    "mad.lo.u32 %r1, %r1, 2, %r2; mov.u32 %r2, %tid.y; mad.lo.u32 %r1, %r1, 4, %r2; mov.u32 %r2, %tid.x; mad.lo.u32 %r1, %r1, 5, %r2;"
                    "mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2; st.global.u32 [%rd1], %r30; ret;", ".param .u64 p0")
    for blocks in (None, [(1, 2, 1), 3]):
        out, memory = np.zeros((2, 3, 2, 2, 4, 5), u32), Memory()
        run(kernel, (2, 3, 2), (5, 4, 2), np.uint64(memory.map(out)).tobytes(), memory, blocks=blocks)
        for (z, y, x, tz, ty, tx), got in np.ndenumerate(out):
            t, r = tx + 5 * (ty + 4 * tz), 0
            for v in (tx, ty, tz, 5, 4, 2, x, y, z, 2, 3, 2, t % 32, t // 32, (1 << t % 32) - 1, 2**32 - (1 << t % 32)):
                r = r * 7 + v
            ran = blocks is None or (x, y, z) in ((1, 2, 1), (1, 1, 0))
            assert got == (r % 2**32 if ran else 0)


def test_replaced_instructions():
    kernel = module("ld.param.u64 %rd1, [p0]; mov.u32 %r1, 5; L: add.u32 %r1, %r1, 3; { .reg .b32 t; mov.u32 t, %r1; add.u32 %r1, t, t; }"
                    "setp.lt.u32 %p1, %r1, 50; @%p1 bra L; st.global.u32 [%rd1], %r1; ret;", ".param .u64 p0")
    index = {i.text: k for k, i in enumerate(kernel.instructions)}

    def result(changed):
        out, memory = np.zeros(1, u32), Memory()
        run(changed, 1, 1, np.uint64(memory.map(out)).tobytes(), memory, steps=1000)
        return int(out[0])

    assert result(kernel) == 82
    assert result(kernel.replaced(index["mov.u32 %r1, 5"], "mov.u32 %r1, 6")) == 90
    assert result(kernel.replaced(index["add.u32 %r1, t, t"], "mul.lo.u32 %r1, t, t")) == 64
    assert result(kernel.replaced(index["@%p1 bra L"], "@!%p1 bra L;")) == 16
    with pytest.raises(PtxError, match="no end"):
        result(kernel.replaced(index["@%p1 bra L"], "bra L"))
    with pytest.raises(PtxError, match="%p1 is read before it is written: it was made from %r1, which was not"):
        result(kernel.replaced(index["mov.u32 %r1, 5"], "mov.u32 %r2, 5"))
    with pytest.raises(PtxError, match="not declared|not understood|not taken"):
        result(kernel.replaced(index["mov.u32 %r1, 5"], "mov.u32 %r1, t"))
    assert result(kernel) == 82
