"""The encoder of Spectral Guidance (`fd.guidance.spectral`), trained without labels, and the fit of the labels to it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.zoo.data import CLASSES, Images
from benchmarks.zoo.unet import WEIGHTS, NoiseEmbedding, ResBlock, preconditioning
from fastdiff.guidance import Spectral

FEATURES = 128
FIT_COUNT = 6000  # training images that the labels are fitted on, at each level
FIT_LEVELS = tuple(float(f"{s:.4g}") for s in torch.logspace(-2, 1.9031, 17, dtype=torch.float64).tolist())  # 0.01 to 80


class SpectralEncoder(nn.Module):
    """Noisy images x (B, 1, size, size) = x0 + sigma n, size a multiple of 4, and sigma (B,) or () to features (B, K).

    The trunk of `classifiers.GuideNoisy`, so that guidance costs the same. Its features keep their places, and c_in x enters
    linearly beside them: where there is much noise, the functions that are sought are linear in x.
    """

    def __init__(self, features: int = FEATURES, emb: int = 64, size: int = 28) -> None:
        super().__init__()
        self.noise = NoiseEmbedding(emb)
        self.stem = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.block1 = ResBlock(32, 64, emb)
        self.down = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.block2 = ResBlock(96, 96, emb)
        self.block3 = ResBlock(96, 96, emb)
        self.norm = nn.GroupNorm(12, 96)
        self.squeeze = nn.Conv2d(96, 24, 1)
        self.head = nn.Linear(24 * (size // 4) ** 2, features)
        self.linear = nn.Linear(size**2, features, bias=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[0])
        _, _, c_in, c_noise = preconditioning(sigma)
        x = c_in.view(-1, 1, 1, 1) * x
        emb = self.noise(c_noise)
        h = self.block1(self.stem(x), emb)
        h = self.block3(self.block2(self.down(h), emb), emb)
        h = self.squeeze(functional.silu(self.norm(h))).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # what is whitened keeps its digits
            return self.head(h.float()) + self.linear(x.flatten(1).float())


def fitted(state: dict[str, Tensor], images: Images) -> dict[str, Tensor]:
    """The fit of the labels, one-hot, to an encoder with these weights, rounded to fp16 as they are stored."""
    encoder = _encoder(state)
    labels = functional.one_hot(images.labels[:FIT_COUNT], len(CLASSES)).float()
    fit = Spectral.fit(encoder, images.batch(slice(0, FIT_COUNT)), labels, FIT_LEVELS)
    return {name: value for name, value in fit.state_dict().items() if not name.startswith("encoder.")}


def load_spectral(path: str | Path | None = None, device: torch.device | str | None = None) -> Spectral:
    """E[label | x] of noisy images, as guidance takes it: called as network(x, sigma), returns (B, 10). The committed file unless
    `path` is given."""
    state = load_file(WEIGHTS / "spectral.safetensors" if path is None else path)
    fit = {name: state.pop(name) for name in ("levels", "mean", "whitening", "coefficients", "prior")}
    return Spectral(_encoder(state), **fit).to(device).eval().requires_grad_(False)


def _encoder(state: dict[str, Tensor]) -> SpectralEncoder:
    encoder = SpectralEncoder()
    encoder.load_state_dict({name: value.half().float() for name, value in state.items()})
    return encoder.eval().requires_grad_(False)
