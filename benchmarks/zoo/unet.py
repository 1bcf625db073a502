"""The zoo's denoiser: a small unconditional pixel U-Net with EDM preconditioning.

The network and the denoiser around it are kept apart, as in Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models" (arXiv:2206.00364), equation 7 and table 1 (column "Ours")::

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

    c_skip  = sigma_data^2 / (sigma^2 + sigma_data^2)       c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
    c_out   = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)   c_noise = ln(sigma) / 4

`UNet.forward` is the raw F. `denoise` is D. The encoder and the rest can be run apart (`encode`, `decode`), so that one
encoder pass can serve several decoder passes, and every block has a stable name (`enc.0 enc.1 enc.2 mid dec.2 dec.1
dec.0`), so that activations can be hooked and edited.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
SIGMA_DATA = 0.7  # standard deviation of Fashion-MNIST pixels in [-1, 1] about their mean, rounded
IMAGE_SHAPE = (1, 28, 28)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) to an embedding (B, width): fixed sines and cosines, then two linear layers.

    c_noise spans about [-1.2, 1.1] for sigma in [0.01, 80], so the frequencies are set for that interval: the lowest
    turns a quarter over it, the highest still changes by little between two steps of a 50-step schedule.
    """

    def __init__(self, width: int, frequencies: int = 16):
        super().__init__()
        grid = 0.5 * math.pi * 2.0 ** torch.linspace(-1.0, 4.0, frequencies)
        self.register_buffer("frequencies", grid, persistent=False)
        self.hidden = nn.Linear(2 * frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.frequencies
        hidden = functional.silu(self.hidden(torch.cat([angle.cos(), angle.sin()], dim=1)))
        return functional.silu(self.out(hidden))


class ResBlock(nn.Module):
    """Residual block (B, c_in, H, W) -> (B, c_out, H, W); the noise level scales and shifts the second norm."""

    def __init__(self, c_in: int, c_out: int, emb: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(c_in // 8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(c_out // 8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.emb.weight)
        nn.init.zeros_(self.emb.bias)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        return (self.skip(x) + self.conv2(h)) * math.sqrt(0.5)


class Attention(nn.Module):
    """Self-attention over positions, (B, C, H, W) -> (B, C, H, W), heads of 32 channels, residual."""

    def __init__(self, channels: int, head: int = 32):
        super().__init__()
        self.heads = channels // head
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width).transpose(3, 4).unbind(1)
        )
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(b, c, height, width))


class Encoder(nn.Module):
    """One level on the way down: halve the resolution (not at the first level), residual blocks, attention."""

    def __init__(self, c_in: int, c_out: int, emb: int, blocks: int, down: bool, attention: bool):
        super().__init__()
        self.down = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) if down else nn.Identity()
        self.blocks = nn.ModuleList(ResBlock(c_out if i or down else c_in, c_out, emb) for i in range(blocks))
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.attention(x)


class Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.block1 = ResBlock(channels, channels, emb)
        self.attention = Attention(channels)
        self.block2 = ResBlock(channels, channels, emb)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x, emb)), emb)


class Decoder(nn.Module):
    """One level on the way up: concatenate the skip, residual block, attention, double the resolution (not at the top).

    The convolution to the next level's channels comes before the upsampling: nearest upsampling copies pixels, and a
    1x1 convolution on a quarter of them gives the same values.
    """

    def __init__(self, c_in: int, c_skip: int, c_out: int, c_up: int | None, emb: int, attention: bool):
        super().__init__()
        self.block = ResBlock(c_in + c_skip, c_out, emb)
        self.attention = Attention(c_out) if attention else nn.Identity()
        self.up = nn.Conv2d(c_out, c_up, 1) if c_up else None

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        x = self.attention(self.block(torch.cat([x, skip], dim=1), emb))
        return x if self.up is None else functional.interpolate(self.up(x), scale_factor=2.0, mode="nearest")


class UNet(nn.Module):
    """The raw network F(x_in, c_noise) of the EDM denoiser; about two million parameters.

    x_in = c_in(sigma) x: (B, 1, 28, 28) float; c_noise = ln(sigma)/4: (B,) or (). Returns F, shaped like x_in.
    """

    sigma_data = SIGMA_DATA
    image_shape = IMAGE_SHAPE

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 128), emb: int = 112, blocks: int = 1):
        super().__init__()
        c0, c1, c2 = channels
        self.noise = NoiseEmbedding(emb)
        self.stem = nn.Conv2d(1, c0, 3, padding=1)
        self.enc = nn.ModuleList(
            [
                Encoder(c0, c0, emb, blocks, down=False, attention=False),
                Encoder(c0, c1, emb, blocks, down=True, attention=False),
                Encoder(c1, c2, emb, blocks, down=True, attention=True),
            ]
        )
        self.mid = Middle(c2, emb)
        self.dec = nn.ModuleList(
            [
                Decoder(c0, c0, c0, None, emb, attention=False),
                Decoder(c1, c1, c1, c0, emb, attention=False),
                Decoder(c2, c2, c2, c1, emb, attention=True),
            ]
        )
        self.head = nn.Sequential(nn.GroupNorm(c0 // 8, c0), nn.SiLU(), nn.Conv2d(c0, 1, 3, padding=1))
        nn.init.zeros_(self.head[2].weight)
        nn.init.zeros_(self.head[2].bias)

    def encode(self, x: Tensor, c_noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the encoder: h (B, c2, 7, 7), the outputs of enc.0 to enc.2 (h is the last), the embedding (B, emb)."""
        return self._encode(x, self.noise(c_noise.to(x.dtype).expand(x.shape[0])))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        h, skips = self.stem(x), []
        for level in self.enc:
            h = level(h, emb)
            skips.append(h)
        return h, skips, emb

    def decode(self, h: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Run the rest: what `encode` returned, edited or not, to F (B, 1, 28, 28). Changes none of its arguments."""
        h = self.mid(h, emb)
        for i in (2, 1, 0):
            h = self.dec[i](h, skips[i], emb)
        return self.head(h)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.decode(*self.encode(x, c_noise))


class ConditionalUNet(UNet):
    """The network told a class: F(x_in, c_noise, label). For classifier-free guidance.

    label: (B,) int64 in 0..classes-1, or `unconditional` = classes, or None for all unconditional. A class is a vector
    added to the embedding of the noise level. The vectors start at zero, so that a copy of the unconditional network is
    that network until it is trained on.
    """

    def __init__(self, classes: int = 10, emb: int = 112, **options):
        super().__init__(emb=emb, **options)
        self.unconditional = classes
        self.label = nn.Embedding(classes + 1, emb)
        nn.init.zeros_(self.label.weight)

    def encode(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """As `UNet.encode`, for labels (B,)."""
        if label is None:
            label = torch.full((x.shape[0],), self.unconditional, device=x.device)
        return self._encode(x, self.noise(c_noise.to(x.dtype).expand(x.shape[0])) + self.label(label))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decode(*self.encode(x, c_noise, label))


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, each shaped and typed like sigma."""
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / total**2, sigma * SIGMA_DATA / total, 1 / total, sigma.log() / 4


def denoise(net: nn.Module, x: Tensor, sigma: Tensor | float) -> Tensor:
    """The denoised estimate D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), shaped like x (B, 1, 28, 28).

    sigma: a number, or a tensor () or (B,), positive.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[0])
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    shape = (-1, 1, 1, 1)
    return c_skip.view(shape) * x + c_out.view(shape) * net(c_in.view(shape) * x, c_noise)


def load(path: str | Path | None = None, device: torch.device | str | None = None) -> UNet:
    """The trained U-Net: fp16 safetensors (the committed file unless `path` says another) into fp32, in eval mode."""
    return _loaded(UNet(), WEIGHTS / "unet.safetensors" if path is None else path, device)


def load_conditional(path: str | Path | None = None, device: torch.device | str | None = None) -> ConditionalUNet:
    """The class-conditional copy of it, likewise."""
    return _loaded(ConditionalUNet(), WEIGHTS / "unet_cond.safetensors" if path is None else path, device)


def _loaded(net, path, device):
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return net.to(device).eval().requires_grad_(False)
