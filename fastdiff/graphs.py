"""CUDA graphs of a run: model and row are captured once and replayed, and the host only says "again".

A graph holds addresses and launches, no decisions. So the row's number stands on the device: a round gathers the model's
time by it, calls the model, applies the row and adds one. Rows that do not call the model are a graph of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import ops

if TYPE_CHECKING:
    from .stepper import Stepper

__all__ = ["Captured", "as_outputs", "check_device"]

_WARM_UPS = 3  # as torch.cuda.make_graphed_callables: libraries load, benchmark and allocate in the first calls


def as_outputs(outputs) -> tuple:
    """What a model returned, as the arguments of ``Stepper.step``."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def check_device(device: torch.device | str) -> None:
    """Raises ``ValueError`` where a run on this device cannot be captured."""
    device = ops.checked_device(device)
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph was asked for on {device}: a CUDA device is taken")
    if ops.chosen(device) == "reference":
        raise ValueError(f"a CUDA graph was asked for on {device}, where the backend is 'reference', which computes on the host: "
                         "cuda or triton is taken (`fastdiff doctor` says what is missing)")


class Rounds:
    """The rounds of a run with the row's number on the device: nothing in them comes from the host."""

    def __init__(self, run: Stepper, model: Callable[..., torch.Tensor]):
        self.run, self.model = run, model
        self.row = torch.full((), run.row, dtype=torch.int64, device=run.x.device)

    def round(self, calls: bool) -> None:
        """What is captured: one row, with the model's call before it or without. ``row`` goes on after the row has read it."""
        run = self.run
        if calls:
            outputs = self.model(run.model_input, run._time_at(self.row))
            run.step(*as_outputs(outputs), row=self.row)
        else:
            run._apply(self.row, 0)
        self.row.add_(1)


class Captured:
    """CUDA graphs of a run's rounds, from ``Stepper.capture``.

    They hold the run's own tensors, and the model with all that it allocated. Between replays the run may be read
    (``x``, ``denoised()``, ``sigma``, ``clone()``, ``save``), changed in place (``gather``, ``load``, ``restart``) and taken
    on by ``run.step``: the next replay goes on from where it is.
    """

    @torch.no_grad()
    def __init__(self, run: Stepper, model: Callable[..., torch.Tensor]):
        check_device(run.x.device)
        run._refuse_done()
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise RuntimeError("autocast keeps cast weights that a CUDA graph would outlive: "
                               "torch.autocast(..., cache_enabled=False) is taken, or autocast inside of the model")
        self.run = run
        self._rounds = Rounds(run, model)
        self._at = run.row  # where the row on the device stands
        first = run._calls.index(True)  # rows before the first call are applied when the run is made
        kinds = {calls: run._calls.index(calls, first) for calls in (True, False) if calls in run._calls[first:]}
        _warm_up(run, model, kinds)
        self._graphs = {calls: _graph(self._rounds, calls) for calls in kinds}

    def replay(self) -> None:
        """One round: the model's call and its row, and any rows before the next call. Raises ``RuntimeError`` at the end."""
        run, calls = self.run, self.run._calls
        run._refuse_done()
        here = run.row
        if here != self._at:
            self._rounds.row.fill_(here)
        while True:
            self._graphs[calls[here]].replay()
            here += 1
            if here == len(calls) or calls[here]:
                break
        run.row = self._at = here
        if torch.is_grad_enabled():
            torch.autograd.graph.increment_version(run._outputs)


def _warm_up(run, model, kinds) -> None:
    """A few rounds of each kind on a copy of the run, on a side stream as torch.cuda.graph wants it. kinds: a row of each.

    Neither the run nor the random numbers of a model that draws some are moved.
    """
    device = run.x.device
    with torch.cuda.device(device), torch.random.fork_rng([device]):
        rounds = Rounds(run.clone(), model)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for calls, row in kinds.items():
                for _ in range(_WARM_UPS):
                    rounds.row.fill_(row)
                    rounds.round(calls)
        here.wait_stream(side)


def _graph(rounds, calls) -> torch.cuda.CUDAGraph:
    graph, device = torch.cuda.CUDAGraph(), rounds.run.x.device
    try:
        # A stream of this device: torch's own capture stream stays on the device of the first capture.
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            rounds.round(calls)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError("the model could not be captured in a CUDA graph: it waits for the device, copies from or to the "
                           "host, or does something else that cannot be replayed") from error
    return graph
