"""Steps whose timesteps differ from sample to sample, or from token to token, as one call of the op.

Such a step has one row for each sample or token, with numbers that may lie on the device alone. So the scheduler's own step is
run there, on tensors that have the samples and tokens of the latent and a few columns in place of everything else, which hold
basis vectors: what it returns are the coefficients, and they go to the op as its data-dependent factors. Nothing is read back.
That the step is linear, and takes each sample or token for itself, is looked at once, on the CPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..checks import FLOATS
from ..differentiable import step as differentiable_step
from ..reference import Layout
from ..stepper import on_device
from .calls import TOLERANCE, Draw, NotLinear, Watch
from .probing import opened
from .runs import OWN, Run, check_generators, drawn_as
from .state import mapped, same

__all__ = ["lead_of", "step"]

NOISES = 2  # draws of a step, at most
_PRIMES = (5, 7, 3, 2)  # sizes of samples, tokens, ... in the check: no two dimensions are taken for each other
_op = torch.ops.fastdiff.step_.default


def lead_of(given: dict) -> tuple[int, ...] | None:
    """The samples, or samples and tokens, that have numbers of their own in a call: dimensions that sample begins with."""
    sample = given["sample"]
    if not isinstance(sample, torch.Tensor):
        return None
    found = [tuple(t.shape) for t in given.values() if isinstance(t, torch.Tensor) and 0 < t.ndim < sample.ndim]
    lead = max(found, key=len, default=None)
    return lead if lead is not None and all(tuple(sample.shape[: len(s)]) == s for s in found) and sample.numel() else None


class _Columns(Watch):
    """Replaces what the step draws by one more column. values: (slots, columns) of what each slot holds."""

    def __init__(self, first: int, shape: tuple[int, ...], values: torch.Tensor):
        super().__init__(first, len(shape), torch.Generator(), 1.0)
        self.shape, self.values = shape, values

    def column(self, slot: int, dtype: torch.dtype) -> torch.Tensor:
        if slot >= len(self.values):
            raise NotLinear(f"it draws more than {NOISES} noises")
        return self.values[slot].to(dtype).expand(self.shape).clone()

    def noise(self, draw: Draw) -> torch.Tensor:
        self.draws.append(draw)
        self.noise_slots.append(self.next)
        self.next += 1
        return self.column(self.noise_slots[-1], draw.dtype)

    def _clipped(self, args, kwargs, out):
        raise NotLinear("it clips")


class _Probe:
    """One step on columns. attributes: of the scheduler; given: its arguments; names: of those that are columns."""

    def __init__(self, parent, method: str, attributes: dict, given: dict, names, lead, values, dtypes):
        ndim = given["sample"].ndim
        shape = (*lead, *(1,) * (ndim - len(lead) - 1), values.shape[1])
        self.watch = watch = _Columns(len(names), shape, values)
        shadow = object.__new__(parent)
        shadow.__dict__.update({name: mapped(value, lambda v: v) for name, value in attributes.items()})
        arguments = {**given, **{name: watch.column(k, dtype) for k, (name, dtype) in enumerate(zip(names, dtypes))}}
        if given.get("generator") is not None:
            arguments["generator"] = watch.given
        with torch.no_grad(), watch:
            out = getattr(parent, method)(shadow, **arguments)
        self.returned, self.build = opened(out, shape)
        self.after = shadow.__dict__
        held = []
        mapped(list(self.after.values()), lambda v: held.append(v) if isinstance(v, torch.Tensor) and v.shape == shape else None)
        if held:
            raise NotLinear("it keeps tensors of the latent's shape")


def _check(parent, method: str, attributes: dict, times, given: dict, names, lead) -> None:
    """Raises ``NotLinear`` where the step mixes samples or tokens, or is not linear in each."""
    count = len(names) + NOISES
    rng = torch.Generator().manual_seed(0)
    values = torch.cat([torch.eye(count, device="cpu"), torch.randn(count, 6, generator=rng, device="cpu")], 1).double()
    sizes = _PRIMES[: len(lead)]
    times = times[:-1] or times or [0]  # the last one may be where the last step leads

    def here(t):
        if not isinstance(t, torch.Tensor) or t.ndim == given["sample"].ndim:
            return t
        if not t.ndim:
            return torch.tensor(times[0], dtype=t.dtype, device="cpu")
        size = sizes[: t.ndim]
        chosen = [times[3 * i % len(times)] for i in range(math.prod(size))]
        return torch.tensor(chosen, dtype=t.dtype, device="cpu").view(size)

    found = _Probe(parent, method, attributes, {name: here(t) for name, t in given.items()}, names, sizes, values,
                   [torch.float64] * len(names))  # fmt: skip
    for t in found.returned:
        t = t.double()[torch.isfinite(t).all(-1)]  # some timesteps do not go together
        c, got = t[:, :count], t[:, count:]
        scale = (c.abs() @ values[:, count:].abs()).amax(1, keepdim=True).clamp(min=1e-30)
        if len(t) < 2 or float(((c @ values[:, count:] - got) / scale).abs().max()) > TOLERANCE:
            raise NotLinear("it is not linear in latent, model output and noise")


def step(scheduler, run: Run, given: dict, lead: tuple[int, ...], draws_of):
    """The step. draws_of: None where torch draws; else gives the ``Draws`` of a generator and a batch. Raises ``NotLinear`` where
    the op cannot take it, and what the scheduler raises."""
    sample = given["sample"]
    parent, method = scheduler._fastdiff_parent, scheduler._fastdiff_method
    names = [name for name, t in given.items() if isinstance(t, torch.Tensor) and t.shape == sample.shape]
    tensors = [given[name] for name in names]
    fits = all(t.dtype in FLOATS and t.device == sample.device for t in tensors)
    if run.kept or run.pending or "model_output" not in names or not fits:
        raise NotLinear("timesteps of each sample or token are fused for steps without history, of tensors like sample")
    checked = scheduler.__dict__.setdefault(OWN + "spread", set())
    kind = tuple((name, t.ndim, t.dtype) if isinstance(t, torch.Tensor) else (name, type(t)) for name, t in given.items())
    if kind not in checked:
        _check(parent, method, run.node.attributes, run.node.times, given, names, lead)
        checked.add(kind)

    attributes = {name: value for name, value in scheduler.__dict__.items() if not name.startswith(OWN)}
    values = torch.eye(len(names) + NOISES, device=sample.device)
    found = _Probe(parent, method, attributes, given, names, lead, values, [torch.float32] * len(names))
    typed = found
    if any(t.dtype != torch.float32 for t in tensors):
        typed = _Probe(parent, method, attributes, given, names, lead, values, [t.dtype for t in tensors])
    batch, points = len(sample), math.prod(lead)
    if found.watch.draws:
        generator = given.get("generator")
        check_generators(generator, batch)
        tensors += _noises(typed.watch.draws, generator, sample, draws_of)
    inputs = [t.contiguous().view(points, -1) for t in tensors]
    coef, meta = _sum_of(len(inputs), sample.device)
    outputs = []
    for c, t in zip(found.returned, typed.returned):
        factors = c.float().reshape(points, -1)[:, : len(inputs)].contiguous()
        if torch.is_grad_enabled() and any(v.requires_grad for v in inputs):
            (y,) = differentiable_step(inputs, [t.dtype], None, coef, meta, None, 0, None, factors)
        else:
            y = torch.empty(inputs[0].shape, dtype=t.dtype, device=sample.device)
            _op(inputs, [y], None, coef, meta, None, 0, None, factors, None, None, None, None, None, None, None)
        outputs.append(y.view(sample.shape))
    for name, value in found.after.items():
        if name not in attributes or not same(value, attributes[name]):
            setattr(scheduler, name, value)
    return found.build(outputs)


def _noises(draws, generator, sample, draws_of) -> list[torch.Tensor]:
    if draws_of is None:
        return [drawn_as(draw, generator, sample) for draw in draws]
    stream = draws_of(generator, len(sample))
    keys = stream.keys(0, len(draws), sample.device)[0]
    stream.count += len(draws)
    made = [torch.empty(sample.shape, device=sample.device) for _ in draws]
    for noise, key in zip(made, keys):
        torch.ops.fastdiff.normal_(noise, key)
    return made


def _sum_of(count: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The row y = sum_k s_bk v_k."""
    found = _rows.get((count, device))
    if found is None:
        coef = np.zeros((1, Layout(count, 1).width))
        *_, ys, _ = Layout(count, 1).unpack(coef[0])
        ys[0][0][:] = 1.0
        meta = np.array([[-1, 0, -1, -1]], np.int32)
        with torch.inference_mode(False):
            found = _rows[count, device] = tuple(on_device(device, coef.astype(np.float32), meta))
    return found


_rows: dict = {}
