"""Noise that depends on a sample's own seed and on nothing else.

A sample's key is ``(seed, 0)``. Every use folds in a stream and then the number of the draw, so that no two uses share
bits, and a sample gets the same noise in any batch, at any position, on any device, in any dtype (up to one rounding).
The map from key to bits is that of ``torch.func._random``; ``docs/noise.md`` states it.
"""

from collections.abc import Sequence

import torch

__all__ = ["STREAMS", "as_seeds", "fold_in", "randn", "sample_keys", "stream_id"]

STREAMS = {"init": 0, "step": 1, "churn": 2, "mask": 3, "brownian": 4, "resample": 5, "user": 6}
"""What a stream is for. Numbers from 2^32 on are free for anybody's own use."""


def stream_id(stream: str | int) -> int:
    """The number of a named stream, or the number itself. Raises ``ValueError`` with the nearest name."""
    if isinstance(stream, bool) or not isinstance(stream, (str, int)):
        raise TypeError(f"stream is {stream!r}: a name ({', '.join(STREAMS)}) or an int is taken")
    if isinstance(stream, int):
        if not 0 <= stream < 2**63:
            raise ValueError(f"stream is {stream}: a number from 0 to 2^63 - 1 is taken")
        return stream
    if stream not in STREAMS:
        raise ValueError(unknown("stream", stream, STREAMS))
    return STREAMS[stream]


def as_seeds(seeds: int | Sequence[int] | torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """Seeds as (B,) int64 on the CPU (bit views of uint64).

    seeds: an int s, which means s, s+1, ..., s+B-1 (``batch`` must be given); a sequence of B ints in
    [-2^63, 2^64); or an integer tensor (B,). Raises ``ValueError``/``TypeError`` naming what was given.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype not in (torch.int64, torch.int32) or seeds.ndim != 1:
            raise TypeError(f"seeds is a tensor of shape {tuple(seeds.shape)} and dtype {seeds.dtype}: "
                            "shape (B,) and dtype int64 or int32 is taken")
        values = seeds.to("cpu", torch.int64)
    else:
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            if batch is None:
                raise ValueError("seeds is one int: the number of samples is needed too")
            seeds = range(seeds, seeds + batch)
        if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Sequence):
            raise TypeError(f"seeds is {seeds!r}: an int, a sequence of ints or a tensor is taken")
        for s in seeds:
            if isinstance(s, bool) or not hasattr(s, "__index__"):
                raise TypeError(f"seeds holds {s!r}: ints are taken")
            if not -(2**63) <= s.__index__() < 2**64:
                raise ValueError(f"seeds holds {s}: ints from -2^63 to 2^64 - 1 are taken")
        wrapped = [int(s) & (2**64 - 1) for s in seeds]
        values = torch.tensor([w - 2**64 if w >= 2**63 else w for w in wrapped], dtype=torch.int64)
    if batch is not None and len(values) != batch:
        raise ValueError(f"seeds has {len(values)} entries, the batch has {batch} samples: one seed a sample is taken")
    return values


def sample_keys(seeds: torch.Tensor, stream: str | int, draw: int = 0) -> torch.Tensor:
    """Keys (B, 2) int64 of one draw: ``fold_in(fold_in((seed_b, 0), stream), draw)``. seeds: (B,) int64."""
    where = torch.tensor([[stream_id(stream)]]), torch.tensor([[draw]])
    return torch.ops.fastdiff.run_keys(seeds, *(w.to(seeds.device) for w in where))[0, 0]


def fold_in(keys: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """Children of keys. keys: (..., 2) int64; data: an int, or int64 that broadcasts with (...). Returns (..., 2)."""
    data = torch.as_tensor(data, dtype=torch.int64, device=keys.device)
    return torch.ops.fastdiff.fold_in(keys, data)


def randn(
    shape: Sequence[int],
    *,
    seeds: int | Sequence[int] | torch.Tensor,
    stream: str | int = "user",
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normals (B, ...), sample b from its own seed.

    shape: (B, ...), B being the number of seeds; seeds: see ``as_seeds``; stream, draw: which noise of that seed;
    dtype: float32, float16 or bfloat16 (the float32 value, rounded once).

    >>> import fastdiff as fd
    >>> both = fd.randn((2, 3, 8, 8), seeds=[7, 8])
    >>> bool((both[1:] == fd.randn((1, 3, 8, 8), seeds=[8])).all())
    True
    """
    shape = tuple(int(s) for s in shape)
    if not shape or any(s < 0 for s in shape):
        raise ValueError(f"shape is {shape}: (B, ...) with sizes of 0 or more is taken")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}: torch.float32, torch.float16 or torch.bfloat16 is taken")
    if isinstance(draw, bool) or not isinstance(draw, int) or not 0 <= draw < 2**63:
        raise ValueError(f"draw is {draw!r}: an int from 0 to 2^63 - 1 is taken")
    keys = sample_keys(as_seeds(seeds, shape[0]).to(device), stream, draw)
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.fastdiff.normal_(out, keys)
    return out


def unknown(what: str, given: str, names) -> str:
    """The message for a name that is not known, with the nearest that is."""
    import difflib

    near = difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.4)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"{what} {given!r} is not known{hint} Taken: {', '.join(sorted(names))}"
