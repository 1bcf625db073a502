"""Concepts: a direction in the activations of one block of one network, with what it was learnt from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ..schedules import Schedule
from .collect import check_images, checked_sigma, collect, find_block
from .directions import check_choices, checked_targets, fit_directions
from .files import digest, load, save

if TYPE_CHECKING:
    from .inject import Injection

__all__ = ["Concept", "fit_concepts", "network_checksum"]


def network_checksum(network: torch.nn.Module) -> str:
    """sha256, in hexadecimal, of a network's state: names, shapes, dtypes and bytes of its parameters and buffers, as
    ``network.state_dict()`` gives them. ``torch.compile`` does not change it.

    It is kept, and computed anew where the sum of the bits of some tensor is another: a sum takes a tenth of the time, and
    none of the copying from a GPU.
    """
    state = network.state_dict().items()
    state = {name.replace("_orig_mod.", ""): t.detach() for name, t in state if isinstance(t, torch.Tensor)}
    seen = [(name, t.shape, t.dtype, t.device, _sum_of_bits(t)) for name, t in state.items()]
    kept = _checksums.get(network)
    if kept is None or kept[0] != seen:
        kept = _checksums[network] = (seen, digest(state))
    return kept[1]


_checksums: WeakKeyDictionary = WeakKeyDictionary()
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(t) -> int:
    t = torch.view_as_real(t) if t.is_complex() else t
    return int(t.view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Concept:
    """A concept vector.

    direction: (*activation) float32 of norm 1, for activations (B, *activation) of ``block``, a name of
    ``network.named_modules()``; sigma: the noise level sigma_t / alpha_t at which it was learnt; network: the checksum of the
    network (``network_checksum``); label: the class or attribute, an int or text; method: "rfm", "mean_difference",
    "covariance_aware", or one's own; auc: of the direction's scores on held-out samples; settings: what else is known of the
    fit, as JSON holds it: the settings chosen, all trials, how many samples.
    """

    direction: torch.Tensor
    block: str
    sigma: float
    network: str
    label: int | str
    method: str
    auc: float
    settings: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        v = self.direction
        if not isinstance(v, torch.Tensor) or v.dtype != torch.float32 or not v.ndim:
            kind = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__
            raise TypeError(f"direction is {kind}: a float32 tensor of the activation's shape is taken")
        norm = float(v.double().norm())
        if not abs(norm - 1) < 1e-3:
            raise ValueError(f"direction has norm {norm:g}: a unit vector is taken")
        for name, kind in (("block", str), ("network", str), ("method", str), ("label", (int, str)), ("settings", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}: {getattr(kind, '__name__', 'an int or text')} is taken")
        object.__setattr__(self, "sigma", checked_sigma(self.sigma))
        if not 0 <= self.auc <= 1:
            raise ValueError(f"auc is {self.auc!r}: a number from 0 to 1 is taken")

    def __repr__(self) -> str:
        return (f"Concept({self.label!r}, {tuple(self.direction.shape)} at {self.block!r}, sigma {self.sigma:g}, {self.method}, "
                f"AUC {self.auc:.3f}, network {self.network[:8]})")

    def check(self, network: torch.nn.Module, *, shape: Sequence[int] | None = None) -> None:
        """Raises ``ValueError`` where the concept was not made for this network, or for activations of this shape.

        network: a module; shape: of one sample's activation of the block, where it is known.
        """
        find_block(network, self.block)
        given = network_checksum(network)
        if given != self.network:
            made = self.settings.get("network", "a network")
            raise ValueError(f"the concept {self.label!r} was learnt in {made} with checksum {self.network[:16]}; this network "
                             f"is {_described(network)} with checksum {given[:16]}: its weights, names or dtypes differ, so "
                             "that the direction means nothing in its activations")
        if shape is not None and tuple(shape) != tuple(self.direction.shape):
            raise ValueError(f"the concept {self.label!r} was learnt from activations of shape {tuple(self.direction.shape)} of "
                             f"block {self.block!r}: it cannot be used for {tuple(shape)}")

    def at(self, weight=1.0, scale: float = 1.0, window: tuple[float, float] | None = None, **options) -> Injection:
        """The concept as ``fd.sample(..., steering=[...])`` takes it: h += weight |h| direction at its block.

        weight: w, a number or one a sample; scale: s of the amplification eps0 + s (eps1 - eps0); window: (low, high) in sigma,
        always by default. options: steps, skip, network. See ``fastdiff.steering.inject.Injection``.
        """
        from .inject import Injection

        return Injection(self, weight, scale, window, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; ``Concept.load`` reads it."""
        about = {name: getattr(self, name) for name in _ABOUT}
        save(path, {"direction": self.direction}, {"kind": "concept", **about})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Concept:
        """Reads what ``save`` wrote, onto the CPU. Raises ``ValueError`` for a file that is damaged or of another kind."""
        tensors, about = load(path, "concept")
        return cls(tensors["direction"], **{name: about[name] for name in _ABOUT})


_ABOUT = ("block", "sigma", "network", "label", "method", "auc", "settings")


def _described(network) -> str:
    parameters = list(network.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return f"{type(network).__name__} ({sum(p.numel() for p in parameters):,} parameters, {', '.join(dtypes) or 'none'})"


def fit_concepts(
    network: torch.nn.Module,
    block: str,
    images: torch.Tensor,
    labels,
    sigma: float,
    method: str = "rfm",
    *,
    classes: Sequence | None = None,
    held_out: float = 0.2,
    split_seed: int = 0,
    select: str = "direction",
    schedule: str | Schedule | None = None,
    prediction: str | None = None,
    time: str | None = None,
    sigma_data: float | None = None,
    vp_input: bool = False,
    call: Callable | None = None,
    seeds: int | Sequence[int] | torch.Tensor = 0,
    batch_size: int = 64,
    progress: bool | None = None,
    **options,
) -> dict[int | str, Concept]:
    """Concepts of a frozen network: for each label, the direction in a block's activations at x0 + sigma n that tells it from
    the rest.

    images: x0 (N, ...); labels: N ints or texts, or a mapping of names to bool (N,); classes: the labels wanted, all by
    default. schedule, prediction, time, sigma_data, vp_input or call: how the network is called, seeds: of the noise, batch_size:
    as ``collect`` takes them. method, held_out, split_seed, select, and the method's options: as ``fit_directions`` takes them.

    Returns label -> ``Concept``. Raises ``ValueError``/``TypeError`` for wrong or degenerate input: before the network runs, but
    for degenerate activations.

        concepts = fit_concepts(unet, "enc.2", images, labels, 0.5, schedule="edm", prediction="edm", sigma_data=0.7)
        fd.sample(unet, plan, shape, seeds, steering=[concepts["cat"].at(0.1, scale=2, window=(0.6, 2))])
    """
    check_choices(method, held_out, select, options)
    check_images(images)
    checked_targets(labels, len(images), classes)
    activations = collect(network, block, images, sigma, schedule=schedule, prediction=prediction, time=time,
                          sigma_data=sigma_data, vp_input=vp_input, call=call, seeds=seeds, batch_size=batch_size,
                          progress=progress)
    found = fit_directions(activations, labels, method, classes=classes, held_out=held_out, split_seed=split_seed, select=select,
                           progress=progress, **options)
    checksum, described = network_checksum(network), _described(network)
    common = {"network": described, "samples": len(images), "held_out": held_out, "split_seed": split_seed, "select": select}
    return {
        label: Concept(d.vector, block, float(sigma), checksum, label, method, d.auc,
                       _json({**common, "chosen": d.settings, "trials": d.trials}))
        for label, d in found.items()
    }


def _json(value):
    """What JSON holds: numbers as Python's own, no infinity."""
    if isinstance(value, dict):
        return {str(name): _json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
