"""The fixed tree and the ops on vectors: the exact reference against sums written as loops, and against float64."""

import numpy as np
import pytest

from fastdiff import reference

F32 = np.float32


def tree_by_hand(a, b):
    """Element by element, in loops."""

    def pairwise(lanes):
        half = 128
        while half:
            for i in range(half):
                lanes[i] = F32(lanes[i] + lanes[i + half])
            half //= 2
        return lanes[0]

    sums = []
    for start in range(0, len(a), 2048):
        lanes = [F32(0)] * 256
        for e in range(start, min(start + 2048, len(a))):
            lanes[e % 256] = F32(np.float64(a[e]) * np.float64(b[e]) + np.float64(lanes[e % 256]))
        sums.append(pairwise(lanes))
    lanes = [F32(0)] * 256
    for c, s in enumerate(sums):
        lanes[c % 256] = F32(lanes[c % 256] + s)
    return pairwise(lanes)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 2047, 2048, 2049, 5000])
def test_the_tree(n):
    """With few bits in each factor, float64 holds a product and its sum exactly, and rounds once: so the loops need no fma."""
    rng = np.random.default_rng(n)
    a, b = (F32(rng.integers(-2**11, 2**11, n)) * F32(2.0) ** rng.integers(-6, 6, n).astype(F32) for _ in range(2))
    expected = tree_by_hand(a, b)
    got = reference.dot(a, b)
    assert got.dtype == F32 and got.view(np.int32) == expected.view(np.int32)
    assert len(reference.chunk_sums(a, b)) == -(-n // 2048)
    if n > 256:
        other = np.sum(F32(a * b), dtype=F32)
        assert n < 1000 or other != got  # the order can be seen at all


def test_more_chunks_than_lanes():
    rng = np.random.default_rng(1)
    sums = rng.standard_normal((3, 700)).astype(F32)
    expected = [tree_of_sums(row) for row in sums]
    assert np.array_equal(reference.combine(sums), expected)
    a = rng.standard_normal(300 * 2048 + 77).astype(F32)
    assert np.isclose(reference.dot(a, a), np.dot(a.astype(np.float64), a.astype(np.float64)), rtol=1e-6)


def tree_of_sums(sums):
    lanes = np.zeros(256, F32)
    for c, s in enumerate(sums):
        lanes[c % 256] += s
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def test_a_sum_is_never_minus_zero():
    tiny = np.full(3, 1e-30, F32)
    assert reference.fma(tiny[0], -tiny[0], F32(0)).view(np.int32) == -(2**31)  # a lane may be
    for a, b in ((tiny, -tiny), (tiny * 0, -tiny), (tiny[:0], tiny[:0])):
        assert reference.dot(a, b).view(np.int32) == 0


@pytest.mark.parametrize("n", [1, 100, 784, 3000, 20000])
def test_near_float64(n):
    rng = np.random.default_rng(n)
    B, V, M, N = 3, 5, 4, 2
    x, basis = rng.standard_normal((B, n)).astype(F32), (rng.standard_normal((V, n)) / np.sqrt(n)).astype(F32)
    gain, offset, weight = (rng.standard_normal(s).astype(F32) for s in ((N, V), (N, V), (B, M)))
    index, row = rng.integers(0, V, (B, M)), rng.integers(0, N, B)
    exact = reference.project(x, basis, index, gain, offset, weight, row)
    wide = reference.project(x, basis, index, gain, offset, weight, row, arithmetic=reference.FLOAT64)
    by_hand = weight * (np.take_along_axis(gain[row], index, 1) * np.einsum("bn,bmn->bm", x.astype(np.float64), basis[index])
                        + np.take_along_axis(offset[row], index, 1))
    assert exact.dtype == F32 and wide.dtype == np.float64
    assert np.allclose(wide, by_hand, rtol=1e-12) and np.allclose(exact, wide, rtol=1e-5, atol=1e-5)

    exact, wide = (reference.lift(basis, index, weight, arithmetic=A) for A in (reference.EXACT, reference.FLOAT64))
    assert np.allclose(wide, np.einsum("bm,bmn->bn", weight.astype(np.float64), basis[index]), rtol=1e-12, atol=1e-14)
    assert np.allclose(exact, wide, rtol=1e-5, atol=1e-6)

    exact, wide = (reference.edit(x, basis, index, weight, arithmetic=A) for A in (reference.EXACT, reference.FLOAT64))
    norm = np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    assert np.allclose(wide, x + norm * np.einsum("bm,bmn->bn", weight.astype(np.float64), basis[index]), rtol=1e-12, atol=1e-12)
    assert np.allclose(exact, wide, rtol=1e-5, atol=1e-5)
    assert np.allclose(reference.norm(x), norm[:, 0], rtol=1e-6)


def test_what_is_not_read():
    nan = F32(np.nan)
    x, basis = np.full((1, 4), nan), np.full((2, 4), nan)
    zero, one = np.zeros((1, 2), F32), np.ones((1, 2), F32)
    offset = np.array([[2.0, -0.0]], F32)
    assert reference.project(x, basis, None, zero, offset).tolist() == [[2.0, -0.0]]
    assert reference.project(x, basis, None, -zero, offset, 3 * one).tolist() == [[6.0, -0.0]]
    unread = reference.project(x, basis, np.array([[-1, 9]]), nan * one, nan * one, zero)
    assert unread.tolist() == [[0.0, 0.0]] and not np.signbit(unread).any()
    lifted = reference.lift(basis, None, -zero)
    assert (lifted == 0).all() and np.signbit(lifted).all()
    assert np.array_equal(reference.edit(np.ones((1, 4), F32), basis, None, zero), np.ones((1, 4)))
    # A norm of 0 removes the terms too; weights of 0 stay 0 beside an infinite norm.
    minus = np.full((1, 4), -0.0, F32)
    assert np.signbit(reference.edit(minus, basis, None, one)).all()
    assert reference.edit(np.full((1, 4), np.inf, F32), basis, None, zero).tolist() == [[np.inf] * 4]


@pytest.mark.parametrize("dtype, bits", [("float32", np.uint32), ("float16", np.uint16), ("bfloat16", np.uint16)])
def test_without_a_term_every_bit_stays(dtype, bits):
    quiet, signalling = (0xFFFFFFFF, 0x7F800001) if bits == np.uint32 else (0xFFFF, 0x7F81)
    pattern = np.array([[quiet, 1, signalling]], bits)
    h = pattern if dtype == "bfloat16" else pattern.view(dtype)
    vectors, weight = np.ones((1, 3), F32), np.zeros((1, 1), F32)
    assert np.array_equal(reference.edit(h, vectors, None, weight, dtype=dtype).view(bits), pattern)
    output, nan = ("bfloat16", 0x7FC0) if dtype == "float32" else ("float32", 0x7FC00000)
    rounded = reference.edit(h, vectors, None, weight, dtype=dtype, output=output)
    assert rounded.view(np.uint16 if output == "bfloat16" else np.uint32)[0, 0] == nan


def test_indices_are_clamped():
    basis = np.arange(6, dtype=F32).reshape(3, 2)
    weight, index = np.ones((1, 2), F32), np.array([[-5, 7]])
    assert reference.lift(basis, index, weight).tolist() == [[4.0, 6.0]]
    table = np.ones((2, 3), F32) * np.array([[1], [10]], F32)
    assert reference.project(np.ones((1, 2), F32), basis, index, table, 0 * table, None, 9).tolist() == [[10.0, 90.0]]
