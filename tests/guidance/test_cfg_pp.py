"""CFG++: against its paper in float64, against ComfyUI's formulas, in runs, and what is refused."""

import math

import pytest
import torch
from counter.emulated import Gpu
from guidance.cases import same
from guidance.papers import PREDICTIONS, SHAPE, conditional, flat, near, pair, plan_of, unconditional

import fastdiff as fd
from fastdiff.guidance import apg, cfg_pp, cfg_rescale, classifier_free
from fastdiff.integrations import comfy_plans
from fastdiff.integrations.comfy_stages import UNCOND
from fastdiff.samplers.assemble import denoised_from
from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.stage import Noise

W = 3.0  # the paper's are below 1; the formulas do not mind, and more shows more
ALPHA = {"edm": lambda s: 1.0, "linear": lambda s: (1 + s * s) ** -0.5, "flow": lambda s: 1 / (1 + s)}


def first_base(plan):
    """x_T in x0 + sigma n, float64."""
    seen = []
    fd.sample(lambda x, t: seen.append(x.clone()) or pair(x, t), plan, SHAPE, 0)
    return seen[0].double() / plan.input_scales[plan.calls_model][0]


def calls_of(plan):
    """sigma, sigma', the scale of the model's input and its time, of each call."""
    here = plan.calls_model
    sigmas = plan.sigmas[here].tolist()
    return list(zip(sigmas, [*sigmas[1:], 0.0], plan.input_scales[here].tolist(), plan.times[here].tolist()))


def expected(plan, prediction, name, w=W, clip=None, window=(0.0, math.inf), shift=0.0):
    """The docstring's formulas in x0 + sigma n; outside of the window D in place of U."""
    x, u_last, s_last, d_last = first_base(plan), None, None, None
    for i, (s, s_next, scale, time) in enumerate(calls_of(plan)):
        outputs = pair(scale * x, torch.full((len(x),), time, dtype=torch.float64))
        alpha = ALPHA[PREDICTIONS[prediction]](s)
        c_x, c_o = denoised_from(prediction, s, alpha)
        c, u = (c_x * alpha * x + c_o * out for out in outputs)
        d = u + w * (c - u) + shift
        d = d if clip is None else d.clamp(*clip)
        inside = window[0] <= s <= window[1]
        down, up = ancestral_step(s, s_next) if name in ("euler_ancestral", "ddpm") else (s_next, 0.0)
        x_next = d + down / s * (x - (u if inside else d))
        if name == "dpmpp_2m" and i and s_next > 0:
            h, h_last = math.log(s / s_next), math.log(s_last / s)
            x_next += (1 - s_next / s) * h / (2 * h_last) * (d - (u_last if inside else d_last))
        x = x_next + up * fd.randn(SHAPE, seeds=0, stream="step", draw=i).double()
        u_last, s_last, d_last = u, s, d
    return x


CASES = [("denoised", "euler"), ("epsilon", "ddim"), ("v", "ddim"), ("edm", "euler"), ("flow", "flow_euler"),
         ("epsilon", "euler_ancestral"), ("epsilon", "ddpm"), ("denoised", "dpmpp_2m"), ("epsilon", "dpmpp_2m"),
         ("flow", "dpmpp_2m")]


@pytest.mark.parametrize("prediction, name", CASES)
def test_formulas(prediction, name):
    plan = plan_of(prediction, name, W)
    wanted = expected(plan, prediction, name)
    near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()]), wanted)
    assert (fd.sample(pair, plan, SHAPE, 0) - wanted).abs().max() > 1e-3  # without it


def test_algorithm_2_of_the_paper():
    """x_{t-1} = sqrt(abar_{t-1}) x0(eps_w) + sqrt(1 - abar_{t-1}) eps_u, in the coordinates of the model."""
    plan = plan_of("epsilon", "ddim", W, steps=12)
    x = None
    for s, s_next, _, time in calls_of(plan):
        abar, abar_next = (1 / (1 + level**2) for level in (s, s_next))
        x = first_base(plan) * abar**0.5 if x is None else x
        eps_c, eps_u = pair(x, torch.full((len(x),), time, dtype=torch.float64))
        eps = eps_u + W * (eps_c - eps_u)
        x = abar_next**0.5 * (x - (1 - abar) ** 0.5 * eps) / abar**0.5 + (1 - abar_next) ** 0.5 * eps_u
    near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()]), x)


@pytest.mark.parametrize("name, options, flow", [("euler_cfg_pp", {"eta": 0.0}, False), ("euler_cfg_pp", {"eta": 0.0}, True),
                                                 ("euler_ancestral_cfg_pp", {"eta": 1.0, "s_noise": 1.0}, False),
                                                 ("dpmpp_2m_cfg_pp", {}, False)])
def test_as_comfyui(name, options, flow):
    """ComfyUI's functions, whose model returns the guided estimate and hands the unconditional one beside it."""
    ours = fd.plan(name.removesuffix("_cfg_pp"), schedule="flow" if flow else "edm", prediction="denoised", steps=6,
                   **({"time": "t"} if flow else {"time": "sigma", "sigma_max": 20.0}))
    got = fd.sample(pair, ours.with_guidance(W), SHAPE, 0, steering=[cfg_pp()])
    levels = (*ours.sigmas[ours.calls_model].tolist(), 0.0)
    theirs = comfy_plans.made(name, levels, flow, tuple(sorted(options.items())), torch.float32, False)
    start = first_base(ours.with_guidance(W)) * ours.input_scales[ours.calls_model][0]
    run, unconditionals, times = fd.Stepper(theirs.plan, SHAPE, 0, init=start.float()), {}, ours.times[ours.calls_model].tolist()
    while not run.done:
        c, u = pair(run.model_input, torch.full((len(start),), times[len(unconditionals)]))
        unconditionals[Noise(UNCOND, len(unconditionals))] = u
        taken = [unconditionals[address] for address in theirs.taken[run.row]]
        unread = sum(name.startswith("noise") for name in run.plan.inputs) - len(taken)
        run.step(u + W * (c - u), *taken, *[u] * unread)
    near(got, run.result())


@pytest.mark.parametrize("prediction, name", [("epsilon", "ddim"), ("denoised", "dpmpp_2m")])
def test_a_window(prediction, name):
    plan = plan_of(prediction, name, W, steps=7)
    levels = plan.sigmas[plan.calls_model]
    window = float(levels[4]), float(levels[2])
    near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp(window)]), expected(plan, prediction, name, window=window))


@pytest.mark.parametrize("raw", [False, True])
def test_the_estimate_is_clipped_and_the_noise_is_not(raw):
    """Also where DDIM takes its direction from the estimate as it was before it was clipped."""
    plan = plan_of("v", "ddim", W, clip_denoised=(-0.4, 0.4), use_clipped_model_output=not raw)
    clipped = expected(plan, "v", "ddim", clip=(-0.4, 0.4))
    near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()]), clipped)
    assert (expected(plan, "v", "ddim") - clipped).abs().max() > 0.1


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_beside_steering_and_previews(name):
    """What moves the estimate moves it alone, before or after, and previews show it."""
    push, plan, shown = fd.steering.LatentVector(torch.ones(1, *SHAPE[1:])).at(0.3), plan_of(name=name, w=W), []
    wanted = expected(plan, "denoised", name, shift=0.3)
    first, last = (fd.sample(pair, plan, SHAPE, 0, steering=order, callback=lambda p: shown.append(p.denoised.clone()))
                   for order in ([push, cfg_pp()], [cfg_pp(), push]))
    near(first, wanted)
    assert same(first, last) and len(shown) == 10
    near(shown[4], wanted)  # the last step ends at the estimate


@pytest.mark.parametrize("null", [None, 0])
def test_after_classifier_free(null):
    plan = plan_of("epsilon", "ddim", None)

    def labelled(x, time, y):
        return torch.where(flat(y) == 1, conditional(x, time), unconditional(x, time))

    got = fd.sample(unconditional, plan, SHAPE, 0, steering=[classifier_free(labelled, 1, W, null=null), cfg_pp()])
    assert same(got, fd.sample(pair, plan.with_guidance(W), SHAPE, 0, steering=[cfg_pp()]))


def test_a_scale_of_one():
    """The estimate is the conditional one, the noise the unconditional one: both are read."""
    plan = plan_of("epsilon", "ddim", 1.0)
    near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()]), expected(plan, "epsilon", "ddim", w=1.0))
    half = plan_of("epsilon", "ddim", lambda s: W if s > 1 else 0.0)  # where it is 0, there is nothing to do
    assert torch.isfinite(fd.sample(pair, half, SHAPE, 0, steering=[cfg_pp()])).all()


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_samples_do_not_know_their_neighbours(name):
    plan = plan_of(name=name, w=W)
    whole = fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()])
    for size in (1, 3, 6):
        assert same(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()], batch_size=size), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction, name", [("epsilon", "ddim"), ("edm", "dpmpp_2m")])
def test_16_bits(prediction, name, dtype):
    plan = plan_of(prediction, name, W)
    exact, got = (fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()], dtype=t) for t in (torch.float32, dtype))
    near(got, exact, 4 * torch.finfo(dtype).eps)


def test_inpainting():
    """The mask acts on what it acts on without CFG++: where all is painted, nothing is another."""
    for kind in ("d", "x"):
        extra = {"known": torch.full(SHAPE, 0.5), "mask": torch.ones(1, 1, 6, 5)}
        plan = plan_of("denoised", "euler", W, inpaint=kind)
        near(fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()], **extra), expected(plan_of(w=W), "denoised", "euler"))
        kept = fd.sample(pair, plan, SHAPE, 0, steering=[cfg_pp()], known=extra["known"], mask=torch.zeros(1, 1, 6, 5))
        assert torch.equal(kept, extra["known"])


@pytest.mark.parametrize("prediction, name", [("epsilon", "ddim"), ("edm", "euler"), ("flow", "euler_ancestral")])
def test_one_output_twice_is_the_sampler_itself(prediction, name):
    """Also where steps are taken several times, and from a latent at the first level."""

    def twice(x, time):
        return (conditional(x, time),) * 2

    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for plan, extra in ((fd.guidance.time_travel(plan_of(prediction, name, None), 3), {}),
                        (plan_of(prediction, name, None, start="latent"), {"init": latents})):
        plain, made = (fd.sample(twice, plan.with_guidance(W), SHAPE, 0, steering=s, **extra) for s in ([], [cfg_pp()]))
        near(made, plain)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_launches(name):
    """One a call, as without it."""
    with Gpu(latent=math.prod(SHAPE[1:])) as gpu:
        counted = []

        def watched(x, time):
            counted.append(gpu.take())
            outputs = tuple(out.to("cuda") for out in pair(x.inner, time.inner))
            gpu.take()
            return outputs

        fd.sample(watched, plan_of("flow", name, W), SHAPE, 0, steering=[cfg_pp()], device="cuda")
    for counts in counted[1:]:
        assert counts.ops["fastdiff.step_"] == counts.big == 1
        assert (counts.small, counts.reads, counts.copies, counts.waits) == (0, 0, 0, 0)


def test_it_adds_no_input_to_one_step_methods_and_one_to_2m():
    for name, inputs, ring in (("euler", 3, 0), ("dpmpp_2m", 4, 0)):  # of dpmpp_2m: U in place of the estimate in the ring
        with fd.Actions([cfg_pp()], plan_of(name=name, w=W), SHAPE, pair) as actions:
            assert len(actions.plan.inputs) == inputs and actions.plan.ring == ring and not actions.bank


def counted():
    calls = []

    def model(x, time):
        calls.append(1)
        return pair(x, time)

    return model, calls


def gradients():
    return fd.guidance.mpgd(lambda x0, y: -x0.square().flatten(1).sum(1), None, 0.1)


def one(scale):
    return classifier_free(lambda x, time, y: conditional(x, time), 1, scale)


REFUSED = {
    "no guidance": (lambda: [cfg_pp()], {"w": None}, ["no guidance", "with_guidance"]),
    "a scale by sample": (lambda: [one([0.1, 0.2, 0.3, 0.4]), cfg_pp()], {"w": None}, ["one scale for all samples"]),
    "a scale of 0": (lambda: [cfg_pp()], {"w": 0.0}, ["scales of 0"]),
    "two networks at scale 1": (lambda: [one(1.0), cfg_pp()], {"w": None}, ["scale is 1", "plan.with_guidance(1.0)"]),
    "twice": (lambda: [cfg_pp(), cfg_pp()], {}, ["twice", "once"]),
    "after factors": (lambda: [cfg_rescale(), cfg_pp()], {}, ["factors", "cfg_rescale"]),
    "before factors": (lambda: [cfg_pp(), apg(1.0)], {}, ["cfg_pp stands before", "apg"]),
    "after gradients": (lambda: [gradients(), cfg_pp()], {}, ["gradients", "after"]),
    "a window that holds nothing": (lambda: [cfg_pp((30, 40))], {}, ["(30, 40)", "20"]),
    "heun": (lambda: [cfg_pp()], {"name": "heun"}, ["'heun'", "several calls", "dpmpp_2m"]),
    "dpm_2": (lambda: [cfg_pp()], {"name": "dpm_2"}, ["several calls"]),
    "dpmpp_2s_ancestral": (lambda: [cfg_pp()], {"name": "dpmpp_2s_ancestral"}, ["several calls"]),
    "dpmpp_3m": (lambda: [cfg_pp()], {"name": "dpmpp_3m"}, ["earlier estimates"]),
    "dpmpp_2m_sde": (lambda: [cfg_pp()], {"name": "dpmpp_2m_sde"}, ["earlier estimates"]),
    "dpmpp_2m, heun": (lambda: [cfg_pp()], {"name": "dpmpp_2m", "solver_type": "heun"}, ["earlier estimates"]),
    "unipc": (lambda: [cfg_pp()], {"name": "unipc"}, ["no CFG++ is published"]),
    "lms": (lambda: [cfg_pp()], {"name": "lms"}, ["slopes"]),
    "deis": (lambda: [cfg_pp()], {"name": "deis"}, ["slopes"]),
    "sa_solver": (lambda: [cfg_pp()], {"name": "sa_solver"}, ["no CFG++ is published"]),
    "lcm": (lambda: [cfg_pp()], {"name": "lcm", "prediction": "epsilon"}, ["all noise anew"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(case):
    make, options, words = REFUSED[case]
    model, calls = counted()
    with pytest.raises(ValueError) as error:
        fd.sample(model, plan_of(**{"w": W, **options}), SHAPE, 0, steering=make())
    assert not calls
    for word in words:
        assert word in str(error.value), error.value


def test_every_sampler_is_taken_or_refused():
    """What is taken is of the known list; all else is refused with the sampler's name, and no plan breaks it."""
    taken = set()
    for name, entry in fd.samplers.SAMPLERS.items():
        schedule = entry.default_schedule or "edm"
        plan = fd.plan(name, schedule=schedule, steps=8, prediction="v" if schedule != "flow" else "flow").with_guidance(W)
        try:
            with fd.Actions([cfg_pp()], plan, SHAPE, pair):
                taken.add(name)
        except ValueError as error:
            assert "CFG++" in str(error) and repr(name) in str(error)
    assert taken == {"euler", "flow_euler", "euler_ancestral", "ddim", "ddpm", "tcd", "dpmpp_2m"}


def test_guidance_by_gradients_after():
    """It moves the base as far as it does without CFG++."""
    gradient = gradients()

    def after_one_step(*steering):
        xs = []
        fd.sample(pair, plan_of(w=W), SHAPE, 0, steering=steering, callback=lambda p: xs.append(p.x.clone()))
        return xs[0]

    moved, plain = after_one_step(cfg_pp(), gradient), after_one_step(cfg_pp())
    near(moved - plain, after_one_step(gradient) - after_one_step(), 1e-3)
    assert (moved - plain).abs().max() > 1e-3
