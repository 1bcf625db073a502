"""Wrong input to schedules, grids and plans: refused before any work, saying what was given and what is taken."""

import dataclasses
import math

import numpy as np
import pytest

from fastdiff.plan import Plan, Row, plan
from fastdiff.samplers import register
from fastdiff.samplers.stage import Noise, Stage, d, past, past_base, x
from fastdiff.schedules import EDM, VP, Flow, schedule

ROW = Row({"x": 1.0, "out": -1.0}, ({"x": 0.5, "d": 0.5},), sigma=1.0)
FIRST = Row({}, ({Noise("init", 0): 1.0},), calls_model=False)


def euler(**options):
    return plan("euler", **{"schedule": "edm", "steps": 4, **options})


def from_rows(*rows, **options):
    return Plan.from_rows(rows or [FIRST, ROW], **options)


def changed(**fields):
    return dataclasses.replace(from_rows(), **fields)


def sampler_of(*stages):
    return lambda sigmas: iter(stages)


# what: (call, exception, what the message must hold)
CASES = {
    "a sampler that nobody knows": (
        lambda: plan("dpm++2m", schedule="edm", steps=4),
        ValueError,
        ["dpm++2m", "dpmpp_2m", "euler"],
    ),
    "a sampler in capitals": (
        lambda: plan("Euler", schedule="edm", steps=4),
        ValueError,
        ["Euler", "did you mean 'euler'"],
    ),
    "a schedule that nobody knows": (
        lambda: euler(schedule="scaledlinear"),
        ValueError,
        ["scaledlinear", "did you mean 'scaled_linear'"],
    ),
    "a schedule that is a number": (lambda: euler(schedule=3), TypeError, ["3", "scaled_linear", "Schedule"]),
    "no schedule": (lambda: plan("euler", steps=4), TypeError, ["schedule", "scaled_linear"]),
    "a grid that nobody knows": (lambda: euler(grid="kerras"), ValueError, ["kerras", "did you mean 'karras'"]),
    "a prediction that nobody knows": (
        lambda: euler(prediction="epsilonn"),
        ValueError,
        ["epsilonn", "did you mean 'epsilon'"],
    ),
    "a time that the schedule lacks": (lambda: euler(time="timestep"), ValueError, ["timestep", "sigma", "c_noise"]),
    "an option that nobody knows": (lambda: euler(s_chrun=1.0), TypeError, ["s_chrun", "did you mean 's_churn'"]),
    "a grid's option with sigmas": (
        lambda: euler(steps=None, sigmas=[1.0, 0.0], rho=7.0),
        TypeError,
        ["rho", "sigmas"],
    ),
    "steps 0": (lambda: euler(steps=0), ValueError, ["0", "1 or more"]),
    "steps -3": (lambda: euler(steps=-3), ValueError, ["-3", "1 or more"]),
    "steps 2.5": (lambda: euler(steps=2.5), ValueError, ["2.5", "int"]),
    "steps True": (lambda: euler(steps=True), ValueError, ["True", "int"]),
    "more steps than timesteps": (lambda: euler(schedule="linear", steps=1001), ValueError, ["1001", "1000"]),
    "neither steps nor sigmas": (lambda: euler(steps=None), TypeError, ["none", "steps", "sigmas", "timesteps"]),
    "steps and sigmas": (lambda: euler(sigmas=[1.0, 0.0]), TypeError, ["steps and sigmas", "timesteps"]),
    "a negative sigma": (lambda: euler(steps=None, sigmas=[2.0, 1.0, -0.5]), ValueError, ["sigmas[2]", "-0.5", ">= 0"]),
    "sigmas with NaN": (
        lambda: euler(steps=None, sigmas=[2.0, math.nan, 0.0]),
        ValueError,
        ["sigmas[1]", "nan", "finite"],
    ),
    "sigmas with infinity": (
        lambda: euler(steps=None, sigmas=[math.inf, 1.0, 0.0]),
        ValueError,
        ["sigmas[0]", "inf", "finite"],
    ),
    "sigmas that rise": (
        lambda: euler(steps=None, sigmas=[2.0, 1.0, 1.5, 0.0]),
        ValueError,
        ["sigmas[1] = 1.0", "1.5", "decreasing"],
    ),
    "sigmas that repeat": (lambda: euler(steps=None, sigmas=[2.0, 2.0, 0.0]), ValueError, ["2.0", "decreasing"]),
    "one sigma": (lambda: euler(steps=None, sigmas=[1.0]), ValueError, ["(1,)", "at least 2"]),
    "sigmas in two dimensions": (
        lambda: euler(steps=None, sigmas=[[2.0, 1.0]]),
        ValueError,
        ["(1, 2)", "(steps + 1,)"],
    ),
    "a timestep past the table": (
        lambda: euler(schedule="linear", steps=None, timesteps=[1000, 10]),
        ValueError,
        ["1000", "0 to 999"],
    ),
    "a flow time above 1": (lambda: Flow().sigma_ve(1.2), ValueError, ["1.2", "0 to 1"]),
    "sigma_min above sigma_max": (lambda: EDM(5.0, 1.0), ValueError, ["5.0", "1.0", "sigma_min < sigma_max"]),
    "sigma_min 0": (lambda: EDM(0.0, 1.0), ValueError, ["0.0", "0 < sigma_min"]),
    "sigma_data 0": (lambda: EDM(sigma_data=0), ValueError, ["sigma_data", "0", "> 0"]),
    "betas of 2": (lambda: VP(np.array([0.1, 2.0])), ValueError, ["2.0", "beta <= 1"]),
    "beta_start above beta_end": (lambda: VP.linear(0.02, 0.01), ValueError, ["0.02", "0.01", "beta_start < beta_end"]),
    "timesteps 1": (lambda: VP.linear(timesteps=1), ValueError, ["1", "2 or more"]),
    "shift 0": (lambda: Flow(0.0), ValueError, ["shift", "0.0", "> 0"]),
    "options beside a Schedule": (lambda: schedule(EDM(), sigma_max=1.0), TypeError, ["sigma_max", "EDM"]),
    "a uniform grid of a VP schedule": (
        lambda: euler(schedule="linear", grid="uniform"),
        ValueError,
        ["uniform", "flow", "linear"],
    ),
    "a karras grid from pure noise": (
        lambda: euler(schedule="flow", grid="karras"),
        ValueError,
        ["1e+12", "sigma_max", "999"],
    ),
    "an end that nobody knows": (lambda: euler(final="nought"), ValueError, ["nought", "zero", "sigma_min"]),
    "flow_euler on VP": (
        lambda: plan("flow_euler", schedule="linear", steps=4),
        ValueError,
        ["flow_euler", "linear", "euler takes any"],
    ),
    "fixed_large on EDM": (
        lambda: plan("ddpm", schedule="edm", steps=4, variance="fixed_large"),
        ValueError,
        ["fixed_large", "VP", "EDM"],
    ),
    "a variance that nobody knows": (
        lambda: plan("ddpm", schedule="linear", steps=4, variance="learned"),
        ValueError,
        ["learned", "fixed_small"],
    ),
    "a solver type that nobody knows": (
        lambda: plan("dpmpp_2m", schedule="edm", steps=4, solver_type="hune"),
        ValueError,
        ["hune", "did you mean 'heun'"],
    ),
    "r 0": (lambda: plan("dpmpp_sde", schedule="edm", steps=4, r=0.0), ValueError, ["r is 0.0", "0 < r <= 1"]),
    "lms of order 5": (
        lambda: plan("lms", schedule="edm", steps=4, order=5), ValueError,
        ["order of lms is 5", "1, 2, 3, 4", "nearest: 4"],
    ),
    "lms of an order in words": (lambda: plan("lms", schedule="edm", steps=4, order="2"), ValueError, ["'2'", "1, 2, 3, 4"]),
    "lms of order 2.0": (lambda: plan("lms", schedule="edm", steps=4, order=2.0), ValueError, ["2.0", "nearest: 2"]),
    "deis of order 4": (
        lambda: plan("deis", schedule="edm", steps=4, order=4), ValueError,
        ["deis is 4", "1, 2, 3", "nearest: 3"],
    ),
    "unipc, misspelt": (lambda: plan("uni_pc", schedule="edm", steps=4), ValueError, ["uni_pc", "did you mean 'unipc'"]),
    "unipc of order 0": (lambda: plan("unipc", schedule="edm", steps=4, order=0), ValueError, ["unipc is 0", "nearest: 1"]),
    "unipc with bh3": (lambda: plan("unipc", schedule="edm", steps=4, solver_type="bh3"), ValueError, ["bh3", "bh1", "bh2"]),
    "singlestep of order 1": (
        lambda: plan("dpmpp_singlestep", schedule="edm", steps=4, order=1), ValueError, ["dpmpp_singlestep is 1", "2, 3"]),
    "an algorithm that nobody knows": (
        lambda: plan("dpmpp_singlestep", schedule="edm", steps=4, algorithm="dpmsolver+"), ValueError,
        ["dpmsolver+", "dpmsolver++"],
    ),
    "sa_solver's predictor of order 4": (
        lambda: plan("sa_solver", schedule="edm", steps=4, predictor_order=4), ValueError,
        ["predictor_order", "4", "nearest: 3"],
    ),
    "sa_solver's corrector of order 5": (
        lambda: plan("sa_solver", schedule="edm", steps=4, corrector_order=5), ValueError,
        ["corrector_order", "0, 1, 2, 3, 4"],
    ),
    "a Runge-Kutta start of 3 steps": (
        lambda: plan("pndm", schedule="linear", steps=3, skip_prk=False), ValueError, ["4 steps or more", "given 3"]),
    "skip_prk in words": (
        lambda: plan("pndm", schedule="linear", steps=5, skip_prk="no"), TypeError,
        ["'no'", "True or False"],
    ),
    "dpm_fast with one level": (
        lambda: plan("dpm_fast", schedule="edm", steps=1), ValueError,
        ["dpm_fast", "2 levels", "given 1"],
    ),
    "er_sde of order 4": (lambda: plan("er_sde", schedule="edm", steps=4, order=4), ValueError, ["er_sde is 4", "1, 2, 3"]),
    "er_sde with no points": (
        lambda: plan("er_sde", schedule="edm", steps=4, points=0), ValueError,
        ["points is 0", "1 or more"],
    ),
    "seeds_2 with r of 1.5": (lambda: plan("seeds_2", schedule="edm", steps=4, r=1.5), ValueError, ["r is 1.5", "0 < r <= 1"]),
    "seeds_3 with its places turned": (
        lambda: plan("seeds_3", schedule="edm", steps=4, r_1=0.7, r_2=0.3), ValueError, ["r_1 is 0.7", "r_1 < r_2"]),
    "seeds_2 with phi_3": (
        lambda: plan("seeds_2", schedule="edm", steps=4, solver_type="phi_3"), ValueError,
        ["phi_3", "phi_2"],
    ),
    "tcd with eta 1.2": (lambda: plan("tcd", schedule="linear", steps=4, eta=1.2), ValueError, ["eta of tcd is 1.2", "<= 1"]),
    "consistency below 0": (
        lambda: plan("consistency", schedule=EDM(), sigmas=[2.0, 1.0, 0.0], sigma_min=-0.1), ValueError,
        ["sigma_min is -0.1", ">= 0"],
    ),
    "deis in rho": (
        lambda: plan("deis", schedule="edm", steps=4, variable="rho"), ValueError,
        ["rho", "did you mean 'log_rho'"],
    ),
    "pece in words": (lambda: plan("sa_solver", schedule="edm", steps=4, pece="yes"), TypeError, ["'yes'", "True or False"]),
    "a negative tau": (lambda: plan("sa_solver", schedule="edm", steps=4, tau=-1.0), ValueError, ["tau is -1.0", "0 or more"]),
    "the base from before the start": (
        lambda: euler_like(Stage(1.0, past_base(2), 0.0)), ValueError, ["base of 2 calls ago", "0 came"]),
    "epsilon from pure noise": (
        lambda: euler(schedule="flow", prediction="epsilon"),
        ValueError,
        ["epsilon", "alpha = 0", "'flow'"],
    ),
    "a start that nobody knows": (lambda: euler(start="img"), ValueError, ["img", "image"]),
    "strength 0": (lambda: euler(start="image", strength=0.0), ValueError, ["strength is 0.0", "0 < strength <= 1"]),
    "strength from noise": (lambda: euler(strength=0.5), ValueError, ["0.5", "start='image'", "start='noise'"]),
    "a prior that nobody knows": (lambda: euler(prior="one"), ValueError, ["one", "unit", "sigma"]),
    "inpainting of nothing": (lambda: euler(inpaint="y"), ValueError, ["y", "d", "x"]),
    "clip upside down": (lambda: euler(clip_denoised=(1.0, -1.0)), ValueError, ["(1.0, -1.0)", "low < high"]),
    "no rows": (lambda: Plan.from_rows([]), ValueError, ["0", "at least one row"]),
    "an infinite coefficient": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, d={"x": math.inf})),
        ValueError,
        ["row 1", "inf", "finite"],
    ),
    "a coefficient past float32": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, d={"x": 1e39})),
        ValueError,
        ["row 1", "1e+39", "float32"],
    ),
    "a slot that is not there": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, d={"z": 1.0})),
        ValueError,
        ["row 1", "z", "x, out"],
    ),
    "two outputs in a plan of one": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, y=ROW.y * 2)),
        ValueError,
        ["row 1", "2 outputs", "1"],
    ),
    "a ring slot outside": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, keep=1), ring=1),
        ValueError,
        ["row 1", "slot 1", "-1 to 0"],
    ),
    "history before it is there": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, d={"ring0": 1.0}), ring=1),
        ValueError,
        ["row 1", "ring0", "before"],
    ),
    "the output of a model not called": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, calls_model=False)),
        ValueError,
        ["row 1", "out"],
    ),
    "13 inputs": (lambda: from_rows(ring=11), ValueError, ["13", "12"]),
    "4 outputs": (
        lambda: from_rows(dataclasses.replace(FIRST, y=({},) * 4), outputs=("x", "a", "b", "c")),
        ValueError,
        ["4 outputs", "3"],
    ),
    "17 noises": (
        lambda: from_rows(dataclasses.replace(FIRST, y=({Noise("init", i): 1.0 for i in range(17)},))),
        ValueError,
        ["17 noises", "16"],
    ),
    "17 vectors": (lambda: euler().with_bank(g=np.ones(17)), ValueError, ["17 bank", "16"]),
    "a name twice": (lambda: from_rows(inputs=("x", "out", "out")), ValueError, ["x, out, out", "once"]),
    "a stream that nobody knows": (
        lambda: from_rows(dataclasses.replace(FIRST, y=({Noise("stp", 0): 1.0},))),
        ValueError,
        ["stp", "did you mean 'step'"],
    ),
    "a mask of nothing": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, mask={"y1": (1.0, 0.0)})),
        ValueError,
        ["y1", "input:NAME", "y0"],
    ),
    "a noised mask without its noise": (
        lambda: from_rows(FIRST, dataclasses.replace(ROW, mask={"y0": (1.0, 0.5)})),
        ValueError,
        ["row 1", "k1 != 0", "mask_noise"],
    ),
    "a negative level": (lambda: changed(sigmas=[0.0, -1.0]), ValueError, ["sigmas[1]", "-1.0", ">= 0"]),
    "times of the wrong length": (lambda: changed(times=[0.0]), ValueError, ["times", "(1,)", "(2,)"]),
    "a model dtype of 64 bits": (lambda: euler().with_model_dtype("float64"), ValueError, ["float64", "bfloat16"]),
    "guidance twice": (lambda: euler().with_guidance(2.0).with_guidance(2.0), ValueError, ["uncond"]),
    "guidance of the wrong shape": (lambda: euler().with_guidance([1.0, 2.0]), ValueError, ["(2,)", "(5,)"]),
    "a bank of nothing": (lambda: euler().with_bank(), ValueError, ["g, h", "neither"]),
    "a bank of the wrong shape": (lambda: euler().with_bank(g=np.ones((3, 2))), ValueError, ["(3, 2)", "(5, 2)"]),
    "a window upside down": (lambda: euler().window(5.0, 1.0), ValueError, ["5.0", "1.0", "low <= high"]),
    "another program's JSON": (lambda: Plan.from_json('{"format": 7}'), ValueError, ["7", "format 2"]),
    "a JSON list": (lambda: Plan.from_json("[]"), ValueError, ["list", "format 2"]),
    "a stage at a negative level": (lambda: Stage(-1.0, x, 0.0), ValueError, ["sigma is -1.0", ">= 0"]),
    "an evaluation point without its level": (
        lambda: Stage(1.0, x, 0.0, d),
        ValueError,
        ["eval", "sigma_eval", "None"],
    ),
    "an estimate from before the start": (
        lambda: euler_like(Stage(1.0, past(2), 0.0)),
        ValueError,
        ["2 calls ago", "0 came"],
    ),
    "a sampler's name twice": (lambda: register("euler", sampler_of()), ValueError, ["euler", "already"]),
}


def euler_like(*stages):
    return plan(sampler_of(*stages), schedule="edm", sigmas=[1.0, 0.0])


@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_what_was_given_and_what_is_taken(case):
    call, exception, words = CASES[case]
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_a_plan_cannot_be_changed():
    made = euler()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "other"
    with pytest.raises(ValueError):
        made.coef[0, 0] = 1.0
