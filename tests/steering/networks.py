"""Small networks with random weights, for tests of what edits and shares their activations."""

import torch
from torch import nn


def randomised(network, seed=0):
    """Every parameter drawn anew: layers that start at zero would hide what lies before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.ndim < 2 else 0.7 / max(p[0].numel(), 1) ** 0.5))
    return network.eval()


def zoo():
    from benchmarks.zoo.unet import UNet

    return randomised(UNet(channels=(8, 16, 32), emb=16))


def unet_2d():
    from diffusers import UNet2DModel

    return randomised(UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")))


def unet_2d_condition():
    from diffusers import UNet2DConditionModel

    return randomised(UNet2DConditionModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))


def conv(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def plain():
    return randomised(nn.Sequential(conv(1, 4), nn.ReLU(inplace=True), conv(4, 4), nn.SiLU(), conv(4, 1)))


class Twice(nn.Module):
    """One block called twice in an evaluation."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv(1, 4), conv(4, 4), conv(4, 1)

    def forward(self, x, t=None):
        h = self.block(self.stem(x).tanh())
        return self.head(self.block(h.relu()) + h)


def twice():
    return randomised(Twice())


def closure(network, conditions=None):
    """network(x, t) for any of them; conditions: (B, L, 12) for the conditional one."""
    name = type(network).__name__
    if name == "UNet2DModel":
        return lambda x, t: network(x, t).sample
    if name == "UNet2DConditionModel":
        given = torch.linspace(-1, 1, 3 * 12).view(1, 3, 12) if conditions is None else conditions
        return lambda x, t: network(x, t, encoder_hidden_states=given.to(x.dtype).expand(len(x), -1, -1), return_dict=False)[0]
    if name == "Sequential":
        return lambda x, t: network(x)
    return lambda x, t: network(x, t)


MAKERS = {"zoo": zoo, "UNet2DModel": unet_2d, "UNet2DConditionModel": unet_2d_condition, "Sequential": plain, "twice": twice}
CROSS_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
# blocks of each, early and late, whole ones and nested ones; the first is the one that a user would edit
BLOCKS = {
    "zoo": ["enc.2", "enc.0", "mid", "enc.1.blocks.0.conv1", "dec.2", "noise"],
    "UNet2DModel": ["down_blocks.2", "down_blocks.1.resnets.0", "mid_block", "up_blocks.0.resnets.1", "conv_in"],
    "UNet2DConditionModel": ["down_blocks.1", "down_blocks.0.attentions.0", CROSS_ATTENTION, "mid_block.resnets.1",
                             "conv_norm_out"],
    "Sequential": ["2", "0", "1"],
    "twice": ["block", "stem"],
}


def directions(shape, count=1, seed=0):
    """(count, *shape), each of norm 1."""
    v = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return v / v.flatten(1).norm(dim=1).view(-1, *(1,) * len(shape))


def probe(model, network, block, x, t):
    """A direction for the activation of a block in model(x, t)."""
    from fastdiff.steering.collect import activation

    seen = []
    handle = network.get_submodule(block).register_forward_hook(lambda m, a, out: seen.append(activation(block, out).shape[1:]))
    with torch.no_grad():
        model(x, t)
    handle.remove()
    return directions(seen[0], seed=3)[0]


# ---- evaluations, one and two

MODES = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}


def both(branch, model, edit, *args):
    """eps0 and eps1 with the encoder shared."""
    with branch.first():
        first = model(*args)
    with branch.second(), edit():
        second = model(*args)
    return first, second


def whole(model, edit, *args):
    """eps0 and eps1, two whole evaluations."""
    first = model(*args)
    with edit():
        return first, model(*args)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, (tuple, list)) else torch.equal(a, b)
