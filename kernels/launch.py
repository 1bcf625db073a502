"""Where and how a kernel runs: the grid, the tile, how each tensor is accessed, interpreted or compiled."""

from dataclasses import dataclass

import torch
import triton
from triton import knobs

from ..checks import sample_layout
from .tile import CHANNELS_LAST, DENSE, WIDE

__all__ = ["Geometry", "geometry", "grid", "interpreted", "periodic_mode", "run"]

ELEMENTS = 1024  # of a program: one row of 8 or two rows of 4 a thread, with 4 warps
INTERPRETED_ELEMENTS = 256  # the interpreter's time goes with the number of operations, not with their size
MAX_GRID_Y = 65535
# From here on, logical indices inside a sample take 64 bits.
LARGE = 2**31 - 2**16


def interpreted() -> bool:
    """Were the kernels of this process decorated for Triton's interpreter?"""
    return not isinstance(_probe, triton.runtime.jit.JITFunction)


@triton.jit
def _probe():
    pass


def grid(tiles, samples):
    """Programs (tiles, y, z): sample y + z num_programs(1), which may lie beyond the last, takes ``tiles`` programs."""
    z = triton.cdiv(samples, MAX_GRID_Y)
    return tiles, triton.cdiv(samples, z), z


@dataclass(frozen=True)
class Geometry:
    """One launch over samples (B, n), each cut into ``tokens`` equal parts with a row of the plan each."""

    batch: int
    numel: int  # elements a sample
    tokens: int
    V: int  # elements of a row of the tile
    quads: int  # rows of the tile
    num_warps: int
    modes: tuple  # how each tensor is accessed
    inner: int  # of the channels-last tensors: elements a channel, channels
    groups: int
    large: bool
    grid: tuple

    @property
    def part(self):
        return self.numel // self.tokens


def _aligned(tensor, V, axes):
    """Is every sample aligned to V elements? axes: leading dimensions that number the samples."""
    bytes_ = V * tensor.element_size()
    return tensor.data_ptr() % bytes_ == 0 and all(
        tensor.stride(d) % V == 0 for d in range(axes) if tensor.shape[d] > 1)


def geometry(tensors, *, others=(), axes=(), periodic=None, tokens=1, noisy=True) -> Geometry:
    """How to launch over tensors (B, *shape), B and n being those of the first. others: tensors of the same samples but of
    another batch (bank, mask) or with a slot axis (ring); axes: how many leading dimensions number their samples.
    periodic: a mask that repeats within a sample, or None. tokens: parts of a sample with a row each. noisy: does anything depend on the logical index of an element?"""
    first = tensors[0] if tensors else others[0][0]
    batch, numel = first.shape[0], first[0].numel()
    every = [(t, 1) for t in tensors] + list(zip(others, axes))
    layouts = [sample_layout(t, a) for t, a in every]
    strict = {name for name in layouts if name != "both"}
    if strict == {"channels_last"} and not noisy and tokens == 1:
        layouts = ["contiguous"] * len(layouts)  # one and the same order of the elements: memory order serves as well
    part = numel // tokens

    def wide(V):
        return [layout != "channels_last" and part % V == 0 and _aligned(t, V, a) for layout, (t, a) in zip(layouts, every)]

    small = all(t.element_size() == 2 for t, _ in every) and (periodic is None or periodic.element_size() == 2)
    V = 8 if small and all(wide(8)) else 4  # 16 bytes, or what a thread has of the tensors with 32 bits an element
    modes = tuple(CHANNELS_LAST if layout == "channels_last" else WIDE if w else DENSE
                  for layout, w in zip(layouts, wide(V)))
    ragged = part % V != 0 and tokens > 1  # a part may begin and end inside a row of the tile
    rows = triton.cdiv(part, V) + ragged
    limit = (INTERPRETED_ELEMENTS if interpreted() else ELEMENTS) // V
    quads = min(limit, max(triton.next_power_of_2(rows), 1 if interpreted() else 32))
    groups = first.shape[1] if first.dim() > 1 else 1
    return Geometry(batch, numel, tokens, V, quads, max(1, min(4, quads // 32)), modes, numel // max(groups, 1), groups,
                    numel >= LARGE, grid(triton.cdiv(rows, quads), batch * tokens))


def periodic_mode(mask, V, part):
    """How a mask is accessed whose elements repeat within a sample."""
    return WIDE if mask[0].numel() % V == 0 and part % V == 0 and _aligned(mask, V, 1) else DENSE


def run(kernel, device, programs, *args, **options):
    """Launch a kernel on a torch.device. fp fusion is off in all of them: what is to be one rounding is written as an fma."""
    if interpreted():
        from .interpreter import exact

        with exact():
            kernel[programs](*args, **{k: v for k, v in options.items() if k != "num_warps"})
    elif device.type == "cuda" and device.index == torch.cuda.current_device():
        kernel[programs](*args, enable_fp_fusion=False, **options)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[programs](*args, enable_fp_fusion=False, **options)
    else:
        raise ValueError(f"the tensors are on {device}: Triton takes CUDA tensors, or CPU tensors where TRITON_INTERPRET=1 "
                         "was set before fastdiff was imported")
