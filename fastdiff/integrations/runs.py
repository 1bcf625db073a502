"""What one run of a fused scheduler keeps, and where its noise comes from."""

from __future__ import annotations

from collections import deque

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..checks import FLOATS
from ..noise import as_seeds, stream_id
from .calls import Draw
from .probing import Node, Row, root
from .state import Slot, mapped, same

__all__ = ["OWN", "Draws", "Run", "check_generators", "drawn", "drawn_as", "holds_latents"]

OWN = "_fastdiff_"  # attributes of the fused half of a scheduler


class Run:
    """What one run of a scheduler keeps: its state, and the latents that stand in it.

    pending: attributes that somebody has set since; busy: what is set now is set by the scheduler; own_step: whether the
    scheduler's own step serves for the rest of the run; ahead: whether the first step is to find all rows at once.
    """

    def __init__(self, scheduler):
        cls = type(scheduler)
        self.pending, self.brownian = {}, None
        attributes = {}
        for name, value in scheduler.__dict__.items():
            if not name.startswith(OWN):
                (self.pending if holds_latents(value) else attributes)[name] = value
        for name in self.pending:
            attributes[name] = None
        if "noise_sampler" in attributes:
            self.brownian, attributes["noise_sampler"] = attributes["noise_sampler"], None
        self.node: Node = root(cls._fastdiff_parent, cls._fastdiff_method, attributes)
        self.kept: list[torch.Tensor] = []
        self.tables: dict = {}  # tensors among the attributes, and the number of changes in place that they had seen
        self.watch(attributes)
        self.busy = False
        self.own_step = False
        self.ahead = False

    def watch(self, attributes: dict):
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not value.is_inference():
                self.tables[name] = value, value._version

    def look(self, scheduler):
        """What was changed in place since counts as set from outside: tables, and history replaced in its lists."""
        now = scheduler.__dict__
        if any(table._version != version for table, version in self.tables.values()):  # one may be a view of another
            self.pending.update((name, table) for name, (table, _) in self.tables.items() if now.get(name) is table)
        for name in self.node.held:
            if name not in self.pending and not _stands(now.get(name), self.node.attributes[name], self.kept):
                self.pending[name] = now.get(name)

    def settle(self, sample):
        """Takes up what was set from outside; tensors of the latent's shape are kept by the run."""
        self.watch(self.pending)
        for name, value in self.pending.items():
            if name == "noise_sampler":
                self.brownian = value
                continue

            def leaf(v):
                if isinstance(v, torch.Tensor):
                    if v.ndim > 1 and v.shape == sample.shape and v.dtype in FLOATS and v.device == sample.device:
                        self.kept.append(v)
                        return Slot(len(self.kept) - 1)
                    return v.detach().cpu()
                return v

            value = mapped(value, leaf)
            self.node = self.node.changed(
                name, value, self.node.dtypes + tuple(t.dtype for t in self.kept[len(self.node.dtypes) :])
            )
        self.pending = {}


def _stands(value, expected, kept: list) -> bool:
    """Whether a run's tensors stand where its state says."""
    if isinstance(expected, Slot):
        return value is kept[expected.index]
    if isinstance(expected, (list, tuple, deque)):
        return (
            type(value) is type(expected)
            and len(value) == len(expected)
            and all(_stands(v, e, kept) for v, e in zip(value, expected))
        )
    return not isinstance(value, torch.Tensor) or same(value, expected)


def holds_latents(value) -> bool:
    found = []
    mapped(value, lambda v: found.append(v) if isinstance(v, torch.Tensor) and v.ndim > 1 else None)
    return bool(found)


class Draws:
    """Noise drawn inside of the step: keys of one stream a sample, numbered since ``set_timesteps``."""

    def __init__(self, generator, batch: int):
        if isinstance(generator, list) and len(generator) > 1:
            self.seeds = as_seeds([_seed(g) for g in generator])
        else:
            self.seeds = as_seeds(_seed(generator[0] if isinstance(generator, list) else generator), batch)
        self.count = 0
        self._keys = None
        self._path: tuple = (None, None, None)

    def along(self, row: int, draws, device) -> torch.Tensor:
        """(1, J, B, 2): keys of a row of draws (N, J) of the stream "brownian"."""
        if self._path[0] is not draws or self._path[1] != device:
            numbers = torch.from_numpy(draws).to(device)
            streams = torch.full_like(numbers, stream_id("brownian"))
            with torch.inference_mode(False):
                self._path = draws, device, torch.ops.fastdiff.run_keys(self.seeds.to(device), streams, numbers)
        return self._path[2][row : row + 1]

    def keys(self, first: int, end: int, device) -> torch.Tensor:
        """(1, end - first, B, 2): keys of draws counted from the next one."""
        first, end = first + self.count, end + self.count
        if self._keys is None or self._keys.shape[1] < end or self._keys.device != device:
            draws = torch.arange(max(64, 2 * end), device="cpu").unsqueeze(1)
            streams = torch.full_like(draws, stream_id("step"))
            with torch.inference_mode(False):
                made = torch.ops.fastdiff.run_keys(self.seeds.to(device), streams.to(device), draws.to(device))
                self._keys = made.transpose(0, 1)
        return self._keys[:, first:end]


def _seed(generator: torch.Generator | None) -> int:
    """A seed, by which the generator moves on: a generator used again gives other noise, one seeded again the same."""
    if generator is None or generator.device.type == "cpu":
        return int(torch.randint(0, 2**63 - 1, (), generator=generator, device="cpu"))
    offset = generator.get_offset()  # of the host: reading a draw would wait for the device
    generator.set_offset(offset + 4)
    key = torch.tensor([as_seeds([generator.initial_seed()]).item(), 0], device="cpu")
    return int(torch.ops.fastdiff.fold_in(key, torch.tensor(offset, device="cpu"))[0])


def check_generators(generator, batch: int) -> None:
    if isinstance(generator, list) and len(generator) not in (1, batch):
        raise ValueError(f"generator is a list of {len(generator)}, the batch has {batch} samples: one a sample is taken")


def drawn(
    run: Run, scheduler: SchedulerMixin, row: Row, generator, tensors: list, sample: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The noises of a row by slot, drawn as the scheduler itself does: the same calls, shapes and dtypes."""
    return {slot: _one(draw, run, scheduler, generator, tensors, sample) for slot, draw in zip(row.noise_slots, row.draws)}


def _one(draw: Draw, run, scheduler, generator, tensors, sample):
    if draw.how != "brownian":
        return drawn_as(draw, generator, sample)
    if run.brownian is None:
        run.brownian = _brownian(scheduler, generator, tensors[0], sample)
    return run.brownian(*draw.between).to(sample.device)


def drawn_as(draw: Draw, generator, sample: torch.Tensor) -> torch.Tensor:
    """A noise of sample's shape, drawn as the scheduler draws it."""
    if draw.how == "randn_like":
        return torch.randn_like(sample, dtype=draw.dtype)
    return randn_tensor(sample.shape, generator=generator if draw.generator else None, device=sample.device, dtype=draw.dtype)


def _brownian(scheduler, generator, output, sample):
    """The Brownian tree that the scheduler itself would have made."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler, DPMSolverSDEScheduler

    if isinstance(scheduler, DPMSolverSDEScheduler):
        sigmas = scheduler.sigmas
        return BrownianTreeNoiseSampler(
            sample, sigmas[sigmas > 0].min().item(), sigmas.max().item(), scheduler.noise_sampler_seed
        )
    seed = (
        [g.initial_seed() for g in generator]
        if isinstance(generator, list)
        else None
        if generator is None
        else generator.initial_seed()
    )
    config = scheduler.config
    return BrownianTreeNoiseSampler(output, sigma_min=config.sigma_min, sigma_max=config.sigma_max, seed=seed)
