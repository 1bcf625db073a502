"""Steering inside of diffusers' schedulers, against the same schedulers run with a model whose output is steered."""

import functools
import warnings

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.steering import LatentVector, NoiseAlignment
from integrations.schedulers import CONFIGS, SD, Config, made, relative, sample

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")
SHAPE = (3, 6, 6)
WINDOW = (0.3, 1e13)


def data(seed, mean):
    return fd.randn((300, *SHAPE), seeds=seed) * torch.linspace(0.3, 1.2, 36).view(6, 6) + mean


EVERYTHING = data(1, 0.0)
ALIGNMENT = NoiseAlignment.fit({"up": data(2, 0.4), "down": data(3, -0.7)}, EVERYTHING, rank=4)
VECTOR = LatentVector(fd.randn((2, *SHAPE), seeds=4), ("one", "two"))


def aligned(x, s, target, weight):
    """w (D_class - D_full), in float64. x: x0 + s n; weight: (B,) or a number."""

    def denoised(gaussian):
        basis, values = gaussian.basis.double().flatten(1), gaussian.eigenvalues.double()
        mean = gaussian.mean.double().flatten()
        along = (x.double().flatten(1) - mean) @ basis.T * (values / (values + s * s))
        return (mean + along @ basis).view(x.shape)

    full = denoised(ALIGNMENT.full)
    each = [target] * len(x) if isinstance(target, str) else target
    moved = torch.stack([denoised(ALIGNMENT.targets[name])[b] for b, name in enumerate(each)]) - full
    return torch.as_tensor(weight, dtype=torch.float64).view(-1, 1, 1, 1) * moved


def at(weight=1.5, window=WINDOW, target="up", how=None):
    return ALIGNMENT.at(weight, window, target, rank=4, how=how)


def plain(x, s):
    return aligned(x, s, "up", 1.5)


def pushed(x, s):
    return VECTOR.vectors[0].double()


def level(scheduler, t, place):
    """(alpha, sigma) of the latent at a call, written anew for each family."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "scale_noise"):
        sigma = float(scheduler.sigmas[place])
        return 1 - sigma, sigma
    if scheduler.config.get("use_flow_sigmas"):
        sigma = float(scheduler.sigmas[place])
        return 1 - sigma, sigma
    if name.startswith("EDM"):
        return 1.0, float(scheduler.sigmas[place])
    bar = scheduler.alphas_cumprod.double()
    log = (0.5 * ((1 - bar) / bar).log()).numpy()  # as _sigma_to_t interpolates
    whole = float(t).is_integer()
    s = float(np.exp(log[int(t)] if whole else np.interp(float(t), np.arange(len(log)), log)))
    s = min(s, 1e12)
    if name.startswith(("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")):
        return 1.0, s
    alpha = (1 + s * s) ** -0.5
    return alpha, s * alpha


def of_output(scheduler, alpha, sigma):
    """The weight of the model's output in the denoised estimate."""
    s = sigma / alpha if alpha else np.inf
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if hasattr(scheduler, "precondition_outputs"):
        return s * scheduler.config.sigma_data / (s * s + scheduler.config.sigma_data**2) ** 0.5
    v = -s / (1 + s * s) ** 0.5 if s < np.inf else -1.0
    return {"epsilon": -s, "v_prediction": v, "sample": 1.0, "flow_prediction": -sigma}[kind]


def steered_by_hand(scheduler, moved=plain, window=WINDOW, first=0):
    """The scheduler, whose steps take a model output that is steered explicitly, in float64."""
    own, count = scheduler.step, [first]

    @functools.wraps(own)
    def step(output, t, x, **options):
        alpha, sigma = level(scheduler, t, count[0])
        count[0] += 1
        s = min(sigma / max(alpha, 1e-12), 1e12)
        if window[0] <= s <= window[1]:
            head = output[:, : x.shape[1]].double() + moved(x.double() * s / sigma, s) / of_output(scheduler, alpha, sigma)
            output = torch.cat([head.to(output.dtype), output[:, x.shape[1] :]], 1)
        return own(output, t, x, **options)

    scheduler.step = step
    return scheduler


def sd(name, **config):
    return Config(name, {**SD, **config})


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
EXACT = {
    **{f"ddim {p}": sd("DDIMScheduler", clip_sample=False, prediction_type=p) for p in ("epsilon", "v_prediction", "sample")},
    **{f"dpm++ 2m {p}": sd("DPMSolverMultistepScheduler", prediction_type=p, timestep_spacing="leading") for p in
       ("epsilon", "v_prediction", "sample")},
    "dpm++ 2m flow": Config("DPMSolverMultistepScheduler", FLOW),
    **{f"euler {p}": sd("EulerDiscreteScheduler", prediction_type=p, timestep_spacing="leading") for p in
       ("epsilon", "v_prediction")},
    **{f"heun {p}": sd("HeunDiscreteScheduler", prediction_type=p, timestep_spacing="leading") for p in
       ("epsilon", "v_prediction")},
    "flow euler": Config("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow heun": Config("FlowMatchHeunDiscreteScheduler"),
    "edm euler": Config("EDMEulerScheduler"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_steps_are_those_of_a_steered_model(name, no_own_step):
    config = EXACT[name]
    x = fd.randn((2, *SHAPE), seeds=9)
    x = x * min(float(getattr(config.make(), "init_noise_sigma", 1.0)), 80.0)
    expected = sample(steered_by_hand(config.make()), config, x=x.double())
    unsteered = sample(config.make(), config, x=x.double())
    for how in ("bank", "lift"):
        fused = fuse(config.make(), steering=[at(how=how)])
        got = sample(fused, config, x=x)
        assert relative(got.double(), expected) < 1e-5
        assert relative(sample(fused, config, x=x), got) == 0
    assert relative(expected, unsteered) > 0.05


# Their levels by interpolation of the training levels, which rounds.
OTHERS = ["pndm", "pndm plms", "lms", "kdpm2", "unipc bh2", "deis 3", "dpm single 3", "dpm++ 3m", "dpm 2m", "cogvideox ddim",
          "ddim clip", "heun clip", "ddim zero snr", "edm dpm++ 2m", "unipc flow", "dpm++ inverse"]  # fmt: skip
STOCHASTIC = ["ddpm", "ddpm clip", "ddim eta", "euler ancestral", "dpm++ 2m sde", "sa solver", "lcm", "tcd", "kdpm2 ancestral",
              "euler churn", "unclip", "flow lcm", "flow euler stochastic", "edm dpm++ 2m sde"]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS + STOCHASTIC)
def test_other_schedulers(name, no_own_step):
    """Drawn by torch, the noise is the same in the plain scheduler and in the fused one, in float32."""
    config, clips = CONFIGS[name], "clip" in name  # the data of the alignment go beyond the bounds
    expected = sample(steered_by_hand(made(name), pushed if clips else plain), config)
    got = sample(fuse(made(name), steering=[VECTOR.at(1.0, WINDOW, "one") if clips else at()]), config)
    assert relative(got, expected) < 2e-3
    assert relative(sample(made(name), config), expected) > 0.02


@pytest.mark.parametrize("name", ["ddpm learned", "ddpm threshold"])
def test_a_step_that_is_not_fused_is_steered_too(name):
    config = CONFIGS[name]
    expected = sample(steered_by_hand(made(name)), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*own step is used.*")
        got = sample(fuse(made(name), steering=[at()]), config)
    assert relative(got, expected) < 2e-3
    assert relative(sample(made(name), config), expected) > 0.02


# ---- what a weight of nothing does


@pytest.mark.parametrize(
    "name",
    ["ddpm", "ddim clip", "euler churn", "heun", "dpm++ 2m", "dpm++ 3m sde", "pndm plms", "unipc bh2", "lms", "flow euler"],
)
@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
def test_a_weight_of_zero_changes_no_bit(name, noise, no_own_step):
    config = CONFIGS[name]
    expected = sample(fuse(made(name), noise), config)
    bound = "clip" in name
    for steering in (
        [*[at(0.0, WINDOW, "up", how="bank")] * (not bound), VECTOR.at(0.0, target="one")],
        [VECTOR.at(0.0, target="two") if bound else at(0.0, WINDOW, "down", how="lift")],
    ):
        assert torch.equal(sample(fuse(made(name), noise, steering), config), expected)
    assert torch.equal(sample(fuse(made(name), noise, []), config), expected)


@pytest.mark.parametrize("name", ["ddpm", "dpm++ 2m sde"])
def test_noise_of_the_op_is_that_of_the_run_without_steering(name, no_own_step):
    """A sample whose weight is 0 is what it was, beside one that is steered."""
    config = CONFIGS[name]
    expected = sample(fuse(made(name), "philox"), config)
    got = sample(fuse(made(name), "philox", [at([0.0, 1.5], WINDOW, "up")]), config)
    assert torch.equal(got[0], expected[0]) and relative(got[1], expected[1]) > 0.02


# ---- several, by sample, from an image, in half precision


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "euler", "flow euler", "heun"])
def test_several_actions_with_targets_of_each_sample(name, no_own_step):
    config = CONFIGS[name]

    def moved(x, s):
        inside = aligned(x, s, ["down", "up"], [0.5, 2.0]) if s >= 0.8 else 0
        return inside + VECTOR.vectors[1].double() * torch.tensor([1.0, -0.5], dtype=torch.float64).view(2, 1, 1, 1)

    expected = sample(steered_by_hand(made(name), moved, (0, 1e13)), config)
    actions = [at([0.5, 2.0], (0.8, float("inf")), ["down", "up"]), VECTOR.at([1.0, -0.5], target="two")]
    got = sample(fuse(made(name), steering=actions), config)
    assert relative(got, expected) < 1e-3  # the level by interpolation
    assert relative(sample(fuse(made(name), steering=actions[::-1]), config), got) < 1e-5


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "euler", "flow euler"])
def test_image_to_image(name, no_own_step):
    config = CONFIGS[name]
    image = torch.linspace(-1, 1, 216).view(2, *SHAPE)
    expected = sample(steered_by_hand(made(name), first=8), config, start=8, x=image)
    got = sample(fuse(made(name), steering=[at()]), config, start=8, x=image)
    assert relative(got, expected) < 1e-3
    high = float(fuse(made(name)).sigmas[3]) if name == "euler" else 5.0
    late = fuse(made(name), steering=[at(1.5, (high, 1e13), "up")])
    with pytest.raises(ValueError, match="no call of the model falls into window"):
        sample(late, config, start=12, x=image)  # the levels are there, the run does not come to them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "euler", "flow euler"])
def test_half_precision(name, dtype, no_own_step):
    config, action = CONFIGS[name], at()
    exact = sample(fuse(made(name), steering=[action]), config)
    got = sample(fuse(made(name), steering=[action]), config, dtype=dtype)
    assert got.dtype == dtype and relative(got.float(), exact) < (0.01 if dtype == torch.float16 else 0.08)


@pytest.mark.parametrize("how", ["bank", "lift", None])
def test_layouts(how, no_own_step):
    fused = fuse(made("ddim"), steering=[at(how=how)])
    x = fd.randn((2, *SHAPE), seeds=6)
    results = []
    for value in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        fused.set_timesteps(4)
        results.append(fused.step(value / 2, fused.timesteps[1], value)[0])
    assert torch.equal(results[1].contiguous(), results[0]) and relative(results[2].contiguous(), results[0]) < 1e-6


def test_gradients_reach_through_a_steered_run(no_own_step):
    results = []
    for scheduler in (steered_by_hand(made("dpm++ 2m"), pushed),
                      fuse(made("dpm++ 2m"), steering=[VECTOR.at(1.0, WINDOW, "one")])):  # fmt: skip
        scheduler.set_timesteps(4)
        x = start = torch.linspace(-1, 1, 108).view(1, *SHAPE).requires_grad_()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x)[0]
        results.append(torch.autograd.grad(x.square().sum(), start)[0])
    assert relative(results[1], results[0]) < 1e-3


def test_guidance_by_a_classifier_of_noisy_images(no_own_step):
    """log p(y | x, sigma) = -|x - y|^2 / 2 (1 + sigma^2): d += scale sigma^2 (y - x) / (1 + sigma^2)."""

    def log_p(x, sigma, y):
        return -(x - y.view(-1, 1, 1, 1)).square().sum((1, 2, 3)) / (2 * (1 + sigma**2))

    guide = fd.guidance.classifier(log_p, torch.tensor([0.5, -0.5]), scale=0.3, window=(0.3, 100.0))
    y = torch.tensor([0.5, -0.5], dtype=torch.float64).view(2, 1, 1, 1)
    by_hand = steered_by_hand(made("ddim"), lambda x, s: 0.3 * s * s / (1 + s * s) * (y - x), (0.3, 100.0))
    expected = sample(by_hand, CONFIGS["ddim"])
    assert relative(sample(fuse(made("ddim"), steering=[guide]), CONFIGS["ddim"]), expected) < 1e-3
