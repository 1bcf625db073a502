"""Concepts in the network that a pipeline calls.

Between ``set_timesteps`` and the last step of a run, the network's ``forward`` is one that looks up which of the timesteps the
call is for, and evaluates the network with the concepts that act there. Then it is what it was.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..action import Setting
from ..plan import Plan
from ..steering.inject import Edit, Injection
from ..steering.window import per_sample

__all__ = ["Injected", "network_of"]

_COMPONENTS = ("unet", "transformer", "prior", "decoder")


def network_of(pipe, injections: Sequence[Injection]) -> torch.nn.Module:
    """The network that concepts are for: the one they name, or the pipeline's. Raises ``TypeError`` or ``ValueError``."""
    named = {id(i.network): i.network for i in injections if i.network is not None}
    if len(named) > 1:
        raise ValueError("concepts for two networks were given: the concepts of one pipeline are for one network")
    candidates = list(named.values()) or [getattr(pipe, name, None) for name in _COMPONENTS]
    network = next((c for c in candidates if isinstance(c, torch.nn.Module)), None)
    if network is None:
        raise TypeError(f"{type(pipe).__name__} has no {', '.join(_COMPONENTS[:-1])} or {_COMPONENTS[-1]}, so the network of the "
                        "concepts is not known: give it, as concept.at(..., network=...)")
    return network


class Injected:
    """The concepts of a scheduler. network: what the pipeline calls once, or several times, for each timestep.

    Raises what ``Concept.check`` and ``Edit`` do: ``ValueError`` for another network than the concept's, or a block that is not
    there.
    """

    def __init__(self, injections: Sequence[Injection], network: torch.nn.Module):
        self.network, self._injections = network, []
        for injection in injections:
            concept = injection.concept
            if hasattr(concept, "check"):
                concept.check(network)
            Edit(network, concept.block, concept.direction[None], skip=injection.skip)
            # What is checked here, with a checksum of the network, is not checked in every run.
            known = SimpleNamespace(block=concept.block, direction=concept.direction)
            self._injections.append(replace(injection, concept=known, network=network))
        self._parameters = inspect.signature(type(network).forward)
        self._before, self._installed, self._busy = None, False, False

    def begin(self, scheduler, plan: Plan, place) -> None:
        """A run begins. place: a function of the scheduler and the timestep that the network is called with."""
        self.end()
        other = getattr(self.network.__dict__.get("forward"), "__self__", None)
        if isinstance(other, Injected):  # of a run that ended early, or that this one replaces
            other.end()
        self._scheduler, self._plan, self._place = weakref.ref(scheduler), plan, place
        self._acting: dict = {}
        self._before = self.network.__dict__.get("forward")
        self._forward = self.network.forward
        self.network.__dict__["forward"] = self._call
        self._installed = True

    def check(self, scheduler) -> None:
        """Raises ``RuntimeError`` where a run goes on without its concepts."""
        if not self._installed or self._scheduler() is not scheduler:
            raise RuntimeError("the concepts of this run act no more (another run began on the network, a call of it failed, or the "
                               "run is over): set_timesteps begins another run")
        if not self._acting:
            raise RuntimeError("the network of the concepts was not called in this run: where the pipeline calls another one by now, "
                               "fuse(pipe, steering=...) again")

    def of(self, network: torch.nn.Module) -> Injected:
        """The same concepts in a copy of the network."""
        twin = object.__new__(Injected)
        twin.__dict__.update(self.__dict__, network=network, _installed=False, _busy=False, _acting={},
                             _injections=[replace(one, network=network) for one in self._injections])
        return twin

    def end(self, scheduler=None) -> None:
        """The network is what it was. scheduler: only if its run is the one that acts."""
        if not self._installed or scheduler is not None and self._scheduler() not in (None, scheduler):
            return
        self._installed = False
        for acting in self._acting.values():
            for one in reversed(acting):
                one.close()
        if self.network.__dict__.get("forward") == self._call:  # else somebody has wrapped it since: then it passes calls on
            if self._before is None:
                del self.network.__dict__["forward"]
            else:
                self.network.__dict__["forward"] = self._before
        self._acting = {}

    # ---- a call of the network

    def _call(self, *args, **kwargs):
        scheduler = self._scheduler() if self._installed and not self._busy else None
        if scheduler is None:
            return self._forward(*args, **kwargs)
        kept = []

        def evaluate():
            out = self.network.forward(*args, **kwargs)
            kept.append(out)
            return (out[0],)

        self._busy = True
        try:
            given = self._parameters.bind_partial(self.network, *args, **kwargs).arguments
            floating = (v for v in list(given.values())[1:] if isinstance(v, torch.Tensor) and v.is_floating_point())
            sample = next(floating, None)
            if sample is None:
                raise TypeError("the network was called without a floating tensor: its concepts are for one")
            now = SimpleNamespace(plan=self._plan, row=self._place(scheduler, given.get("timestep")), x=sample)
            (output,) = self._acting_on(sample)[0].outputs(now, evaluate)
        except BaseException:
            self._busy = False
            self.end()
            raise
        self._busy = False
        out = kept[0]
        output = output.to(out[0].dtype)
        if isinstance(out, tuple):
            return (output, *out[1:])
        return type(out)(**{name: output if i == 0 else value for i, (name, value) in enumerate(out.items())})

    def _acting_on(self, sample: torch.Tensor) -> list:
        """What acts on a call with so many samples: weights of B samples are repeated where the network is called with several
        copies of the batch at once, for the condition and its absence."""
        size = len(sample)
        if size not in self._acting:
            acting: list = []
            setting = Setting(self._plan, tuple(sample.shape), size, self.network, sample.device, sample.dtype)
            for injection in self._injections:
                weight = torch.as_tensor(injection.weight, dtype=torch.float32)
                count = weight.numel() if weight.ndim == 1 else 1
                if not count or size % count:
                    raise ValueError(f"weight has {count} entries, the network was called with {size} samples: a number, or one "
                                     "a sample, is taken")
                weight = per_sample(injection.weight, count).repeat(size // count) if weight.ndim else weight.expand(size)
                one = replace(injection, weight=weight)
                acting.append(one.begin(replace(setting, acting=tuple(acting))))
            acting[0].select(torch.arange(size, device="cpu"))
            self._acting[size] = acting
        return self._acting[size]
