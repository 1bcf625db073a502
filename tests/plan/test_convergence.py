"""Samplers on a Gaussian, whose denoiser and solution are known: orders of convergence, and the law of what SDEs draw.

Data N(mu, C): D(x, sigma) = mu + C (C + sigma^2)^-1 (x - mu), and the probability-flow ODE carries x(sigma) - mu along
sqrt((sigma^2 + c) / (sigma_T^2 + c)) in each eigendirection c of C (Wang & Vastola 2024, arXiv:2412.09726).
"""

import math

import numpy as np
import pytest
from plan.harness import Noises, run

from fastdiff.plan import plan
from fastdiff.samplers.stage import Noise
from fastdiff.schedules import EDM, Flow

MEAN, VARIANCE = np.array([0.3, -0.8, 0.5]), np.array([0.02, 0.5, 1.7])
HIGH, LOW = 20.0, 0.05


def gaussian(x, sigma):
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


def solution(x, start, end):
    return MEAN + np.sqrt((end**2 + VARIANCE) / (start**2 + VARIANCE)) * (x - MEAN)


def error(name, steps, *, levels=None, flow=False, **options):
    """Largest error at LOW of a run from HIGH in `steps` steps, uniform in ln sigma."""
    levels = np.geomspace(HIGH, LOW, steps + 1) if levels is None else levels(steps)
    start = MEAN + levels[0] * np.array([[1.2, -0.7, 0.4]])
    schedule = Flow() if flow else EDM()
    scale, unscale = (float(schedule.alpha_at(s)) for s in (levels[0], levels[-1]))
    made = plan(name, schedule=schedule, sigmas=levels, prediction="denoised", start="latent", **options)
    end = run(
        made, lambda seen, s, _: gaussian(seen / schedule.alpha_at(s), s), Noises(batch=1, size=3), start=scale * start
    )
    return float(np.abs(end / unscale - solution(start, levels[0], levels[-1])).max())


def order(name, counts=(64, 128, 256), **options):
    """The slope of ln error over ln(1/steps), fitted."""
    errors = [error(name, n, **options) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def careful_start(steps):
    """Two steps of size h^2 first: multistep solvers start with lower orders there, which then do not show."""
    total = math.log(HIGH / LOW)
    h = total / steps
    return HIGH * np.exp(-np.concatenate([[0, h**2], np.linspace(2 * h**2, total, steps)]))


def careful_ends(steps):
    """`careful_start`, and two steps of size h^2 at the end, where orders fall again."""
    total = math.log(HIGH / LOW)
    h = total / steps
    return HIGH * np.exp(-np.concatenate([[0, h**2], np.linspace(2 * h**2, total - 2 * h**2, steps - 2), [total - h**2, total]]))


def middles(steps):
    """Steps of two calls, and two calls of size h^2 that fall to order 1."""
    total = math.log(HIGH / LOW)
    h = total / steps
    return HIGH * np.exp(-np.concatenate([np.linspace(0, total - 2 * h**2, steps - 1), [total - h**2, total]]))


def thirds(steps):
    """Steps of three calls, then one of two and one of one, of size h^3."""
    total = math.log(HIGH / LOW)
    h = (total / steps) ** 3
    return HIGH * np.exp(-np.concatenate([np.linspace(0, total - 3 * h, steps - 2), total - h * np.array([2, 1, 0])]))


ORDERS = {
    "euler": (1, {}),
    "ddim": (1, {}),
    "heun": (2, {}),
    "dpm_2": (2, {}),
    "dpmpp_2m": (2, {}),
    "dpmpp_2m heun": (2, {"solver_type": "heun"}),
    "dpmpp_2m_sde, eta 0": (2, {"eta": 0.0}),
    "dpmpp_2s_ancestral, eta 0": (2, {"eta": 0.0}),
    "dpmpp_sde, eta 0": (2, {"eta": 0.0}),
    "dpmpp_sde, eta 0, r 0.3": (2, {"eta": 0.0, "r": 0.3}),
    "dpmpp_3m": (2, {}),
    "dpmpp_3m, curvature 2": (3, {"levels": careful_start, "curvature": 2.0}),
    "flow_euler": (1, {"flow": True}),
    "flow_heun": (2, {"flow": True}),
    "dpm_2 of a flow": (2, {"flow": True}),
    "dpmpp_2m of a flow": (2, {"flow": True}),
    "dpm_2_ancestral, eta 0": (2, {"eta": 0.0}),
    "lms, order 1": (1, {"order": 1}),
    "lms, order 2": (2, {"order": 2}),
    "lms, order 3": (3, {"order": 3, "levels": careful_start}),
    "lms": (4, {"levels": careful_start}),
    "lms of a flow, order 2": (2, {"order": 2, "flow": True}),
    "deis, order 2": (2, {"order": 2}),
    "deis, order 3": (3, {"levels": careful_start}),
    "deis of a flow, order 2": (2, {"order": 2, "flow": True}),
    "unipc, order 1": (2, {"order": 1}),
    "unipc, order 2": (3, {"order": 2, "levels": careful_ends}),
    "unipc, order 2, bh1": (3, {"order": 2, "solver_type": "bh1", "levels": careful_ends}),
    "dpmpp_singlestep": (2, {"levels": middles}),
    "dpmpp_singlestep, heun": (2, {"solver_type": "heun", "levels": middles}),
    "dpmpp_singlestep, dpmsolver": (2, {"algorithm": "dpmsolver", "levels": middles}),
    "dpmpp_singlestep, order 3": (3, {"order": 3, "levels": thirds, "counts": (63, 126, 252)}),
    "dpmpp_singlestep, order 3, dpmsolver": (
        3, {"order": 3, "algorithm": "dpmsolver", "levels": thirds, "counts": (63, 126, 252)}),
    "sa_solver, tau 0": (2, {"tau": 0.0, "predictor_order": 2, "corrector_order": 0, "levels": careful_ends}),
    "sa_solver, tau 0, 2 and 3": (3, {"tau": 0.0, "predictor_order": 2, "corrector_order": 3, "levels": careful_ends}),
    "res_multistep": (2, {}),
    "res_multistep of a flow": (2, {"flow": True}),
    "res_multistep_ancestral, eta 0": (2, {"eta": 0.0}),
    "seeds_2, eta 0": (2, {"eta": 0.0}),
    "seeds_2, eta 0, r 1, phi_2": (2, {"eta": 0.0, "r": 1.0, "solver_type": "phi_2"}),
    "seeds_3, eta 0": (3, {"eta": 0.0}),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case, record_property):
    expected, options = ORDERS[case]
    found = order(case.replace(",", " ").split()[0], **options)
    record_property("order", float(found))
    assert expected - 0.15 < found < expected + 0.4, found


def test_third_order_step_is_exact_for_a_quadratic_estimate():
    """dx/dlambda = d(lambda) - x with d quadratic in lambda = -ln sigma; likewise the mean of the SDE, rate 1 + eta."""
    levels = np.array([9.0, 5.0, 2.2, 1.4, 0.5])
    quadratic = np.poly1d([0.3, -0.7, 1.1])
    for eta in (0.0, 1.0, 0.4):
        trace, rate = [], 1 + eta
        made = plan(
            "dpmpp_3m_sde",
            schedule="edm",
            sigmas=levels,
            prediction="denoised",
            start="latent",
            eta=eta,
            s_noise=0.0,
            curvature=2.0,
        )
        end = run(
            made,
            lambda seen, s, _: np.full_like(seen, quadratic(-math.log(s))),
            Noises(batch=1, size=1),
            start=np.ones((1, 1)),
            trace=trace,
        )
        points = [base.item() for _, base, *_ in trace] + [end.item()]
        particular = quadratic - quadratic.deriv() / rate + quadratic.deriv(2) / rate**2  # solves x' = rate (d - x)
        for i in (2, 3):  # the steps with two estimates before them
            a, b = -math.log(levels[i]), -math.log(levels[i + 1])
            exact = particular(b) + (points[i] - particular(a)) * math.exp(-rate * (b - a))
            assert abs(points[i + 1] - exact) < 1e-12


# ---- the law of samples: with a Gaussian's denoiser everything is linear, so that it can be had exactly


class Impulses(dict):
    """Each noise is 1 in a sample of its own and 0 in all others; the first sample has no noise at all."""

    def __init__(self, count):
        super().__init__()
        self.shape = (count, 3)

    def __missing__(self, address):
        self[address] = np.zeros(self.shape)
        self[address][len(self)] = 1.0
        return self[address]


def law(name, steps, **options):
    """Mean and variance of what a sampler draws, from the exact law at HIGH."""
    count = 3 * steps + 3
    made = plan(
        name,
        schedule=EDM(),
        sigmas=np.geomspace(HIGH, LOW, steps + 1),
        prediction="denoised",
        start="latent",
        **options,
    )
    start = np.tile(MEAN, (count, 1))
    start[-1] += np.sqrt(VARIANCE + HIGH**2)  # the deviation at the start is one more independent normal
    ends = run(made, lambda seen, s, _: gaussian(seen, s), Impulses(count), start=start)
    return ends[0], ((ends - ends[0]) ** 2).sum(0)


WEAK_ORDERS = {
    "euler_ancestral": 1,
    "ddim, eta 0.5": 1,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
    "heun, s_churn 4": 2,
    "dpm_2_ancestral": 2,
    "res_multistep_ancestral": 2,
    "seeds_2": 2,
    "seeds_3": 1,
    "sa_solver": 2,
    "sa_solver, tau 0.6": 2,
    "er_sde": 2,
}


@pytest.mark.parametrize("case", WEAK_ORDERS)
def test_law_converges(case, record_property):
    """At LOW the law must become N(mu, C + LOW^2): its mean is exact, its variance at the sampler's order."""
    name, *option = case.replace(",", " ").split()
    options = {option[0]: float(option[1])} if option else {}
    counts, errors = (12, 24, 48), []
    for steps in counts:
        mean, variance = law(name, steps, **options)
        assert np.abs(mean - MEAN).max() < 1e-12
        errors.append(np.abs(variance / (VARIANCE + LOW**2) - 1).max())
    found = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    record_property("weak order", float(found))
    record_property("error of the variance at 48 steps", float(errors[-1]))
    assert found > WEAK_ORDERS[case] - 0.25, (found, errors)


# ---- and by drawing, in two correlated dimensions

CENTRE = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.0, 0.45], [0.45, 0.4]])
SAMPLES = 20_000


def correlated(x, sigma):
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + sigma**2 * np.eye(2))
    return (CENTRE + (x.reshape(-1, 2) - CENTRE) @ gain.T).reshape(x.shape)


LAWS = {
    "euler_ancestral": 250,
    "euler_ancestral, eta 0.5": 250,
    "ddpm": 250,
    "ddim, eta 0.8": 250,
    "dpmpp_2s_ancestral": 80,
    "dpmpp_2m_sde": 80,
    "dpmpp_2m_sde, eta 0.5": 80,
    "dpmpp_3m_sde": 80,
    "dpmpp_sde": 80,
    "heun, s_churn 20": 60,
    "euler, s_churn 2": 250,
}


@pytest.mark.parametrize("case", LAWS)
def test_samples_have_the_right_mean_and_covariance(case, record_property):
    """At the end of the run the law must be N(mu, C) within the discretisation's bias and 4 standard errors."""
    name, *option = case.replace(",", " ").split()
    options = {option[0]: float(option[1])} if option else {}
    made = plan(name, schedule=EDM(0.01, 60), steps=LAWS[case], prediction="denoised", **options)
    end = run(made, lambda seen, s, _: correlated(seen, s), Noises(seed=11, batch=1, size=2 * SAMPLES))
    points = end.reshape(-1, 2)
    mean, covariance = points.mean(0), np.cov(points.T)
    spread = np.sqrt(np.diag(COVARIANCE))
    deviation = np.abs(mean - CENTRE) / spread
    bias = np.abs(covariance - COVARIANCE) / np.outer(spread, spread)
    record_property("mean", float(deviation.max()))
    record_property("covariance", float(bias.max()))
    assert deviation.max() < 4 / math.sqrt(SAMPLES) + 0.005
    assert bias.max() < 4 * math.sqrt(2 / SAMPLES) + 0.015


def test_init_noise_has_the_level_of_the_prior():
    for schedule, spread in ((EDM(), 80.0), ("scaled_linear", 1.0), ("flow", 1.0)):
        first = plan("euler", schedule=schedule, steps=4).rows[0]
        assert first.y[0] == {Noise("init", 0): pytest.approx(spread, rel=1e-9)} and not first.calls_model
