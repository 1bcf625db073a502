"""Noise along one Brownian path, whatever the number of steps, in the rows of a run (``fastdiff.brownian``)."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from ..brownian import NORMALS, Path
from ..reference.step import LIMITS
from .probing import Row

__all__ = ["Along", "along_path"]

_SAME = 1e-5  # levels that differ by less, relatively, are one: schedulers take roots and logarithms of them in float32


class Along(NamedTuple):
    """Increments of a path in place of a row's draws. draws: (N, J) int64, the normals of all rows of the run in the stream
    "brownian"; row: which of them are this row's; weights: (draws of the row, J)."""

    row: int
    draws: np.ndarray
    weights: np.ndarray


def along_path(rows: list[Row]) -> None:
    """Sets ``along`` of a run's rows, all of them, in order. They stay as they are where noise is asked for down to level 0, or
    where levels are too close to each other to be told apart: increments have the law of a path then, on the run's own grid."""
    asking = [row for row in rows if row.draws and all(draw.how == "brownian" for draw in row.draws)
              and row.targets[:, list(row.noise_slots)].any()]  # some ask for noise that they do not use, at the end
    if not asking or any(row.along is not None for row in asking):
        return
    asked = [[sorted(map(float, draw.between)) for draw in row.draws] for row in asking]
    ends = sorted(end for pairs in asked for pair in pairs for end in pair)
    levels = [end for end, before in zip(ends, [-math.inf, *ends]) if end - before > _SAME * abs(end)]
    if levels[0] <= 0 or not math.isfinite(levels[-1]):
        return

    def place(end):
        return min(bisect_left(levels, end * (1 - _SAME)), len(levels) - 1)

    for most in range(NORMALS, 3, -2):
        try:
            path = Path(levels, most)
        except ValueError:
            return
        terms = [[_increment(path, place(low), place(high)) for low, high in pairs] for pairs in asked]
        draws = [sorted({draw for one in row for draw in one}) for row in terms]
        width = max(map(len, draws))
        if width <= LIMITS["noises"]:
            break
    else:
        return
    table = np.array([own + [0] * (width - len(own)) for own in draws], np.int64)
    for i, (row, of_row, own) in enumerate(zip(asking, terms, draws)):
        weights = np.array([[one.get(draw, 0.0) for draw in own] + [0.0] * (width - len(own)) for one in of_row])
        row.along = Along(i, table, weights)


def _increment(path: Path, low: int, high: int) -> dict[int, float]:
    """(W(high) - W(low)) / sqrt(high - low) as weights of normals; what lies between cancels."""
    terms: dict[int, float] = {}
    for i in range(low, high):
        for draw, weight in path.terms(i).items():
            terms[draw] = terms.get(draw, 0.0) + weight
    least = 1e-12 * math.sqrt(path.levels[high].sigma)
    terms = {draw: weight for draw, weight in terms.items() if abs(weight) > least}
    length = math.sqrt(math.fsum(weight * weight for weight in terms.values()))
    return {draw: weight / length for draw, weight in terms.items()}
