"""2^26 draws: moments, distribution, and independence across elements, keys, draws and streams.

Bounds are five standard errors of the statistic under the null, so that a run of all of them fails by chance about once
in 10^5, and seeds are fixed: a failure is a defect.
"""

import math

import pytest
import scipy.stats
import torch

import fastdiff as fd

KEYS, EACH = 64, 1 << 20
N = KEYS * EACH


@pytest.fixture(scope="module")
def draws():
    if fd.ops.chosen("cpu") == "reference":
        pytest.skip("2^26 draws need the C++ backend: the reference would take minutes")
    return fd.randn((KEYS, EACH), seeds=0)


def _corr(a, b):
    """Correlation of standard normals, in units of its standard error."""
    return float((a.double() * b.double()).mean()) * math.sqrt(a.numel())


def test_moments(draws):
    z = draws.double()
    mean, second, third, fourth = (float((z**k).mean()) for k in (1, 2, 3, 4))
    root = math.sqrt(N)
    assert abs(mean) * root < 5
    assert abs(second - 1) * root / math.sqrt(2) < 5
    assert abs(third) * root / math.sqrt(15) < 5
    assert abs(fourth - 3) * root / math.sqrt(96) < 5  # kurtosis


def test_each_key_alone(draws):
    means = draws.double().mean(1) * math.sqrt(EACH)
    variances = (draws.double().var(1) - 1) * math.sqrt(EACH / 2)
    assert scipy.stats.kstest(means.numpy(), "norm").pvalue > 1e-4
    assert scipy.stats.kstest(variances.numpy(), "norm").pvalue > 1e-4


def test_kolmogorov_smirnov(draws):
    z = draws.flatten().sort().values
    cdf = torch.special.ndtr(z.double())
    steps = torch.arange(N, dtype=torch.float64) / N
    distance = max(float((cdf - steps).abs().max()), float((cdf - steps - 1 / N).abs().max()))
    assert distance * math.sqrt(N) < 2.23  # p = 1e-4
    tail = int((z.abs() > 5).sum())
    expected = N * 5.733e-7
    assert abs(tail - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 1024])
def test_neighbouring_elements(draws, lag):
    assert abs(_corr(draws[:, lag:], draws[:, :-lag])) < 5
    squares = draws.square() - 1
    assert abs(_corr(squares[:, lag:], squares[:, :-lag])) / 2 < 5


def test_neighbouring_keys(draws):
    assert abs(_corr(draws[1:], draws[:-1])) < 5
    assert abs(_corr(draws[1:, 1:], draws[:-1, :-1])) < 5


def test_steps_and_streams():
    if fd.ops.chosen("cpu") == "reference":
        pytest.skip("needs the C++ backend: the reference would take minutes")
    shape = (4, 1 << 20)
    streams = [fd.randn(shape, seeds=0, stream=s) for s in fd.STREAMS]
    steps = [fd.randn(shape, seeds=0, stream="step", draw=i) for i in range(1, 7)]
    everything = streams + steps
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert abs(_corr(a, b)) < 5
            assert not (a == b).float().mean() > 1e-4
