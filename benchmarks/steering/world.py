"""What all methods share: networks, data, sampler, offline fits; and how a batch is drawn, timed and counted."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.steering.score import Reference, Scored, judged
from benchmarks.steering.store import Store, file_checksum
from benchmarks.zoo import data, unet
from benchmarks.zoo.classifiers import load_classifier
from benchmarks.zoo.spectral import load_spectral
from benchmarks.zoo.unet import SIGMA_DATA, WEIGHTS

__all__ = ["CONDITIONAL", "SPECTRAL", "Drawn", "Sampler", "World", "counted", "load_world", "peak_memory"]

FORMAT = 1
CONDITIONAL, SPECTRAL = "unet_cond", "spectral"
NETWORKS = ("unet", CONDITIONAL, "guide", "guide_noisy", "judge")
REFERENCE_COUNT = 1000  # real images of each class that the search's distances refer to (training images)
REAL_COUNT = 200  # test images of each class in the row of real images; the others are what results refer to


@dataclass(frozen=True)
class Sampler:
    """Euler on the probability flow, which is DDIM with eta 0: one model call a step, the same for every method. Of 512 unguided
    samples the Frechet distance is 2.38; twice the steps, down to 0.01, give 2.06."""

    name: str = "euler"
    steps: int = 25
    sigma_max: float = 80.0
    sigma_min: float = 0.02
    batch: int = 64

    def plan(self, sigmas: list[float] | None = None) -> fd.Plan:
        """Levels of Karras et al. 2022 (rho 7), then 0; or these levels."""
        if sigmas is not None:
            return fd.plan(self.name, schedule="edm", prediction="edm", sigmas=sigmas, sigma_data=SIGMA_DATA)
        return fd.plan(
            self.name,
            schedule="edm",
            prediction="edm",
            steps=self.steps,
            sigma_max=self.sigma_max,
            sigma_min=self.sigma_min,
            sigma_data=SIGMA_DATA,
        )


@dataclass(frozen=True)
class Drawn:
    """images (B, 1, 28, 28); seconds for all of them; counts: passes per image."""

    images: Tensor
    seconds: float
    counts: dict


class World:
    """networks: {name: module}, "unet", "guide", "guide_noisy", "judge" and, where it has been trained, "unet_cond".

    train, test: `zoo.data.Images`; sampler: of every run; context: what results depend on beside their own specification;
    folder: where fits and units are kept; device: of all networks but the judge, which sees its images on the CPU.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        train: data.Images,
        test: data.Images,
        *,
        sampler: Sampler,
        context: dict,
        folder: Path,
        stale: str = "refuse",
        device: torch.device | str = "cpu",
        reference_count: int = REFERENCE_COUNT,
        real_count: int = REAL_COUNT,
    ):
        self.networks, self.train, self.test, self.sampler, self.context = networks, train, test, sampler, context
        self.folder, self.plan, self.device = Path(folder), sampler.plan(), torch.device(device)
        self.reference_count, self.real_count = reference_count, real_count
        self.store = Store(self.folder / "units", context, stale)
        self.checksums: dict[str, str] = {}  # of networks that only one method uses

    @property
    def net(self) -> nn.Module:
        return self.networks["unet"]

    @property
    def judge(self) -> nn.Module:
        return self.networks["judge"]

    @property
    def classes(self) -> list[int]:
        return list(range(len(data.CLASSES)))

    def train_index(self, count: int, start: int = 0) -> Tensor:
        """Indices of `count` training images of each class, from its `start`-th on, class by class."""
        return torch.cat([torch.nonzero(self.train.labels == c)[start : start + count, 0] for c in self.classes])

    @cached_property
    def calibration(self) -> Reference:
        """Training images: what the distances of searches refer to."""
        index = self.train_index(self.reference_count)
        return Reference(judged(self.judge, self.train.batch(index), self.train.labels[index]))

    @cached_property
    def _test(self) -> tuple[Scored, Reference]:
        scored = judged(self.judge, self.test.batch(slice(None)), self.test.labels)
        first = torch.cat([torch.nonzero(self.test.labels == c)[: self.real_count, 0] for c in self.classes])
        rest = torch.ones(len(self.test), dtype=torch.bool)
        rest[first] = False
        return scored.take(first), Reference(scored.take(torch.nonzero(rest)[:, 0]))

    @property
    def real(self) -> Scored:
        """The row of real test images."""
        return self._test[0]

    @property
    def reference(self) -> Reference:
        """The other test images: what results refer to, those of the real row included."""
        return self._test[1]

    def draw(self, model, steering: list, seeds: Tensor, plan: fd.Plan | None = None) -> Drawn:
        """One batch, by the sampler's plan or another. Raises what `fd.sample` raises."""
        shape = (len(seeds), *self.train.pixels.shape[1:])
        with counted(self.networks) as counts:
            start = time.perf_counter()
            images = fd.sample(
                model,
                plan or self.plan,
                shape,
                seeds,
                batch_size=self.sampler.batch,
                device=self.device,
                steering=steering,
                progress=False,
            ).cpu()  # which waits for a GPU
            seconds = time.perf_counter() - start
        padded = -(-len(seeds) // self.sampler.batch) * self.sampler.batch
        return Drawn(images.clamp(-1, 1), seconds, {k: v / padded for k, v in sorted(counts.items())})


def load_world(
    folder: Path,
    *,
    data_folder=None,
    weights: Path = WEIGHTS,
    sampler: Sampler = Sampler(),
    stale: str = "refuse",
    device: torch.device | str = "cpu",
) -> World:
    """The zoo's networks, channels last, and data."""
    train, test = data.load_images("train", data_folder), data.load_images("test", data_folder)
    networks: dict[str, nn.Module] = {name: load_classifier(name, weights / f"{name}.safetensors") for name in NETWORKS[2:]}
    networks["unet"] = unet.load(weights / "unet.safetensors")
    if (weights / f"{CONDITIONAL}.safetensors").is_file():
        networks[CONDITIONAL] = unet.load_conditional(weights / f"{CONDITIONAL}.safetensors")
    if (weights / f"{SPECTRAL}.safetensors").is_file():
        networks[SPECTRAL] = load_spectral(weights / f"{SPECTRAL}.safetensors")
    for name, network in networks.items():
        network.to("cpu" if name == "judge" else device, memory_format=torch.channels_last)
    context = {
        "format": FORMAT,
        "device": torch.device(device).type,
        "sampler": vars(sampler),
        "train": train.checksum,
        "test": test.checksum,
        **{name: file_checksum(weights / f"{name}.safetensors") for name in NETWORKS if name != CONDITIONAL and name in networks},
    }
    world = World(networks, train, test, sampler=sampler, context=context, folder=folder, stale=stale, device=device)
    world.checksums = {name: file_checksum(weights / f"{name}.safetensors") for name in (CONDITIONAL, SPECTRAL) if name in networks}
    return world


@contextmanager
def counted(networks: dict[str, nn.Module]):
    """Counts passes through networks, in images: yields a Counter with "encoder", "decoder" of U-Nets and "classifier", each
    with a twin "... backward". A pass of the decoder alone is what an amplified concept costs beyond the unsteered step; the
    encoder is counted inside of its first level, which is not called where its kept outputs are used again."""
    counts, handles = Counter(), []

    def hook(name):
        def count(module, inputs, output):
            counts[name] += len(output)
            if output.requires_grad:
                output.register_hook(lambda grad: counts.update({f"{name} backward": len(grad)}))

        return count

    for name, network in networks.items():
        if name == "judge":
            continue
        unet = {"encoder": network.enc[0].blocks[0].norm1, "decoder": network.head[2]} if name.startswith("unet") else None
        parts = unet or {"classifier": network}
        handles += [module.register_forward_hook(hook(part)) for part, module in parts.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def peak_memory(function, device: torch.device) -> int:
    """Most bytes of tensors that `function()` held at once on a device beyond those that were there before. On the CPU from torch's
    own record of every allocation and release (scratch space that a library takes for itself is not in it)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
