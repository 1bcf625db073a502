"""2^24 draws of each step of a Brownian plan, by the kernels: variance 1, independent of each other, sums that fit together."""

import itertools
import math

import pytest

import fastdiff as fd
from fastdiff.brownian import increments
from fastdiff.samplers.stage import Noise

LEVELS = (14.6, 9.1, 5.3, 2.2, 0.7, 0.2)
N = 1 << 24


def drawn(levels):
    """(steps, N) float32: the draws between levels."""
    sums = [{Noise("brownian", draw): w for draw, w in terms.items()} for terms in increments(levels)]
    made = fd.Plan.from_rows([fd.Row({}, (terms,), calls_model=False) for terms in sums])
    run = fd.Stepper(made, (16, N // 16), seeds=0)  # applies all rows: none calls the model
    every = []
    for row in range(len(made)):
        run._apply(None, row)
        every.append(run.x.flatten().clone())
    return every


@pytest.fixture(scope="module")
def draws():
    if fd.ops.chosen("cpu") == "reference":
        pytest.skip("2^24 draws of several normals need the C++ backend: the reference would take minutes")
    return drawn(LEVELS)


def test_variance(draws):
    for z in draws:
        z = z.double()
        assert abs(float(z.mean())) * math.sqrt(N) < 5
        assert abs(float(z.square().mean()) - 1) * math.sqrt(N / 2) < 5


def test_independence(draws):
    for a, b in itertools.combinations(draws, 2):
        assert abs(float((a.double() * b.double()).mean())) * math.sqrt(N) < 5
        assert abs(float(((a.double() ** 2 - 1) * (b.double() ** 2 - 1)).mean())) * math.sqrt(N) / 2 < 5


def test_coarser_steps_are_sums_of_finer_ones(draws):
    coarse = drawn((LEVELS[0], LEVELS[2], LEVELS[4]))
    for i, z in enumerate(coarse):
        s = LEVELS[2 * i : 2 * i + 3]
        parts = [math.sqrt((s[k] - s[k + 1]) / (s[0] - s[2])) * draws[2 * i + k] for k in (0, 1)]
        assert float((z - sum(parts)).abs().max()) < 2e-5
