"""The reference against oracles that were not written here: Random123, torch.func._random, the C library, mpmath."""

import ctypes
import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from fastdiff import reference

DATA = Path(__file__).parent.parent / "data"

# kat_vectors of Random123: philox 4x32 10, counter, key, result.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, result", RANDOM123)
def test_philox_random123(counter, key, result):
    assert tuple(int(w) for w in reference.philox(key, counter)) == result


def _awkward_floats(rng, n):
    """Every kind of float32, near-cancelling triples among them."""
    bits = rng.integers(0, 2**32, (3, n), dtype=np.uint32)
    small = (bits & 0x807FFFFF) | (rng.integers(0, 80, (3, n), dtype=np.uint32) << 23)
    a = np.concatenate([bits, small], axis=1).view(np.float32)
    with np.errstate(all="ignore"):
        near = (-(a[0] * a[1])).view(np.uint32) ^ rng.integers(0, 4, a.shape[1], dtype=np.uint32)
    cancelling = np.stack([a[0], a[1], near.view(np.float32)])
    special = np.array(np.meshgrid(*[[0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38]] * 3), np.float32)
    return np.concatenate([a, cancelling, special.reshape(3, -1)], axis=1)


def test_fma_is_the_c_librarys():
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    values = _awkward_floats(np.random.default_rng(1), 40_000)
    ours = reference.fma(*values)
    theirs = np.array([fmaf(*v) for v in values.T.tolist()], dtype=np.float32)
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), values[:, ~same][:, :5]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_and_every_tie(dtype):
    """Widening of all 65,536 values, and rounding of the values around and at every midpoint, against torch."""
    torch_dtype = getattr(torch, dtype)
    bits = np.arange(65536, dtype=np.uint16)
    stored = bits if dtype == "bfloat16" else bits.view(np.float16)
    wide = reference.widen(stored, dtype)
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(torch_dtype).float().numpy()
    nan = np.isnan(wide)
    assert (nan == np.isnan(theirs)).all()
    assert (wide.view(np.uint32) == theirs.view(np.uint32))[~nan].all()

    finite = np.sort(wide[np.isfinite(wide)].astype(np.float64))
    midpoints = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    with np.errstate(over="ignore"):
        extreme = np.array([1e39, -1e39, 65519.99, 65520]).astype(np.float32)
    around = np.concatenate([np.nextafter(midpoints, np.float32(-np.inf)), midpoints,
                             np.nextafter(midpoints, np.float32(np.inf)), wide, extreme])
    ours = reference.narrow(around, dtype)
    theirs = torch.from_numpy(around).to(torch_dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(around)
    assert (ours.view(np.uint16)[~nan] == theirs[~nan]).all()
    assert (ours.view(np.uint16)[nan] == {"float16": 0x7E00, "bfloat16": 0x7FC0}[dtype]).all()


def _int64(values):
    return np.array([int(v) % 2**64 for v in values], dtype=np.uint64).view(np.int64)


@pytest.fixture(scope="module")
def vectors():
    """Recorded from torch 2.14.1 and Triton (``tests/data/make_torch_vectors.py``)."""
    return json.loads((DATA / "torch_func_random_2_14_1.json").read_text())


def test_keys_of_torch_func_random(vectors):
    for case in vectors["keys"]:
        child = reference.fold_in(_int64(case["key"]), _int64([case["data"]])[0])
        assert (child == _int64(case["fold_in"])).all(), case
    for case in vectors["splits"]:
        for i, child in enumerate(case["split"]):
            assert (reference.fold_in(_int64(case["key"]), i) == _int64(child)).all(), (case["key"], i)


@pytest.mark.parametrize("source", ["words", "triton"])
def test_words_of_torch_func_random_and_triton(vectors, source):
    for case in vectors[source]:
        assert reference.raw_words(_int64(case["key"]), 0, 8).tolist() == case["words"], case["key"]


def test_normals_of_torch_func_random(vectors):
    """Same map from key to normals; the last bits are a libm's there."""
    def floats(bits):
        return np.array([int(v, 16) for v in bits], dtype=np.uint32).view(np.float32)

    for case in vectors["normals"]:
        theirs = floats(case["normals"])
        assert np.abs(reference.normal(_int64(case["key"]), len(theirs)).astype(float) - theirs).max() < 2e-6
    batched = vectors["batched"]
    keys = np.stack([_int64(k) for k in batched["keys"]])
    ours = reference.normal(keys, int(np.prod(batched["shape"][1:])))
    assert np.abs(ours.ravel().astype(float) - floats(batched["normals"])).max() < 2e-6


def test_normals_against_mpmath():
    """Within 2e-6 of Box-Muller from the same float32 uniform, at the ends of every binade and at random."""
    mpmath.mp.prec = 120
    rng = np.random.default_rng(3)
    edge = np.array([v for k in range(32) for v in ((1 << k) - 1, 1 << k, (1 << k) + 1)] + [2**32 - 1], dtype=np.uint32)
    first = np.concatenate([edge, rng.integers(0, 2**32, 400, dtype=np.uint32)])
    second = rng.permutation(np.concatenate([rng.integers(0, 2**32, 400, dtype=np.uint32), edge]))
    words = np.stack([first, second], axis=-1).reshape(-1)
    words = words[: len(words) // 4 * 4]
    z = reference.box_muller(words).reshape(-1, 2)
    for (u0, u1), (c, s) in zip(reference.uniform(words).reshape(-1, 2).tolist(), z.tolist()):
        r, angle = mpmath.sqrt(-2 * mpmath.log(u0)), 2 * mpmath.pi * mpmath.mpf(u1)
        assert abs(r * mpmath.cos(angle) - c) < 2e-6 and abs(r * mpmath.sin(angle) - s) < 2e-6


def test_largest_normal():
    words = np.array([0, 0, 0, 1 << 30], dtype=np.uint32)
    assert np.abs(reference.box_muller(words)).max() == np.float32(6.7637057)


def test_fold_in_wraps_modulo_2_64():
    key = np.array([-1, -1], dtype=np.int64)
    assert (reference.fold_in(key, 1) == reference.fold_in(np.array([-1, 0], dtype=np.int64), 0)).all()
    words = reference.raw_words(np.array([5, -1], dtype=np.int64), 0, 8)
    assert (words[4:] == reference.raw_words(np.array([5, 0], dtype=np.int64), 0, 4)).all()


def test_words_do_not_depend_on_where_one_starts():
    key = np.array([9, 0], dtype=np.int64)
    all_words = reference.raw_words(key, 0, 40)
    for first in range(9):
        assert (reference.raw_words(key, first, 13) == all_words[first : first + 13]).all()


def test_nothing_is_a_size_too():
    keys = np.array([[9, 0], [8, 0]], dtype=np.int64)
    assert reference.raw_words(keys, 0, 0).shape == (2, 0)
    assert reference.raw_words(keys[:0], 0, 5).shape == (0, 5)
    assert reference.normal(keys, 0).shape == (2, 0)
    assert reference.normal(keys[:0], 3).shape == (0, 3)
