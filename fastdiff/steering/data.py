"""Data to fit to, batch by batch: checked, counted and hashed while it passes."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

__all__ = ["Seen", "batches", "same_scale"]

_CHUNK = 1024  # samples of one tensor that are widened to float64 at a time


@dataclass
class Seen:
    """What has passed: name says what the data is; shape of a sample, count, smallest and largest value.

    ``sha256`` is that of the values in float32, little-endian, in their order: whatever the batches were.
    """

    name: str
    shape: tuple[int, ...] | None = None
    count: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    _sha: object = field(default_factory=hashlib.sha256, repr=False)

    def take(self, batch: torch.Tensor, place: str) -> None:
        shape = tuple(batch.shape[1:])
        if self.shape is not None and shape != self.shape:
            raise ValueError(f"{self.name}: {place} holds samples of shape {shape}, those before it {self.shape}")
        finite = torch.isfinite(batch)
        if not bool(finite.all()):
            first = int((~finite).reshape(len(batch), -1).any(1).nonzero()[0])
            what = "a NaN" if bool(torch.isnan(batch[first]).any()) else "an infinite value"
            raise ValueError(f"{self.name}: {place} holds {what}, in sample {self.count + first}")
        self.shape = shape
        self.count += len(batch)
        self.low, self.high = min(self.low, float(batch.min())), max(self.high, float(batch.max()))
        values = batch.detach().to("cpu", torch.float32).contiguous().numpy()
        self._sha.update(memoryview(values.reshape(-1).astype("<f4", copy=False)))

    @property
    def about(self) -> dict:
        """For a file: what JSON holds."""
        return {"count": self.count, "shape": list(self.shape), "range": [self.low, self.high], "sha256": self._sha.hexdigest()}


def batches(data, seen: Seen, least: int = 2) -> Iterator[torch.Tensor]:
    """The data in batches (b, *shape), b of 1 or more, each noted in ``seen`` first.

    data: a tensor or array (N, *shape) of floating point; or an iterable of such batches, or of tuples whose first item is
    one, as a DataLoader gives. Raises ``TypeError`` or ``ValueError`` that name the batch, at the end too, if there were
    fewer than ``least`` samples.
    """
    if isinstance(data, torch.utils.data.Dataset):
        raise TypeError(f"{seen.name} is a dataset ({type(data).__name__}), which gives single samples: "
                        "torch.utils.data.DataLoader(dataset, batch_size=...) is taken")
    if isinstance(data, (str, bytes, dict)) or not isinstance(data, (torch.Tensor, np.ndarray, Iterable)):
        raise TypeError(f"{seen.name} is {type(data).__name__}: a tensor (N, ...), or an iterable of such batches, is taken")
    whole = isinstance(data, (torch.Tensor, np.ndarray))
    for number, item in enumerate([data] if whole else data):
        batch = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        place = "the data" if whole else f"batch {number}"
        for part in _checked(batch, seen.name, place).split(_CHUNK):
            if len(part):
                seen.take(part, place)
                yield part
    if seen.count < least:
        raise ValueError(f"{seen.name} holds {seen.count} sample{'s' * (seen.count != 1)}: {least} or more are taken")


def _checked(batch, name, place) -> torch.Tensor:
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.ascontiguousarray(batch))
    if not isinstance(batch, torch.Tensor):
        raise TypeError(f"{name}: {place} is {type(batch).__name__}: a tensor (b, ...) is taken")
    if not batch.is_floating_point():
        raise TypeError(f"{name}: {place} is {batch.dtype}: floating point in the range that the model was trained on is taken "
                        "(for bytes: x / 127.5 - 1, say)")
    if batch.ndim < 2 or 0 in batch.shape[1:]:
        raise ValueError(f"{name}: {place} has shape {tuple(batch.shape)}: (b, ...) with samples that are not empty is taken")
    return batch.detach()


def same_scale(name: str, given: dict, reference: str, taken: dict) -> None:
    """Raises ``ValueError`` where two sets cannot be of one shape and one range of values.

    given, taken: ``Seen.about``. A range further out than the other's whole width is another scaling (0 to 255 beside
    -1 to 1), not other images.
    """
    if given["shape"] != taken["shape"]:
        raise ValueError(f"{name} has samples of shape {tuple(given['shape'])}, {reference} of {tuple(taken['shape'])}: "
                         "one shape is taken")
    (low, high), (least, most) = given["range"], taken["range"]
    width = most - least
    if low < least - width or high > most + width:
        raise ValueError(f"{name} has values from {low:g} to {high:g}, {reference} from {least:g} to {most:g}: "
                         "one range of values is taken")
