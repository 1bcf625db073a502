"""`plan` makes a table (`fastdiff.table`) by the name of its sampler, or from a function of the levels."""

from collections.abc import Callable

import numpy as np

from .noise import unknown
from .samplers import SAMPLERS, Sampler
from .samplers.assemble import assemble, prediction_name
from .samplers.options import check_choices, context, joined, levels_of, shortened, sort_options
from .samplers.stage import Stage, noise, x
from .samplers.table import LIMITS, Row
from .schedules import SCHEDULES, Schedule
from .schedules import schedule as named_schedule
from .table import Plan

__all__ = ["LIMITS", "Plan", "Row", "plan"]

FINITE_START = 9999.0
"""Where samplers with a midpoint in ln sigma start, in place of pure noise: t = 0.9999 of a flow, as ComfyUI."""
_PREDICTION = {"vp": "epsilon", "ve": "edm", "flow": "flow"}
_TIME = {"vp": "timestep", "ve": "sigma", "flow": "t"}


def plan(
    name: str | Callable,
    *,
    schedule: str | Schedule | None = None,
    steps: int | None = None,
    prediction: str | None = None,
    grid: str | None = None,
    sigmas=None,
    timesteps=None,
    time: str | None = None,
    start: str = "noise",
    strength: float = 1.0,
    prior: str | None = None,
    sigma_data: float | None = None,
    vp_input: bool = False,
    clip_denoised: tuple[float, float] | None = None,
    inpaint: str | None = None,
    **options,
) -> Plan:
    """A plan by the name of its sampler, or from a function of the levels that yields stages.

    schedule: "linear", "scaled_linear", "cosine", "edm", "flow", or a `Schedule`; steps: how many; grid: "karras",
    "exponential", "trailing", ... (`fastdiff.grids`), by default that of the schedule; in place of both, sigmas
    (steps + 1,), the levels sigma_t / alpha_t themselves, or timesteps (steps,), to which the level 0 is added.
    prediction: what the model returns: "epsilon", "sample" (x0), "v", "flow" (n - x0), "edm" (F of Karras et al. 2022,
    with sigma_data), "denoised"; by default epsilon for VP, edm for EDM, flow for flow. time: the model's time
    argument: "timestep" (1000 t for a flow), "sigma", "c_noise" (ln(sigma) / 4), "t". vp_input: the model takes
    x / sqrt(sigma^2 + 1), as a VP model does that is sampled with the levels of an EDM schedule.
    start: "noise"; "image": the base holds an image, which is noised to the first level (with `strength`, the share of
    the steps that is run); "latent": the base is at the first level already. prior: x_T as alpha sigma N ("sigma") or
    as N ("unit", the default of VP). clip_denoised: bounds of the denoised estimate. inpaint: "d" or "x".
    options: of the sampler, of the schedule where it is given by name, and of the grid.

    >>> made = plan("dpmpp_2m_sde", schedule="scaled_linear", grid="karras", steps=20, eta=0.5)
    """
    if not callable(name) and name not in SAMPLERS:
        raise ValueError(unknown("sampler", name, SAMPLERS))
    entry = Sampler(name) if callable(name) else SAMPLERS[name]
    sampler, name = entry.stages, name.__name__ if callable(name) else name
    if schedule is None:
        schedule = entry.default_schedule
        if schedule is None:
            raise TypeError(f"plan({name!r}) takes a schedule: {', '.join(SCHEDULES)}, or a Schedule")
    for_sampler, for_schedule, for_grid = sort_options(name, sampler, schedule, options)
    schedule = named_schedule(schedule, **for_schedule)
    prediction = prediction_name(_PREDICTION[schedule.kind] if prediction is None else prediction)
    levels = levels_of(schedule, steps, grid, sigmas, timesteps, for_grid)
    levels = shortened(levels, strength, start)
    if entry.finite_start and levels[0] > FINITE_START:
        levels[0] = max(FINITE_START, 2 * levels[1])
    kind = time or ("c_noise" if prediction == "edm" else _TIME[schedule.kind])
    sigma_data = getattr(schedule, "sigma_data", 0.5) if sigma_data is None else sigma_data
    check_choices(prior, inpaint, clip_denoised, sigma_data)
    if prediction == "epsilon" and float(schedule.alpha_at(levels[0])) < 1e-6:
        raise ValueError(
            f"a prediction of epsilon says nothing about x0 at the first level, sigma={levels[0]:g} (alpha = 0); "
            "it takes prediction='v', 'sample' or 'flow', or a lower first level"
        )

    first = levels[0]
    spread = {"sigma": first, "unit": np.hypot(first, 1), None: schedule.prior(first)}[prior]
    begin = {
        "noise": Stage(None, noise("init", 0, spread), first),
        "image": Stage(None, x + noise("init", 0, first), first),
        "latent": Stage(None, x, first),
    }[start]
    stages = joined([begin] + list(sampler(levels.tolist(), **for_sampler, **context(sampler, schedule))))
    made = assemble(
        stages,
        alpha=lambda s: float(schedule.alpha_at(s)),
        time=lambda s: schedule.time(s, kind),
        prediction=prediction,
        start_sigma=first if start == "latent" else 0.0,
        sigma_data=sigma_data,
        vp_input=vp_input,
        clip=clip_denoised,
        inpaint=inpaint,
    )
    info = {
        "schedule": getattr(schedule, "name", schedule.kind),
        "prediction": prediction,
        "time": kind,
        "start": start,
        **{k: v for k, v in options.items() if isinstance(v, (str, int, float, bool))},
    }
    return Plan.from_rows(**made, name=name, info=info)
