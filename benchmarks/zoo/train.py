"""Train the zoo: `python -m benchmarks.zoo.train unet|unet_cond|guide|guide_noisy|spectral|judge|all`.

Checkpoints go to `benchmarks/zoo/runs/` (ignored by git); the same command goes on from them after Ctrl-C or a kill, at
most `--every` steps back. What is finished is written as fp16 safetensors (the moving average of the weights) to
`benchmarks/zoo/weights/`, with what it was trained from in the file's metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import benchmarks.zoo.threads  # noqa: F401  isort: skip  (before torch)
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks.zoo import data
from benchmarks.zoo.classifiers import CLASSIFIERS
from benchmarks.zoo.spectral import SpectralEncoder, fitted
from benchmarks.zoo.trainer import Loss, Settings, Trainer, save
from benchmarks.zoo.unet import ConditionalUNet, UNet, load, preconditioning
from fastdiff.guidance import spectral_loss

HERE = Path(__file__).parent
UNET_SIGMA = (-0.6, 1.4)  # mean and standard deviation of ln(sigma) while the U-Net is trained
LABEL_DROPOUT = 0.1
NOISY_SIGMA = (-0.2, 1.7)  # the same for the noise-aware guide and the spectral encoder, whose sigma is kept within NOISY_RANGE
NOISY_RANGE = (0.02, 80.0)
DEFAULTS = {
    s.name: s
    for s in (
        Settings("unet", seed=1, steps=6800, batch=64, lr=1.2e-3, decay=0.25, shards=2),
        Settings("unet_cond", seed=2, steps=3000, batch=64, lr=6e-4, decay=0.5, shards=2),
        Settings("guide", seed=11, steps=2400, batch=128, lr=2e-3, decay=0.8, weight_decay=0.05, ema=0.99),
        Settings("guide_noisy", seed=12, steps=2400, batch=128, lr=1.5e-3, decay=0.8, weight_decay=0.05, ema=0.99),
        Settings("spectral", seed=14, steps=1000, batch=256, lr=1.5e-3, decay=0.6, weight_decay=0.05, ema=0.99),
        Settings("judge", seed=13, steps=4200, batch=128, lr=2e-3, decay=0.8, weight_decay=0.05, ema=0.99),
    )
}


def lognormal(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """sigma (count,), ln(sigma) ~ N(mean, std^2), stratified: one draw from each of `count` equal slices."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).exp().float()


class DenoisingLoss:
    """EDM's loss. With its weight lambda(sigma) = 1 / c_out^2 it is the mean of (F - (x0 - c_skip x) / c_out)^2.

    The images are not flipped: in this data shoes point left, and a flipped one is a picture the data does not have.
    """

    def __init__(self, images: data.Images):
        self.images = images

    def labels(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the network is told beside x and c_noise: nothing."""
        return ()

    def __call__(self, net: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = next(net.parameters()).device  # random numbers come from the CPU, so that they are the same everywhere
        x0 = self.images.batch(index).to(device)
        sigma = lognormal(len(index), *UNET_SIGMA, generator).to(device)
        c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1, 1) for c in preconditioning(sigma))
        x = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator).to(device)
        raw = net(c_in * x, c_noise.flatten(), *(t.to(device) for t in self.labels(index, generator))).float()
        return (raw - (x0 - c_skip * x) / c_out).square().mean()


class ConditionalLoss(DenoisingLoss):
    """The same with the label told, but to a share LABEL_DROPOUT of the images (Ho and Salimans 2022, algorithm 1)."""

    def labels(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        dropped = torch.rand(len(index), generator=generator) < LABEL_DROPOUT
        return (torch.where(dropped, len(data.CLASSES), self.images.labels[index]),)


class LabelLoss:
    """Cross-entropy on clean images, or with `noisy` on x0 + sigma n with the network told sigma."""

    def __init__(self, images: data.Images, noisy: bool):
        self.images, self.noisy = images, noisy

    def __call__(self, net: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = next(net.parameters()).device
        x, labels = self.images.batch(index).to(device), self.images.labels[index].to(device)
        if not self.noisy:
            return functional.cross_entropy(net(x).float(), labels)
        sigma = lognormal(len(index), *NOISY_SIGMA, generator).clamp(*NOISY_RANGE).to(device)
        x = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator).to(device)
        return functional.cross_entropy(net(x, sigma).float(), labels)


class SpectralLoss:
    """What `fd.guidance.spectral_loss` says of two noisings of each image, all at one level: whitening takes a whole batch."""

    def __init__(self, images: data.Images):
        self.images = images

    def __call__(self, net: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = next(net.parameters()).device
        x0 = self.images.batch(index).to(device)
        sigma = lognormal(1, *NOISY_SIGMA, generator).clamp(*NOISY_RANGE).to(device)
        first, second = (x0 + sigma * torch.randn(x0.shape, generator=generator).to(device) for _ in range(2))
        with torch.no_grad():
            whitened = net(first, sigma)
        return spectral_loss(whitened, net(second, sigma))


def build(name: str, images: data.Images, seed: int, weights: Path) -> tuple[nn.Module, Loss]:
    """The network with its first weights, a function of `seed` alone, and its loss. The conditional network starts as
    the unconditional one of the folder `weights`."""
    networks = {"unet": UNet, "unet_cond": ConditionalUNet, "spectral": SpectralEncoder} | CLASSIFIERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = networks[name]()
    if name == "unet_cond":
        net.load_state_dict(load(weights / "unet.safetensors").state_dict(), strict=False)
        return net, ConditionalLoss(images)
    if name == "spectral":
        return net, SpectralLoss(images)
    return net, DenoisingLoss(images) if name == "unet" else LabelLoss(images, noisy=name == "guide_noisy")


def origin(name: str, weights: Path) -> dict[str, str]:
    """For the conditional network: which file it started as."""
    if name != "unet_cond":
        return {}
    return {"started_as": f"unet.safetensors, sha256 {hashlib.sha256((weights / 'unet.safetensors').read_bytes()).hexdigest()}"}


def export(trainer: Trainer, weights: Path, fit: dict[str, Tensor] | None = None) -> Path:
    """Write the moving average as fp16 safetensors, with its origin in the metadata. fit: what was fitted to it, as it is."""
    settings = trainer.settings
    default = DEFAULTS.get(settings.name)
    options = "".join(
        f" --{k} {getattr(settings, k)}"
        for k in ("steps", "seed", "batch")
        if default is None or getattr(settings, k) != getattr(default, k)
    )
    path = weights / f"{settings.name}.safetensors"
    save(
        {**{k: v.half() if v.is_floating_point() else v for k, v in trainer.ema.items()}, **(fit or {})},
        path,
        {
            "name": settings.name,
            "data": "Fashion-MNIST, training half (60,000 images), MIT licence, (c) Zalando SE",
            "data_sha256": trainer.checksum,
            "command": f"python -m benchmarks.zoo.train {settings.name}{options}"
            + (f" --device {trainer.device.type}" if trainer.device.type != "cpu" else ""),
            "steps": str(settings.steps),
            "seed": str(settings.seed),
            "settings": json.dumps(dataclasses.asdict(settings), sort_keys=True),
            "as_if_uninterrupted": str(trainer.as_if_uninterrupted).lower(),
            "parameters": str(sum(p.numel() for p in trainer.net.parameters())),
            "torch": torch.__version__,
            **origin(settings.name, weights),
        },
    )
    return path


def train(name: str, images: data.Images, args: argparse.Namespace) -> bool:
    """Train one network from where it stands. True if it is finished and exported."""
    chosen = {k: v for k in ("steps", "seed", "batch") if (v := getattr(args, k)) is not None}
    if args.device != "cpu":
        chosen["shards"] = 1  # which serve cores
    settings = dataclasses.replace(DEFAULTS[name], **chosen)
    net, loss = build(name, images, settings.seed, args.out)
    trainer = Trainer(net.to(args.device), loss, len(images), settings, args.runs / f"{name}.safetensors", images.checksum)
    if not trainer.run(every=args.every, until=args.until, quiet=args.quiet or None):
        print(f"{name}: stopped after {trainer.step} of {settings.steps} steps; the same command goes on from there")
        return False
    path = export(trainer, args.out, fitted(trainer.ema, images) if name == "spectral" else None)
    print(f"{name}: {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    return True


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=[*DEFAULTS, "all"])
    parser.add_argument(
        "--data", help="folder with the four idx files (default: $FASHION_MNIST, else the Debian package's)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="where finished weights go")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where checkpoints go")
    parser.add_argument("--steps", type=positive, help="length of the run (default: see DEFAULTS)")
    parser.add_argument("--seed", type=int, help="of the first weights, the order and the noise")
    parser.add_argument("--batch", type=positive)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--every", type=positive, default=250, help="steps between checkpoints")
    parser.add_argument("--until", type=positive, help="stop there, to go on later")
    parser.add_argument("--threads", type=positive, default=2, help="repeating a run bit for bit needs the same number")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none either unless stderr is a terminal)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        images = data.load_images("train", args.data)
        for name in DEFAULTS if args.name == "all" else [args.name]:
            if not train(name, images, args):
                return 130
    except (data.DataError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
