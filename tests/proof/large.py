"""Samples of more than 2^31 and 2^32 elements, and strides beyond that: on memory that is reserved and hardly touched, so that
chosen blocks of a real launch can run."""

import mmap
import re

import numpy as np
import torch

from cases import BITS, Case
from fastdiff import reference

KINDS = ("contiguous", "plain", "channels last", "mask", "whole mask", "tokens")
SPAN = 1024  # elements that a block of a large sample owns, in both backends
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def reserved(shape, strides, dtype):
    """A tensor whose memory exists where it is touched."""
    count = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def places(t, b, first, count):
    """Where elements first, first + 1, ... of sample b stand in a tensor's storage, as an index."""
    e, at = torch.arange(first, first + count), torch.full((count,), b * t.stride(0) if len(t) > 1 else 0)
    for n, stride in reversed(list(zip(t.shape[1:], t.stride()[1:]))):
        at, e = at + e % n * stride, e // n
    return at


def flat(t):
    """All of a tensor's memory, as integers."""
    return torch.empty(0, dtype=BITS[t.dtype]).set_(t.untyped_storage(), 0, (t.untyped_storage().nbytes() // t.element_size(),), (1,))


def window(case, b, first, count, row):
    """The elements [first, first + count) of sample b as a case of its own, whose one row is ``row``."""

    def cut(t, lead=0):
        if t is None:
            return None
        period = t[0].numel()
        at = places(t, b, first % period, min(count, period))
        return flat(t)[at].view(t.dtype).reshape(1, -1).clone()

    keys = case.keys[:, :, b : b + 1].clone()
    keys[..., 1] += first // 4  # the elements' noise is that of a stream which starts there
    return Case([cut(t) for t in case.inputs], [cut(t) for t in case.outputs], None, case.coef, case.meta, None, row, keys,
                known=cut(case.known), mask=cut(case.mask), status=case.status.clone())


def big_case(kind):
    """(case, parts of a sample with a row each)"""
    data = np.random.default_rng(0)
    C, H, W = (5, 2**15, 2**15) if kind != "contiguous" else (1, 1, 2**31 + 1029)
    B, n = 2, C * H * W
    masks, tokens = "mask" in kind, C if kind == "tokens" else 1

    def samples(dtype, layout):
        inner = (H * W, W, 1) if layout == "contiguous" else (1, W * C, C)
        return reserved((B, C, H, W), (-(-n // 8) * 8 + 8192, *inner), dtype)

    dtypes = {"plain": ([F32, F32], [F32]), "contiguous": ([F16, F16], [F16]), "channels last": ([F16, F32], [BF16]),
              "mask": ([F32, F16], [F16]), "whole mask": ([F16], [F16]), "tokens": ([F16], [F16, F32])}[kind]
    other = "contiguous" if kind == "contiguous" else "channels last"
    inputs, outputs = [[samples(d, other if i == 0 else "contiguous") for i, d in enumerate(ds)] for ds in dtypes]
    layout = reference.Layout(len(inputs), len(outputs), 0, 1)
    N = 4
    coef, meta = torch.from_numpy(data.standard_normal((N, layout.width)).astype(np.float32)), torch.zeros(N, 4, dtype=torch.int32)
    meta[:, 0], meta[:, 1] = -1, 8 * masks
    keys = torch.from_numpy(data.integers(-(2**63), 2**63, (N, 1, B, 2)))
    row = torch.from_numpy(data.integers(0, N, (B, C))) if kind == "tokens" else None
    known = samples(F16, "channels last") if masks else None
    mask = reserved((1, 1, H, W), (H * W, H * W, W, 1), F16) if kind == "mask" else samples(F16, "channels last") if masks else None
    status = torch.tensor([2**31 - 1, 0], dtype=torch.int32)
    return Case(inputs, outputs, None, coef, meta, row, 2, keys, known=known, mask=mask, status=status), tokens


def fill(case, b, first, count, data):
    """Values where the elements [first, first + count) of sample b will be read."""
    for t in (*case.inputs, *(t for t in (case.known, case.mask) if t is not None)):
        period = t[0].numel()
        values = torch.from_numpy(data.standard_normal(count).astype(np.float32)).to(t.dtype)
        flat(t)[places(t, b, first % period, count)] = values.view(BITS[t.dtype])


def row_of(case, b, first, tokens):
    return case.row_index if case.row is None else int(case.row[b, first // (case.inputs[0][0].numel() // tokens)])


def blocks(name, launch, b, first, numel, tokens):
    """Which block of a launch owns the elements from ``first`` on."""
    if name == "cuda":
        elements = int(re.search(r"kernelILi(\d+)E", launch.kernel.name)[1])
        return [(at // (launch.block[0] * elements), b, 0) for at in range(first, first + SPAN, launch.block[0] * elements)]
    part = numel // tokens
    return [((first % part) // SPAN, b * tokens + first // part, 0)]
