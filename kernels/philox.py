"""Philox4x32-10 for Triton, and the ops on its words: ``fold_in``, ``run_keys``, ``raw_words``.

The map is that of ``tl.randint4x``: KEY = lo, hi of the seed; CTR = lo, hi of the counter, 0, 0. It is written out here
since the 32 by 32 bit products are wanted as one wide multiplication each, and since the counter has 64 bits.
"""

import torch
import triton
import triton.language as tl

from ..checks import check_fold_in, check_raw_words, check_run_keys
from .launch import grid, run

__all__ = ["fold_in", "philox", "raw_words", "run_keys"]

BLOCK = 256


@triton.jit
def philox(seed, counter):
    """Ten rounds. seed, counter: uint64, scalars or tensors that broadcast. Returns four uint32."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c2 = c0 ^ c0
    c3 = c2
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def child(seed, offset, i):
    """``fold_in``: the i-th child of the key (seed, offset). All uint64."""
    r0, r1, r2, r3 = philox(seed, offset + i)
    return r0.to(tl.uint64) | (r1.to(tl.uint64) << 32), r2.to(tl.uint64) | (r3.to(tl.uint64) << 32)


@triton.jit
def _store_key(out, at, keep, seed, offset):
    tl.store(out + 2 * at, seed.to(tl.int64, bitcast=True), mask=keep)
    tl.store(out + 2 * at + 1, offset.to(tl.int64, bitcast=True), mask=keep)


@triton.jit
def fold_in_kernel(out, keys, data, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    seed = tl.load(keys + 2 * at, mask=keep, other=0).to(tl.uint64, bitcast=True)
    offset = tl.load(keys + 2 * at + 1, mask=keep, other=0).to(tl.uint64, bitcast=True)
    i = tl.load(data + at, mask=keep, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    seed, offset = child(seed, offset, i)
    _store_key(out, at, keep, seed, offset)


@triton.jit
def run_keys_kernel(out, seeds, streams, draws, count, batch, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    entry = at // batch
    seed = tl.load(seeds + (at - entry * batch), mask=keep, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    stream = tl.load(streams + entry, mask=keep, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    draw = tl.load(draws + entry, mask=keep, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    seed, offset = child(seed, seed ^ seed, stream)
    seed, offset = child(seed, offset, draw)
    _store_key(out, at, keep, seed, offset)


@triton.jit
def raw_words_kernel(out, keys, key_stride, count, batch, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(keys + b * key_stride).to(tl.uint64, bitcast=True)
    offset = tl.load(keys + b * key_stride + 1).to(tl.uint64, bitcast=True)
    w0, w1, w2, w3 = philox(seed, offset + block.to(tl.uint64))
    at = out + b * count + 4 * block
    tl.store(at, w0.to(tl.int32, bitcast=True), mask=4 * block < count)
    tl.store(at + 1, w1.to(tl.int32, bitcast=True), mask=4 * block + 1 < count)
    tl.store(at + 2, w2.to(tl.int32, bitcast=True), mask=4 * block + 2 < count)
    tl.store(at + 3, w3.to(tl.int32, bitcast=True), mask=4 * block + 3 < count)


def fold_in(keys, data):
    """The children of keys. keys: (..., 2) int64; data: int64, broadcasts with (...). Returns (..., 2) int64."""
    check_fold_in(keys, data)
    shape = torch.broadcast_shapes(keys.shape[:-1], data.shape)
    out = torch.empty((*shape, 2), dtype=torch.int64, device=keys.device)
    count = out.numel() // 2
    if count:
        keys, data = keys.expand(*shape, 2).contiguous(), data.expand(shape).contiguous()
        run(fold_in_kernel, out.device, (triton.cdiv(count, BLOCK),), out, keys, data, count, BLOCK=BLOCK)
    return out


def run_keys(seeds, streams, draws):
    """Keys of a run. seeds: (B,); streams, draws: (N, J); int64. Returns (N, J, B, 2) int64."""
    check_run_keys(seeds, streams, draws)
    out = torch.empty((*streams.shape, len(seeds), 2), dtype=torch.int64, device=seeds.device)
    count = out.numel() // 2
    if count:
        run(run_keys_kernel, out.device, (triton.cdiv(count, BLOCK),), out, seeds.contiguous(), streams.contiguous(),
            draws.contiguous(), count, len(seeds), BLOCK=BLOCK)
    return out


def raw_words(keys, count):
    """Philox words 0..count-1 of each stream. keys: (B, 2) int64. Returns (B, count) int32, bit views of uint32."""
    check_raw_words(keys, count)
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    out = torch.empty((len(keys), count), dtype=torch.int32, device=keys.device)
    if out.numel():
        run(raw_words_kernel, out.device, grid(triton.cdiv(count, 4 * BLOCK), len(keys)), out, keys, keys.stride(0), count, len(keys),
            BLOCK=BLOCK)
    return out
