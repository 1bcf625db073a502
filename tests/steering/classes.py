"""Small sets of data in three classes, an alignment fitted to them, and a model whose bits do not depend on the batch."""

import math

import torch

import fastdiff as fd
from fastdiff.steering import NoiseAlignment

SHAPE = (1, 3, 2)
SIZE = math.prod(SHAPE)
PLANS = ["euler_ancestral", "heun", "dpmpp_2m_sde", "dpmpp_sde"]


def data(count, seed=0, mean=0.0, scale=0.5):
    """Samples with falling variances in a basis that the seed turns."""
    z = fd.randn((count, SIZE), seeds=range(1000 * seed, 1000 * seed + count)).double()
    turn = torch.linalg.qr(fd.randn((1, SIZE, SIZE), seeds=77 + seed)[0].double())[0]
    return (mean + scale * (z * 0.7 ** torch.arange(SIZE)) @ turn).reshape(count, *SHAPE)


def fitted(**options):
    classes = {"low": data(80, 1, -0.4, 0.3), "high": data(90, 2, 0.5, 0.4), 3: data(70, 3, 0.1, 0.2)}
    return NoiseAlignment.fit(classes, torch.cat([*classes.values(), data(60, 4)]), **options)


def difference(na, x, sigma, name):
    """D_class - D_full at x = x0 + sigma n, in float64."""
    return na.targets[name].denoise(x, sigma) - na.full.denoise(x, sigma)


def small(x, sigma):
    """A smooth denoiser whose bits do not depend on the batch."""
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    return (0.2 * x + s2 * 0.1 * torch.tanh(x)) / (0.2 + s2)


def made(name="heun", steps=8, **options):
    return fd.plan(name, schedule="edm", prediction="denoised", steps=steps, **options)
