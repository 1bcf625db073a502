"""The timestep that a scheduler is called with, without waiting for a device."""

from __future__ import annotations

import torch

from .probing import Node

__all__ = ["Unusual", "check_order", "host_time"]


class Unusual(Exception):
    """Arguments that a row cannot take, though the scheduler may."""


def host_time(scheduler, node: Node, t):
    """A timestep as (kind, value) on the host. One on the device is known by its place in ``timesteps``."""
    if not isinstance(t, torch.Tensor):
        return type(t), t
    kind = t.dtype, t.ndim
    if t.device.type == "cpu":
        if t.numel() == 1:
            return kind, t.item()
        if t.numel() and bool((t == t.reshape(-1)[0]).all()):
            return kind, t.reshape(-1)[0].item()
        raise Unusual("timesteps that differ from sample to sample are not fused")
    whole = scheduler.timesteps
    if isinstance(whole, torch.Tensor) and whole.ndim == 1 and whole.dtype == t.dtype and _one_value(t) and _share(whole, t):
        place, rest = divmod(t.storage_offset() - whole.storage_offset(), whole.stride(0) or 1)
        if rest == 0 and 0 <= place < len(node.times):
            return kind, node.times[place]
    if t.numel() != 1:
        raise Unusual("timesteps on the device that are not of scheduler.timesteps are not fused")
    if node.counted is not None and node.counted < len(node.times):
        return kind, node.times[node.counted]  # the scheduler counts too
    return kind, t.item()  # a timestep from elsewhere, to a scheduler that goes by its value: it has to be read


def check_order(scheduler, node: Node, t, value) -> None:
    """A scheduler that counts its steps is not asked for another one. Raises ``ValueError`` or ``IndexError``."""
    place, times = node.counted, node.times
    if place is None or not times:
        return
    if place >= len(times):
        raise IndexError(f"all {len(times)} steps have been taken: set_timesteps begins another run")
    if isinstance(t, torch.Tensor) and t.dtype != scheduler.timesteps.dtype:
        return  # rounded: the scheduler does not look at it either
    if value != times[place] and value in times:
        raise ValueError(
            f"step {place} of the run was called with timestep {value}, which is step {times.index(value)}: {times[place]} "
            "is taken"
        )


def _one_value(t: torch.Tensor) -> bool:
    """Whether a tensor is one value, broadcast."""
    return not any(stride for size, stride in zip(t.shape, t.stride()) if size > 1)


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
