"""Concepts put into a network's activations while it samples: h += w |h|_F v at a named block.

|h|_F is the norm of one sample's activation (all channels and positions), v a direction of its shape and unit norm, w its weight
(Wang, Belkin and Wang, arXiv:2602.11395). One pass over h, ``torch.ops.fastdiff.edit_``, finds the norm and adds every
concept of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..checks import dense
from .branch import inside_compiled
from .collect import activation, find_block
from .window import check_window

if TYPE_CHECKING:
    from ..action import Acting, Setting

__all__ = ["Edit", "Injection", "edited"]


class _Edited(torch.autograd.Function):
    """h + sum_m w_m |h| v_m, and its gradients: g + (sum_m w_m <g, v_m>) h / |h|, and |h| <g, v_m> by w_m."""

    @staticmethod
    def forward(h, bank, weight):
        h = dense(h)
        out = torch.empty_like(h)
        torch.ops.fastdiff.edit_(out, h, bank, None, weight)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        h, bank, weight = ctx.saved_tensors
        flat, g_flat = h.float().flatten(1), g.float().flatten(1)
        along = g_flat @ bank.flatten(1).T  # (B, M)
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        unit = torch.where(norm > 0, flat / norm, 0)
        of_h = g_flat + (weight * along).sum(1, keepdim=True) * unit
        return of_h.view(g.shape).to(g.dtype), None, norm * along


class Edit:
    """The edit of one block by M directions.

        edit = Edit(network, "enc.2", directions)
        with edit.at(weight):
            out = network(x, t)

    network: any module; block: a name of ``network.named_modules()``, whose output is a tensor h (B, ...) or a tuple that begins
    with one; directions: (M, *shape) for h of shape (B, *shape), of any float dtype.

    skip: whether copies of h that go elsewhere are edited too. True: what the block returns is edited, wherever it goes, and in
    a tuple every place that holds h (diffusers' down blocks return their hidden state, and again as the last residual). False:
    in such a tuple only the first; otherwise h is edited where the module that runs next takes it, so that a skip connection
    of the network keeps what the block returned. Raises ``ValueError`` or ``TypeError`` for a block that is not there or
    cannot be edited.
    """

    def __init__(self, network: torch.nn.Module, block: str, directions: torch.Tensor, *, skip: bool = True):
        self._module = find_block(network, block)
        self.network, self.block, self.skip = network, block, skip
        if self._module in inside_compiled(network):
            raise ValueError(compiled(block))
        floating = isinstance(directions, torch.Tensor) and directions.is_floating_point()
        if not floating or directions.ndim < 2 or not len(directions):
            raise TypeError(f"directions is {_what(directions)}: a floating tensor (M, *shape) is taken")
        self.directions = directions.detach().to(torch.float32).contiguous()
        self._takers: set[torch.nn.Module] = set()  # who took h, where skip is False: known after the first evaluation

    @contextmanager
    def at(self, weight: torch.Tensor, *, required: bool = True):
        """Inside, every call of the block is edited. weight: (B, M) or (1, M) float; 0 leaves a sample's bits as they are.

        The activation's batch is B, or a multiple of it: several copies of the batch, one after the other, as models make that
        call the network once for the condition and its absence. Hooks are removed whatever happens. Raises
        ``RuntimeError`` where the block is edited already, and, if ``required``, at the end where it was never called.
        """
        floating = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if not floating or weight.ndim != 2 or weight.shape[1] != len(self.directions):
            M = len(self.directions)
            raise ValueError(f"weight is {_what(weight)}: a floating tensor (B, {M}) or (1, {M}), one a direction, is taken")
        if self._module in _in_use:
            raise RuntimeError(f"block {self.block!r} is edited already: one edit takes all directions of a block")
        handles, run = [], _Run(self, weight)
        _in_use.add(self._module)
        try:
            handles.append(self._module.register_forward_hook(run.leave))
            if not self.skip:
                for module in self._takers or self.network.modules():
                    handles.append(module.register_forward_pre_hook(run.enter, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            _in_use.discard(self._module)
        if required:
            run.check()

    def __call__(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """h (B, *shape) with the directions added, a new tensor of h's dtype. Differentiable in h and weight."""
        if h.shape[1:] != self.directions.shape[1:]:
            given, made = tuple(h.shape[1:]), tuple(self.directions.shape[1:])
            raise ValueError(f"block {self.block!r} returned {given} a sample, the direction has {made}: a direction is for one "
                             "block and one size of the samples")
        if len(h) != len(weight):
            if not len(weight) or len(h) % len(weight):
                raise ValueError(f"block {self.block!r} returned a batch of {len(h)}, the weights are for {len(weight)} samples")
            weight = weight.repeat(len(h) // len(weight), 1)
        order = _order(h)
        if self.directions.device != h.device or not self.directions.is_contiguous(memory_format=order):
            with torch.inference_mode(False):  # a later evaluation may save them for its gradient
                self.directions = self.directions.to(h.device, memory_format=order)
        return _Edited.apply(h, self.directions, weight.to(h.device, torch.float32))


def _order(h: torch.Tensor) -> torch.memory_format:
    """In which order h lies in memory: read in another one, directions cost several times as much."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(h.ndim)
    there = last is not None and not h.is_contiguous() and h.is_contiguous(memory_format=last)
    return last if there else torch.contiguous_format


def compiled(block: str) -> str:
    """What to say of a block whose hooks Python may never call."""
    return (f"block {block!r} lies in a compiled or scripted module, which Python does not call: the network as it was before is "
            "taken, or one whose blocks are compiled one by one")


_in_use: WeakSet[torch.nn.Module] = WeakSet()


class _Run:
    """The hooks of one edit."""

    def __init__(self, edit: Edit, weight):
        self._edit, self._weight = edit, weight
        self._called, self._waiting = False, None

    def leave(self, module, args, output):
        """The block's forward hook."""
        self._called = True
        self._refuse_waiting()
        h = activation(self._edit.block, output)
        if output is h:
            if self._edit.skip:
                return self._edit(h, self._weight)
        else:
            leaves, spec = pytree.tree_flatten(output)
            copies = [i for i, leaf in enumerate(leaves) if leaf is h]
            if self._edit.skip or len(copies) > 1:
                new = self._edit(h, self._weight)
                for i in copies if self._edit.skip else copies[:1]:
                    leaves[i] = new
                return pytree.tree_unflatten(leaves, spec)
        self._waiting = h

    def enter(self, module, args, kwargs):
        """The forward pre-hook of the modules that may run next: the first that is given h itself is given h edited."""
        h = self._waiting
        if h is None or not any(value is h for value in (*args, *kwargs.values())):
            return None
        self._waiting = None
        self._edit._takers.add(module)
        new = self._edit(h, self._weight)
        return tuple(new if a is h else a for a in args), {k: new if a is h else a for k, a in kwargs.items()}

    def check(self):
        if not self._called:
            raise RuntimeError(f"block {self._edit.block!r} was not called, so nothing was edited: the network that was given is "
                               "not the one that the model calls, or it was compiled, or captured, before")
        self._refuse_waiting()

    def _refuse_waiting(self):
        if self._waiting is not None:
            raise RuntimeError(f"no module takes what block {self._edit.block!r} returns, so that only there it could be edited: "
                               "skip=True edits it wherever it goes")


def edited(network: torch.nn.Module, block: str, direction, weight, *, skip: bool = True):
    """Inside ``with edited(network, "enc.2", direction, 0.1):`` the block's output is h + w |h|_F v.

    direction: (*shape), for activations (B, *shape), or several of them; weight: a number or (B,), or one such for each
    direction. skip: as for ``Edit``. Returns a context manager; raises what ``Edit`` does.
    """
    one = isinstance(direction, torch.Tensor)
    directions, weights = ([direction], [weight]) if one else (list(direction), list(weight))
    if len(directions) != len(weights):
        raise ValueError(f"{len(directions)} directions and {len(weights)} weights were given: one weight for each is taken")
    weights = [torch.as_tensor(w, dtype=torch.float32, device=directions[0].device).reshape(-1) for w in weights]
    return Edit(network, block, torch.stack(directions), skip=skip).at(torch.stack(torch.broadcast_tensors(*weights), 1))


def _what(value) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


@dataclass(frozen=True, eq=False)
class Injection:
    """A concept at work in ``fd.sample(..., steering=[concept.at(...)])``.

    concept: a ``Concept``, or what has its ``direction`` (*shape) and ``block``, a name of ``network.named_modules()``; where it
    has ``check(network)``, that is asked.
    weight: w, a number or (B,), one a sample; 0 changes no bit. scale: s of the amplification, for s != 1 in place of
    the network's output eps

        eps0 + s (eps1 - eps0),    eps1 with the concept, eps0 without,

    with the part of the network before the block computed once (``steering.branch``). window: (low, high) in sigma, steps:
    (first, last) of the sampler's steps, in which it acts; neither: always. skip: whether skip connections carry the edit too,
    see ``Edit``. network: where the model is neither the network nor a module around it.

    Several in one list act together: those of scale 1 edit the network itself, in both evaluations; those of each other scale
    s_g share one more evaluation eps_g, and the output is eps0 + sum_g s_g (eps_g - eps0). Concepts of one block are one edit,
    all relative to the norm of the same h. Where one scale acts in a row, with weights that are numbers, the combination is part
    of the row (``Plan.with_guidance``); where there are several, weights by sample or guidance by a second output, it is
    computed in float32 before it. List guidance by two outputs before concepts. All concepts of a run are for one network.
    """

    concept: object
    weight: float | torch.Tensor | Sequence[float] = 1.0
    scale: float = 1.0
    window: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None
    skip: bool = True
    network: torch.nn.Module | None = None

    def __post_init__(self):
        if not isinstance(getattr(self.concept, "direction", None), torch.Tensor) or not hasattr(self.concept, "block"):
            raise TypeError(f"concept is {type(self.concept).__name__}: a Concept is taken, with a direction and a block")
        if isinstance(self.scale, bool) or not hasattr(self.scale, "__float__") or np.ndim(self.scale):
            raise TypeError(f"scale is {self.scale!r}: a number is taken, one for all samples")
        if not abs(self.scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"scale is {self.scale!r}: a finite number of float32 is taken")
        if self.window is not None:
            object.__setattr__(self, "window", check_window(self.window))
        if not isinstance(self.skip, bool):
            raise TypeError(f"skip is {self.skip!r}: True or False is taken")
        if self.network is not None and not isinstance(self.network, torch.nn.Module):
            raise TypeError(f"network is {type(self.network).__name__}: a torch.nn.Module is taken")

    def begin(self, setting: Setting) -> Acting:
        """Checks concept, network, weights and window. Raises ``ValueError`` or ``TypeError`` before any work."""
        from .amplify import begin

        return begin(self, setting)
