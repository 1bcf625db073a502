"""The quantile: the exact reference against torch.quantile in every bit, against the step's own d, and beyond where torch ends."""

import math

import numpy as np
import pytest
import torch

from fastdiff import reference
from fastdiff.reference import Layout

F32 = np.float32
ONE = np.ones((1, 1), F32)


def bits(values):
    """Bits of float32, every NaN alike."""
    values = np.asarray(values, F32)
    return np.where(np.isnan(values), np.int32(0x7FC00000), values.view(np.int32))


def by_torch(x, q):
    return torch.quantile(torch.from_numpy(np.abs(x)), q, dim=1).numpy()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 100, 1001, 65536, 2**20])
def test_torch(n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3 if n < 10**5 else 1, n)).astype(F32)
    for q in (0.0, 1.0, 0.5, 0.995, 1 / 3, 1e-9, 1 - 1e-9, *rng.random(20 if n < 10**5 else 3)):
        out, clip = reference.quantile([x], ONE, 0, float(q), low=0.7, high=2.0)
        expected = by_torch(x, float(q))
        assert np.array_equal(bits(out), bits(expected)), (n, q)
        t = torch.from_numpy(expected).clamp(0.7, 2.0)
        assert np.array_equal(bits(clip), bits(torch.stack([-t, t, 1 / t], 1)))


SPECIAL = {
    "all equal": [2.0] * 9, "zeros of both signs": [-0.0, 0.0, -0.0, 0.0], "subnormals": [1e-45, -3e-45, 1e-40, -1e-41, 1e-38],
    "one infinity": [1.0, -2.0, np.inf, 3.0], "infinities": [1.0, -np.inf, np.inf, np.inf], "a NaN": [1.0, np.nan, np.inf, 2.0],
    "NaN": [np.nan] * 3, "the largest": [3.4028235e38, -3.4028235e38, 1.0], "one element": [-5.0], "two": [3.0, -1.0],
}


@pytest.mark.parametrize("what", SPECIAL)
def test_special_values(what):
    x = np.array([SPECIAL[what]], F32)
    for q in (0.0, 0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 1.0):
        assert np.array_equal(bits(reference.quantile([x], ONE, 0, q)[0]), bits(by_torch(x, q))), q


def test_torch_is_right_to_be_followed():
    """Where interpolation starts: a float64 quantile of the same elements, by NumPy."""
    x = np.random.default_rng(5).standard_normal((4, 999)).astype(F32)
    for q in (0.25, 0.995):  # exact in float32 up to its rounding
        exact = np.quantile(np.abs(x).astype(np.float64), float(F32(q)), axis=1)
        assert np.allclose(reference.quantile([x], ONE, 0, q)[0], exact, rtol=3e-7 * 999)
        wide = reference.quantile([x], ONE, 0, q, arithmetic=reference.FLOAT64)
        assert wide[0].dtype == wide[1].dtype == np.float32 or wide[0].dtype == np.float64
        assert np.allclose(wide[0], exact, rtol=1e-4)


def test_position():
    assert reference.position(1, 0.7) == (0, 0, 0) and reference.position(5, 1.0) == (4, 4, 0)
    below, above, w = reference.position(2**24, 0.5)  # 8388607.5 is a float32
    assert (below, above, w) == (2**23 - 1, 2**23, 0.5)
    below, above, w = reference.position(2**24 + 2, 0.5)  # 8388608.5 is none
    assert (below, above, w) == (2**23, 2**23 + 1, 0.5)
    n = 2**31 + 10
    assert reference.position(n, 1.0) == (n - 1, n - 1, 0) and reference.position(n, 0.0) == (0, 0, 0)
    below, above, w = reference.position(n, 0.3)
    assert above == below + 1 and abs(below + float(w) - 0.3 * (n - 1)) < 1e-6 and w.dtype == F32


def test_d_is_that_of_the_step():
    """With coefficients by row and scales by sample, and what a coefficient of 0 leaves out."""
    rng = np.random.default_rng(0)
    B, K, N, n = 4, 3, 3, 257
    inputs = [rng.standard_normal((B, n)).astype(F32) for _ in range(K)]
    inputs[1][2] = np.nan
    layout = Layout(K, 1)
    coef = rng.standard_normal((N, layout.width)).astype(F32)
    coef[1, 1] = 0  # the row of the sample with NaN
    row, scale = np.array([0, 2, 1, 9]), rng.standard_normal((B, K)).astype(F32)
    meta = np.tile(np.array([-1, 0, 0, -1], np.int32), (N, 1))
    d = reference.step(inputs, coef, meta, row, scale=scale).d
    out, _ = reference.quantile(inputs, coef, row, 0.9, scale=scale)
    assert np.array_equal(bits(out), bits(by_torch(d, 0.9))) and np.isfinite(out).all()
    unscaled = reference.quantile(inputs, coef[:, :K], row, 0.9)[0]
    assert not np.array_equal(unscaled, out)


def test_limits():
    x = np.array([[0.25], [1.5], [8.0], [np.nan], [np.inf]], F32)
    out, clip = reference.quantile([x], ONE, 0, 0.5, high=4.0)
    assert np.array_equal(out[:3], x[:3, 0]) and np.isnan(out[3:]).all()  # of infinities torch makes inf + 0 (inf - inf)
    assert clip[:3].tolist() == [[-1, 1, 1], [-1.5, 1.5, F32(1) / F32(1.5)], [-4, 4, 0.25]]
    assert (clip[3:].view(np.int32) == 0x7FC00000).all()
    assert reference.quantile([x], ONE, 0, 0.5, high=math.inf)[1][2].tolist() == [-8, 8, 0.125]
    assert reference.quantile([x], ONE, 0, 0.5, high=0.5)[1][:3].tolist() == [[-0.5, 0.5, 2]] * 3  # limits that cross, as in torch.clamp
