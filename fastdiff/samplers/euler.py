"""Euler and Heun steps along dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 1 and algorithm 2)."""

import math
from collections.abc import Iterator
from itertools import pairwise

from .options import step_noises
from .path import takes_path
from .stage import Linear, Stage, d, noise, past, x, xe

__all__ = [
    "Churn",
    "ancestral_step",
    "dpm_2",
    "dpm_2_ancestral",
    "euler",
    "euler_ancestral",
    "euler_step",
    "flow_euler",
    "flow_heun",
    "frame",
    "heun",
    "heunpp2",
    "midpoint_step",
    "runge_kutta",
]


def euler_step(point: Linear, s: float, s_next: float) -> Linear:
    """point + (s_next - s) (point - d) / s, written so that it is exactly d where s_next = 0."""
    return s_next / s * point + (1 - s_next / s) * d


class Churn:
    """Noise that lifts the base from sigma_i to sigma_hat_i before step i (Karras et al. 2022, algorithm 2, lines 4-6).

    The row before step i adds it: the base is left at `level(i)` = sigma_hat_i, ready for the model.
    """

    def __init__(self, sigmas, s_churn, s_tmin, s_tmax, s_noise):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        self.sigmas, self.s_noise = sigmas, s_noise
        self.hats = [s * (1 + gamma) if s_tmin <= s <= s_tmax else s for s in sigmas[:-1]]

    def level(self, i: int) -> float:
        return self.hats[i] if i < len(self.hats) else self.sigmas[-1]

    def lift(self, i: int) -> Linear:
        return noise("churn", i, self.s_noise * math.sqrt(self.level(i) ** 2 - self.sigmas[i] ** 2))

    def start(self) -> Iterator[Stage]:
        if self.hats[0] > self.sigmas[0]:
            yield Stage(None, x + self.lift(0), self.hats[0])

    def steps(self):
        return enumerate(zip(self.hats, self.sigmas[1:]))


def euler(sigmas, *, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """x' = x + (sigma' - sigma) (x - d) / sigma; at the same time DDIM with eta = 0 and the Euler step of a flow."""
    churn = Churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    yield from churn.start()
    for i, (s, s_next) in churn.steps():
        yield Stage(s, euler_step(x, s, s_next) + churn.lift(i + 1), churn.level(i + 1), step=i)


def frame(schedule):
    """The coordinates in which dz/dw = (z - d) / w, as sigma -> (scale, w) with z = scale x, and back w -> sigma.

    VE and VP: z = x, w = sigma. Flow: z = x_t, w = t, where the slope is the velocity n - x0 and finite at t = 1. A
    Euler step is the same in both, steps of higher order are not.
    """
    if schedule is None or schedule.kind != "flow":
        return (lambda s: (1.0, s)), (lambda w: w)
    return (lambda s: (float(schedule.alpha_at(s)), float(schedule.t(s)))), (lambda w: w / (1 - w))


def heun(sigmas, *, schedule=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Karras et al. 2022, algorithm 2: the trapezoidal rule; an Euler step where sigma' = 0. For a flow: in t."""
    churn, (to_frame, _) = Churn(sigmas, s_churn, s_tmin, s_tmax, s_noise), frame(schedule)
    yield from churn.start()
    for i, (s, s_next) in churn.steps():
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
        else:
            (a, w), (a_next, w_next) = to_frame(s), to_frame(s_next)
            yield Stage(s, x, s, euler_step(x, s, s_next), s_next, step=i)
            slope, slope_next = (a * x - past(1)) / w, (a_next * xe - d) / w_next
            x_next = (a * x + (w_next - w) * (slope + slope_next) / 2) / a_next
            yield Stage(s_next, x_next + churn.lift(i + 1), churn.level(i + 1), step=i)


def midpoint_step(step, s, s_next, coordinates, added=0, level=None):
    """The midpoint rule from s to s_next in the coordinates of a `frame`, its midpoint in ln w: two stages, the first call at
    the base, the second half way. Then `added`, which leaves the base at `level`."""
    to_frame, back = coordinates
    (a, w), (a_next, w_next) = to_frame(s), to_frame(s_next)
    middle = back(math.sqrt(w * w_next))
    a_middle, w_middle = to_frame(middle)
    yield Stage(s, x, s, euler_step(x, s, middle), middle, step=step)
    slope = (a_middle * xe - d) / w_middle
    x_next = (a * x + (w_next - w) * slope) / a_next
    yield Stage(middle, x_next + added, s_next if level is None else level, step=step)


def dpm_2(sigmas, *, schedule=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """The midpoint rule, its midpoint in ln sigma: DPM-Solver-2 (Lu et al. 2022, algorithm 1) as k-diffusion has it.

    For a flow: in t, its midpoint in ln t.
    """
    churn, coordinates = Churn(sigmas, s_churn, s_tmin, s_tmax, s_noise), frame(schedule)
    yield from churn.start()
    for i, (s, s_next) in churn.steps():
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
        else:
            yield from midpoint_step(i, s, s_next, coordinates, churn.lift(i + 1), churn.level(i + 1))


def ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """sigma_down, sigma_up with sigma_down^2 + sigma_up^2 = sigma_next^2: further down, and back up with fresh noise.

    eta = 1 is the posterior q(x' | x, x0) of DDPM, eta = 0 the ODE (Song et al. 2021, DDIM, eq. 16, in VE coordinates).
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


def euler_ancestral(sigmas, *, eta=1.0, s_noise=1.0, noise="independent"):
    """An Euler step to sigma_down, then noise of sigma_up.

    noise: "independent" draws, or "brownian": increments of one path in sigma (`fastdiff.brownian`).
    """
    unit = step_noises(noise, sigmas)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        added = s_noise * up * unit[i] if up else 0
        yield Stage(s, euler_step(x, s, down) + added, s_next, step=i)


@takes_path
def dpm_2_ancestral(sigmas, *, schedule=None, eta=1.0, s_noise=1.0):
    """`dpm_2` to sigma_down, its midpoint in ln sigma, then noise of sigma_up (k-diffusion; diffusers' KDPM2Ancestral).

    For a flow: the step is in t.
    """
    coordinates = frame(schedule)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        added = noise("step", i, s_noise * up)
        if down == 0:
            yield Stage(s, d + added, s_next, step=i)
        else:
            yield from midpoint_step(i, s, down, coordinates, added, s_next)


def runge_kutta(step, points, tableau, weights, s_next, to_frame, lift=None, level=None):
    """Slopes at the levels `points`, slope_j at the base + sum_l tableau[j][l] slope_l; then the base + sum_j weights[j]
    slope_j, at s_next (with `lift` at `level`). In the coordinates of a `frame`; the first point is the base."""
    (scales, levels), a_next = zip(*map(to_frame, points)), to_frame(s_next)[0]

    def slopes(calls):  # after so many calls
        found = []
        for j in range(calls):
            point = sum((c * slope for c, slope in zip(tableau[j], found)), scales[0] * x)
            found.append((point - past(calls - 1 - j)) / levels[j])
        return found

    for calls in range(1, len(points)):
        ahead = sum((c * slope for c, slope in zip(tableau[calls], slopes(calls))), scales[0] * x) / scales[calls]
        yield Stage(points[calls - 1], x, points[0], ahead, points[calls], step=step)
    x_next = sum((c * slope for c, slope in zip(weights, slopes(len(points)))), scales[0] * x) / a_next
    yield Stage(points[-1], x_next if lift is None else x_next + lift, s_next if level is None else level, step=step)


def heunpp2(sigmas, *, schedule=None, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Heun++ of order 2 as ComfyUI has it: slopes at this level and, by Euler steps, at the next two, weighed by those
    levels over 3 times the first level of all; the last step but one has two slopes, the last is Euler's."""
    churn, (to_frame, _) = Churn(sigmas, s_churn, s_tmin, s_tmax, s_noise), frame(schedule)
    yield from churn.start()
    highest, steps = to_frame(sigmas[0])[1], len(sigmas) - 1
    for i, (s, s_next) in churn.steps():
        points = [s, *sigmas[i + 1 : min(i + 3, steps)]]
        levels = [to_frame(point)[1] for point in points]
        jumps = [after - before for before, after in pairwise(levels)]
        later = [w / (len(points) * highest) for w in levels[1:]]
        weights = [(to_frame(s_next)[1] - levels[0]) * c for c in (1 - sum(later), *later)]
        tableau = [jumps[:j] for j in range(len(points))]
        yield from runge_kutta(i, points, tableau, weights, s_next, to_frame, churn.lift(i + 1), churn.level(i + 1))


def flow_euler(sigmas, *, schedule):
    """x' = x + (t' - t) v, the Euler step of a rectified flow (Liu et al. 2023): `euler`, for flow schedules only."""
    _flow_only("flow_euler", schedule)
    return euler(sigmas)


def flow_heun(sigmas, *, schedule):
    """x' = x + (t' - t) (v + v') / 2: `heun`, for flow schedules only."""
    _flow_only("flow_heun", schedule)
    return heun(sigmas, schedule=schedule)


def _flow_only(name, schedule):
    if schedule.kind != "flow":
        raise ValueError(
            f"{name} goes with a flow schedule; given was {schedule!r}. {name.removeprefix('flow_')} takes any"
        )
