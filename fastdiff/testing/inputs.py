"""What golden cases are fed with: numbers from the project's own Philox, by exact integer-to-float operations.

Nothing here depends on Python's or NumPy's generators, nor on a mathematics library: the same on every version of both.
"""

import hashlib
import math

import numpy as np
import torch

from .. import reference

__all__ = ["BITS", "DTYPES", "Draw", "EDGES", "laid_out", "moved"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# Where 64-bit counters and seeds carry, wrap and change their sign.
EDGES = (0, 1, -1, 2, -2, 2**31 - 1, 2**31, 2**32 - 3, 2**32 - 1, 2**32, -(2**32), 2**63 - 2, 2**63 - 1, -(2**63),
         0x123456789ABCDEF)

# Bits of float32: NaN of several payloads, infinities, zeros, subnormals, and the borders of the 16-bit types.
SPECIALS = np.array([
    0x7FC00000, 0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF,
    0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x337FFFFF, 0x387FC000,
    0x7F7F7FFF, 0x7F7F8000, 0x00007FFF, 0x00008000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000], np.uint32)


class Draw:
    """Numbers of one case, from the key that the SHA-256 of its name makes: cases do not depend on their order."""

    def __init__(self, name: str):
        self.seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        self.used = 0

    def words(self, count: int) -> np.ndarray:
        """(count,) uint32"""
        key = np.array([self.seed, self.used], np.int64)
        self.used += -(-count // 4)
        return reference.raw_words(key, 0, count)

    def integers(self, low: int, high: int, shape) -> np.ndarray:
        """int64 in [low, high)"""
        return low + (self.words(math.prod(shape)).astype(np.int64) % (high - low)).reshape(shape)

    def keys(self, *shape) -> np.ndarray:
        """(*shape, 2) int64"""
        return self.words(4 * math.prod(shape)).view(np.int64).reshape(*shape, 2)

    def values(self, shape, special: float = 0) -> np.ndarray:
        """float32 in [-2, 2) with 24 bits; where special > 0, scaled by 2^-4 .. 2^4, that share from ``SPECIALS``."""
        count = math.prod(shape)
        whole = (self.words(count) >> np.uint32(8)).astype(np.int32) - np.int32(2**23)
        values = whole.astype(np.float32) * np.float32(2.0**-22)
        if special:
            powers = np.ldexp(np.float32(1), self.integers(-4, 5, (count,)).astype(np.int32)).astype(np.float32)
            bits = (values * powers).view(np.uint32)
            chosen = self.words(count) < np.uint32(special * 2**32)
            values = np.where(chosen, SPECIALS[self.integers(0, len(SPECIALS), (count,))], bits).view(np.float32)
        return values.reshape(shape)

    def coefficients(self, shape, density: float) -> np.ndarray:
        """float32, a share of ``density`` of them not 0, some exactly 1."""
        kept = self.words(math.prod(shape)).reshape(shape)
        values = np.where(kept % np.uint32(7) == 0, np.float32(1), self.values(shape))
        return np.where(kept < np.uint32(min(density * 2**32, 2**32 - 1)), values, np.float32(0))

    def tensor(self, shape, dtype="float32", layout="contiguous", special: float = 0) -> torch.Tensor:
        return laid_out(self.values(shape, special), dtype, layout)


def laid_out(values: np.ndarray, dtype: str, layout: str = "contiguous") -> torch.Tensor:
    """float32 values (B, *shape), rounded to a dtype, in a layout: "contiguous", "channels_last", "strided" (a gap after
    each sample), "offset" (storage begins one element early), "expanded" (one sample for all). Gaps are filled with 7."""
    shape, n = values.shape, math.prod(values.shape[1:])
    order = list(range(1, len(shape)))
    if layout == "channels_last":
        order = order[1:] + order[:1]
    stride, step = [0] * len(shape), 1
    for d in reversed(order):
        stride[d], step = step, step * shape[d]
    stride[0] = {"expanded": 0, "strided": n + 3}.get(layout, n)
    offset = 1 if layout in ("offset", "strided") else 0
    storage = torch.full((offset + (shape[0] - 1) * stride[0] + n,), 7.0, dtype=DTYPES[dtype])
    out = storage.as_strided(shape, stride, offset)
    target = out[:1] if layout == "expanded" else out
    stored = np.ascontiguousarray(reference.narrow(values[: len(target)], dtype))
    if dtype == "float32":  # a NaN keeps its payload: ``narrow`` makes it the canonical one
        stored = np.ascontiguousarray(values[: len(target)])
    target.view(BITS[out.dtype]).copy_(torch.from_numpy(stored.view(np.int32 if stored.itemsize == 4 else np.int16)))
    return out


def moved(tree, device):
    """A copy of all tensors in a dict on a device: strides, offsets and what shares memory stay as they are."""
    storages = {}

    def move(value):
        if isinstance(value, (list, tuple)):
            return [move(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        key = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
        if key not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
            storages[key] = whole.to(device, copy=True).untyped_storage()
        return torch.empty(0, dtype=value.dtype, device=device).set_(
            storages[key], value.storage_offset(), value.shape, value.stride())

    return {name: move(value) for name, value in tree.items()}
