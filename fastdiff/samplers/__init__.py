"""Samplers by name. Each is a function of the noise levels (steps + 1,) that yields `Stage`s in VE coordinates.

A new one: write such a function and `register("name", function)` it. It needs no kernel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import adams, consistency, ddim, dpmpp, euler, exponential, singlestep, unipc
from .stage import Stage

__all__ = ["SAMPLERS", "Sampler", "register"]


@dataclass(frozen=True)
class Sampler:
    """stages(sigmas, **options); a parameter `schedule` gets the schedule.

    finite_start: its formulas need a first level that is not pure noise.
    """

    stages: Callable[..., Iterable[Stage]]
    default_schedule: str | None = None
    finite_start: bool = False


SAMPLERS: dict[str, Sampler] = {}


def register(name: str, stages, *, default_schedule: str | None = None, finite_start: bool = False) -> None:
    """Add a sampler under a name that is still free."""
    if name in SAMPLERS:
        raise ValueError(f"a sampler named {name!r} is there already; it takes a free name")
    SAMPLERS[name] = Sampler(stages, default_schedule, finite_start)


for _stages in (
    euler.euler,
    euler.euler_ancestral,
    euler.heun,
    euler.dpm_2,
    ddim.ddim,
    ddim.ddpm,
    ddim.lcm,
    dpmpp.dpmpp_2m,
    dpmpp.dpmpp_2m_sde,
    dpmpp.dpmpp_3m,
    dpmpp.dpmpp_3m_sde,
    euler.dpm_2_ancestral,
    euler.heunpp2,
    adams.lms,
    adams.ipndm,
    adams.deis,
    adams.pndm,
    adams.gradient_estimation,
    unipc.unipc,
    unipc.sa_solver,
    singlestep.dpmpp_singlestep,
    exponential.res_multistep,
    consistency.tcd,
    consistency.scm,
    consistency.consistency,
):
    register(_stages.__name__, _stages)
for _stages in (
    dpmpp.dpmpp_2s_ancestral,
    dpmpp.dpmpp_sde,
    singlestep.dpm_fast,
    exponential.res_multistep_ancestral,
    exponential.seeds_2,
    exponential.seeds_3,
    exponential.er_sde,
):
    register(_stages.__name__, _stages, finite_start=True)
for _stages in (euler.flow_euler, euler.flow_heun):
    register(_stages.__name__, _stages, default_schedule="flow")
