"""Noise that depends on a sample's own seed and on nothing else.

A sample's key is ``(seed, 0)``. Every use folds in a stream and then the number of the draw, so that no two uses share
bits, and a sample gets the same noise in any batch, at any position, on any device, in any dtype (up to one rounding).
The map from key to bits is that of ``torch.func._random``; ``docs/noise.md`` states it.
"""

import operator
from collections.abc import Iterable, Sequence

import torch

__all__ = ["STREAMS", "as_seeds", "checked_shape", "default_seeds", "fold_in", "randn", "sample_keys", "stream_id"]

STREAMS = {"init": 0, "step": 1, "churn": 2, "mask": 3, "brownian": 4, "resample": 5, "user": 6, "travel": 7, "guide": 8}
"""What a stream is for. Numbers from 2^32 on are free for anybody's own use."""


def stream_id(stream: str | int) -> int:
    """The number of a named stream, or the number itself. Raises ``ValueError`` with the nearest name."""
    number = _whole(stream)
    if number is None and not isinstance(stream, str):
        raise TypeError(f"stream is {stream!r}: a name ({', '.join(STREAMS)}) or an int is taken")
    if number is not None:
        if not 0 <= number < 2**63:
            raise ValueError(f"stream is {number}: a number from 0 to 2^63 - 1 is taken")
        return number
    if stream not in STREAMS:
        raise ValueError(unknown("stream", stream, STREAMS))
    return STREAMS[stream]


def as_seeds(seeds: int | Sequence[int] | torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """Seeds as (B,) int64 on the CPU (bit views of uint64).

    seeds: an int s, which means s, s+1, ..., s+B-1 modulo 2^64 (``batch`` must be given); a sequence of B ints in
    [-2^63, 2^64); or an integer tensor (B,). Raises ``ValueError``/``TypeError`` naming what was given.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype not in (torch.int64, torch.int32) or seeds.ndim != 1:
            raise TypeError(f"seeds is a tensor of shape {tuple(seeds.shape)} and dtype {seeds.dtype}: "
                            "shape (B,) and dtype int64 or int32 is taken")
        values = seeds.to("cpu", torch.int64, copy=True)
    else:
        first = _whole(seeds)
        if first is not None:
            if batch is None:
                raise ValueError("seeds is one int: the number of samples is needed too")
            _seed(first)
            seeds = [_seed((first + b) % 2**64) for b in range(batch)]
        elif isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable):
            raise TypeError(f"seeds is {seeds!r}: an int, a sequence of ints or a tensor is taken")
        values = torch.tensor([(_seed(s) + 2**63) % 2**64 - 2**63 for s in seeds], dtype=torch.int64, device="cpu")
    if batch is not None and len(values) != batch:
        raise ValueError(f"seeds has {len(values)} entries, the batch has {batch} samples: one seed a sample is taken")
    return values


def default_seeds(seeds, draws: bool):
    """The seeds given; for None, one from torch's default generator on the CPU, which ``torch.manual_seed`` decides, and which
    stays as it is where the run draws nothing: 0 then."""
    if seeds is not None:
        return seeds
    return int(torch.randint(0, 2**63 - 1, (), device="cpu")) if draws else 0


def _whole(value) -> int | None:
    """The value as an int, if it is one: NumPy's too, but not True or 1.0."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several
        return None


def _seed(value) -> int:
    whole = _whole(value)
    if whole is None:
        raise TypeError(f"seeds holds {value!r}: ints are taken")
    if not -(2**63) <= whole < 2**64:
        raise ValueError(f"seeds holds {whole}: ints from -2^63 to 2^64 - 1 are taken")
    return whole


def checked_shape(shape, least: int = 1) -> tuple[int, ...]:
    """(B, ...) as ints of 0 or more, at least ``least`` of them. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise TypeError(f"shape is {shape!r}: (B, ...) of ints is taken")
    given = tuple(shape)
    sizes = [_whole(s) for s in given]
    if None in sizes:
        raise TypeError(f"shape is {given!r}: (B, ...) of ints is taken")
    if len(sizes) < least or any(s < 0 for s in sizes):
        few = "(B, ...) with at least two dimensions," if least == 2 else "(B, ...)"
        raise ValueError(f"shape is {given}: {few} of sizes of 0 or more, is taken")
    return tuple(sizes)


def sample_keys(seeds: torch.Tensor, stream: str | int, draw: int = 0) -> torch.Tensor:
    """Keys (B, 2) int64 of one draw: ``fold_in(fold_in((seed_b, 0), stream), draw)``. seeds: (B,) int64."""
    where = (torch.tensor([[value]], device="cpu") for value in (stream_id(stream), draw))
    return torch.ops.fastdiff.run_keys(seeds, *(w.to(seeds.device) for w in where))[0, 0]


def fold_in(keys: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """Children of keys. keys: (..., 2) int64; data: an int, or int64 that broadcasts with (...). Returns (..., 2)."""
    if not isinstance(keys, torch.Tensor):
        raise TypeError(f"keys is {type(keys).__name__}: a tensor (..., 2) of int64 is taken")
    if not isinstance(data, torch.Tensor):
        if _whole(data) is None:
            raise TypeError(f"data is {data!r}: an int or an int64 tensor is taken")
        data = torch.tensor((_whole(data) + 2**63) % 2**64 - 2**63, device=keys.device)
    elif data.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"data is {data.dtype}: int64 is taken")
    data = data.to(keys.device, torch.int64)
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
    shape = checked_shape(shape)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}: torch.float32, torch.float16 or torch.bfloat16 is taken")
    if _whole(draw) is None or not 0 <= _whole(draw) < 2**63:
        raise ValueError(f"draw is {draw!r}: an int from 0 to 2^63 - 1 is taken")
    keys = sample_keys(as_seeds(seeds, shape[0]).to(device), stream, _whole(draw))
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.fastdiff.normal_(out, keys)
    return out


def unknown(what: str, given: str, names) -> str:
    """The message for a name that is not known, with the nearest that is."""
    import difflib

    near = difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.4)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"{what} {given!r} is not known{hint} Taken: {', '.join(sorted(names))}"
