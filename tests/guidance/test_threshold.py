"""Dynamic thresholding as an action: against its formula in float64, against diffusers, in runs, and what is refused."""

import math

import pytest
import torch
from counter.emulated import LAUNCHES, Gpu
from guidance.cases import same
from guidance.papers import PREDICTIONS, SHAPE, cfg, conditional, estimates, flat, near, pair, plan_of, rescaled
from steering.concepts import Made
from steering.networks import directions, randomised

import fastdiff as fd
from fastdiff.guidance import apg, cfg_pp, cfg_rescale, dynamic_threshold
from fastdiff.steering.inject import Injection

W = 3.0


def thresholded(d, ratio=0.9, maximum=math.inf):
    """diffusers' _threshold_sample: the quantile, limited to 1 and the maximum, then clipped to and divided by."""
    s = torch.quantile(d.abs().flatten(1), ratio, dim=1).clamp(1, maximum)
    return torch.maximum(torch.minimum(d, flat(s)), -flat(s)) / flat(s)


def scaled(x, time):
    """An output whose estimates reach beyond 1."""
    return 3 * conditional(x, time)


def reference(prediction, rule=thresholded, model=scaled, combine=lambda out: out):
    """The model of a plan of estimates ("denoised") that does to them what the action does."""

    def estimate(x, time):
        outputs = model(x.double(), time)
        out = combine(*outputs) if isinstance(outputs, tuple) else combine(outputs)
        return rule(estimates(prediction, float(time[0]), x.double(), out)[2]).float()

    return estimate


def plans(prediction, name, **options):
    """The plan, and that of a model which returns estimates, at the same levels in the same coordinates."""
    plan = plan_of(prediction, name, None, **options)
    same_coordinates = {**options, **({"vp_input": False} if prediction == "edm" else {})}
    schedule = PREDICTIONS[prediction]
    time = {"time": "t"} if schedule == "flow" else {"time": "sigma", **({"sigma_max": 20.0} if schedule == "edm" else {})}
    return plan, fd.plan(name, schedule=schedule, prediction="denoised", **{**time, "steps": 5, **same_coordinates})


@pytest.mark.parametrize("prediction, name", [("denoised", "euler"), ("v", "ddim"), ("v", "heun"), ("flow", "dpmpp_2m"),
                                              ("v", "dpmpp_2m_sde"), ("denoised", "dpm_2"), ("v", "dpmpp_2s_ancestral"),
                                              ("denoised", "unipc")])
@pytest.mark.parametrize("ratio, maximum", [(0.9, None), (0.95, 1.5), (1.0, None), (0.5, 1.0)])
def test_formula(prediction, name, ratio, maximum):
    plan, of_estimates = plans(prediction, name)
    rule = lambda d: thresholded(d, ratio, maximum or math.inf)  # noqa: E731
    wanted = fd.sample(reference(prediction, rule), of_estimates, SHAPE, 0)
    near(fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(ratio, maximum)]), wanted, 2e-5)
    assert (fd.sample(scaled, plan, SHAPE, 0) - wanted).abs().max() > 0.01


def test_the_estimates_are_diffusers_in_every_bit():
    """One call: the picture is the estimate. 1 / s is rounded once and multiplied, so that a last bit may differ."""
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = scheduling.DDIMScheduler(dynamic_thresholding_ratio=0.9, sample_max_value=1.7, thresholding=True)
    plan = fd.plan("euler", schedule="edm", prediction="denoised", sigmas=[20.0, 0.0], time="sigma")
    got = fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9, 1.7)])
    wanted = scheduler._threshold_sample(fd.sample(scaled, plan, SHAPE, 0))
    torch.testing.assert_close(got, wanted, rtol=2**-23, atol=0)


def test_slopes_are_of_thresholded_estimates_where_the_plan_keeps_estimates():
    for name in ("lms", "deis", "ipndm"):
        plan, of_estimates = plans("denoised", name, clip_denoised=(-1.0, 1.0))
        wanted = fd.sample(reference("denoised"), of_estimates, SHAPE, 0)
        near(fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9)]), wanted)


def test_after_guidance_and_its_factors():
    plan, of_estimates = plans("v", "ddim")

    def big(x, time):
        return tuple(3 * out for out in pair(x, time))

    for steering, combine in (([], lambda c, u: cfg(W, c, u)), ([cfg_rescale(0.7)], lambda c, u: rescaled(0.7, cfg(W, c, u), c))):
        wanted = fd.sample(reference("v", model=big, combine=combine), of_estimates, SHAPE, 0)
        near(fd.sample(big, plan.with_guidance(W), SHAPE, 0, steering=[*steering, dynamic_threshold(0.9)]), wanted, 2e-5)
    got = fd.sample(big, plan.with_guidance(W), SHAPE, 0, steering=[apg(1.0, 0.2, -0.5), dynamic_threshold(0.9)])
    assert got.abs().max() <= 1


def test_after_cfg_pp():
    """The estimate is thresholded, the unconditional noise is not."""
    plan, x = plan_of("denoised", "euler", W, steps=4), None
    shown = []
    got = fd.sample(lambda x, t: shown.append(x.clone()) or tuple(3 * out for out in pair(x, t)), plan, SHAPE, 0,
                    steering=[cfg_pp(), dynamic_threshold(0.9)])
    sigmas = plan.sigmas[plan.calls_model].tolist()
    x = shown[0].double()
    for s, s_next in zip(sigmas, [*sigmas[1:], 0.0]):
        c, u = (3 * out for out in pair(x, torch.full((len(x),), s, dtype=torch.float64)))
        x = thresholded(cfg(W, c, u)) + s_next / s * (x - u)
    near(got, x)


def test_a_window_and_previews():
    plan, shown = plan_of("denoised", "euler", None, steps=6), []
    levels = plan.sigmas[plan.calls_model]
    window = float(levels[3]), float(levels[1])
    fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9, window=window)],
              callback=lambda p: shown.append(float(p.denoised.abs().max())))
    assert [largest <= 1 for largest in shown] == [False, True, True, True, False, False]


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_samples_do_not_know_their_neighbours(name, dtype):
    plan = plan_of("v", name, None)
    whole = fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9)], dtype=dtype)
    for size in (1, 3, 6):
        assert same(fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9)], batch_size=size, dtype=dtype), whole)
    exact = fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9)])
    near(whole, exact, 1e-6 + 8 * torch.finfo(dtype).eps * (dtype != torch.float32))


def test_no_effect_where_nothing_is_beyond_one():
    """s is 1 then, and the estimate is that of the row, rounded to float32 once."""
    plan = plan_of("denoised", "euler", None)
    small = lambda x, t: 0.5 * conditional(x, t)  # noqa: E731
    assert same(fd.sample(small, plan, SHAPE, 0, steering=[dynamic_threshold(0.5)]), fd.sample(small, plan, SHAPE, 0))


def test_vectors_of_the_bank_are_added_after():
    push = fd.steering.LatentVector(torch.ones(1, *SHAPE[1:])).at(0.3)
    plan = fd.plan("euler", schedule="edm", prediction="denoised", sigmas=[20.0, 0.0], time="sigma")
    alone = fd.sample(scaled, plan, SHAPE, 0, steering=[dynamic_threshold(0.9)])
    for steering in ([push, dynamic_threshold(0.9)], [dynamic_threshold(0.9), push]):
        near(fd.sample(scaled, plan, SHAPE, 0, steering=steering), alone + 0.3)


def test_a_nan_is_reported():
    with pytest.raises(FloatingPointError, match="step 0"):
        fd.sample(lambda x, t: x * torch.nan, plan_of(w=None), SHAPE, 0, steering=[dynamic_threshold()])


def test_launches():
    """The estimate, its quantile, its bounds, the row; no copy and no wait."""
    with Gpu(latent=math.prod(SHAPE[1:])) as gpu:
        counted = []

        def watched(x, time):
            counted.append(gpu.take())
            out = scaled(x.inner, time.inner).to("cuda")
            gpu.take()
            return out

        got = fd.sample(watched, plan_of("v", "euler", None), SHAPE, 0, steering=[dynamic_threshold(0.9)], device="cuda")
    assert same(got.inner, fd.sample(scaled, plan_of("v", "euler", None), SHAPE, 0, steering=[dynamic_threshold(0.9)]))
    for counts in counted[1:]:
        assert counts.ops["fastdiff.step_"] == 3 and counts.ops["fastdiff.quantile_"] == LAUNCHES["fastdiff.quantile_"]
        assert counts.big == 3 + LAUNCHES["fastdiff.quantile_"] and counts.small == 1  # all factors 1
        assert (counts.reads, counts.copies, counts.waits) == (0, 0, 0)


# ---- refusals


def minus_square(x0, y):
    return -x0.square().flatten(1).sum(1)


def gradients():
    return fd.guidance.mpgd(minus_square, None, 0.1)


def concept():
    layers = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 2, 3, padding=1)
    network = randomised(torch.nn.Sequential(*layers))
    return Injection(Made(directions((4, 6, 5), 1, 0)[0], "0"), 0.3, 3.0, network=network)


REFUSED = {
    "ratio above 1": (lambda: [dynamic_threshold(1.5)], {}, ["ratio is 1.5", "from 0 to 1"]),
    "ratio NaN": (lambda: [dynamic_threshold(math.nan)], {}, ["ratio is nan"]),
    "ratio by sample": (lambda: [dynamic_threshold([0.9] * 4)], {}, ["ratio", "a number"]),
    "maximum below 1": (lambda: [dynamic_threshold(0.9, 0.5)], {}, ["maximum is 0.5", "1 or more"]),
    "twice": (lambda: [dynamic_threshold(), dynamic_threshold()], {}, ["twice"]),
    "a window that holds nothing": (lambda: [dynamic_threshold(window=(30, 40))], {}, ["(30, 40)"]),
    "slopes": (lambda: [dynamic_threshold()], {"name": "lms"}, ["'lms'", "slopes", "clip_denoised"]),
    "before factors": (lambda: [dynamic_threshold(), cfg_rescale()], {"w": 2.0}, ["dynamic_threshold stands before", "after"]),
    "before cfg_pp": (lambda: [dynamic_threshold(), cfg_pp()], {"w": 2.0}, ["dynamic_threshold stands before cfg_pp"]),
    "before recurrences": (lambda: [dynamic_threshold(), fd.guidance.freedom(minus_square, None, 0.1, n_recur=2)], {},
                           ["first in steering"]),
    "before gradients": (lambda: [dynamic_threshold(), gradients()], {}, ["adds to the estimate", "before"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(case):
    make, options, words = REFUSED[case]
    calls = []

    def model(x, time):
        calls.append(1)
        return pair(x, time) if "w" in options else conditional(x, time)

    with pytest.raises(ValueError) as error:
        fd.sample(model, plan_of(**{"w": None, **options}), SHAPE, 0, steering=make())
    assert not calls
    for word in words:
        assert word in str(error.value), error.value


def test_a_concept_before_it_is_thresholded():
    action = concept()
    network = action.network

    def model(x, time):
        return 3 * network(x / (1 + x.abs()))

    got = fd.sample(model, plan_of(w=None), SHAPE, 0, steering=[action, dynamic_threshold(0.9)])
    assert got.abs().max() <= 1
    assert not same(got, fd.sample(model, plan_of(w=None), SHAPE, 0, steering=[dynamic_threshold(0.9)]))


def test_a_second_output_after_it_is_refused():
    amplified = concept()
    amplified = type(amplified)(amplified.concept, amplified.weight, scale=2.0, network=amplified.network)
    with pytest.raises(ValueError, match="brings guidance by a second output"):
        fd.sample(conditional, plan_of(w=None), SHAPE, 0, steering=[dynamic_threshold(0.9), amplified])
