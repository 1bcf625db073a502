"""ComfyUI's functions, fused, in use: hooks, interrupts, noise inside of the step, fallbacks, ComfyUI's sampler list."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.integrations import comfyui
from fastdiff.integrations.comfy_plans import FUNCTIONS
from integrations.comfy_like import Denoiser, Sampling, comfy, samplers  # noqa: F401

SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.5, 0.1, 0.0])


def no_draw(*args, **kwargs):
    raise AssertionError("noise was asked for")


def arguments(name, model, x, sigmas=SIGMAS):
    return (model, x, 0.1, 10.0, 5) if name == "dpm_fast" else (model, x, sigmas.clone())


@pytest.mark.parametrize("name", sorted(name for name, spec in FUNCTIONS.items() if spec.noise and not name.endswith("_RF")))
def test_philox_draws_by_sample(name, comfy, monkeypatch):
    comfy.default_noise_sampler = comfy.BrownianTreeNoiseSampler = no_draw
    monkeypatch.setattr(torch, "randn_like", no_draw)
    function = getattr(comfyui, "sample_" + name)
    churn = {"s_churn": 2.0} if FUNCTIONS[name].noise == "like" else {}
    x = 10 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def sampled(x, seed):
        return function(*arguments(name, Denoiser(), x), extra_args={"seed": seed}, noise="philox", disable=True, **churn)

    both = sampled(x, 5)
    assert torch.equal(both, sampled(x, 5))
    assert torch.equal(both[1:], sampled(x[1:], 6))
    assert bool(both.isfinite().all())
    if name not in ("dpm_fast", "res_multistep", "res_multistep_cfg_pp"):  # without noise
        assert not torch.equal(both, sampled(x, 6))


@pytest.mark.parametrize("name", sorted(name for name, spec in FUNCTIONS.items() if spec.noise and spec.stages != "dpmpp_sde"))
def test_philox_has_the_spread_of_torch(name, comfy):
    """The samples of both kinds of noise have one standard deviation, within 5 of its standard errors."""
    comfy.default_noise_sampler = comfy.BrownianTreeNoiseSampler = lambda x, *args, **kwargs: lambda a, b: torch.randn(x.shape)
    options = {"s_churn": 2.0} if FUNCTIONS[name].noise == "like" else {"eta": 0.7} if name == "dpm_fast" else {}
    kind = "const" if name.endswith("_RF") else "eps"
    sigmas = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]) if kind == "const" else SIGMAS[:-1]  # ends with noise
    torch.manual_seed(0)
    x = sigmas[0] * torch.randn(8, 3, 16, 16)
    spreads = []
    for noise in ("torch", "philox"):
        given = arguments(name, Denoiser(kind), x, sigmas)
        result = getattr(comfyui, "sample_" + name)(*given, extra_args={"seed": 0}, noise=noise, disable=True, **options)
        spreads.append(result.std().item())
    assert spreads[1] == pytest.approx(spreads[0], rel=5 / (2 * x.numel()) ** 0.5 * 2**0.5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpm_2", "unipc", "lms", "euler_cfg_pp", "heunpp2"])
def test_tensors_that_are_handed_out_stay_as_they_were(name, comfy):
    """A hook and a callback may keep what they are given: nothing is written into it later."""
    kept = []

    def hook(args):
        kept.append((args["input"], args["input"].clone()))
        return args["denoised"] * 0.99

    def callback(about):
        kept.extend((about[key], about[key].clone()) for key in ("x", "denoised"))

    x = 10 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before, options = x.clone(), {"sampler_post_cfg_function": [hook]}
    function = getattr(comfyui, "sample_" + name)
    with torch.inference_mode():
        result = function(*arguments(name, Denoiser(), x), extra_args={"model_options": options}, callback=callback, disable=True)
        plain = function(*arguments(name, Denoiser(), x), disable=True)
    assert len(kept) > 10 and all(torch.equal(now, then) for now, then in kept)
    assert torch.equal(x, before) and options == {"sampler_post_cfg_function": [hook]}
    assert not torch.allclose(result, plain)  # the hook acts


@pytest.mark.parametrize("at", ["model", "callback"])
def test_an_interrupt_passes_and_leaves_nothing(at, comfy):
    class Interrupt(Exception):  # ComfyUI: comfy.model_management.InterruptProcessingException
        pass

    x = 10 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = Denoiser()
    expected = comfyui.sample_dpmpp_2m(model, x, SIGMAS, disable=True)
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupt
        return Denoiser.__call__(model, *args, **kwargs) if at == "model" else None

    class Stopping(Denoiser):
        __call__ = staticmethod(stop)

    with pytest.raises(Interrupt):
        comfyui.sample_dpmpp_2m(Stopping() if at == "model" else model, x, SIGMAS, callback=stop if at == "callback" else None,
                                disable=True)
    assert torch.equal(comfyui.sample_dpmpp_2m(model, x, SIGMAS, disable=True), expected)


def test_bounds_are_compared_in_the_dtype_of_the_levels(comfy, monkeypatch):
    """torch compares 0.1 with a float32 tensor in float32, which holds another 0.1 than Python."""
    drawn = []
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(1) or torch.zeros_like(x))
    comfyui.sample_euler(Denoiser(), torch.ones(1, 1, 2, 2), SIGMAS, s_churn=1.0, s_tmin=0.1, s_tmax=0.1, disable=True)
    assert len(drawn) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype, comfy):
    x = (10 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    result = comfyui.sample_dpmpp_2m(Denoiser(), x, SIGMAS, disable=True)
    exact = comfyui.sample_dpmpp_2m(Denoiser(), x.float(), SIGMAS, disable=True)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), exact, rtol=3 * torch.finfo(dtype).eps, atol=3 * torch.finfo(dtype).eps)


def test_unipc_ends_where_comfyui_does(comfy):
    """ComfyUI writes 0.001 into the last level of the caller's tensor, and its inverse noise scaling reads it there."""
    sigmas = SIGMAS.clone()
    comfyui.sample_unipc(Denoiser(), 10 * torch.ones(1, 1, 2, 2), sigmas, disable=True)
    assert sigmas[-1].item() == pytest.approx(0.001) and torch.equal(sigmas[:-1], SIGMAS[:-1])


# ---- calls that are ComfyUI's own function's

X = torch.ones(1, 1, 2, 2)
FALLBACKS = {
    "float64": ("euler", (X.double(), SIGMAS), {}, "float64"),
    "rising": ("euler", (X, SIGMAS.flip(0)), {}, "do not fall"),
    "deis of order 4": ("deis", (X, SIGMAS), {"max_order": 4}, "up to 3"),
    "deis rhoab": ("deis", (X, SIGMAS), {"deis_mode": "rhoab"}, "rhoab"),
    "noise_scaler": ("er_sde", (X, SIGMAS), {"noise_scaler": torch.exp}, "noise_scaler"),
    "eta": ("euler_ancestral", (X, SIGMAS), {"eta": 1.5}, "eta"),
    "tau_func": ("sa_solver", (X, SIGMAS), {"tau_func": float}, "tau_func"),
    "lms of order 5": ("lms", (X, SIGMAS), {"order": 5}, "up to 4"),
    "unipc of one step": ("unipc", (X, SIGMAS[-2:]), {}, "2 steps"),
    "lcm": ("lcm", (X, SIGMAS), {}, "noise_scaling"),
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_fallback(why, comfy):
    name, (x, sigmas), options, says = FALLBACKS[why]
    uni_pc = sys.modules["comfy.extra_samplers.uni_pc"]
    seen = []

    def own(*args, **kwargs):
        seen.append((args, kwargs))
        return "its own"

    setattr(uni_pc if name == "unipc" else comfy, "sample_" + name, own)
    model = Denoiser()
    if why == "lcm":
        model.model_sampling = type("Other", (Sampling,), {"noise_scaling": None})()
    comfyui._say_once.cache_clear()
    with pytest.warns(UserWarning, match=says):
        assert getattr(comfyui, "sample_" + name)(model, x, sigmas, **options) == "its own"
    assert seen[0][0][:2] == (model, x) and seen[0][0][2] is sigmas and seen[0][1] == options


def test_warns_once(comfy, recwarn):
    comfy.sample_euler = lambda *args, **kwargs: None
    comfyui._say_once.cache_clear()
    for _ in range(3):
        comfyui.sample_euler(Denoiser(), X.double(), SIGMAS)
    assert len(recwarn) == 1


def test_no_step(comfy):
    assert comfyui.sample_euler(Denoiser(), X, SIGMAS[:1]) is X


# ---- the node folder


def folder():
    path = Path(__file__).parents[2] / "integrations/comfyui/__init__.py"
    spec = importlib.util.spec_from_file_location("fastdiff_nodes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_registers(samplers, comfy):
    folder()
    added = ["fastdiff_" + name for name in ("euler", "dpm_2", "dpm_fast", "dpmpp_2m_sde", "uni_pc", "uni_pc_bh2")]
    assert samplers.KSampler.SAMPLERS[9:] == samplers.SAMPLER_NAMES[9:] == samplers.KSAMPLER_NAMES[6:] == added
    assert samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS == {"dpm_2", "uni_pc", "fastdiff_dpm_2", "fastdiff_uni_pc"}
    assert comfyui.register() == added and len(samplers.SAMPLER_NAMES) == 15  # once more changes nothing
    x = 10 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in added:
        function = getattr(comfy, "sample_" + name)
        if name != "fastdiff_dpmpp_2m_sde":
            result = function(Denoiser(), x, SIGMAS.clone(), extra_args={"seed": 1}, callback=None, disable=True)
            assert result.shape == x.shape and bool(result.isfinite().all())
    own = comfyui.sample_dpm_fast(Denoiser(), x, SIGMAS[-2], SIGMAS[0], 5, disable=True)
    assert torch.equal(comfy.sample_fastdiff_dpm_fast(Denoiser(), x, SIGMAS, disable=True), own)


def test_node(samplers, comfy):
    comfy.default_noise_sampler = comfy.BrownianTreeNoiseSampler = no_draw
    node = folder().NODE_CLASS_MAPPINGS["FastdiffSampler"]
    names, noises = (choice for choice, in node.INPUT_TYPES()["required"].values())
    assert names == ["euler", "dpm_2", "dpm_fast", "dpmpp_2m_sde", "uni_pc", "uni_pc_bh2"] and noises == ["torch", "philox"]
    x = torch.ones(1, 3, 4, 4)
    for name in names:
        (sampler,) = getattr(node(), node.FUNCTION)(name, "philox")
        result = sampler.sampler_function(Denoiser(), x, SIGMAS.clone(), extra_args={"seed": 1}, callback=None, disable=True,
                                          **sampler.extra_options)
        assert result.shape == x.shape and bool(result.isfinite().all())


def test_a_function_with_another_parameter_is_left_out(samplers, comfy):
    comfy.sample_euler = lambda model, x, sigmas, extra_args=None, callback=None, disable=None, of_tomorrow=1.0: x
    assert "fastdiff_euler" not in comfyui.register() and "fastdiff_dpm_2" in samplers.SAMPLER_NAMES
