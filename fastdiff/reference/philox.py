"""Philox4x32-10 and the keys made from it (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A key is a pair ``(seed, offset)`` of two uint64. Element e of a stream is lane ``e mod 4`` of
``philox(KEY = lo, hi of seed; CTR = lo, hi of (offset + e div 4), 0, 0)``. This is the map of ``torch.func._random``,
of Triton's ``tl.randint4x`` and of FlashInfer. Keys travel as int64 bit views, since torch's uint64 has no arithmetic.
"""

import numpy as np

__all__ = ["fold_in", "philox", "raw_words", "run_keys"]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key, counter):
    """Ten rounds of Philox4x32. key: two, counter: four uint32 arrays that broadcast. Returns four uint32 arrays."""
    k0, k1 = (np.asarray(k, dtype=np.uint64) for k in key)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    for i in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        w0, w1 = np.uint64(i * _W0 & 0xFFFFFFFF), np.uint64(i * _W1 & 0xFFFFFFFF)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ ((k0 + w0) & _LOW), p1 & _LOW, (p0 >> _32) ^ c3 ^ ((k1 + w1) & _LOW), p0 & _LOW
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def _uint64(values):
    """Python ints of any size, or int64/uint64 arrays, modulo 2^64."""
    values = np.asarray(values)
    if values.dtype == object:
        values = np.vectorize(lambda v: int(v) & 0xFFFFFFFFFFFFFFFF, otypes=[np.uint64])(values)
    return values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values.astype(np.uint64)


def _split(word):
    return word & _LOW, word >> _32


def fold_in(key, i):
    """The i-th child of a key: ``philox(seed, offset + i)`` read as two uint64.

    key: (..., 2) int64; i: int64, broadcasts with the leading dimensions of key. Returns (..., 2) int64.
    """
    key = _uint64(key)
    with np.errstate(over="ignore"):
        counter = key[..., 1] + _uint64(i)
    r0, r1, r2, r3 = (r.astype(np.uint64) for r in philox(_split(key[..., 0]), (*_split(counter), 0, 0)))
    return np.stack(np.broadcast_arrays(r0 | r1 << _32, r2 | r3 << _32), axis=-1).view(np.int64)


def run_keys(seeds, streams, draws):
    """Keys of a run. seeds: (B,) int64; streams, draws: (N, J) int64. Returns (N, J, B, 2) int64:
    ``fold_in(fold_in((seed_b, 0), stream), draw)``."""
    seeds = _uint64(seeds).view(np.int64)
    base = np.stack([seeds, np.zeros_like(seeds)], axis=-1)
    return fold_in(fold_in(base, np.asarray(streams)[..., None]), np.asarray(draws)[..., None])


def raw_words(keys, first, count):
    """Elements first..first+count-1 of each stream. keys: (..., 2) int64. Returns (..., count) uint32."""
    keys = _uint64(keys)
    element = np.arange(first, first + count, dtype=np.uint64)
    blocks = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    with np.errstate(over="ignore"):
        counter = keys[..., 1:] + blocks
    words = np.stack(philox(_split(keys[..., :1]), (*_split(counter), 0, 0)), axis=-1)
    words = words.reshape(*words.shape[:-2], 4 * len(blocks))
    return words[..., first % 4 : first % 4 + len(element)]
