"""What a method can be set to: axes with ordered levels. A strength's levels go on beyond both ends, a window's end there.

A setting is a dict {axis: value}. Strengths stand on a geometric grid, so that "one level up" means the same wherever the
search is, and a best setting at the end of what was tried can always be compared with one beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

__all__ = ["Levels", "Space", "Strength"]


@dataclass(frozen=True)
class Strength:
    """Positive numbers on a geometric grid, value = start * ratio^k. low, high: k of the first design; natural: a value
    that nothing lies below, such as an amplification of 1."""

    start: float
    ratio: float
    low: int
    high: int
    natural: float | None = None

    def design(self) -> list[float]:
        return [self.value(k) for k in range(self.low, self.high + 1)]

    def value(self, k: float) -> float:
        return float(f"{self.start * self.ratio**k:.4g}")

    def level(self, value: float) -> float:
        """k, a multiple of one half: values are kept to four digits."""
        return round(2 * float(np.log(value / self.start) / np.log(self.ratio))) / 2

    def beside(self, value: float, by: float) -> float | None:
        """The value `by` levels away; half levels too."""
        other = self.value(self.level(value) + by)
        return None if self.natural is not None and other < self.natural * (1 - 1e-9) else other

    def order(self, value: float) -> float:
        return value


@dataclass(frozen=True)
class Levels:
    """A fixed list of values; both ends are natural: sigma of a window from the sampler's last level to its first, or names."""

    values: tuple
    first: tuple | None = None  # what the first design uses, all by default

    def design(self) -> list:
        return list(self.first or self.values)

    def beside(self, value, by: float):
        if by != int(by):
            return None
        at = self.values.index(value) + int(by)
        return self.values[at] if 0 <= at < len(self.values) else None

    def order(self, value) -> int:
        return self.values.index(value)


@dataclass(frozen=True)
class Space:
    """axes: {name: Strength or Levels}. valid: whether a setting makes sense (a window's low end below its high end)."""

    axes: dict

    def valid(self, setting: dict) -> bool:
        pairs = [(n, n.replace("low", "high")) for n in self.axes if n.endswith("low")]
        return all(high not in setting or setting[low] < setting[high] for low, high in pairs)

    def design(self, count: int, seed: int = 0) -> list[dict]:
        """`count` settings that fill the space evenly: a scrambled Sobol sequence over the axes' levels."""
        if not self.axes:
            return [{}]
        sobol, found = qmc.Sobol(len(self.axes), seed=seed), []
        for _ in range(64):  # a small space may hold fewer than count
            for point in sobol.random(32):
                setting = {}
                for (name, axis), u in zip(self.axes.items(), point):
                    levels = axis.design()
                    setting[name] = levels[min(int(u * len(levels)), len(levels) - 1)]
                if self.valid(setting) and setting not in found:
                    found.append(setting)
                if len(found) == count:
                    return found
        return found

    def beside(self, setting: dict, by: float = 1) -> list[dict]:
        """The settings one level (or `by`) away on one axis, in order of the axes, downwards first."""
        found = []
        for name, axis in self.axes.items():
            for step in (-by, by):
                value = axis.beside(setting[name], step)
                other = {**setting, name: value}
                if value is not None and self.valid(other) and other not in found:
                    found.append(other)
        return found

    def edges(self, best: dict, tried: list[dict]) -> list[dict]:
        """Settings beyond the end of what was tried, for each axis on which the best lies there and more is possible."""
        found = []
        for name, axis in self.axes.items():
            order = [axis.order(s[name]) for s in tried]
            for step, end in ((-1, min(order)), (1, max(order))):
                value = axis.beside(best[name], step)
                if value is not None and axis.order(best[name]) == end and self.valid({**best, name: value}):
                    found.append({**best, name: value})
        return found
