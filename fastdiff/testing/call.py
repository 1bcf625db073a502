"""What golden cases are asked for: devices, backends and cases by name, checked before anything is run or skipped."""

import difflib
import heapq
import numbers
from collections.abc import Collection
from pathlib import Path

import torch

from ..noise import unknown
from .cases import Case
from .digests import Golden, golden

__all__ = ["NAMES", "TIME_LIMIT", "check_call", "kind_of"]

NAMES = {"cpu": ("cpp", "triton-interpreted", "reference"), "cuda": ("cuda", "triton")}
TIME_LIMIT = 600.0
LONGEST = 1e6  # seconds: what every system's clock can wait for


def kind_of(device) -> str:
    """The kind of a device, "cpu" or "cuda". Raises ``ValueError`` for another, and for a number that none has."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(unknown("device", str(device), NAMES)) from None
    if parsed.type not in NAMES:
        raise ValueError(unknown("device", parsed.type, NAMES))
    count = 1 if parsed.type == "cpu" else torch.cuda.device_count()
    if count and (parsed.index or 0) >= count:  # where there is no GPU at all, that is the reason why nothing is run
        raise ValueError(f"device is {device}: {parsed.type}:0" + f" to {parsed.type}:{count - 1}" * (count > 1) + " is taken")
    return parsed.type


def check_call(device=None, *, backends=None, cases=None, golden_folder=None, time_limit=TIME_LIMIT) -> tuple[Golden, list[Case]]:
    """The digests and the cases that ``run`` is asked for. Raises ``ValueError`` or ``TypeError`` for what it does not take."""
    kinds = NAMES if device is None else (kind_of(device),)
    there = [name for kind in kinds for name in NAMES[kind]]
    for name in _names("backends", backends, "names of backends"):
        if name not in there:
            raise ValueError(("" if device is None else f"on {device}: ") + unknown("backend", name, there))
    if isinstance(time_limit, bool) or not isinstance(time_limit, numbers.Real):
        raise TypeError(f"time_limit is {time_limit!r}: a positive number of seconds is taken")
    if not 0 < time_limit <= LONGEST:
        raise ValueError(f"time_limit is {time_limit!r}: a positive number of seconds, at most {LONGEST:g}, is taken")
    stored = golden(None if golden_folder is None else Path(golden_folder))
    names = [c.name for c in stored.cases]
    for given in _names("cases", cases, "beginnings of case names"):
        if not any(name.startswith(given) for name in names):
            near = ", ".join(map(repr, _nearest(given, names)))
            raise ValueError(f"case {given!r} is not known: no name begins so; the nearest are {near}")
    return stored, [c for c in stored.cases if cases is None or c.name.startswith(tuple(cases))]


def _nearest(beginning: str, names: list[str]) -> list[str]:
    """The three names that begin most alike."""
    alike = difflib.SequenceMatcher(b=beginning)

    def likeness(name):
        alike.set_seq1(name[: len(beginning)])
        return alike.ratio()

    return heapq.nlargest(3, names, key=likeness)


def _names(what, given, meaning) -> list[str]:
    """A list of names that may be None, and may not be empty or a single string."""
    if given is None:
        return []
    if isinstance(given, (str, bytes)) or not isinstance(given, Collection):
        raise TypeError(f"{what} is {given!r}: a list of {meaning} is taken")
    given = list(given)
    if not given:
        raise ValueError(f"{what} is empty: a list of {meaning} is taken, or None for all")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{what} holds {name!r}: {meaning} are taken")
    return given
