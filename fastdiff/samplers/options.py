"""What `fastdiff.plan.plan` makes of its arguments: whose option is whose, the levels, where a run starts."""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..brownian import NORMALS, increments
from ..grids import GRIDS
from ..noise import unknown
from ..schedules import SCHEDULES, check_sigmas
from .stage import Linear, Noise, Stage, noise

__all__ = ["check_choices", "context", "joined", "levels_of", "shortened", "sort_options", "step_noises"]


def _parameters(function) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


def context(sampler, schedule) -> dict:
    """What a sampler asks for beyond its options: the schedule, if it has a parameter of that name."""
    return {"schedule": schedule} if "schedule" in inspect.signature(sampler).parameters else {}


def sort_options(name, sampler, schedule, options):
    """Options of plan() to the sampler, the schedule's constructor (if it is named) and the grid."""
    groups = [
        _parameters(sampler) - {"schedule"},
        _parameters(SCHEDULES[schedule]) if isinstance(schedule, str) and schedule in SCHEDULES else set(),
        set().union(*map(_parameters, GRIDS.values())),
    ]
    sorted_options = [{}, {}, {}]
    for option, value in options.items():
        place = next((i for i, known in enumerate(groups) if option in known), None)
        if place is None:
            raise TypeError(unknown(f"option of {name}", option, set().union(*groups)))
        sorted_options[place][option] = value
    _check_finite(sampler, sorted_options[0])
    return sorted_options


def step_noises(kind: str, sigmas: Sequence[float], most: int = NORMALS) -> list[Linear]:
    """The unit normal of each step between levels above 0.

    "independent": draw i of the stream "step"; "brownian": the increments of one path, at most `most` draws each of the
    stream "brownian" (`fastdiff.brownian`).
    """
    levels = [s for s in sigmas if s > 0]
    if kind == "independent":
        return [noise("step", i) for i in range(len(levels) - 1)]
    if kind == "brownian":
        return [Linear({Noise("brownian", draw): w for draw, w in terms.items()}) for terms in increments(levels, most)]
    raise ValueError(unknown("noise", kind, ("independent", "brownian")))


_NEVER_NEGATIVE = ("eta", "s_noise", "s_churn", "s_tmin", "s_tmax", "r", "tau")


def _check_finite(sampler, options) -> None:
    """A number among a sampler's options is finite, unless infinity is what it is by default (s_tmax)."""
    for option, value in options.items():
        default = inspect.signature(sampler).parameters[option].default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, float) and not number and value is not None:
            raise TypeError(f"{option} is {value!r}; it takes a number")
        if option in _NEVER_NEGATIVE and number and value < 0:
            raise ValueError(f"{option} is {value}; it takes a number of 0 or more")
        if isinstance(value, float) and not math.isfinite(value) and value != default:
            raise ValueError(f"{option} is {value}; it takes a finite number")


def levels_of(schedule, steps, grid, sigmas, timesteps, options) -> np.ndarray:
    given = [
        what for what, value in (("steps", steps), ("sigmas", sigmas), ("timesteps", timesteps)) if value is not None
    ]
    if len(given) != 1 or (grid is not None and steps is None):
        raise TypeError(
            "plan takes steps (with or without grid), sigmas or timesteps; "
            f"given {' and '.join(given) or 'none of them'}"
        )
    if steps is not None:
        return schedule.grid(grid, steps, **options)
    if options:
        raise TypeError(f"{', '.join(options)} goes with steps and grid; given {given[0]}")
    return check_sigmas(
        np.append(schedule.sigma_ve(np.asarray(timesteps, np.float64)), 0.0) if sigmas is None else sigmas
    )


def shortened(levels, strength, start):
    if start not in ("noise", "image", "latent"):
        raise ValueError(unknown("start", start, ("noise", "image", "latent")))
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it takes 0 < strength <= 1")
    if strength < 1 and start == "noise":
        raise ValueError(f"strength={strength} goes with start='image' or 'latent'; given start='noise'")
    steps = len(levels) - 1
    return levels[steps - max(1, min(int(steps * strength), steps)) :]


def joined(stages: Iterable[Stage]) -> list[Stage]:
    """Stages in a row that do not call the model become one."""
    done: list[Stage] = []
    for stage in stages:
        if done and stage.sigma is None and done[-1].sigma is None:
            stage = replace(stage, x=stage.x.replace("x", done.pop().x))
        done.append(stage)
    return done


def check_choices(prior, inpaint, clip_denoised, sigma_data) -> None:
    """Raise ValueError unless each is one that `plan` takes."""
    if prior not in (None, "sigma", "unit"):
        raise ValueError(unknown("prior", prior, ("sigma", "unit")))
    if inpaint not in (None, "d", "x"):
        raise ValueError(unknown("inpaint", inpaint, ("d", "x")))
    if clip_denoised is not None:
        pair = isinstance(clip_denoised, (tuple, list)) and len(clip_denoised) == 2
        if not (pair and all(isinstance(v, (int, float)) and math.isfinite(v) for v in clip_denoised)
                and clip_denoised[0] < clip_denoised[1]):
            raise ValueError(f"clip_denoised is {clip_denoised!r}; it takes (low, high), finite, with low < high")
    if not 0 < sigma_data < np.inf:
        raise ValueError(f"sigma_data is {sigma_data}; it takes a finite number > 0")
