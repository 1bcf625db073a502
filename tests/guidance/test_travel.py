"""Steps taken several times: what the rows do, what becomes of the distribution, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
from guidance.cases import edm

import fastdiff as fd
from fastdiff import guidance


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}])
@pytest.mark.parametrize("prediction", ["denoised", "edm", "epsilon"])
def test_time_travel_returns_to_the_level(prediction, options):
    """For data N(0, 1) the base has variance 1 + sigma^2 at every level; after the way back, again."""
    schedule = {"schedule": "linear", "time": "sigma"} if prediction == "epsilon" else {"schedule": "edm"}
    plan = fd.plan("ddim", prediction=prediction, sigmas=[9.0, 3.0, 1.0, 0.3, 0.0], **schedule, **options)
    back = guidance.time_travel(plan, 3)
    assert back.evaluations == 3 * plan.evaluations and len(back) == 1 + 3 * 4
    variance = {0: 1 + plan.sigmas_next[0] ** 2}
    draws = set()
    for r, row in enumerate(back.rows[1:], 1):
        unit = back.input_scales[r] if back.model_input == "x" else back.base_scales[r - 1]
        terms = dict(row.y[0])
        # x and d = x / (1 + sigma^2), both in the same direction
        gain = terms.get("x", 0) * unit + terms["d"] / (1 + row.sigma**2)
        drawn = [(s, c) for s, c in terms.items() if isinstance(s, fd.samplers.stage.Noise)]
        assert not draws & {s for s, _ in drawn}
        draws |= {s for s, _ in drawn}
        variance[r] = (gain**2 * variance[r - 1] + sum(c**2 for _, c in drawn)) / row.base_scale**2
        if row.sigma_next == row.sigma:  # what came back is what came, plus the step's own error
            step_variance = plan_variance(plan, row, variance[r - 1])
            expected = step_variance + row.sigma**2 - next_level(plan, row) ** 2
            assert variance[r] == pytest.approx(expected)
    assert [s for s, t in pairwise(back.sigmas[1:]) if s != t] == list(plan.sigmas[1:-1])
    assert back.sigmas_next[-1] == 0 and np.array_equal(back.steps[1:], np.repeat(plan.steps[1:], 3))


def plan_row(plan, row):
    return next(r for r, other in enumerate(plan.rows) if other.calls_model and other.sigma == row.sigma)


def next_level(plan, row):
    return plan.sigmas_next[plan_row(plan, row)]


def plan_variance(plan, row, variance):
    """Of x' in VE coordinates, after the plan's own step from a base of this variance (in VE coordinates)."""
    r = plan_row(plan, row)
    unit = plan.input_scales[r] if plan.model_input == "x" else plan.base_scales[r - 1]
    step = plan.rows[r]
    terms = step.y[0]
    gain = (terms.get("x", 0) * unit + terms["d"] / (1 + step.sigma**2)) / step.base_scale
    noise = sum(c**2 for s, c in terms.items() if not isinstance(s, str)) / step.base_scale**2
    return gain**2 * variance + noise


def test_time_travel_keeps_the_distribution():
    """The exact denoiser of N(0, 1), DDPM's noise: recurrences leave N(0, 1) what it is, and draw other numbers."""

    def gaussian(x, sigma):
        return x / (1 + sigma[:, None] ** 2)

    plan = fd.plan("ddim", schedule="edm", prediction="denoised", steps=60, eta=1.0)
    x = fd.sample(gaussian, guidance.time_travel(plan, 2, (0.05, 10.0)), (4000, 2), 0)
    plain = fd.sample(gaussian, plan, (4000, 2), 0)
    assert abs(float(x.mean())) < 4.5 / math.sqrt(8000)
    assert abs(float(x.square().mean()) - float(plain.square().mean())) < 4.5 * math.sqrt(4 / 8000)
    assert abs(float((x * plain).mean())) < 0.8


def test_time_travel_once_is_the_plan():
    plan = edm()
    assert guidance.time_travel(plan, 1) is plan
    assert guidance.time_travel(plan, 2).info["recurrences"] == 2
    assert fd.Plan.from_json(guidance.time_travel(plan, 2).to_json()) == guidance.time_travel(plan, 2)


REFUSED_PLANS = {
    "history": (lambda: edm("dpmpp_2m"), ["dpmpp_2m", "earlier estimates", "euler, euler_ancestral, ddim, ddpm"]),
    "two stages": (lambda: edm("heun"), ["heun", "several", "euler"]),
    "two stages below the first": (lambda: edm("dpm_2"), ["dpm_2", "several", "euler"]),
    "inpainting": (lambda: edm(inpaint="x"), ["inpaint"]),
    "twice": (lambda: guidance.time_travel(edm(), 2), ["sigma 20", "already", "once"]),
    "carry": (lambda: edm("dpmpp_2s_ancestral").with_model_dtype("float16"), ["dpmpp_2s_ancestral"]),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_time_travel_refuses(case):
    make, words = REFUSED_PLANS[case]
    with pytest.raises(ValueError) as error:
        guidance.time_travel(make(), 2)
    for word in words:
        assert word in str(error.value)
