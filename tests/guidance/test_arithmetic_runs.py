"""Guidance arithmetic in runs: no effect, neighbours, windows, beside other actions, what it costs, what is refused."""

import pytest
import torch
from counter.emulated import Gpu
from guidance.cases import same
from guidance.papers import (
    ALL,
    METHODS,
    SHAPE,
    W,
    conditional,
    flat,
    model_of,
    near,
    pair,
    plan_of,
    reference,
    triple,
    unconditional,
    zero_star,
)
from steering.concepts import Made
from steering.networks import directions, randomised

import fastdiff as fd
from fastdiff.action import Acting
from fastdiff.guidance import classifier_free, dynamic_threshold
from fastdiff.guidance.arithmetic import apg, cfg_rescale, cfg_zero_star, perp_neg
from fastdiff.steering.inject import Injection, edited

# ---- no effect, no neighbours

NOTHING = {
    "rescale": (lambda: [cfg_rescale(0.0)], pair),
    "apg": (lambda: [apg(None, 1.0)], pair),
    "perp neg": (lambda: [perp_neg(0.0)], lambda x, t: (*pair(x, t), torch.full_like(x, torch.nan))),
}
SOME = {
    "rescale": (lambda: [cfg_rescale([0.0, 0.7, 0.0, 1.0])], pair),
    "apg": (lambda: [apg([1e6, 0.5, 1e6, 0.5], [1.0, 0.0, 1.0, 0.0])], pair),
    "perp neg": (lambda: [perp_neg([0.0, 1.0, 0.0, 0.5])], triple),
}


@pytest.mark.parametrize("prediction", ["denoised", "epsilon"])
@pytest.mark.parametrize("method", NOTHING)
def test_no_effect_changes_no_bit(method, prediction):
    steering, model = NOTHING[method]
    plan = plan_of(prediction, "dpmpp_2m")
    plain = fd.sample(pair, plan, SHAPE, 0)
    assert same(fd.sample(model, plan, SHAPE, 0, steering=steering()), plain)
    with fd.Actions(steering(), plan, SHAPE, model) as actions:
        assert not actions.bank  # and costs nothing
    steering, model = SOME[method]
    some = fd.sample(model, plan, SHAPE, 0, steering=steering())
    assert same(some[[0, 2]], plain[[0, 2]]) and not same(some[[1, 3]], plain[[1, 3]])


@pytest.mark.parametrize("method", ALL)
def test_samples_do_not_know_their_neighbours(method):
    model, plan = model_of(method), plan_of("flow", "heun")
    whole = fd.sample(model, plan, SHAPE, 0, steering=ALL[method]())
    for size in (1, 3, 6):  # again in the same tensors, and padded
        assert same(fd.sample(model, plan, SHAPE, 0, steering=ALL[method](), batch_size=size), whole)
    assert same(fd.sample(model, plan, SHAPE, [3, 2, 1, 0], steering=ALL[method]()).flip(0), whole)


@pytest.mark.parametrize("method", ALL)
def test_a_window_acts_in_it_only(method):
    model, plan = model_of(method), plan_of(steps=6)
    window = plan.sigmas[3], plan.sigmas[2]
    seen = {}
    steering = [type(action)(action.method, window, action.options) for action in ALL[method]()]
    for what, network, actions in (("plain", pair, []), ("guided", model, steering)):
        kept = seen[what] = []
        fd.sample(network, plan, SHAPE, 0, steering=actions, callback=lambda p, kept=kept: kept.append(p.x.clone()))
    assert same(seen["plain"][0], seen["guided"][0]) and not same(seen["plain"][1], seen["guided"][1])
    after = fd.plan("euler", schedule="edm", prediction="denoised", sigmas=[*plan.sigmas[4:], 0.0], start="latent")
    at = int(plan.calls_model[:4].sum()) - 1
    near(fd.sample(pair, after.with_guidance(W), SHAPE, 0, init=seen["guided"][at]), seen["guided"][-1])


# ---- together with what is there


@pytest.mark.parametrize("null", [None, 0])
@pytest.mark.parametrize("method", ["rescale", "zero star", "apg, momentum"])
def test_after_classifier_free(method, null):
    """The networks are two, and outside of its window one is called only."""
    plan = plan_of("flow", w=None)
    window = plan.sigmas[-2], plan.sigmas[2]

    def labelled(x, time, y):
        return torch.where(flat(y) == 1, conditional(x, time), unconditional(x, time))

    free = classifier_free(labelled, 1, W, window, null=null)
    got = fd.sample(unconditional, plan, SHAPE, 0, steering=[free, *ALL[method]()])
    guided = plan.with_guidance(lambda s: W if window[0] <= s <= window[1] else 1.0)
    assert same(got, fd.sample(pair, guided, SHAPE, 0, steering=ALL[method]()))
    assert not same(got, fd.sample(pair, guided, SHAPE, 0))


def test_beside_steering_and_bounds():
    """A vector in the bank, a lifted sum after the outputs, bounds, a mask and previews do not change the factors."""
    push = fd.steering.LatentVector(torch.ones(1, *SHAPE[1:]))
    data = fd.randn((50, *SHAPE[1:]), seeds=0)
    lifted = fd.steering.NoiseAlignment.fit({"a": data[:25] + 1}, data).at(0.5, (0.5, 80), how="lift")
    options = {"clip_denoised": (-1.5, 1.5), "inpaint": "x"}
    extra = {"known": torch.zeros(SHAPE), "mask": (torch.arange(5) < 3).float().view(1, 1, 1, 5), "callback": lambda p: None}
    combine = METHODS["rescale"][2]
    for actions in ([push.at(0.3)], [lifted], [push.at(0.3), lifted]):
        plan = plan_of(w=None, **{**options, "clip_denoised": None} if lifted in actions else options)
        expected = fd.sample(reference(combine), plan, SHAPE, 0, steering=actions, **extra)
        for steering in ([cfg_rescale(0.7), *actions], [*actions, cfg_rescale(0.7)]):
            near(fd.sample(pair, plan.with_guidance(W), SHAPE, 0, steering=steering, **extra), expected)


def test_beside_a_concept():
    """The factors are of the outputs with the concept in both."""
    layers = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 2, 3, padding=1)
    network = randomised(torch.nn.Sequential(*layers))
    concept = Made(directions((4, 6, 5), 1, 0)[0], "0")

    def two(x, time):
        return network(x / (1 + x.abs())), network(x / (2 + x.abs()))

    def amplified(x, time):
        base = two(x, time)
        with edited(network, concept.block, concept.direction, 0.3):
            steered = two(x, time)
        return tuple(b + 3.0 * (s - b) for b, s in zip(base, steered))

    injection = Injection(concept, 0.3, 3.0, network=network)
    got = fd.sample(two, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7), injection])
    assert same(got, fd.sample(amplified, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7)]))
    assert not same(got, fd.sample(two, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7)]))
    with pytest.raises(ValueError, match="a concept stands before"):
        fd.sample(two, plan_of(), SHAPE, 0, steering=[injection, cfg_rescale(0.7)])


class Edit(Acting):
    """Changes what the model returned, after all actions before it."""

    def __init__(self, setting):
        self.plan = setting.plan

    def outputs(self, run, evaluate):
        c, u = evaluate()
        return 2 * c, u


class Half(Acting):
    scales = True

    def __init__(self, setting):
        self.plan = setting.plan

    def factors(self, run, given, scale):
        scale["out"].mul_(0.5)


class Doing:
    def __init__(self, kind):
        self.begin = kind


def test_factors_are_of_what_the_row_reads_and_multiply():
    def doubled(x, time):
        return 2 * conditional(x, time), unconditional(x, time)

    expected = fd.sample(doubled, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7)])
    assert same(fd.sample(pair, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7), Doing(Edit)]), expected)
    assert not same(fd.sample(pair, plan_of(), SHAPE, 0, steering=[cfg_rescale(0.7)]), expected)
    half = fd.sample(doubled, plan_of(), SHAPE, 0, steering=[Doing(Half)])
    assert same(half, fd.sample(pair, plan_of(), SHAPE, 0))

    def fourfold(x, time):
        return 4 * conditional(x, time), unconditional(x, time)

    assert same(fd.sample(fourfold, plan_of(), SHAPE, 0, steering=[Doing(Half), Doing(Half)]), half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_a_loop_of_ones_own(dtype):
    """With gradients on, outputs that have some, and channels-last ones of which a part is not dense."""
    steering, plan = [apg(0.9, 0.1, -0.5)], plan_of("epsilon", "heun")

    def model(x, time):
        c, u = (out.clone().requires_grad_() for out in pair(x, time))
        return c.contiguous(memory_format=torch.channels_last), torch.cat([u, u], 3)[..., :5]

    with fd.Actions(steering, plan, SHAPE, model, dtype=dtype) as actions:
        run = fd.Stepper(actions.plan, SHAPE, 0, dtype=dtype, **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
    assert same(run.result(), fd.sample(pair, plan, SHAPE, 0, steering=steering, dtype=dtype))


@pytest.mark.parametrize("sampler, calls", [("euler", 3), ("heun", 5)])
def test_zero_init_does_not_call_the_model(sampler, calls):
    times = []

    def model(x, time):
        times.append(float(time[0]))
        return pair(x, time)

    plan = plan_of("flow", sampler)
    got = fd.sample(model, plan, SHAPE, 0, steering=[cfg_zero_star(2)])
    assert len(times) == calls == int((plan.steps[plan.calls_model] >= 2).sum())
    last = min(plan.times[plan.calls_model & (plan.steps == 1)])

    def zeroed(x, t, c, u):
        return torch.zeros_like(x) if t >= last else zero_star(W, c, u)

    if sampler == "euler":  # of heun, the second stage of a step and the first of the next have one time
        near(got, fd.sample(reference(zeroed), plan_of("flow", sampler, None), SHAPE, 0))
    called = fd.sample(model, plan_of("flow", sampler, None), SHAPE, 0, steering=[Doing(Guided), cfg_zero_star(2)])
    assert same(called, got)


class Guided(Acting):
    """Guidance that an action brings: those before the zeros see every call."""

    def __init__(self, setting):
        self.plan = setting.plan.with_guidance(W)


def test_a_nan_is_reported_at_its_step():
    def model(x, time):
        c, u = pair(x, time)
        return (c * torch.nan if float(time[0]) < 1 else c), u

    for method in ("rescale", "zero star", "apg, momentum"):
        with pytest.raises(FloatingPointError, match="sigma 0."):
            fd.sample(model, plan_of(), SHAPE, 0, steering=ALL[method]())


# ---- what it costs

COSTS = {"rescale": (pair, 1, 12), "zero star": (pair, 1, 4), "perp neg": (triple, 1, 12), "apg": (pair, 1, 15),
         "apg, momentum": (pair, 2, 27), "zero star, rescaled": (pair, 2, 16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", COSTS)
def test_launches(method, dtype):
    """A pass, a reduction, and the row; what else is launched works on one number a sample. No copy and no wait."""
    model, actions, small = COSTS[method]
    on_cpu = fd.sample(model, plan_of("flow", "heun"), SHAPE, 0, steering=ALL[method](), dtype=dtype)
    with Gpu(latent=SHAPE[1] * SHAPE[2] * SHAPE[3]) as gpu:
        counted = []

        def watched(x, time):
            counted.append(gpu.take())
            outputs = tuple(out.to("cuda") for out in model(x.inner, time.inner))
            gpu.take()
            return outputs

        result = fd.sample(watched, plan_of("flow", "heun"), SHAPE, 0, steering=ALL[method](), dtype=dtype, device="cuda")
    assert same(result.inner, on_cpu)
    for counts in counted[1:]:
        assert counts.ops["fastdiff.step_"] == 1 + actions and counts.ops["fastdiff.project_"] == actions
        assert counts.big == 1 + 2 * actions
        assert (counts.reads, counts.copies, counts.waits) == (0, 0, 0)
        assert counts.small == small


# ---- refusals


class Counting:
    calls = 0

    def __call__(self, x, time):
        self.calls += 1
        return pair(x, time)


def log_prob(x0, y):
    return -x0.square().flatten(1).sum(1)


free = classifier_free(lambda x, time, y: conditional(x, time), 1, [1.0, 2.0, 3.0, 4.0])
REFUSED = {
    "no guidance": (lambda: [cfg_rescale()], {"w": None}, ValueError, ["no guidance", "with_guidance"]),
    "a scale by sample": (lambda: [free, cfg_rescale()], {"w": None}, ValueError, ["one scale for all samples"]),
    "guidance of 1": (lambda: [cfg_rescale()], {"w": 1.0}, ValueError, ["0 and 1"]),
    "guidance of 0": (lambda: [perp_neg()], {"w": 0.0}, ValueError, ["0 and 1"]),
    "phi above 1": (lambda: [cfg_rescale(1.5)], {}, ValueError, ["phi", "1.5", "from 0 to 1"]),
    "phi of another batch": (lambda: [cfg_rescale([0.1, 0.2])], {}, ValueError, ["phi", "(2,)", "4 samples"]),
    "phi as text": (lambda: [cfg_rescale("0.7")], {}, TypeError, ["phi", "'0.7'"]),
    "a window that holds nothing": (lambda: [apg(1.0, window=(30, 40))], {}, ValueError, ["(30, 40)", "20"]),
    "zero steps negative": (lambda: [cfg_zero_star(-1)], {"prediction": "flow"}, ValueError, ["-1", "0 to 4"]),
    "all steps zero": (lambda: [cfg_zero_star(5)], {"prediction": "flow"}, ValueError, ["5", "0 to 4"]),
    "nothing but zeros": (lambda: [cfg_zero_star(2, window=(3.0, 10.0))], {"prediction": "flow"}, ValueError, ["set to 0"]),
    "zero of no velocity": (lambda: [cfg_zero_star()], {}, ValueError, ["'denoised'", "prediction='flow'", "zero_steps=0"]),
    "threshold 0": (lambda: [apg(0.0)], {}, ValueError, ["threshold", "above 0"]),
    "eta NaN": (lambda: [apg(1.0, torch.nan)], {}, ValueError, ["eta", "nan"]),
    "momentum 1": (lambda: [apg(1.0, momentum=1)], {}, ValueError, ["momentum is 1", "between -1 and 1"]),
    "momentum by sample": (lambda: [apg(1.0, momentum=[0.1] * 4)], {}, ValueError, ["momentum", "one number"]),
    "an unknown space": (lambda: [apg(1.0, of="outputs")], {}, ValueError, ["'outputs'", "did you mean 'output'"]),
    "neg_scale below 0": (lambda: [perp_neg(-1.0)], {}, ValueError, ["neg_scale", "-1", "0 or more"]),
    "two of a kind": (lambda: [apg(1.0), cfg_zero_star(0)], {}, ValueError, ["one of cfg_zero_star, apg and perp_neg"]),
    "rescale before": (lambda: [cfg_rescale(), apg(1.0)], {}, ValueError, ["cfg_rescale after"]),
    "rescale twice": (lambda: [cfg_rescale(), cfg_rescale()], {}, ValueError, ["cfg_rescale", "once"]),
    "perp neg after": (lambda: [Doing(Guided), perp_neg()], {"w": None}, ValueError, ["first in steering"]),
    "guidance by gradients after": (lambda: [cfg_rescale(), fd.guidance.mpgd(log_prob, None)], {}, ValueError,
                                    ["gradients", "before guidance arithmetic"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(case):
    make, options, kind, words = REFUSED[case]
    model = Counting()
    with pytest.raises(kind) as error:
        fd.sample(model, plan_of(**options), SHAPE, 0, steering=make())
    assert model.calls == 0
    for word in words:
        assert word in str(error.value), error.value


def test_a_model_with_too_few_outputs_is_told_what_is_taken():
    with pytest.raises(ValueError, match=r"2 model outputs: 3 \(out, uncond, negative\)"):
        fd.sample(pair, plan_of(), SHAPE, 0, steering=[perp_neg()])
    with pytest.raises(ValueError, match=r"1 model outputs: 2 \(out, uncond\)"):
        fd.sample(conditional, plan_of(), SHAPE, 0, steering=[cfg_rescale()])
    for action in (cfg_rescale(), apg(1.0), dynamic_threshold()):
        with pytest.raises(TypeError, match="the model returned torch.float64: torch.float32"):
            fd.sample(lambda x, t: tuple(out.double() for out in pair(x, t)), plan_of(), SHAPE, 0, steering=[action])


def test_guidance_by_gradients_before():
    """It takes its estimate from plain guidance; the factors act on the outputs alone, and not on what it adds."""
    gradient = fd.guidance.mpgd(log_prob, None, 0.1)

    def after_one_step(*steering):
        xs = []
        fd.sample(pair, plan_of(), SHAPE, 0, steering=steering, callback=lambda p: xs.append(p.x.clone()))
        return xs[0]

    plain, both = after_one_step(), after_one_step(gradient, cfg_rescale(0.7))
    near(both - after_one_step(cfg_rescale(0.7)), after_one_step(gradient) - plain, 1e-3)  # of small differences
    assert (after_one_step(gradient) - plain).abs().max() > 0.01
