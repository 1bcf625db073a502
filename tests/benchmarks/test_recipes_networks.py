"""The U-Nets of EDM and OpenAI against what their authors' own code returned, and their state dicts told apart."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from safetensors.torch import save_file

import fastdiff as fd
from benchmarks.recipes import checkpoints, edm, openai

# What the published code (NVlabs/edm 008a4e5, training/networks.py; openai/improved-diffusion, openai/guided-diffusion, unet.py)
# returned for networks of these sizes with the weights of `fill` and the images of `image`: a checksum of the names and shapes
# of the state dict, F at eight places and, of EDM's, the denoiser D of EDMPrecond.
EDM = {
    "ddpmpp": (
        edm.Config(16, 3, 16, (1, 2, 2), 2, (8,), "ddpmpp", augment=9), "c492550f4c6dbe85",
        [0.41301, 0.42546, 0.53516, 0.62635, 0.32706, 0.43318, 0.46089, 0.50078],
        [-0.56772, -0.64341, 0.73484, 0.67302, 0.32014, 0.38242, 0.2957, 0.29568]),
    "ncsnpp": (
        edm.Config(16, 3, 16, (2, 2, 2), 1, (8,), "ncsnpp"), "964f3c5a7a43a23f",
        [0.46648, 0.43027, 0.62082, 0.48861, 0.20435, 0.40298, 0.31455, 0.35138],
        [-0.55594, -0.66215, 0.80331, 0.67218, 0.12242, 0.18282, 0.10214, 0.14195]),
    "adm": (
        edm.Config(16, 3, 64, (1, 2), 1, (8,), "adm", labels=5), "8fac58c667e4b898",
        [-0.43501, -0.27373, 0.04346, -0.32301, -0.02648, 0.14433, -0.26714, -0.36592],
        [-0.78502, -0.8108, 0.60245, 0.42527, -0.13697, -0.14062, -0.13846, -0.19078]),
}
OPENAI = {
    "improved": (
        openai.Config(3, 6, 32, (1.0, 2.0), 1, (1,)), "cbac4c4b97cf4403",
        [-0.26643, -0.37801, 0.13025, -0.07063, 0.01935, -0.00431, 0.35075, 0.18222]),
    "without scale and shift": (
        openai.Config(3, 3, 32, (1.0, 2.0), 1, (0,), scale_shift=False), "41f76c69495107b3",
        [-0.383, 0.33426, -0.45062, -0.05834, 0.37816, 0.11509, -0.51766, -0.39132]),
    "guided": (
        openai.Config(3, 6, 64, (1.0, 2.0), 1, (1,), residual_resampling=True, heads=None, head_channels=64), "63f2b93a1c589b72",
        [0.55437, 0.47396, 0.34277, 0.41719, 0.03707, 0.57106, 0.39984, 0.28009]),
}


def fill(network):
    """Weights that any code can make again: a hash of place and position, of the size that keeps activations in bounds."""
    state = network.state_dict()
    for k, name in enumerate(sorted(state)):
        t = state[name]
        if not name.endswith("resample_filter"):
            values = (torch.arange(t.numel(), dtype=torch.float64) * 7919 + k * 104729 + 13) % 1009 / 1009 - 0.5
            scale = 2 * t[0].numel() ** -0.5 if t.ndim > 1 else 1.0
            t.copy_((values * scale + (name.endswith("weight") and t.ndim == 1)).reshape(t.shape))
    return network.eval().requires_grad_(False)


def image():
    return ((torch.arange(2 * 3 * 16 * 16, dtype=torch.float64) * 31 % 257) / 257 * 4 - 2).view(2, 3, 16, 16).float()


def at_places(x):
    return x[:, 1, 3::8, 5::8].flatten()


def names_and_shapes(network):
    state = network.state_dict()
    return hashlib.sha256(repr([(name, tuple(state[name].shape)) for name in sorted(state)]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", EDM)
def test_edm_networks_are_the_published_ones(name):
    config, checksum, expected, _ = EDM[name]
    network = fill(edm.EDMUNet(config))
    assert names_and_shapes(network) == checksum
    assert (at_places(network(image(), torch.tensor([-0.5, 0.9]))) - torch.tensor(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("name", OPENAI)
def test_networks_of_openai_are_the_published_ones(name):
    config, checksum, expected = OPENAI[name]
    network = fill(openai.OpenAIUNet(config))
    assert names_and_shapes(network) == checksum
    assert (at_places(network(image(), torch.tensor([3.25, 801.0]))) - torch.tensor(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("name", EDM)
def test_preconditioning_is_that_of_the_formula_and_of_the_published_code(name, tmp_path):
    config, _, _, expected = EDM[name]
    network = fill(edm.EDMUNet(config))
    save_file({f"model.{k}": v for k, v in network.state_dict().items()}, tmp_path / "net.safetensors",
              metadata={"precond": "EDMPrecond", "sigma_data": "0.5"})
    checkpoint = checkpoints.load(tmp_path / "net.safetensors")
    x, found = image(), []
    for b, sigma in enumerate((0.3, 7.0)):
        plan = fd.plan("euler", sigmas=[sigma, 0.0], start="latent", **checkpoint.how)  # a step to 0 returns D
        d = fd.sample(checkpoint.model, plan, (1, 3, 16, 16), seeds=0, init=x[b : b + 1])
        total = sigma**2 + 0.5**2
        f = network(x[b : b + 1] / math.sqrt(total), torch.tensor([math.log(sigma) / 4]))
        assert torch.allclose(d, 0.5**2 / total * x[b : b + 1] + sigma * 0.5 / math.sqrt(total) * f, rtol=0, atol=2e-6)
        found.append(d)
    assert (at_places(torch.cat(found)) - torch.tensor(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("config", [
    *(config for config, *_ in EDM.values()),
    edm.Config(32, 3, 128, (2, 2, 2), 4, (16,), "ddpmpp", augment=9),  # edm-cifar10-32x32-uncond-vp
    edm.Config(32, 3, 128, (2, 2, 2), 4, (16,), "ncsnpp", augment=9),  # edm-cifar10-32x32-uncond-ve
    edm.Config(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), "adm", labels=1000),  # edm-imagenet-64x64-cond-adm
], ids=lambda config: f"{config.kind} {config.size}")
def test_a_state_dict_of_edm_tells_its_network(config):
    with torch.device("meta"):
        network = edm.EDMUNet(config)
    assert edm.config_of(network.state_dict()) == config
    assert config.size < 32 or network.last_of_encoder == f"enc.8x8_block{config.blocks - 1}"


@pytest.mark.parametrize("config", [
    *(config for config, *_ in OPENAI.values()),
    openai.Config(3, 6, 128, (1.0, 2.0, 2.0, 2.0), 3, (1, 2)),  # cifar10_uncond_50M_500K
    openai.Config(3, 6, 256, (1.0, 1.0, 2.0, 2.0, 4.0, 4.0), 2, (3, 4, 5), True, True, None, 64),  # 256x256_diffusion_uncond
    openai.Config(3, 3, 64, (0.5, 1.0, 2.0), 2, (2,)),
], ids=lambda config: f"{config.width} {len(config.mult)}")
def test_a_state_dict_of_openai_tells_its_network(config):
    with torch.device("meta"):
        network = openai.OpenAIUNet(config)
    assert openai.config_of(network.state_dict()) == config


def test_published_sizes():
    """Parameters of the published networks of CIFAR-10 and ImageNet-64 (EDM), CIFAR-10 (improved DDPM) and ImageNet-256 (ADM)."""
    with torch.device("meta"):
        networks = [
            edm.EDMUNet(edm.Config(32, 3, 128, (2, 2, 2), 4, (16,), "ddpmpp", augment=9)),
            edm.EDMUNet(edm.Config(32, 3, 128, (2, 2, 2), 4, (16,), "ncsnpp", augment=9)),
            edm.EDMUNet(edm.Config(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), "adm", labels=1000)),
            openai.OpenAIUNet(openai.Config(3, 6, 128, (1, 2, 2, 2), 3, (1, 2))),
            openai.OpenAIUNet(openai.Config(3, 6, 256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), True, True, None, 64)),
        ]
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [55733891, 56397827, 295899267, 52546438, 552814086]
