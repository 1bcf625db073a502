"""The CUDA kernels of kernels.cu, as nvcc compiled them, against what they must give."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptx import Memory, PtxError, parse, run

HERE = Path(__file__).parent
u16, u32, u64, i32, i64, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32


@pytest.fixture(scope="module", params=["kept", "compiled"])
def kernels(request, tmp_path_factory):
    """kernels.ptx as it is kept here, and as nvcc makes it."""
    if request.param == "kept":
        return parse((HERE / "kernels.ptx").read_text()).kernels
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: kernels.cu is not compiled here")
    out = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    command = re.search(r"nvcc (-ptx .*) kernels\.cu", (HERE / "kernels.cu").read_text())[1].split()
    subprocess.run(["nvcc", *command, HERE / "kernels.cu", "-o", out], check=True, capture_output=True)
    return parse(out.read_text()).kernels


def launch(kernel, grid, block, *args, memory=None, **options):
    """Runs a kernel on arrays and scalars (NumPy's) in the order of its parameters."""
    memory, at, params = memory or Memory(), 0, bytearray(kernel.param_bytes)
    for (name, offset, size, _), value in zip(kernel.params, args, strict=True):
        data = u64(memory.map(value, name=name)) if isinstance(value, np.ndarray) else value
        assert data.nbytes == size
        params[offset:offset + size] = data.tobytes()
    return run(kernel, grid, block, bytes(params), memory, **options)


def test_nested(kernels):
    x = np.random.default_rng(0).integers(0, 300, 1000).astype(i32)
    y = np.zeros(1000, i32)
    counts = launch(kernels["nested"], 8, 128, x, y, i32(990))
    for i in range(1000):
        v, out = int(x[i]), 0
        if i >= 990:
            pass
        elif v & 1:
            out = v * 3 + 1 if v & 2 else v - 6 if v <= 100 else 0
        else:
            for k in range(v & 15):
                if (v >> k) % 3 == 0:
                    continue
                if k == 11:
                    break
                out += k * v
        assert y[i] == out, i
    assert counts.divergent_branches > 32 and counts.threads == 1024


def test_collatz(kernels):
    x = np.arange(1, 257, dtype=u32)
    steps, kinds = np.zeros(256, u32), np.zeros(256, u32)
    launch(kernels["collatz"], 1, 256, x, steps, kinds)
    for v in range(1, 257):
        n, w = 0, v
        while w != 1:
            w, n = 3 * w + 1 if w % 2 else w // 2, n + 1
        assert steps[v - 1] == n
        table = [v ^ 0x1234, v * 17, v >> 3, n + v * n, v | 0xF0, ~v & 0xFFFFFFFF, n // (v + 1), 99, 99]
        assert kinds[v - 1] == table[n % 9]


@pytest.mark.parametrize("blocks", [1, 3, 300])
def test_block_sum(kernels, blocks):
    x = np.random.default_rng(1).integers(0, 2**32, 5000, dtype=u32)
    sums = np.zeros(blocks, u32)
    counts = launch(kernels["block_sum"], blocks, 128, x, sums, i32(5000))
    padded = np.zeros(-(-5000 // (128 * blocks)) * 128 * blocks, u32)
    padded[:5000] = x
    assert (sums == padded.reshape(-1, blocks, 128).sum(axis=(0, 2), dtype=u32)).all()
    assert counts.barriers == 3 * blocks
    assert counts.loaded["global"] == 4 * 5000 and counts.stored["global"] == 4 * blocks
    assert counts.instructions["bar.sync"] == 3 * 128 * blocks and counts.issued["bar.sync"] == 3 * 4 * blocks


def test_dynamic_shared_memory(kernels):
    x = np.arange(256, dtype=u16)
    y = np.zeros(256, u16)
    launch(kernels["reversed"], 4, 64, x, y, shared=128)
    assert (y == x.reshape(4, 64)[:, ::-1].ravel()).all()
    with pytest.raises(PtxError, match=r"out of bounds: 2 bytes at shared address 0x7e of 126 bytes"):
        launch(kernels["reversed"], 4, 64, x, y, shared=126)


def test_atomics(kernels):
    x = np.random.default_rng(2).integers(-(2**31), 2**31, 300).astype(i32)
    out = np.array([2**31 - 1, -(2**31), 0, 0, -1, 0, 0], i32)
    total, old, memory = np.zeros(1, u64), np.zeros(300, u32), Memory()
    counts = launch(kernels["atomics"], 3, 100, x, out, total, old, memory=memory)
    bits = np.bitwise_or.reduce(1 << (x & 31).astype(u32)).astype(u32)
    assert out[0] == x.min() and out[1] == x.max() and out[2] == x.sum(dtype=i32)
    assert out[3].view(u32) == bits and out[4].view(u32) == ~bits
    assert out[5] == (55 if (x & 31 == 5).any() else 0) and out[6] == 77
    assert total[0] == sum((int(v) & 0xFFFF) << 20 for v in x)
    assert sorted(old) == list(range(7, 307))  # the variable starts at 7
    assert counts.widths["atom", "global", 4] >= 6 * 300
    again = np.zeros(300, u32)
    run(kernels["atomics"], 3, 100, np.array([a.__array_interface__["data"][0] for a in (x, out, total, old)], u64).tobytes(), memory)
    assert sorted(old) == list(range(307, 607)) and not again.any()  # and keeps its value between launches


def test_vectors_and_a_ragged_end(kernels):
    x = np.random.default_rng(3).standard_normal(1003).astype(f32)
    y = np.full(1004, 7, f32)
    counts = launch(kernels["scale4"], 2, 128, x, y, f32(1.7), i64(1003))
    assert (y[:1003] == x * f32(1.7)).all() and y[1003] == 7
    assert counts.widths["ld", "global", 16] == 250 and counts.widths["ld", "global", 4] == 3
    assert counts.loaded["global"] == counts.stored["global"] == 4 * 1003
    assert counts.sectors_loaded["global"] == len({(t // 32, (x.ctypes.data + 16 * t) // 32) for t in range(250)}) + 3


def test_beyond_32_bits(kernels):
    memory, at, stride = Memory(), 1 << 44, (1 << 33) + 7
    x = memory.sparse(at, 6 * stride, name="x")
    y = memory.sparse(1 << 45, 6 * stride, name="y", fill=9)
    for block in range(6):
        x.write(at + block * stride, bytes([block + 10] * 32))
    params = np.array([at, 1 << 45, stride], u64).tobytes()
    run(kernels["strided"], (3, 2), 32, params, memory, blocks=[(0, 0, 0), (2, 1, 0), 4])
    for block in range(6):
        expected = block + 11 if block in (0, 5, 4) else 9
        assert memory.read((1 << 45) + block * stride, 33) == bytes([expected] * 32) + b"\x09"
    assert len(x.pages) + len(y.pages) < 30
    with pytest.raises(PtxError, match=r"thread \(9, 0, 0\) of block \(2, 1, 0\): out of bounds: 1 bytes at address .* x \["):
        run(kernels["strided"], (3, 2), 32, np.array([at + stride - 9, 1 << 45, stride], u64).tobytes(), memory, blocks=[5])


def test_local_arrays_and_constants(kernels):
    x = np.random.default_rng(4).integers(0, 2**32, 128, dtype=u32)
    y = np.zeros(128, u32)
    launch(kernels["local_array"], 1, 128, x, y)
    table = [3, 1, 4, 1, 5, 9, 2, 6]
    for v, got in zip(map(int, x), y):
        a, s = [0] * 16, 0
        for k in range(16):
            a[(k * 7 + v) & 15] = v * k + table[k & 7]
        for k in range(16):
            s = s * 31 + a[(v >> k) & 15]
        assert got == (s + table[v & 7]) & 0xFFFFFFFF


def test_floats(kernels):
    data = np.random.default_rng(5)
    a, b, c = data.standard_normal((3, 500)).astype(f32)
    out = np.zeros((6, 500), f32)
    launch(kernels["floats"], 4, 128, a, b, c, out, i32(500))
    with np.errstate(all="ignore"):
        exact = (a.astype(np.longdouble) * b + c).astype(f32)  # 64 bits: rounded twice only where a midpoint is near
        expected = np.stack([exact, a * b + c, a / b, np.sqrt(a), a - b, np.where(a < b, a, c)])
    assert np.array_equal(out, expected, equal_nan=True)


def test_halves(kernels):
    bits = np.arange(65536, dtype=u32).astype(u16)
    f = np.random.default_rng(6).standard_normal(65536).astype(f32) * f32(100)
    wide, narrow = np.zeros((2, 65536), f32), np.zeros((2, 65536), u16)
    launch(kernels["halves"], 512, 128, bits, bits, f, wide, narrow, i32(65536))
    assert np.array_equal(wide[0], bits.view(np.float16).astype(f32), equal_nan=True)
    assert np.array_equal(wide[1], (bits.astype(u32) << u32(16)).view(f32), equal_nan=True)
    assert (narrow[0] == f.astype(np.float16).view(u16)).all()
    w = f.view(u32)
    assert (narrow[1] == ((w + u32(0x7FFF) + (w >> u32(16) & u32(1))) >> u32(16))).all()


def test_integers(kernels):
    data = np.random.default_rng(7)
    edges = np.array([0, 1, -1, 5, -7, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63) + 1], i64)
    a = np.concatenate([np.repeat(edges, len(edges)), data.integers(-(2**63), 2**63 - 1, 200)])
    b = np.concatenate([np.tile(edges, len(edges)), data.integers(-(2**63), 2**63 - 1, 200) >> data.integers(0, 63, 200)])
    out = np.zeros((len(a), 16), i64)
    launch(kernels["integers"], 3, 128, a, b, out, i32(len(a)))

    def s(v, bits):
        v &= (1 << bits) - 1
        return v - (1 << bits) if v >> bits - 1 else v

    for x, y, got in zip(map(int, a), map(int, b), out):
        ux, uy = x % 2**64, y % 2**64
        sx, sy, wx, wy = s(x, 32), s(y, 32), x % 2**32, y % 2**32
        quotient = int(math.copysign(1, x) * math.copysign(1, y)) * (abs(x) // abs(y)) if y else -1
        pair, pick = wx | wy << 32, wx >> 7
        permuted = sum((pair >> 8 * (pick >> 4 * k & 7) & 255) << 8 * k for k in range(4))
        lead, first = 64 - ux.bit_length(), (ux & -ux).bit_length()
        turned = ((wy << 32 | wx) << (wx & 31) >> 32) % 2**32  # the high word is the second argument
        expected = [
            x * y, x * y >> 64, ux * uy >> 64, quotient, x - quotient * y if y else -1, ux // uy if uy else -1, sx * sy, wx * wy,
            (32 - wx.bit_length()) * 1000 + bin(wx).count("1") + (lead * 1000 + bin(ux).count("1")) * 100000,
            int(f"{wx:032b}"[::-1], 2) + (turned << 32), permuted, x >> (y & 63), ux >> (y & 63),
            s(x, 8) + 1000 * s(y, 16) + 100000000 * (x & 255), (1 if ux < uy else 2) if x < y else (3 if ux < uy else 4)]
        assert [int(v) for v in got[:15]] == [s(v, 64) for v in expected], (x, y)
        mixed = first + max(sx, sy) % 2**32 + min(wx, wy)
        assert (int(got[15]) - mixed) % 2**32 == 0, (x, y)


def test_warps(kernels):
    x = np.random.default_rng(8).integers(0, 2**32, 64, dtype=u32)
    x[5], y = 3, np.zeros(64, u32)
    launch(kernels["warps"], 1, 64, x, y)
    for t in range(64):
        warp, lane, v = x[t // 32 * 32:][:32].astype(object), t % 32, int(x[t])
        r = sum(int(w & 1) << k for k, w in enumerate(warp))
        r ^= warp[lane ^ 5]
        r += warp[lane - 3] if lane % 16 >= 3 else v
        r ^= warp[v & 31]
        if lane < 16:
            r += max(warp[:16]) + int(3 in warp[:16])
        else:
            r -= sum(warp[16:])
        assert int(y[t]) == r % 2**32, t
