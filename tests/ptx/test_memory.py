"""Bounds, alignment, made-up memory, parameters; and PTX that is not understood."""

import numpy as np
import pytest
import torch

from ptx import Memory, PtxError, parse, run, unsupported
from ptx.snippets import HEAD, elementwise, module

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64


def launch(code, memory, address, threads=32):
    kernel = module("ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; " + code + " ret;", ".param .u64 p0")
    return run(kernel, 1, threads, u64(address).tobytes(), memory)


def test_out_of_bounds_names_line_thread_and_address():
    memory, data = Memory(), np.zeros(40, u32)
    at = memory.map(data, name="data")
    code = "mul.wide.u32 %rd2, %r1, 8;\nadd.s64 %rd2, %rd1, %rd2;\nld.global.u32 %r2, [%rd2+4];"
    with pytest.raises(PtxError) as caught:
        launch(code, memory, at)
    line = next(k for k, text in enumerate(open_text(code).split("\n"), 1) if "[%rd2+4]" in text)
    assert f"line {line}: ld.global.u32 %r2, [%rd2+4]\n  thread (20, 0, 0) of block (0, 0, 0): out of bounds: 4 bytes at address " \
           f"{at + 164:#x}; the nearest is data [{at:#x}, {at + 160:#x})" in str(caught.value)
    launch(code, memory, at, threads=20)
    with pytest.raises(PtxError, match="out of bounds.*no memory is mapped"):
        launch(code, Memory(), at)
    with pytest.raises(PtxError, match="out of bounds"):
        launch("ld.global.u32 %r2, [%rd1+-4];", memory, at)
    with pytest.raises(PtxError, match=r"thread \(20, 0, 0\)"):
        launch(code.replace("ld.global.u32 %r2, [%rd2+4]", "st.global.u32 [%rd2+4], %r1"), memory, at)
    with pytest.raises(PtxError, match=r"thread \(20, 0, 0\)"):
        launch(code.replace("ld.global.u32 %r2, [%rd2+4]", "red.global.add.u32 [%rd2+4], %r1"), memory, at)
    # A guard that does not hold keeps a thread from its access; the error still names the right thread.
    with pytest.raises(PtxError, match=r"thread \(25, 0, 0\)"):
        launch("setp.ge.u32 %p1, %r1, 25; " + code.replace("ld.g", "@%p1 ld.g"), memory, at)
    launch("setp.lt.u32 %p1, %r1, 20; " + code.replace("ld.g", "@%p1 ld.g"), memory, at)


def open_text(code):
    return (f"{HEAD}\n.visible .entry k(.param .u64 p0)\n{{\n.reg .pred %p<32>;\n.reg .b16 %h<32>;\n.reg .b32 %r<64>;\n.reg .b64 %rd<64>;\n"
            f"ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; {code} ret;\n}}\n")


@pytest.mark.parametrize("access, size", [("ld.global.u16 %h1, [%rd1+1]", 2), ("ld.global.f32 %r2, [%rd1+2]", 4), ("ld.global.u64 %rd2, [%rd1+4]", 8),
                                          ("ld.global.v2.u32 {%r2, %r3}, [%rd1+4]", 8), ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+8]", 16),
                                          ("st.global.v2.b16 [%rd1+2], {1, 2}", 4), ("ld.shared.u32 %r2, [s+2]", 4), ("ld.local.u64 %rd2, [l+4]", 8),
                                          ("atom.global.add.u32 %r2, [%rd1+2], 1", 4), ("ld.u32 %r2, [%rd1+1]", 4)])
def test_misaligned(access, size):
    memory, data = Memory(), np.zeros(64, u8)
    at = memory.map(data, address=1 << 40)
    with pytest.raises(PtxError, match=rf"misaligned: {size} bytes at"):
        launch(f".shared .align 8 .b8 s[64]; .local .align 8 .b8 l[64]; {access};", memory, at)


@pytest.mark.parametrize("access", ["ld.shared.u32 %r2, [s+64]", "st.shared.u32 [%r3], 1", "ld.local.u32 %r2, [l+-4]", "st.local.v2.u32 [l+64], {1, 1}"])
def test_shared_and_local_bounds(access):
    with pytest.raises(PtxError, match=r"thread \(0, 0, 0\).*out of bounds: \d bytes at (shared|local) address"):
        launch(f".shared .align 8 .b8 s[64]; .local .align 8 .b8 l[64]; mov.u32 %r3, 64; {access};", Memory(), 0)


def test_local_memory_is_of_one_thread_and_shared_of_one_block():
    code = (".local .align 4 .b8 l[8]; .shared .align 4 .b8 s[8]; mov.u32 %r4, %ctaid.x; mad.lo.u32 %r5, %r4, 32, %r1; st.local.u32 [l+4], %r5; st.shared.u32 [s], %r4;"
            "bar.sync 0; ld.local.u32 %r6, [l+4]; ld.shared.u32 %r7, [s]; mad.lo.u32 %r6, %r7, 1000, %r6; mul.wide.u32 %rd2, %r5, 4; add.s64 %rd2, %rd1, %rd2;"
            "st.global.u32 [%rd2], %r6; ret;")
    memory, out = Memory(), np.zeros(160, u32)
    kernel = module("ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; " + code, ".param .u64 p0")
    run(kernel, 5, 32, u64(memory.map(out)).tobytes(), memory)
    assert out.tolist() == [t + t // 32 * 1000 for t in range(160)] and kernel.shared_bytes == kernel.local_bytes == 8


def test_tensors_slices_and_read_only_memory():
    memory, t = Memory(), torch.arange(100, dtype=torch.int32)
    assert memory.map(t[10:20], name="t") == t.data_ptr()  # all of the storage
    assert memory.map(t.untyped_storage()) == t.data_ptr()  # which may be there twice
    launch("mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; ld.global.u32 %r2, [%rd2]; add.u32 %r2, %r2, 1; st.global.u32 [%rd2], %r2;", memory, t.data_ptr())
    assert t[:33].tolist() == [*range(1, 33), 32]
    fixed = np.arange(8, dtype=u32)
    at = memory.map(fixed, name="fixed", writable=False)
    launch("ld.global.u32 %r2, [%rd1+28];", memory, at)
    for store in ("st.global.u32 [%rd1], %r1;", "ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd1], %r1;", "atom.global.or.b32 %r2, [%rd1], %r1;"):
        with pytest.raises(PtxError, match="fixed is read-only"):
            launch(store, memory, at)
    with pytest.raises(ValueError, match="overlaps"):
        memory.map(np.zeros(64, u8), address=at + 16)
    with pytest.raises(ValueError, match="contiguous"):
        memory.map(np.zeros((8, 8))[:, ::2])
    data = np.zeros(64, u8)
    here = memory.map(data[3:40], address=(1 << 45) + 3)  # a slice that starts where no word does
    launch("mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; st.global.u32 [%rd2+1], -1;", memory, here, threads=9)
    assert data.tolist() == [0] * 4 + [255] * 36 + [0] * 24


def test_accesses_that_meet_several_ranges():
    memory = Memory()
    arrays = [np.arange(4, dtype=u32) + 10 * k for k in range(5)]
    at = [memory.map(a, address=(1 << 40) + 16 * k + 4096 * (k > 2)) for k, a in enumerate(arrays)]
    out = np.zeros(20, u32)
    memory.map(out, address=1 << 41)
    code = ("mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; setp.ge.u32 %p1, %r1, 12; @%p1 add.s64 %rd3, %rd3, 4096; ld.global.u32 %r2, [%rd3];"
            f"add.s64 %rd2, %rd2, {1 << 41}; st.global.u32 [%rd2], %r2; add.u32 %r2, %r2, 1; st.global.u32 [%rd3], %r2;")
    launch(code, memory, at[0], threads=20)
    assert out.tolist() == [4 * 0 + v % 4 + 10 * (v // 4) for v in range(20)]
    assert [a.tolist() for a in arrays] == [[10 * k + j + 1 for j in range(4)] for k in range(5)]


def test_sparse_memory():
    memory, at, size = Memory(), 1 << 46, 1 << 42
    memory.sparse(at, size, name="huge", fill=0xAB)
    memory.write(at + (1 << 41) - 2, bytes(range(8)))
    code = "shl.b64 %rd2, %rd9, 3; ld.global.v2.u64 {%rd3, %rd4}, [%rd1]; st.global.v2.u64 [%rd1+65536], {%rd4, %rd3}; atom.global.add.u32 %r2, [%rd1+1048576], 1;"
    launch("mov.u64 %rd9, 0; " + code, memory, at + (1 << 41) - 16)
    assert memory.read(at + (1 << 41) - 2, 8) == bytes(range(8))
    assert memory.read(at + (1 << 41) + 65520, 16) == b"\xab" * 6 + b"\0\1" + b"\xab" * 8
    assert int.from_bytes(memory.read(at + (1 << 41) - 16 + 1048576, 4), "little") == 0xABABABAB + 32
    with pytest.raises(PtxError, match="out of bounds.*huge"):
        launch("ld.global.u32 %r2, [%rd1];", memory, at + size)
    launch("ld.global.u32 %r2, [%rd1];", memory, at + size - 4)
    with pytest.raises(PtxError, match="outside"):
        memory.read(at + size - 4, 8)


def test_parameters():
    params = ".param .u8 a, .param .align 16 .b8 b[24], .param .u16 c, .param .u64 .ptr .global .align 1 d, .param .f32 e"
    kernel = module("ld.param.u64 %rd1, [d]; ld.param.s8 %r1, [a]; ld.param.v2.u32 {%r2, %r3}, [b+8]; ld.param.u16 %r4, [c]; mov.b64 %rd2, b; mov.u32 %r5, %tid.x;"
                    "mul.wide.u32 %rd3, %r5, 4; add.s64 %rd2, %rd2, %rd3; ld.param.u32 %r6, [%rd2+-4]; ld.param.f32 %r7, [e]; add.s32 %r1, %r1, %r2; xor.b32 %r1, %r1, %r3;"
                    "add.u32 %r1, %r1, %r4; xor.b32 %r1, %r1, %r7; add.u32 %r1, %r1, %r6; add.s64 %rd1, %rd1, %rd3; st.global.u32 [%rd1], %r1; ret;", params)
    assert kernel.params == [("a", 0, 1, 1), ("b", 16, 24, 16), ("c", 40, 2, 2), ("d", 48, 8, 8), ("e", 56, 4, 4)] and kernel.param_bytes == 60
    memory, out = Memory(), np.zeros(8, u32)
    data = np.zeros(60, u8)
    data[0] = 0xF0
    data[16:40].view(u32)[:] = [1, 2, 3, 4, 5, 6]
    data[40:42].view(u16)[:] = 500
    data[48:56].view(u64)[:] = memory.map(out)
    data[56:60].view(np.float32)[:] = 1.5
    with pytest.raises(PtxError, match=r"thread \(12, 0, 0\).*: out of bounds: 4 bytes at param address 0x3c of 60 bytes"):
        run(kernel, 1, 13, data.tobytes(), memory)
    data[12:16].view(u32)[:] = 77  # what lies between two parameters can be read: it is theirs
    run(kernel, 1, 7, data.tobytes(), memory)
    base = (((-16 + 3 ^ 4) % 2**32 + 500) ^ 0x3FC00000)
    assert out.tolist() == [(base + v) % 2**32 for v in (77, 1, 2, 3, 4, 5, 6)] + [0]
    with pytest.raises(PtxError, match="59 bytes of parameters, 60 are declared"):
        run(kernel, 1, 7, data.tobytes()[:59], memory)
    with pytest.raises(PtxError, match="out of bounds: 4 bytes at offset 60"):
        run(module("ld.param.u32 %r1, [e+4]; ret;", params), 1, 1, data.tobytes(), memory)


def test_wider_registers_are_extended():
    x = np.array([0x80, 0x7F, 0xFF, 1], u8)
    memory = Memory()
    memory.map(x, address=1 << 40)
    memory.map(out := np.zeros(8, u64), address=1 << 41)
    launch(f"cvt.u64.u32 %rd2, %r1; add.s64 %rd2, %rd2, {1 << 40}; ld.global.s8 %rd3, [%rd2]; ld.global.u8 %rd4, [%rd2]; mul.wide.u32 %rd5, %r1, 8;"
           f"add.s64 %rd5, %rd5, {1 << 41}; shl.b64 %rd4, %rd4, 32; xor.b64 %rd3, %rd3, %rd4; st.global.u64 [%rd5], %rd3; st.global.u8 [%rd5+32], %rd4; ", memory, 0, threads=4)
    assert out[:4].tolist() == [((int(v) - 256 * int(v > 127)) ^ int(v) << 32) % 2**64 for v in x]


def test_launches_that_cannot_be():
    kernel = module("ret;", directives="\n.reqntid 64, 1, 1")
    run(kernel, 1, 64, b"", Memory())
    assert kernel.reqntid == (64, 1, 1) and module("ret;", directives="\n.maxntid 128\n.minnctapersm 4").maxntid == (128, 1, 1)
    for grid, block in ((1, 32), (0, 64), ((1, 65536), 64), (2**31, 64)):
        with pytest.raises(PtxError):
            run(kernel, grid, block, b"", Memory())
    with pytest.raises(PtxError, match="maxntid"):
        run(module("ret;", directives=".maxntid 16"), 1, 17, b"", Memory())


@pytest.mark.parametrize("code, match", [
    ("frobnicate.u32 %r1, %r1;", "the instruction frobnicate is not known"), ("add.sat.s32 %r1, %r1, %r1;", r"the modifier .sat is not known"),
    ("add.cc.u32 %r1, %r1, %r1;", "modifier .cc"), ("mul.lo.f32 %r1, %r1, %r1;", "modifiers lo"), ("add.u32 %r1, %r1;", "2 operands: 3 are taken"),
    ("add.u32 %rd1, %r1, %r1;", "%rd1 as the destination of 32 bits"), ("add.u64 %rd1, %r1, %rd1;", "%r1 has 32 bits"), ("mov.u32 %r1, %clock;", "%clock"),
    ("mov.u32 %r99, 1;", "%r99"), ("ld.global.L3.u32 %r1, [%rd1];", "modifier .L3"), ("ld.global.v3.u32 %r1, [%rd1];", "modifier .v3"),
    ("setp.almost.u32 %p1, %r1, %r1;", "almost"), ("mov.u32 %r1, 0f3F800000x;", "literal|understood"), ("add.rn.f32 %r1, %r1, 1.5;", "literal"),
    ("add.rn.f32 %r1, %r1, 1;", "float literal"), ("mov.u32 %r1, 5000000000;", "does not fit"), ("bra NOWHERE;", "no label"), ("call f;", "call is not known"),
    (".dwarf 1;", "directive"), ("shfl.up.b32 %r1, %r1, 1, 0;", "shfl.sync"), ("@%p77 ret;", "predicate"), ("wgmma.fence.sync.aligned;", "wgmma"),
    ("atom.global.add.f32 %r1, [%rd1], %r1;", "type .f32"), ("add.u32 %r1, %r1, nothing;", "nothing"), ("bar.arrive 0, 32;", "bar.sync"), ("@%p1 bar.sync 0;", "guard"),
    (".reg .b128 %q<2>;", "b128"), (".pragma \"x\";", "pragma"), ("cvt.rn.f32.f32 %r1, %r1;", "rounding"), ("prefetch.global.L9 [%rd1];", "prefetch")])
def test_what_is_not_known_is_an_error_with_its_line(code, match):
    text = open_text("\n" + code)
    with pytest.raises(PtxError, match=match) as caught:
        run(parse(text).kernels["k"], 1, 32, bytes(8), Memory())
    line = next(k for k, t in enumerate(text.split("\n"), 1) if t.startswith(code.split(";")[0]))
    assert f"line {line}: {code.split(';')[0]}" in str(caught.value)


@pytest.mark.parametrize("text, match", [(".version 8.6\n.target sm_90\n.address_size 32\n", "64-bit"), (HEAD + ".banana x;", "line 4"),
                                         (HEAD + ".func f() { ret; }", "line 4"), (HEAD + ".visible .entry k(.param .f16x2 x)\n{ ret; }", "line 4")])
def test_modules_that_are_not_understood(text, match):
    with pytest.raises(PtxError, match=match):
        module = parse(text)
        run(module.kernels["k"], 1, 1, bytes(16), Memory())


def test_unsupported_lists_every_instruction():
    found = unsupported(parse(open_text("foo.u32 %r1, %r1; add.u32 %r1, %r1, 1; ex2.approx.f32 %r1, %r1; bar.red.popc.u32 %r1, 0, %p1;")))
    assert len(found) == 1 and "bar" in found[0][1]
    found = unsupported(parse(open_text("foo.u32 %r1, %r1; add.u32 %r1, %r1, 1; ex2.approx.f32 %r1, %r1;")))
    assert [("foo" in message, "ex2" in message) for _, message in found] == [(True, False), (False, True)]


def test_hints_change_nothing():
    x = np.arange(64, dtype=u32)
    (got,) = elementwise("createpolicy.fractional.L2::evict_first.b64 %rd50, 0f3F800000; ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.u32 %d0, [%rd40], %rd50;"
                         "ld.relaxed.gpu.global.u32 %r1, [%rd40]; ld.volatile.global.u32 %r2, [%rd40]; ld.global.L1::evict_last.b32 %r3, [%rd40]; membar.gl; fence.acq_rel.gpu;"
                         "griddepcontrol.wait; prefetch.global.L2 [%rd40]; add.u32 %d0, %d0, %r1; add.u32 %d0, %d0, %r2; add.u32 %d0, %d0, %r3;", [x], [u32])
    assert (got == 4 * x).all()
