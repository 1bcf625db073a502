"""Wrong use of what takes the place of other projects' functions: refused before any work, naming what was given and is taken."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.integrations import comfyui, edm, guided_diffusion
from fastdiff.integrations import k_diffusion as k
from integrations.comfy_like import Denoiser, comfy  # noqa: F401
from integrations.k_functions import FIRST, LAST, denoise, karras, latent, sample
from integrations.plain_diffusion import SHAPE, Diffusion, model_of

NAN, INF = math.nan, math.inf
LEVELS = torch.tensor([10.0, 4.0, 1.5, 0.5, 0.1, 0.0])


def nothing(*args):
    return None


# ---- one way to call each, and a model that counts its calls


def k_model(calls):
    return lambda x, sigma: calls.append(1) or denoise(x, sigma)


def euler(model, x=None, sigmas=None, **options):
    return k.sample_euler(model, latent() if x is None else x, karras(4) if sigmas is None else sigmas, disable=True, **options)


def k_named(name, steps=4, **options):
    return lambda model: sample(k, name, latent(), steps, model=model, **options)


K_DIFFUSION = {
    "model": (lambda m: euler(3), ["model is int", "model(x, sigma)"]),
    "x a list": (lambda m: euler(m, [1.0]), ["x is list", "tensor"]),
    "x float64": (lambda m: euler(m, latent().double()), ["torch.float64", "torch.bfloat16"]),
    "x of integers": (lambda m: euler(m, latent().long()), ["torch.int64", "torch.float32"]),
    "x sparse": (lambda m: euler(m, latent().to_sparse()), ["torch.sparse_coo", "strided"]),
    "x without a batch": (lambda m: euler(m, torch.zeros(3)), ["(3,)", "two dimensions"]),
    "x elsewhere": (lambda m: euler(m, latent().to("meta")), ["meta", "cpu, cuda"]),
    "sigmas up": (lambda m: euler(m, sigmas=karras(4).flip(0)), ["sigmas[0]", "strictly decreasing"]),
    "sigmas twice": (lambda m: euler(m, sigmas=torch.tensor([2.0, 1.0, 1.0, 0.0])), ["sigmas[1]", "strictly decreasing"]),
    "sigmas 0 first": (lambda m: euler(m, sigmas=torch.tensor([0.0, 1.0])), ["sigmas[0] = 0.0", "strictly decreasing"]),
    "sigmas negative": (lambda m: euler(m, sigmas=torch.tensor([2.0, -1.0])), ["-1.0", ">= 0"]),
    "sigmas NaN": (lambda m: euler(m, sigmas=torch.tensor([2.0, NAN, 0.0])), ["nan", "finite"]),
    "sigmas infinite": (lambda m: euler(m, sigmas=torch.tensor([INF, 1.0, 0.0])), ["inf", "finite"]),
    "sigmas text": (lambda m: euler(m, sigmas="karras"), ["'karras'", "(steps + 1,)"]),
    "sigmas missing": (lambda m: k.sample_euler(m, latent(), None), ["sigmas is None", "(steps + 1,)"]),
    "sigmas complex": (lambda m: euler(m, sigmas=karras(4) + 0j), ["sigmas is torch.complex64", "real"]),
    "sigmas of truths": (lambda m: euler(m, sigmas=torch.tensor([True, False])), ["sigmas is torch.bool", "real"]),
    "sigmas of two dimensions": (lambda m: euler(m, sigmas=torch.ones(2, 2)), ["(2, 2)", "(steps + 1,)"]),
    "extra_args a list": (lambda m: euler(m, extra_args=[1]), ["extra_args is list", "dict"]),
    "extra_args of no names": (lambda m: euler(m, extra_args={3: 4}), ["extra_args holds [3]", "by name"]),
    "s_churn text": (lambda m: euler(m, s_churn="much"), ["s_churn", "'much'", "number"]),
    "s_churn negative": (lambda m: euler(m, s_churn=-1.0), ["s_churn", "-1.0", "0 or more"]),
    "s_churn infinite": (lambda m: euler(m, s_churn=INF), ["s_churn is inf", "finite"]),
    "s_noise NaN": (lambda m: euler(m, s_churn=1.0, s_noise=NAN), ["s_noise is nan", "finite"]),
    "eta negative": (k_named("euler_ancestral", eta=-1.0), ["eta is -1.0", "0 or more"]),
    "eta NaN": (k_named("dpmpp_2m_sde", eta=NAN), ["eta is nan", "finite"]),
    "callback": (lambda m: euler(m, callback=3), ["callback is int", "called"]),
    "noise": (lambda m: euler(m, noise="philo"), ["'philo'", "'philox'"]),
    "seeds with torch": (lambda m: euler(m, seeds=3), ["seeds", "noise='philox'"]),
    "seeds of no number": (lambda m: euler(m, s_churn=1.0, noise="philox", seeds=1.5), ["seeds is 1.5", "an int"]),
    "too few seeds": (lambda m: euler(m, s_churn=1.0, noise="philox", seeds=[1]), ["1 entries", "2 samples"]),
    "two noises": (k_named("dpmpp_sde", noise="philox", noise_sampler=nothing), ["noise_sampler", "philox"]),
    "noise_sampler": (k_named("euler_ancestral", noise_sampler=3), ["noise_sampler is int", "called"]),
    "solver_type": (k_named("dpmpp_2m_sde", solver_type="midpont"), ["'midpont'", "'midpoint'"]),
    "order": (k_named("lms", 6, order=0), ["order", "0"]),
    "order 5": (k_named("lms", 6, order=5), ["order of lms is 5", "1, 2, 3, 4"]),
    "order, a list": (k_named("lms", 6, order=[4]), ["order is [4]", "int"]),
    "r": (k_named("dpmpp_sde", r=1.5), ["r is 1.5", "0 < r <= 1"]),
    "n": (lambda m: k.sample_dpm_fast(m, latent(), LAST, FIRST, 0), ["n is 0", "1 or more"]),
    "n no int": (lambda m: k.sample_dpm_fast(m, latent(), LAST, FIRST, 7.5), ["n is 7.5", "an int"]),
    "sigma_min 0": (lambda m: k.sample_dpm_fast(m, latent(), 0.0, FIRST, 5), ["sigma_min is 0.0", "0 < sigma_min"]),
    "sigma_min over sigma_max": (lambda m: k.sample_dpm_fast(m, latent(), FIRST, LAST, 5), ["sigma_min < sigma_max"]),
}


class Counted(Denoiser):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __call__(self, *args, **kwargs):
        self.calls.append(1)
        return super().__call__(*args, **kwargs)


X = torch.ones(1, 1, 2, 2)


def comfy_named(name, x=X, sigmas=LEVELS, **options):
    return lambda model: getattr(comfyui, f"sample_{name}")(model, x, sigmas, disable=True, **options)


def of_no_guider(model):
    return comfyui.sample_dpmpp_2m_sde(lambda x, sigma: model(x, sigma), X, LEVELS)


COMFYUI = {
    "model": (lambda m: comfyui.sample_euler(3, X, LEVELS), ["model is int", "called"]),
    "a model without its sampling": (of_no_guider, ["model is function", "ComfyUI's", "inner_model"]),
    "x a list": (comfy_named("euler", x=[1.0]), ["x is list", "tensor"]),
    "sigmas a list": (comfy_named("euler", sigmas=[1.0, 0.0]), ["sigmas is list", "tensor"]),
    "sigmas of two dimensions": (comfy_named("euler", sigmas=torch.ones(2, 2)), ["(2, 2)", "(steps + 1,)"]),
    "sigmas of integers": (comfy_named("euler", sigmas=torch.tensor([2, 1, 0])), ["torch.int64", "floats"]),
    "sigmas missing": (lambda m: comfyui.sample_euler(m, X), ["sigmas"]),
    "an option of another": (comfy_named("euler", eta=1.0), ["eta"]),
    "noise": (comfy_named("euler", noise="phillox"), ["'phillox'", "'philox'"]),
    "noise of one that draws none": (comfy_named("dpmpp_2m", noise="philox"), ["noise"]),
    "two noises": (comfy_named("euler_ancestral", noise="philox", noise_sampler=nothing), ["noise_sampler", "one of them"]),
    "noise_sampler": (comfy_named("euler_ancestral", noise_sampler=3), ["noise_sampler is int", "called"]),
    "callback": (comfy_named("euler", callback=3), ["callback is int", "called"]),
    "extra_args a list": (comfy_named("euler", extra_args=[1]), ["extra_args is list", "dict"]),
    "seed": (comfy_named("euler_ancestral", noise="philox", extra_args={"seed": "seven"}), ["'seven'", "an int"]),
    "s_tmin text": (comfy_named("euler", s_tmin="low"), ["s_tmin is 'low'", "number"]),
    "s_churn NaN": (comfy_named("euler", s_churn=NAN), ["s_churn is nan", "finite"]),
    "solver_type": (comfy_named("dpmpp_2m_sde", solver_type="midpont"), ["'midpont'", "'midpoint'"]),
    "variant": (comfy_named("unipc", variant="bh3"), ["'bh3'", "bh1, bh2"]),
    "register without a prefix": (lambda m: comfyui.register(""), ["prefix is ''", "text"]),
    "draws of no sampler": (lambda m: comfyui.draws("dpmpp_2n"), ["'dpmpp_2n'", "'dpmpp_2m'"]),
    "dpm_fast to 0": (lambda m: comfyui.sample_dpm_fast(m, X, 0.0, 10.0, 5), ["sigma_min", "0"]),
}


class Net:
    sigma_min, sigma_max, round_sigma = 0.0, INF, staticmethod(torch.as_tensor)

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, x, sigma, class_labels=None):
        self.calls.append(1)
        return 0.5 * x


def of_edm(sampler=edm.edm_sampler, **options):
    return lambda net: sampler(**{"net": net, "latents": torch.ones(SHAPE), **options})


def ablation(**options):
    return of_edm(edm.ablation_sampler, **options)


FAR = fd.steering.LatentVector(torch.ones(1, *SHAPE[1:])).at(1.0, window=(900, 1000))
EDM = {
    "net without levels": (of_edm(net=lambda x, sigma, y: x), ["without sigma_min, sigma_max, round_sigma"]),
    "net is no function": (of_edm(net=SimpleNamespace(sigma_min=0, sigma_max=1, round_sigma=None)), ["without a call"]),
    "num_steps 1": (of_edm(num_steps=1), ["num_steps is 1: an int of 2"]),
    "num_steps no int": (of_edm(num_steps=18.0), ["num_steps is 18.0"]),
    "sigma_min over sigma_max": (of_edm(sigma_min=90), ["sigma_min=90", "sigma_min < sigma_max"]),
    "sigma_min text": (of_edm(sigma_min="low"), ["sigma_min is 'low'", "number"]),
    "rho 0": (of_edm(rho=0), ["rho is 0", "> 0"]),
    "S_churn negative": (of_edm(S_churn=-1), ["S_churn is -1", "0 or more"]),
    "S_churn infinite": (of_edm(S_churn=INF), ["S_churn is inf", "finite"]),
    "S_noise NaN": (of_edm(S_noise=NAN), ["S_noise is nan", "finite"]),
    "S_min over S_max": (of_edm(S_min=3, S_max=2), ["S_min is 3", "S_min <= S_max"]),
    "S_max text": (of_edm(S_max="high"), ["S_max is 'high'", "numbers"]),
    "S_max missing": (of_edm(S_max=None), ["S_max is None", "numbers"]),
    "noise": (of_edm(noise="phlox"), ["did you mean 'philox'"]),
    "too few seeds": (of_edm(seeds=[1, 2]), ["seeds has 2 entries"]),
    "randn_like": (of_edm(randn_like=3), ["randn_like is int"]),
    "randn_like of nothing": (of_edm(randn_like=nothing), ["randn_like returned NoneType", "tensor"]),
    "randn_like of another shape": (of_edm(randn_like=lambda x: x[0]), ["randn_like returned shape (2, 4, 5)", "(4, 2, 4, 5)"]),
    "latents without samples": (of_edm(latents=torch.zeros(3)), ["latents is (3,)", "(B, ...)"]),
    "latents of integers": (of_edm(latents=torch.zeros(SHAPE, dtype=torch.int64)), ["torch.int64", "floats"]),
    "latents a list": (of_edm(latents=[1.0]), ["latents is list"]),
    "steering of a number": (of_edm(steering=[3]), ["steering is or holds int"]),
    "steering a number": (of_edm(steering=3), ["steering is or holds int"]),
    "steering outside": (of_edm(steering=FAR), ["no call of the model"]),
    "callback": (of_edm(callback=3), ["callback is int"]),
    "solver": (ablation(solver="hein"), ["did you mean 'heun'"]),
    "schedule": (ablation(schedule="cosine"), ["schedule 'cosine'"]),
    "discretization": (ablation(discretization="ddpm"), ["did you mean 'iddpm'"]),
    "scaling": (ablation(scaling=None), ["scaling"]),
    "alpha over 1": (ablation(alpha=1.5), ["0 < alpha <= 1"]),
    "alpha 0": (ablation(alpha=0), ["alpha is 0"]),
    "epsilon_s 1": (ablation(epsilon_s=1), ["epsilon_s is 1"]),
    "M no int": (ablation(discretization="iddpm", M=500.5), ["M is 500.5", "an int"]),
    "no level": (ablation(discretization="iddpm", M=3, sigma_min=2, sigma_max=2.1), ["no level"]),
}


def guided(**options):
    def call(model):
        diffusion = options.get("diffusion", Diffusion())
        given = {"model": model, "shape": SHAPE, "device": "cpu", **options, "diffusion": diffusion}
        return guided_diffusion.ddim_sample_loop_progressive(**given)

    return call


def process(betas):
    return SimpleNamespace(betas=betas, model_mean_type="EPSILON", model_var_type="LEARNED_RANGE")


def wrong_map():
    diffusion = Diffusion()
    diffusion.timestep_map = [0, 1, 2]
    return diffusion


GUIDED_DIFFUSION = {
    "diffusion": (guided(diffusion=3), ["diffusion is int", "without betas"]),
    "fuse of something": (lambda m: guided_diffusion.fuse(object()), ["without betas", "GaussianDiffusion"]),
    "fuse, noise": (lambda m: guided_diffusion.fuse(Diffusion(), noise="philx"), ["did you mean 'philox'"]),
    "PREVIOUS_X": (lambda m: guided_diffusion.fuse(Diffusion("PREVIOUS_X")),
                   ["model_mean_type is PREVIOUS_X", "EPSILON or START_X"]),
    "betas text": (guided(diffusion=process("linear")), ["betas is 'linear'", "(T,)"]),
    "betas negative": (guided(diffusion=process(np.array([-0.1, 0.2]))), ["betas", "-0.1", "0 < beta"]),
    "one beta": (guided(diffusion=process(np.array([0.1]))), ["betas", "(1,)", "T >= 2"]),
    "timestep_map": (guided(diffusion=wrong_map()), ["timestep_map has 3 entries"]),
    "model": (guided(model=3), ["model is int"]),
    "shape": (guided(shape=(4, -1)), ["shape"]),
    "shape text": (guided(shape="4x4"), ["shape is '4x4'", "ints"]),
    "noise of another shape": (guided(noise=torch.zeros(1, 2, 4, 5)), ["noise has shape (1, 2, 4, 5)", str(SHAPE)]),
    "noise text": (guided(noise="philox"), ["noise_mode says"]),
    "noise_mode": (guided(noise_mode="phlox"), ["did you mean 'philox'"]),
    "too few seeds": (guided(seeds=[1, 2]), ["seeds has 2 entries"]),
    "cond_fn": (guided(cond_fn=3), ["cond_fn is int"]),
    "denoised_fn": (guided(denoised_fn="clip"), ["denoised_fn is str"]),
    "model_kwargs a list": (guided(model_kwargs=[1]), ["model_kwargs is list", "dict"]),
    "model_kwargs of no names": (guided(model_kwargs={3: 4}), ["model_kwargs holds [3]", "by name"]),
    "no device": (guided(device=None), ["a device is taken"]),
    "device": (guided(device="tpu"), ["device"]),
    "eta negative": (guided(eta=-1), ["eta is -1", "0 or more"]),
    "eta NaN": (guided(eta=NAN), ["eta is nan", "finite"]),
    "steering": (guided(steering=[3]), ["holds int"]),
}

MODELS = {"k_diffusion": k_model, "comfyui": Counted, "edm": Net,
          "guided_diffusion": lambda calls: model_of(Diffusion(), calls)}
CASES = {"k_diffusion": K_DIFFUSION, "comfyui": COMFYUI, "edm": EDM, "guided_diffusion": GUIDED_DIFFUSION}


@pytest.mark.parametrize("project, case", [(project, case) for project, cases in CASES.items() for case in cases])
def test_refused_before_the_model_is_called(project, case, comfy):  # noqa: F811
    (call, words), calls = CASES[project][case], []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)) as error:
        call(MODELS[project](calls))
    for word in words:
        assert word in str(error.value), error.value
    assert not calls
    if not case.startswith("randn_like of") and case != "steering outside":  # what is seen once the start is drawn
        assert torch.equal(state, torch.get_rng_state())


# ---- what models return, and what they write into


def wrong_answers(x):
    return {"nothing": (None, "NoneType"), "another shape": (x[:1], "(1, "), "integers": (x.long(), "int64"),
            "text": ("x", "str")}


@pytest.mark.parametrize("project", CASES)
@pytest.mark.parametrize("answer", wrong_answers(torch.ones(SHAPE)))
def test_answers_are_checked(project, answer, comfy):  # noqa: F811
    def model(x, *args, **kwargs):
        return wrong_answers(x)[answer][0]

    model.sigma_min, model.sigma_max, model.round_sigma = 0.0, INF, torch.as_tensor
    fixed = Diffusion(variance="FIXED_SMALL")
    runs = {"k_diffusion": lambda: euler(model), "comfyui": lambda: comfyui.sample_euler(model, X.repeat(2, 1, 1, 1), LEVELS),
            "edm": lambda: edm.edm_sampler(model, torch.ones(SHAPE)),
            "guided_diffusion": lambda: guided_diffusion.ddim_sample_loop(fixed, model, SHAPE, device="cpu")}
    with pytest.raises((ValueError, TypeError)) as error:
        runs[project]()
    assert "returned" in str(error.value) and wrong_answers(torch.ones(SHAPE))[answer][1] in str(error.value), error.value


def test_what_writes_into_the_latent_is_refused_where_a_step_has_yet_to_read_it():
    """A network of EDM's may do so there, where it gets a copy in float32."""

    def writes(x, *args, **kwargs):
        return x.mul_(0.9)

    writes.sigma_min, writes.sigma_max, writes.round_sigma = 0.0, INF, torch.as_tensor
    fixed = Diffusion(variance="FIXED_SMALL")
    loop = functools.partial(guided_diffusion.p_sample_loop, fixed, shape=SHAPE, device="cpu")
    for call, who in ((lambda: edm.edm_sampler(writes, torch.ones(SHAPE)), "net"), (lambda: loop(writes), "the model"),
                      (lambda: loop(model_of(fixed), cond_fn=writes), "cond_fn"),
                      (lambda: sample(k, "heun", latent(), 4, model=writes), "the model")):
        with pytest.raises(RuntimeError, match=f"{who} wrote into x"):
            call()


# ---- diffusers


def scheduler(name, *, begun=0, **options):
    """A fused scheduler of 5 steps, of which some have been taken; with a latent."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import diffusers

    from fastdiff.integrations.diffusers import fuse

    made, x = fuse(getattr(diffusers, name)(**options)), torch.ones(2, 3, 4, 4)
    made.set_timesteps(5)
    for t in made.timesteps[:begun]:
        made.step(x, t, made.scale_model_input(x, t))
    return made, x


def fuse_of(*args, **options):
    def call():
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
        from fastdiff.integrations.diffusers import fuse

        return fuse(*(args or [diffusers.EulerDiscreteScheduler()]), **options)

    return call


def stepped(name, step, *, begun=0, **options):
    def call():
        made, x = scheduler(name, begun=begun, **options)
        return step(made, x)

    return call


DIFFUSERS = {
    "nothing": (fuse_of(None), ["pipe_or_scheduler is NoneType", "scheduler"]),
    "text": (fuse_of("pipe"), ["pipe_or_scheduler is str"]),
    "noise": (fuse_of(noise="pilox"), ["did you mean 'philox'"]),
    "brownian": (fuse_of(brownian="torchsd"), ["did you mean 'torchsde'"]),
    "steering": (fuse_of(steering=[3]), ["int"]),
    "generators": (stepped("EulerAncestralDiscreteScheduler",
                           lambda s, x: s.step(x, s.timesteps[0], x, generator=[torch.Generator()] * 3)), ["list of 3", "2 samples"]),
    "out of order": (stepped("DPMSolverMultistepScheduler", lambda s, x: s.step(x, s.timesteps[3], x), begun=1),
                     ["step 1", "step 3"]),
    "once more": (stepped("EulerDiscreteScheduler", lambda s, x: s.step(x, s.timesteps[-1], x), begun=5), ["all 5 steps"]),
    "another shape": (stepped("DPMSolverMultistepScheduler", lambda s, x: s.step(x[:1], s.timesteps[1], x[:1]), begun=1),
                      ["(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
    "an unknown prediction": (stepped("DDIMScheduler", lambda s, x: s.step(x, s.timesteps[0], x), prediction_type="x"),
                              ["prediction_type", "x"]),
    "no timesteps": (lambda: fuse_of()().step(torch.ones(1, 3, 4, 4), 3, torch.ones(1, 3, 4, 4)), ["timestep"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DIFFUSERS)
def test_diffusers(case):
    call, words = DIFFUSERS[case]
    with pytest.raises((ValueError, TypeError, IndexError)) as error:
        call()
    for word in words:
        assert word in str(error.value), error.value
