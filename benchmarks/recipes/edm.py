"""The U-Nets of EDM (Karras et al. 2022, arXiv:2206.00364, table 7): DDPM++, NCSN++ and ADM, as plain modules.

Parameters have the names of the published networks (github.com/NVlabs/edm), so that their state dicts load; which of the
three it is, and how wide and deep, is read off names and shapes (`config_of`). `EDMUNet` is F of

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise),    c_noise = ln(sigma) / 4          (equation 7 and table 1)

what is around it is `fd.plan(schedule="edm", prediction="edm", sigma_data=0.5)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Config", "EDMUNet", "config_of"]


@dataclass(frozen=True)
class Config:
    """size: of the images; channels: in and out; width: channels at multiplier 1; mult: one a level; blocks: residual blocks a
    level; attention: sizes with self-attention; kind: "ddpmpp", "ncsnpp" or "adm"; labels, augment: sizes of the inputs for a
    class and for augmentation, 0: none."""

    size: int
    channels: int
    width: int
    mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    kind: str
    labels: int = 0
    augment: int = 0

    @property
    def taps(self) -> tuple[int, ...]:
        """Of the filter that resamples, before it is normalised."""
        return (1, 3, 3, 1) if self.kind == "ncsnpp" else (1, 1)


class Conv(nn.Module):
    """Convolution of kernel 1 or 3 (0: none), after halving or doubling of the size by a separable filter.

    filter_first: "down" filters before the convolution, as everywhere but in the residual shortcuts of NCSN++.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, resample: str = "", taps=(1, 1), filter_first: bool = True):
        super().__init__()
        self.resample, self.filter_first, self.kernel = resample, filter_first, kernel
        if kernel:
            self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(c_out))
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if resample:
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(f, f) / f.sum() ** 2)[None, None])

    def _filtered(self, x: Tensor, padding: int) -> Tensor:
        f, channels = self.resample_filter, x.shape[1]
        if self.resample == "up":  # zeros between the pixels, and the filter with 4 times its weight
            each = 4 * f.expand(channels, 1, -1, -1)
            return functional.conv_transpose2d(x, each, stride=2, padding=padding, groups=channels)
        return functional.conv2d(x, f.expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        reach = (self.resample_filter.shape[-1] - 1) // 2 if self.resample else 0
        if not self.filter_first:  # padded once for both
            x = functional.conv2d(x, self.weight, padding=self.kernel // 2 + reach)
            return self._filtered(x, 0) + self.bias.view(-1, 1, 1)
        if self.resample:
            x = self._filtered(x, reach)
        return functional.conv2d(x, self.weight, self.bias, padding=self.kernel // 2) if self.kernel else x


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class Block(nn.Module):
    """Residual block, and self-attention behind it. ADM scales and shifts the second norm by the noise level; the other two add
    it before the norm, and divide each sum of two branches by sqrt(2)."""

    def __init__(self, config: Config, c_in: int, c_out: int, emb: int, resample: str = "", attention: bool = False):
        super().__init__()
        self.adm = config.kind == "adm"
        self.c_in, self.heads = c_in, (c_out // 64 if self.adm else 1) if attention else 0
        self.gain = 1.0 if self.adm else math.sqrt(0.5)
        eps = 1e-5 if self.adm else 1e-6
        self.norm0 = norm(c_in, eps)
        self.conv0 = Conv(c_in, c_out, 3, resample, config.taps)
        self.affine = nn.Linear(emb, c_out * (2 if self.adm else 1))
        self.norm1 = norm(c_out, eps)
        self.conv1 = Conv(c_out, c_out, 3)
        self.skip = None
        if c_in != c_out or resample:
            self.skip = Conv(c_in, c_out, 0 if self.adm and c_in == c_out else 1, resample, config.taps)
        if self.heads:
            self.norm2 = norm(c_out, eps)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        noise = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = noise.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + noise)
        x = self.gain * ((x if self.skip is None else self.skip(x)) + self.conv1(functional.silu(h)))
        if not self.heads:
            return x
        # Of each head's channels every third is of q, of k, of v.
        q, k, v = self.qkv(self.norm2(x)).reshape(len(x), self.heads, x.shape[1] // self.heads, 3, -1).unbind(3)
        a = functional.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return self.gain * (x + self.proj(a.reshape(x.shape)))


class Positions(nn.Module):
    """cos and sin of c_noise at falling frequencies, 1 to 1e-4; ADM's stop one before that."""

    def __init__(self, width: int, to_the_end: bool):
        super().__init__()
        half = width // 2
        frequencies = 1e-4 ** (torch.arange(half, dtype=torch.float32) / (half - int(to_the_end)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.outer(c_noise, self.frequencies)
        return angle.cos(), angle.sin()


class Fourier(nn.Module):
    """cos and sin at random frequencies, which are part of the checkpoint."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.outer(c_noise, 2 * math.pi * self.freqs)
        return angle.cos(), angle.sin()


class EDMUNet(nn.Module):
    """F(c_in x, c_noise). Modules: `enc` and `dec`, by size and place, as `enc.8x8_block3`, the last of a 32-pixel encoder.

    A network that was trained with classes is called without one, as its authors' code does where none is given.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        adm, emb = config.kind == "adm", 4 * config.width
        inner = config.width * (2 if config.kind == "ncsnpp" else 1)
        self.map_noise = Fourier(inner) if config.kind == "ncsnpp" else Positions(inner, not adm)
        if config.labels:
            self.map_label = nn.Linear(config.labels, emb if adm else inner, bias=not adm)
        if config.augment:  # augmentations of training; none in sampling, so that it is not called
            self.map_augment = nn.Linear(config.augment, inner, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(inner, emb), nn.Linear(emb, emb)
        self.last_of_encoder = self._build(config, emb)

    def _build(self, config: Config, emb: int) -> str:
        adm, ncsnpp = config.kind == "adm", config.kind == "ncsnpp"
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, c = [], config.width * (config.mult[0] if adm else 1)
        for level, mult in enumerate(config.mult):
            size, here = config.size >> level, config.width * mult
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv(config.channels, c, 3)
            else:
                self.enc[f"{name}_down"] = Block(config, c, c, emb, "down")
                if ncsnpp:  # the image, or what became of it one level before
                    before = config.channels if level == 1 else c
                    self.enc[f"{name}_aux_residual"] = Conv(before, c, 3, "down", config.taps, filter_first=False)
            skips.append(c)
            for i in range(config.blocks):
                self.enc[f"{name}_block{i}"] = Block(config, c, here, emb, attention=size in config.attention)
                c = here
                skips.append(c)
        last = f"enc.{list(self.enc)[-1]}"
        for level, mult in reversed(list(enumerate(config.mult))):
            size, here = config.size >> level, config.width * mult
            name = f"{size}x{size}"
            if level == len(config.mult) - 1:
                self.dec[f"{name}_in0"] = Block(config, c, c, emb, attention=True)
                self.dec[f"{name}_in1"] = Block(config, c, c, emb)
            else:
                self.dec[f"{name}_up"] = Block(config, c, c, emb, "up")
            for i in range(config.blocks + 1):
                attention = size in config.attention and (adm or i == config.blocks)
                self.dec[f"{name}_block{i}"] = Block(config, c + skips.pop(), here, emb, attention=attention)
                c = here
        if adm:
            self.out_norm, self.out_conv = norm(c, 1e-5), Conv(c, config.channels, 3)
        else:
            self.dec[f"{name}_aux_norm"], self.dec[f"{name}_aux_conv"] = norm(c, 1e-6), Conv(c, config.channels, 3)
        return last

    def _embedding(self, c_noise: Tensor) -> Tensor:
        adm = self.config.kind == "adm"
        cos, sin = self.map_noise(c_noise.to(torch.float32))
        emb = torch.cat([cos, sin] if adm else [sin, cos], 1)
        label = self.map_label(emb.new_zeros(1, self.config.labels)) if self.config.labels else 0.0
        if adm:
            return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))) + label)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb + label))))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """x: (B, channels, size, size), c_in times the noisy image; c_noise: (B,)."""
        emb, image, skips = self._embedding(c_noise), x, []
        for name, module in self.enc.items():
            if "aux" in name:
                x = skips[-1] = image = (x + module(image)) * math.sqrt(0.5)
            else:
                x = module(x, emb) if isinstance(module, Block) else module(x)
                skips.append(x)
        for name, module in self.dec.items():
            if isinstance(module, Block):
                x = module(x if x.shape[1] == module.c_in else torch.cat([x, skips.pop()], 1), emb)
            elif "aux_norm" in name:
                x = functional.silu(module(x))
            else:
                x = module(x)
        return self.out_conv(functional.silu(self.out_norm(x))) if self.config.kind == "adm" else x


def config_of(state: Mapping[str, Tensor]) -> Config:
    """What network a state dict is of. Raises ``ValueError`` for one that is not of EDM's three."""
    sizes = sorted({int(m[1]) for m in (re.match(r"enc\.(\d+)x\1_", name) for name in state) if m}, reverse=True)
    if not sizes or f"enc.{sizes[0]}x{sizes[0]}_conv.weight" not in state:
        raise ValueError("no convolution enc.SIZExSIZE_conv: not a U-Net of EDM")
    if any(part in name for name in state for part in ("aux_down", "aux_skip", "aux_up")):
        raise ValueError("it has skip connections beside the U-Net (aux_skip, aux_up), which no published network of EDM has")
    largest = f"{sizes[0]}x{sizes[0]}"
    adm = "out_conv.weight" in state
    kind = "adm" if adm else "ncsnpp" if "map_noise.freqs" in state else "ddpmpp"
    width = state["map_layer0.weight"].shape[0] // 4

    def blocks(size):
        return sum(bool(re.fullmatch(rf"enc\.{size}x{size}_block\d+\.norm0\.weight", name)) for name in state)

    def width_at(size):
        return state[f"enc.{size}x{size}_block0.conv1.weight"].shape[0]

    first = state[f"enc.{largest}_conv.weight"]
    return Config(
        size=sizes[0],
        channels=first.shape[1],
        width=width,
        mult=tuple(width_at(size) // width for size in sizes),
        blocks=blocks(sizes[0]),
        attention=tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in state),
        kind=kind,
        labels=state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
        augment=state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
    )
