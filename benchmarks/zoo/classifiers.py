"""Three classifiers of Fashion-MNIST that share neither architecture nor seed.

guide        plain convolutions, clean images: what guidance differentiates (SiLU, so that gradients are smooth)
guide_noisy  residual, conditioned on sigma, images x0 + sigma n: guidance along the whole sampling path
judge        residual with pooling and ReLU, clean images: only ever judges; its 64 features carry the Frechet distance

A judge that shared the guide's errors would reward samples that exploit them, hence the differences.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.zoo.data import CLASSES
from benchmarks.zoo.unet import WEIGHTS, NoiseEmbedding, ResBlock, preconditioning


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and batch normalisation."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out))


class Guide(nn.Module):
    """Five plain convolutions with SiLU. Images (B, 1, 28, 28) in [-1, 1] to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 24, 3),
            nn.SiLU(),
            conv_norm(24, 48, 3, stride=2),
            nn.SiLU(),
            conv_norm(48, 48, 3),
            nn.SiLU(),
            conv_norm(48, 96, 3, stride=2),
            nn.SiLU(),
            conv_norm(96, 96, 3),
            nn.SiLU(),
        )
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


class GuideNoisy(nn.Module):
    """Noisy images x (B, 1, 28, 28) = x0 + sigma n and sigma (B,) or () to logits (B, 10)."""

    def __init__(self, emb: int = 64) -> None:
        super().__init__()
        self.noise = NoiseEmbedding(emb)
        self.stem = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.block1 = ResBlock(32, 64, emb)
        self.down = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.block2 = ResBlock(96, 96, emb)
        self.block3 = ResBlock(96, 96, emb)
        self.norm = nn.GroupNorm(12, 96)
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[0])
        _, _, c_in, c_noise = preconditioning(sigma)
        emb = self.noise(c_noise)
        h = self.block1(self.stem(c_in.view(-1, 1, 1, 1) * x), emb)
        h = self.block3(self.block2(self.down(h), emb), emb)
        return self.head(functional.silu(self.norm(h)).mean(dim=(2, 3)))


class PlainBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv x)))) + skip x), batch normalisation."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_norm(c_in, c_out, 3), conv_norm(c_out, c_out, 3)
        self.skip = conv_norm(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + self.skip(x))


class Judge(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] to logits (B, 10); `features` gives the (B, 64) layer before the last."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.stage1 = PlainBlock(32, 64)
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), PlainBlock(64, 128))
        self.squeeze = nn.Sequential(nn.Linear(2 * 128, self.width, bias=False), nn.BatchNorm1d(self.width))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(self.width, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        h = self.stage2(self.stage1(self.stem(x)))
        return self.squeeze(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(functional.relu(self.features(x))))


CLASSIFIERS: dict[str, type[nn.Module]] = {"guide": Guide, "guide_noisy": GuideNoisy, "judge": Judge}


def load_classifier(name: str, path: str | Path | None = None, device: torch.device | str | None = None) -> nn.Module:
    """A trained classifier: fp16 safetensors (the committed file unless `path` is given) into fp32, in eval mode."""
    if name not in CLASSIFIERS:
        raise ValueError(f"name is {name!r}, must be one of {sorted(CLASSIFIERS)}")
    net = CLASSIFIERS[name]()
    state = load_file(WEIGHTS / f"{name}.safetensors" if path is None else path)
    net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return net.to(device).eval().requires_grad_(False)
