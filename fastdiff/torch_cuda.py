"""The normals of torch's generator on a GPU, computed on any machine.

``torch.randn`` on CUDA deals elements out to the threads of the GPU, so above a size that depends on the GPU the same seed
gives other noise on another one, and none of it on a CPU. Here is that map for a GPU that need not be there:

    generator = TorchCudaGenerator(seed, "H100 SXM")
    latents = generator.randn(1, 4, 128, 128)              # torch.randn(..., generator=torch.Generator("cuda"), device="cuda")

The map (ATen/native/cuda/DistributionTemplates.h, curand_kernel.h, curand_normal.h; ``docs/noise.md``): T = 256 blocks
threads, blocks = min(ceil(n / 256), SMs * (threads per SM div 256)). Thread i runs Philox4x32-10 with KEY = seed and CTR =
(offset / 4 + k, i) for k = 0, 1, ...; normal j of its k-th four is element i + T (4 k + j). The words are exact; the values
are those of the GPU but for the last bits of its sine and cosine: 1.6e-6 at most in 15 million draws of an H100.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .noise import as_seeds, checked_shape, unknown
from .reference import philox

__all__ = ["GPUS", "TorchCudaGenerator"]

GPUS = {
    "T4": (40, 1024), "V100": (80, 2048), "A10G": (80, 1536), "A100": (108, 2048), "L4": (58, 1536), "L40S": (142, 1536),
    "H100 PCIe": (114, 2048), "H100 SXM": (132, 2048), "H200": (132, 2048), "B200": (148, 2048),
    "RTX 3090": (82, 1536), "RTX 4090": (128, 1536), "RTX 5090": (170, 1536),
}
"""Multiprocessors, and threads that one of them holds (``multi_processor_count`` and ``max_threads_per_multi_processor`` of
``torch.cuda.get_device_properties``). MIG slices and cut-down cards have fewer: ask the card."""

_BLOCK = 256
_CHUNK = 1 << 15  # counters at a time: what they take stays in the cache
_TURN = np.float32(6.2831855) * np.float32(2.0**-32)
_LARGEST = 2**31 - 1  # bytes that torch draws into at once


class TorchCudaGenerator:
    """Draws what a ``torch.Generator("cuda")`` with this seed draws on a given GPU, and advances as it does.

    seed: an int, as ``torch.Generator.manual_seed`` takes it; gpu: a name of ``GPUS``, or None for sms, the number of
    multiprocessors, and threads_per_sm, how many threads one holds; offset: where the generator stands, a multiple of 4.

    float32, float16 and bfloat16 come from one stream, the last two rounded from float32; float64 has a map of its own.
    Raises ``ValueError`` or ``TypeError`` for other arguments.

    >>> generator = TorchCudaGenerator(0, "A100")
    >>> generator.randn(1, 4, 64, 64).shape, generator.get_offset()
    (torch.Size([1, 4, 64, 64]), 4)
    """

    def __init__(self, seed: int, gpu: str | None = None, *, sms: int | None = None, threads_per_sm: int | None = None,
                 offset: int = 0):
        if (gpu is None) == (sms is None and threads_per_sm is None) or (sms is None) != (threads_per_sm is None):
            raise TypeError(f"gpu={gpu!r}, sms={sms!r}, threads_per_sm={threads_per_sm!r} were given: "
                            f"a gpu ({', '.join(GPUS)}), or sms and threads_per_sm, are taken")
        if gpu is not None:
            if gpu not in GPUS:
                raise ValueError(unknown("gpu", gpu, GPUS))
            sms, threads_per_sm = GPUS[gpu]
        if not 1 <= _count("sms", sms) < 2**16 or not _BLOCK <= _count("threads_per_sm", threads_per_sm) < 2**16:
            raise ValueError(f"sms is {sms}, threads_per_sm is {threads_per_sm}: "
                             f"sms of 1 or more, threads_per_sm of {_BLOCK} or more are taken")
        self._most = sms * (threads_per_sm // _BLOCK)  # blocks that run at a time
        self.manual_seed(seed)
        self.set_offset(offset)

    # ---- its place, with the names of torch.Generator

    def manual_seed(self, seed: int) -> "TorchCudaGenerator":
        """Starts again with a seed, at offset 0."""
        self._seed, self._offset = int(as_seeds([seed])[0]) % 2**64, 0
        return self

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        if _count("offset", offset) < 0 or offset % 4 or offset >= 2**64:
            raise ValueError(f"offset is {offset}: a multiple of 4, from 0 to 2^64 - 4, is taken")
        self._offset = int(offset)

    # ---- draws

    def randn(self, *shape: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normals of a shape, as ``torch.randn(*shape, generator=, device="cuda")``."""
        sizes = checked_shape(shape[0] if len(shape) == 1 and not hasattr(shape[0], "__index__") else shape, 0)
        return self.normal_(torch.empty(sizes, dtype=dtype, device=device))

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normals in the shape, dtype, memory layout and device of x, as ``torch.randn_like`` of a CUDA tensor."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is {type(x).__name__}: a tensor is taken")
        return self.normal_(torch.empty_like(x, requires_grad=False))

    @torch.no_grad()
    def normal_(self, x: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        """Fills x with normals, in the order of its memory, as ``x.normal_`` of a CUDA tensor does. Returns x."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is {type(x).__name__}: a tensor is taken")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(f"dtype is {x.dtype}: torch.float32, torch.float16, torch.bfloat16 or torch.float64 is taken")
        if not std >= 0:
            raise ValueError(f"std is {std}: a number of 0 or more is taken")
        if x.numel() * x.element_size() > _LARGEST:
            raise ValueError(f"{tuple(x.shape)} of {x.dtype} is more than torch draws at once: up to 2^31 - 1 bytes are taken")
        if x.numel() == 0 or x.is_meta:
            return x
        values = self._normals64(x.numel()) if x.dtype == torch.float64 else self._normals(x.numel())
        if (mean, std) != (0.0, 1.0):
            values = values * std + mean
        by_memory = x.permute(sorted(range(x.ndim), key=lambda dim: -x.stride(dim)))
        by_memory.copy_(values.view(by_memory.shape))
        return x

    def words(self, count: int) -> np.ndarray:
        """(count,) uint32: the word of each element, as a draw of 32-bit integers has it on that GPU (``x.random_()``)."""
        if _count("count", count) < 0:
            raise ValueError(f"count is {count}: 0 or more is taken")
        rounds = [words.reshape(-1) for words in self._fours(count, 4)] if count else [np.empty(0, np.uint32)]
        return np.concatenate(rounds)[:count]

    @contextmanager
    def everywhere(self):
        """In this block ``torch.randn``, ``torch.randn_like`` and ``Tensor.normal_`` without a generator of their own draw from
        here, on whatever device: so that code which draws on a GPU runs elsewhere with that GPU's noise.

            with TorchCudaGenerator(0, "RTX 4090").everywhere():
                images = pipe(prompt, latents=latents)

        Other functions (``torch.rand``, ``torch.randint``) and draws with a generator are torch's own.
        """
        with _Everywhere(self):
            yield self

    def _normals(self, count: int) -> torch.Tensor:
        """(count,) float32."""
        parts, there = [], 0
        for four in self._fours(count, 4):
            for first, second in (four[:2], four[2:]):
                if there < count:  # most draws are small, and take the first word of a thread alone
                    parts += _box_muller(first, second)
                    there += 2 * len(first)
        return torch.cat(parts)[:count]

    def _normals64(self, count: int) -> torch.Tensor:
        """(count,) float64."""
        return torch.cat([z for four in self._fours(count, 2) for z in _box_muller64(*four)])[:count]

    def _fours(self, count: int, unroll: int):
        """For each round k, the four words of every thread; advances. unroll: how many elements a thread takes of them."""
        threads = _BLOCK * min(-(-count // _BLOCK), self._most)
        rounds = -(-count // (threads * unroll))
        first, self._offset = self._offset // 4, (self._offset + 4 * rounds) % 2**64
        key = self._seed & 0xFFFFFFFF, self._seed >> 32
        for k in range(first, first + rounds):
            words = np.empty((4, threads), np.uint32)
            for start in range(0, threads, _CHUNK):
                index = np.arange(start, min(start + _CHUNK, threads), dtype=np.uint64)
                words[:, start : start + _CHUNK] = philox(key, (k & 0xFFFFFFFF, k >> 32, index, 0))
            yield words


class _Everywhere(TorchFunctionMode):
    def __init__(self, generator: TorchCudaGenerator):
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _DRAWS or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("everywhere() does not draw inside of torch.func transforms such as vmap: draw outside of them")
        kwargs.pop("generator", None)
        if func is torch.Tensor.normal_:
            return self._generator.normal_(*args, **kwargs)
        if func is torch.nn.init.normal_:
            return self._generator.normal_(kwargs.pop("tensor"), **kwargs)
        return self._generator.normal_(_DRAWS[func](*args, **kwargs))


_DRAWS = {torch.randn: torch.empty, torch.randn_like: torch.empty_like, torch.Tensor.normal_: None, torch.nn.init.normal_: None}


def _count(name: str, value) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}: an int is taken")
    return value


def _box_muller(first: np.ndarray, second: np.ndarray) -> Sequence[torch.Tensor]:
    """curand_normal4's map of two words to two float32 normals, sine first, for each thread.

    u = (first + 1/2) / 2^32, s = sqrt(-2 ln u), v = 2 pi (second + 1/2) / 2^32, rounded as there. __sincosf(v) takes v to turns
    with one product, rounded to zero, and looks those up; here they go through an accurate sine and cosine.
    """
    first, second = (torch.from_numpy(words.astype(np.float32)).double() for words in (first, second))
    s = (first * 2.0**-32 + 2.0**-33).float().double().log_().float().mul_(-2).sqrt_()
    v = (second * float(_TURN) + float(_TURN / 2)).float().double()
    exact = v * float(np.float32(0.15915494))
    turns = exact.float()
    turns = torch.where(turns > exact, turns.nextafter(turns.new_zeros(())), turns).double().mul_(2 * np.pi)
    return turns.sin().float() * s, turns.cos_().float() * s


def _box_muller64(x0, x1, y0, y1) -> Sequence[torch.Tensor]:
    """curand_normal2_double's map of four words to two float64 normals, sine first, for each thread."""
    bits = (low ^ high.astype(np.uint64) << np.uint64(21) for low, high in ((x0, x1), (y0, y1)))
    u, v = (torch.from_numpy(whole.astype(np.float64)) for whole in bits)
    s = (u * 2.0**-53 + 2.0**-54).log_().mul_(-2).sqrt_()
    angle = (v * 2.0**-52 + 2.0**-53) * np.pi
    return s * angle.sin(), s * angle.cos()
