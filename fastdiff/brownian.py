"""Brownian noise: a sampler's draws as the increments of one path W(sigma) per sample, the same for any number of steps.

The draw of a step from s to s' is (W(s) - W(s')) / sqrt(s - s'), as k-diffusion's BrownianTreeNoiseSampler has it. Such a
draw is a sum of weighted normals with fixed addresses, so a row's noise terms hold it: no kernel, no state, nothing to
keep between steps. ``docs/noise.md`` defines the path; ``fastdiff.reference.brownian`` evaluates it.

Here are the weights. A path has infinitely many normals, a draw at most 14, so a plan looks at its path no closer than it
must: every level goes down the tree until it is alone in its cell, and at least to ``DEPTH``, which is enough for Karras plans
of some 40 steps: these all see the same function W. Whatever is chosen, the draws of one plan have exactly the law of a
Brownian motion's increments: variance 1, and independent where they do not overlap.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["DEPTH", "NORMALS", "Path", "draw_of", "increments"]

NORMALS = 14
"""The most normals that one draw takes."""
DEPTH = 5
"""How far down its octave's tree a level goes at least, where the draws have room for it."""
_OCTAVES = 2048  # added to the octave's number: float64 has octaves from -1074 to 1023
_DEEPEST = 11  # with it, the deeper of two levels that are on one way down takes 13 normals at most


def draw_of(octave: int, node: int) -> int:
    """The number of a normal in the stream "brownian": 2^32 (octave + 2048) + node.

    Node 0 is the increment over the octave [2^octave, 2^(octave + 1)], node 1 the bridge over it, nodes 2 n and 2 n + 1
    the bridges over the lower and the upper half of node n's cell.
    """
    return (octave + _OCTAVES << 32) + node


def _cells(sigma: float):
    """The cells (node, low, middle, high) around a level, from its octave down. A cell's middle is that of ln sigma."""
    octave = math.frexp(sigma)[1] - 1
    node, low, high = 1, math.ldexp(1.0, octave), math.ldexp(1.0, octave + 1)
    while True:
        middle = math.sqrt(low * high)
        yield node, low, middle, high
        node, low, high = (2 * node + 1, middle, high) if sigma >= middle else (2 * node, low, middle)


def _width(octave: int) -> float:
    """The standard deviation of W over an octave."""
    return math.sqrt(math.ldexp(1.0, octave))


def _add(terms: dict, other: dict, factor: float) -> None:
    for draw, weight in other.items():
        terms[draw] = terms.get(draw, 0.0) + factor * weight


class _Level:
    """A noise level as a place in the tree.

    least: the depth at which it is alone in its cell, or is the cell's middle; 0 on the border of two octaves; depth: how
    far down it goes.
    """

    def __init__(self, sigma: float, below: float, above: float):
        self.sigma, self.octave = sigma, math.frexp(sigma)[1] - 1
        self.least = self.depth = 0
        if sigma == math.ldexp(1.0, self.octave):
            return
        for depth, (_, low, middle, high) in enumerate(_cells(sigma), 1):
            if depth > _DEEPEST:
                raise ValueError(f"levels {above:.9g}, {sigma:.9g} and {below:.9g} are closer to each other than a Brownian path "
                                 'is followed; it takes fewer steps, or noise="independent"')
            self.depth = depth
            if not self.least and (sigma == middle or (below <= low and above >= high)):
                self.least = depth
            if self.least and (sigma == middle or depth >= DEPTH):
                return

    def bridge(self) -> dict[int, float]:
        """W(sigma) - W(2^octave): of the tree's normals on the way down, the last stands at sigma itself."""
        if not self.depth:
            return {}
        at_low, at_high = {}, {draw_of(self.octave, 0): _width(self.octave)}
        for depth, (node, low, middle, high) in enumerate(_cells(self.sigma), 1):
            point = self.sigma if depth == self.depth else middle
            share = (point - low) / (high - low)
            at_point = {draw_of(self.octave, node): math.sqrt((point - low) * (high - point) / (high - low))}
            _add(at_point, at_low, 1 - share)
            _add(at_point, at_high, share)
            if depth == self.depth:
                return at_point
            at_low, at_high = (at_point, at_high) if self.sigma >= middle else (at_low, at_point)


class Path:
    """Levels as places in the tree, and the draws between neighbours. levels: upwards."""

    def __init__(self, sigmas: Sequence[float], most: int):
        around = [0.0, *sigmas, math.inf]
        self.levels = [_Level(sigma, *around[i : i + 3 : 2]) for i, sigma in enumerate(sigmas)]
        self.apart = [math.inf] * len(sigmas)
        self._fit(most)

    def terms(self, i: int) -> dict[int, float]:
        """W from level i to level i + 1: the rest of the lower one's octave, whole octaves, the start of the upper one's
        octave. Whole octaves beyond ``apart[i]`` count as one, the lower ones together: their variance goes to the highest
        of them. No other draw of the plan looks into them, so that the law stays exact."""
        low, high = self.levels[i], self.levels[i + 1]
        whole = self._whole(i)
        terms = dict(high.bridge())
        for count, octave in enumerate(whole, 1):
            if count >= self.apart[i]:
                terms[draw_of(octave, 0)] = math.sqrt(math.ldexp(1.0, octave + 1) - math.ldexp(1.0, whole[-1]))
                break
            terms[draw_of(octave, 0)] = _width(octave)
        if low.depth and low.octave < high.octave:
            terms[draw_of(low.octave, 0)] = _width(low.octave)
        _add(terms, low.bridge(), -1.0)
        least = 1e-14 * math.sqrt(high.sigma)  # what is left of terms that cancelled
        return {draw: weight for draw, weight in terms.items() if abs(weight) > least}

    def _whole(self, i: int) -> range:
        """The octaves between levels i and i + 1, from above, without that in which level i stands."""
        low, high = self.levels[i], self.levels[i + 1]
        return range(high.octave - 1, low.octave - (low.depth == 0), -1)

    # ---- few normals a draw

    def _fit(self, most: int) -> None:
        """Look less closely where a draw takes too many normals. Every change leaves out normals and adds none."""
        over = []
        for i in reversed(range(len(self.levels) - 1)):
            ends = self.levels[i : i + 2]
            while len(self.terms(i)) > most and any(end.depth > end.least for end in ends):
                max((end for end in reversed(ends) if end.depth > end.least), key=lambda end: end.depth).depth -= 1
            while len(self.terms(i)) > most and self.apart[i] > 1:
                self.apart[i] = min(self.apart[i], len(self._whole(i))) - 1
            if len(self.terms(i)) > most:
                over.append(i)
        while over:  # levels that are close to each other, on two sides of a border: the highest border first
            (_, border), i = max((self._border(i), i) for i in over)
            near = min((i, i + 1), key=lambda k: abs(math.log(self.levels[k].sigma / border)))
            # the nearer one goes to the border, and is then on the other's way down
            self.levels[near] = _Level(border, border, border)  # not alone: the middle of its cell
            over = [k for k in over if k != i and len(self.terms(k)) > most]

    def _border(self, i: int) -> tuple[float, float]:
        """The highest border between levels i and i + 1: how high (the ratio of its cell's ends), and where."""
        low, high = self.levels[i : i + 2]
        if low.octave < high.octave:
            return math.inf, math.ldexp(1.0, high.octave)
        return next((b / a, middle) for _, a, middle, b in _cells(low.sigma) if low.sigma < middle <= high.sigma)


def increments(levels: Sequence[float], most: int = NORMALS) -> list[dict[int, float]]:
    """The draws of a plan's steps as weights of normals in the stream "brownian".

    levels: all those of the plan, downwards, above 0. Returns for each step the weights {draw: weight} of
    (W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next): at most ``most`` of them, their squares sum to 1.
    Raises ``ValueError`` for other levels, and where levels are too close to each other to be told apart.
    """
    if not all(0 < low < high < math.inf for high, low in pairwise(levels)):
        given = ", ".join(f"{s:g}" for s in levels)
        raise ValueError(f"a Brownian path at the levels {given}; it takes finite levels, downwards, above 0")
    path = Path(levels[::-1], most)
    draws = [path.terms(i) for i in reversed(range(len(levels) - 1))]
    return [{draw: weight / math.sqrt(math.fsum(w * w for w in terms.values())) for draw, weight in terms.items()}
            for terms in draws]
