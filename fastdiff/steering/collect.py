"""Activations of a frozen network on noised images: what concept directions are learnt from."""

import difflib
import math
import sys
from collections.abc import Callable, Sequence

import torch

from ..noise import as_seeds, randn
from ..plan import plan as make_plan
from ..schedules import Schedule

__all__ = ["activation", "collect", "find_block"]


def find_block(network: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module of a network with this name, as ``network.named_modules()`` gives it.

    Raises ``TypeError``, or ``ValueError`` with the nearest names.
    """
    if not isinstance(network, torch.nn.Module):
        raise TypeError(f"network is {type(network).__name__}: a torch.nn.Module is taken")
    if not isinstance(name, str):
        raise TypeError(f"block is {name!r}: the name of a module is taken, such as {_examples(network)}")
    blocks = dict(network.named_modules())
    blocks.pop("")
    if name not in blocks:
        near = difflib.get_close_matches(name, blocks, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {_examples(network)}"
        raise ValueError(f"block {name!r} is not in {type(network).__name__}: {hint}")
    return blocks[name]


def _examples(network) -> str:
    names = [name for name, _ in network.named_modules()][1:]
    return ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5) if names else "no blocks"


def activation(block: str, output) -> torch.Tensor:
    """The activation (B, ...) in what a block returned: the tensor itself, or the first of a tuple (diffusers' down blocks
    return their hidden state, then the skips). Raises ``TypeError`` for anything else."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.ndim < 2:
        kind = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise TypeError(f"block {block!r} returned {kind}: a floating tensor (B, ...), or a tuple that begins with one, is taken")
    return first


class _Reached(Exception):
    """The block has run: what lies behind it need not."""


class _Tap:
    """A forward hook that copies the activations of one block into a tensor (N, ...) float32."""

    def __init__(self, block: str, total: int):
        self.block, self.total = block, total
        self.kept = None
        self.stop = False  # the first batch runs to its end, to see that the block runs once

    def expect(self, start: int, count: int) -> None:
        self.start, self.count, self.calls = start, count, 0

    def __call__(self, module, inputs, output):
        self.calls += 1
        h = activation(self.block, output)
        if len(h) != self.count:
            raise ValueError(f"block {self.block!r} returned {len(h)} activations for {self.count} images: one an image is taken")
        if self.kept is None:
            self.kept = torch.empty((self.total, *h.shape[1:]), dtype=torch.float32, device=h.device)
        if h.shape[1:] != self.kept.shape[1:]:
            raise ValueError(f"block {self.block!r} returned shape {tuple(h.shape[1:])} after {tuple(self.kept.shape[1:])}")
        self.kept[self.start : self.start + self.count] = h
        if self.stop:
            raise _Reached

    def finish(self) -> None:
        """After a batch: the block ran once, on numbers."""
        if self.calls != 1:
            raise ValueError(f"block {self.block!r} ran {self.calls} times in one call of the network: a block that runs once is "
                             "taken")
        finite = self.kept[self.start : self.start + self.count].flatten(1).isfinite().all(1)
        if not finite.all():
            image = self.start + int((~finite).nonzero()[0])
            raise ValueError(f"block {self.block!r}: the activation of image {image} is not finite")
        self.stop = True


def collect(
    network: torch.nn.Module,
    block: str,
    images: torch.Tensor,
    sigma: float,
    *,
    schedule: str | Schedule | None = None,
    prediction: str | None = None,
    time: str | None = None,
    sigma_data: float | None = None,
    vp_input: bool = False,
    call: Callable | None = None,
    seeds: int | Sequence[int] | torch.Tensor = 0,
    draw: int = 0,
    batch_size: int = 64,
    progress: bool | None = None,
) -> torch.Tensor:
    """Activations of a named block of a frozen network at x0 + sigma n.

    network: a module; block: a name of ``network.named_modules()``; images: x0 (N, ...), floating, in the range that the
    network was trained on; sigma: the noise level sigma_t / alpha_t, above 0.
    How the network is called is said as to ``fd.plan``: schedule, prediction, time, sigma_data, vp_input, so that it is called
    as a sampler would, ``network(c x, time)`` with time (n,) float32; or by ``call(network, x, sigma)`` with x = x0 + sigma n
    (n, ...) in the network's dtype and sigma (n,) float32.
    seeds, draw: image i is noised with N(seed_i) of the stream "user", as ``fd.randn`` gives it: one int s means s, s + 1, ...
    batch_size: images in one call; progress: show a bar; None: if there is a terminal.

    Runs in eval mode and without gradients, up to the block (the first batch to the end); the network is left as it was.
    Returns (N, *activation) float32 on the network's device. Raises ``ValueError``/``TypeError`` before the network runs, or
    where an activation is not finite.
    """
    module = find_block(network, block)
    sigma = checked_sigma(sigma)
    check_images(images)
    seeds = as_seeds(seeds, len(images))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: an int of 1 or more is taken")
    how = {"schedule": schedule, "prediction": prediction, "time": time, "sigma_data": sigma_data, "vp_input": vp_input}
    device, dtype = _place(network)
    if call is None:
        call = as_sampled(sigma, dtype, **how)
    elif not callable(call) or any(value for value in how.values()):
        raise TypeError("how the network is called is said either by call, a function (network, x, sigma), or by schedule, "
                        "prediction, time, sigma_data and vp_input")
    else:
        call = _in_dtype(call, dtype)

    from tqdm import tqdm

    tap = _Tap(block, len(images))
    training = {m: m.training for m in network.modules()}
    handle = module.register_forward_hook(tap)
    show = sys.stderr.isatty() if progress is None else progress
    try:
        network.eval()
        with torch.no_grad(), tqdm(total=len(images), disable=not show, unit="image", leave=False) as bar:
            for start in range(0, len(images), batch_size):
                x0 = images[start : start + batch_size].to(device, torch.float32)
                x = x0 + sigma * randn(x0.shape, seeds=seeds[start : start + batch_size], draw=draw, device=device)
                tap.expect(start, len(x))
                try:
                    call(network, x, torch.full((len(x),), sigma, dtype=torch.float32, device=device))
                except _Reached:
                    pass
                tap.finish()
                bar.update(len(x))
    finally:
        handle.remove()
        for m, mode in training.items():
            m.training = mode
    return tap.kept


def as_sampled(sigma: float, dtype: torch.dtype, *, schedule, prediction=None, time=None, sigma_data=None,
               vp_input=False) -> Callable:
    """``call(network, x, sigma)`` that calls a network at this level as a sampler would: the row of a plan says how.

    x is float32; what the network gets is rounded to its dtype once.
    """
    if schedule is None:
        raise TypeError("how the network is called is missing: schedule= and, where they differ from its defaults, prediction=, "
                        "time=, sigma_data=, vp_input= are taken, as by fd.plan; or call=, a function (network, x, sigma)")
    made = make_plan("euler", schedule=schedule, prediction=prediction, time=time, sigma_data=sigma_data, vp_input=vp_input,
                     sigmas=[sigma, 0.0], start="latent")
    row = int(made.calls_model.argmax())
    scale, level = float(made.input_scales[row]), float(made.times[row])

    def call(network, x, sigma):
        return network((scale * x).to(dtype), torch.full((len(x),), level, dtype=torch.float32, device=x.device))

    return call


def _in_dtype(call, dtype):
    return lambda network, x, sigma: call(network, x.to(dtype), sigma)


def checked_sigma(sigma) -> float:
    """A noise level as a float. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(sigma, (bool, str)) or not hasattr(sigma, "__float__"):
        raise TypeError(f"sigma is {sigma!r}: a number above 0 is taken")
    if not 0 < float(sigma) < math.inf:
        raise ValueError(f"sigma is {float(sigma)}: a number above 0 is taken")
    return float(sigma)


def check_images(images) -> None:
    """Raises where images are not floating, finite (N, ...), N of 1 or more."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images is {type(images).__name__}: a tensor (N, ...) is taken")
    if not images.is_floating_point():
        raise TypeError(f"images is {images.dtype}: floating numbers, in the range that the network was trained on, are taken")
    if images.ndim < 2 or not images.numel():
        raise ValueError(f"images has shape {tuple(images.shape)}: (N, ...) with at least one image is taken")
    for start in range(0, len(images), 4096):
        finite = images[start : start + 4096].flatten(1).isfinite().all(1)
        if not finite.all():
            raise ValueError(f"image {start + int((~finite).nonzero()[0])} holds NaN or infinity: finite images are taken")


def _place(network) -> tuple[torch.device, torch.dtype]:
    """Where a network is and what it computes in: as its first floating parameter."""
    for p in network.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.float32
