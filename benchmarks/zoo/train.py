"""Train the zoo: `python -m benchmarks.zoo.train unet|guide|guide_noisy|judge|all`.

Checkpoints go to `benchmarks/zoo/runs/` (ignored by git); a run goes on from its checkpoint. What is finished is
written as fp16 safetensors to `benchmarks/zoo/weights/`, with what it was trained from in the file's metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.zoo import data
from benchmarks.zoo.trainer import Settings, Trainer, save
from benchmarks.zoo.unet import UNet, preconditioning

HERE = Path(__file__).parent
SIGMA_MEAN, SIGMA_STD = -0.6, 1.4  # of ln(sigma) while the U-Net is trained
DEFAULTS = {
    "unet": Settings("unet", seed=1, steps=10_000, batch=64, lr=1.2e-3),
}


def lognormal(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """sigma (count,) with ln(sigma) ~ N(mean, std^2), stratified: one draw from each of `count` equal slices of probability."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).exp().float()


class DenoisingLoss:
    """EDM's loss. With its weight lambda(sigma) = 1 / c_out^2 it is the mean of (F - (x0 - c_skip x) / c_out)^2."""

    def __init__(self, images: data.Images):
        self.images = images

    def __call__(self, net: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0 = self.images.batch(index)
        sigma = lognormal(len(index), SIGMA_MEAN, SIGMA_STD, generator)
        c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1, 1) for c in preconditioning(sigma))
        x = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator)
        raw = net(c_in * x, c_noise.flatten()).float()
        # (x0 - c_skip x) / c_out; the images are not flipped: in this data shoes point left and sleeves hang one way.
        return (raw - (x0 - c_skip * x) / c_out).square().mean()


def build(name: str, images: data.Images) -> tuple[nn.Module, object]:
    if name == "unet":
        return UNet(), DenoisingLoss(images)
    raise ValueError(name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--until", type=int)
    args = parser.parse_args()
    torch.set_num_threads(2)
    images = data.load_images("train", args.data)
    settings = DEFAULTS[args.name]
    settings = dataclasses.replace(settings, **{k: v for k in ("steps", "batch") if (v := getattr(args, k))})
    torch.manual_seed(settings.seed)
    net, loss = build(args.name, images)
    Trainer(net, loss, len(images), settings, args.out / f"{args.name}.safetensors", images.checksum).run(until=args.until, quiet=False)


if __name__ == "__main__":
    main()
