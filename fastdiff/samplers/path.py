"""Noise along a Brownian path, for samplers that are written with independent draws."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..brownian import NORMALS
from ..noise import unknown
from .options import step_noises
from .stage import Linear, Noise, Stage

__all__ = ["along_path", "takes_path"]


def takes_path(sampler: Callable[..., Iterable[Stage]]) -> Callable[..., Iterable[Stage]]:
    """The sampler with one more option, noise: "independent" draws as it is written, or "brownian" (`along_path`)."""

    @functools.wraps(sampler)
    def stages(sigmas, *, noise="independent", **options):
        if noise not in ("independent", "brownian"):
            raise ValueError(unknown("noise", noise, ("independent", "brownian")))
        made = sampler(sigmas, **options)
        return made if noise == "independent" else along_path(made, sigmas)

    written = inspect.signature(sampler)
    option = inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default="independent")
    stages.__signature__ = written.replace(parameters=[*written.parameters.values(), option])
    return stages


def along_path(stages: Iterable[Stage], sigmas: Sequence[float]) -> Iterator[Stage]:
    """The stages with increments of a path W(sigma) as their noise (`fastdiff.brownian`).

    A step's draws N_j are turned, which keeps their law: what they add to the base at the step's end, u . N with |u| = 1, is
    the step's increment over the root of its length, and what they are across u comes from draws of the step's own. So

        N = H (increment, N_2', N_3', ...),    H symmetric and orthogonal with u as its first column (Householder's)
    """
    stages = list(stages)
    units = step_noises("brownian", sigmas, NORMALS - (len(_draws(stages)) > len(sigmas) - 1))
    written: dict[Noise, Linear] = {}
    for step, unit in enumerate(units):
        own = [stage for stage in stages if stage.step == step]
        draws = _draws(own)
        if not draws:
            continue
        u = np.array([own[-1].x.get(draw, 0.0) for draw in draws])
        turned = [unit, *(Linear({draw: 1.0}) for draw in draws[1:])]
        for draw, row in zip(draws, _turn(u / np.linalg.norm(u))):
            written[draw] = sum((c * by for c, by in zip(row, turned)), Linear({}))
    for stage in stages:
        yield replace(stage, x=_rewritten(stage.x, written), eval=stage.eval and _rewritten(stage.eval, written))


def _draws(stages: Iterable[Stage]) -> list[Noise]:
    """The normals of the stream "step", each once."""
    terms = (symbol for stage in stages for sum_ in (stage.eval or (), stage.x) for symbol in sum_)
    return list(dict.fromkeys(symbol for symbol in terms if isinstance(symbol, Noise) and symbol.stream == "step"))


def _turn(u: np.ndarray) -> np.ndarray:
    """The reflection that takes (1, 0, ...) to u."""
    across = np.eye(len(u))[0] - u
    length = across @ across
    return np.eye(len(u)) - (2 / length * np.outer(across, across) if length > 0 else 0.0)


def _rewritten(terms: Linear, written: dict[Noise, Linear]) -> Linear:
    """All at once: what a draw is written as may name it."""
    kept = Linear({symbol: c for symbol, c in terms.items() if symbol not in written})
    return sum((c * written[symbol] for symbol, c in terms.items() if symbol in written), kept)
