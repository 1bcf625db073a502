"""OpenAI's U-Nets: improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672) and ADM (the same, arXiv:2105.05233).

Parameters have the names of the published networks (github.com/openai/improved-diffusion and guided-diffusion), so that their
state dicts load; how wide and deep one is, is read off names and shapes (`config_of`), all but the heads of its attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Config", "OpenAIUNet", "config_of"]


@dataclass(frozen=True)
class Config:
    """channels, out: of the images, and twice that where the variance is learnt; width: channels at multiplier 1; mult: one a
    level; blocks: residual blocks a level; attention: levels with self-attention; scale_shift: whether the time scales the second
    norm; residual_resampling: whether blocks halve and double the size (ADM) or convolutions do; heads of attention, or
    head_channels of each."""

    channels: int
    out: int
    width: int
    mult: tuple[float, ...]
    blocks: int
    attention: tuple[int, ...]
    scale_shift: bool = True
    residual_resampling: bool = False
    heads: int | None = 4
    head_channels: int | None = None


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def resized(x: Tensor, resample: str) -> Tensor:
    """Twice the size by repetition, half by the mean of four."""
    if resample == "up":
        return functional.interpolate(x, scale_factor=2, mode="nearest")
    return functional.avg_pool2d(x, 2) if resample == "down" else x


class ResBlock(nn.Module):
    def __init__(self, config: Config, c_in: int, c_out: int, resample: str = ""):
        super().__init__()
        self.scale_shift, self.resample = config.scale_shift, resample
        self.in_layers = nn.Sequential(group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.width, c_out * (2 if config.scale_shift else 1)))
        # Dropout of training stood at place 2.
        self.out_layers = nn.Sequential(group_norm(c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(resized(silu(norm(x)), self.resample))
        time = self.emb_layers(emb)[:, :, None, None]
        norm, silu, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = time.chunk(2, 1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + time)
        return self.skip_connection(resized(x, self.resample)) + conv(silu(h))


class Attention(nn.Module):
    """Self-attention; of each head's channels the first third is q, then k, then v."""

    def __init__(self, config: Config, channels: int):
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        if not self.heads or channels % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {channels} channels of attention")
        self.norm = group_norm(channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).unbind(2)
        a = functional.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return (flat + self.proj_out(a.flatten(1, 2))).view(x.shape)


class Resample(nn.Module):
    """A convolution that halves (`op`), or one behind doubling (`conv`)."""

    def __init__(self, channels: int, resample: str):
        super().__init__()
        self.resample = resample
        if resample == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) if self.resample == "down" else self.conv(resized(x, "up"))


class Layers(nn.Sequential):
    """Modules in turn, of which residual blocks take the time too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class OpenAIUNet(nn.Module):
    """The network's output (B, out, H, W) for x (B, channels, H, W) and timesteps (B,), fractional ones too.

    Modules: `input_blocks.N`, `middle_block`, `output_blocks.N`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        emb, levels = 4 * config.width, range(len(config.mult))
        widths = [int(config.width * mult) for mult in config.mult]
        self.time_embed = nn.Sequential(nn.Linear(config.width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def layers(level, c_in, *more):
            attention = [Attention(config, widths[level])] if level in config.attention else []
            return Layers(ResBlock(config, c_in, widths[level]), *attention, *more)

        def resample(level, way):
            c = widths[level]
            return ResBlock(config, c, c, way) if config.residual_resampling else Resample(c, way)

        c, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(config.channels, c, 3, padding=1))])
        for level in levels:
            for _ in range(config.blocks):
                self.input_blocks.append(layers(level, c))
                c = widths[level]
                skips.append(c)
            if level != levels[-1]:
                self.input_blocks.append(Layers(resample(level, "down")))
                skips.append(c)
        self.middle_block = Layers(ResBlock(config, c, c), Attention(config, c), ResBlock(config, c, c))
        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for i in range(config.blocks + 1):
                more = [resample(level, "up")] if level and i == config.blocks else []
                self.output_blocks.append(layers(level, c + skips.pop(), *more))
                c = widths[level]
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), nn.Conv2d(c, config.out, 3, padding=1))
        self.last_of_encoder = f"input_blocks.{len(self.input_blocks) - 1}"

    def _time(self, timesteps: Tensor) -> Tensor:
        half = self.config.width // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angle = torch.outer(timesteps.to(torch.float32), (-math.log(10000) * exponents).exp())
        return self.time_embed(torch.cat([angle.cos(), angle.sin()], 1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb, skips = self._time(timesteps), []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return self.out(x)


def config_of(state: Mapping[str, Tensor], heads: int | None = None, head_channels: int | None = None) -> Config:
    """What network a state dict is of.

    heads, head_channels: the weights do not show them. Neither given: 64 channels a head where blocks resample, as the published
    ADM of 256 pixels has them, and 4 heads otherwise, as improved DDPM has. Raises ``ValueError`` for another network.
    """
    if "input_blocks.0.0.weight" not in state or "time_embed.0.weight" not in state:
        raise ValueError("no input_blocks.0.0.weight: not a U-Net of OpenAI")
    if "label_emb.weight" in state:
        raise ValueError("it is class-conditional (label_emb.weight): an unconditional network is taken")
    outputs = 1 + max(int(m[1]) for m in (re.match(r"output_blocks\.(\d+)\.", name) for name in state) if m)

    def doubles(j):
        """An output block that ends a level: with a convolution behind doubling, or a second residual block that doubles."""
        own = [name for name in state if name.startswith(f"output_blocks.{j}.")]
        return any(re.search(r"\.[12]\.(conv|in_layers\.2)\.weight$", name) for name in own)

    ends = [j for j in range(outputs) if doubles(j)]
    levels = 1 + len(ends)
    blocks = outputs // levels - 1
    convolved = any(name.endswith(".conv.weight") for name in state)
    width = state["time_embed.0.weight"].shape[1]
    first = [1 + level * (blocks + 1) for level in range(levels)]  # input block of each level
    missing = [f"input_blocks.{i}.0.in_layers.2.weight" for i in first if f"input_blocks.{i}.0.in_layers.2.weight" not in state]
    if missing:
        raise ValueError(f"no {missing[0]}: its blocks are not those of improved DDPM or ADM")
    widths = [state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first]
    if heads is None and head_channels is None:
        heads, head_channels = (4, None) if convolved else (None, 64)
    return Config(
        channels=state["input_blocks.0.0.weight"].shape[1],
        out=state["out.2.weight"].shape[0],
        width=width,
        mult=tuple(c / width for c in widths),
        blocks=blocks,
        attention=tuple(level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state),
        scale_shift=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        residual_resampling=not convolved,
        heads=heads,
        head_channels=head_channels,
    )
