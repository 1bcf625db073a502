"""Activations: the right ones, of the network as a sampler calls it, which is left as it was."""

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.steering.collect import activation, collect, find_block

from .networks import BLOCKS, closure, randomised, twice, unet_2d, unet_2d_condition, zoo

EDM = {"schedule": "edm", "prediction": "edm", "sigma_data": 0.7}


def images(count, seed=5, shape=(1, 16, 16)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def by_hand(network, block, call, x0, sigma, seeds):
    """The activations of one batch through a hook of its own."""
    seen = []
    module = network.get_submodule(block)
    handle = module.register_forward_hook(lambda m, a, out: seen.append(activation(block, out).float().clone()))
    with torch.no_grad():
        call(x0 + sigma * fd.randn(x0.shape, seeds=seeds))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("block", [b for b in BLOCKS["zoo"]])
def test_an_edm_network_is_called_as_its_denoiser_calls_it(block):
    from benchmarks.zoo.unet import denoise

    network, x0 = zoo(), images(6)
    kept = collect(network, block, x0, 0.5, **EDM, batch_size=6, seeds=9)
    expected = by_hand(network, block, lambda x: denoise(network, x, 0.5), x0, 0.5, range(9, 15))
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
    own = collect(network, block, x0, 0.5, call=denoise, batch_size=6, seeds=9)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize("block", BLOCKS["UNet2DModel"])
def test_a_vp_network_of_diffusers(block):
    network, x0 = unet_2d(), images(5)
    schedule = fd.schedules.VP.linear()
    sigma = float(schedule.sigma_ve(300))
    alpha = float(schedule.alpha_at(sigma))
    kept = collect(network, block, x0, sigma, schedule=schedule, batch_size=5)
    expected = by_hand(network, block, lambda x: network(alpha * x, torch.full((5,), 300.0)), x0, sigma, range(5))
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_a_conditional_network_by_a_call_of_its_own():
    network, x0 = unet_2d_condition(), images(3)
    model = closure(network)

    def call(network, x, sigma):
        return model(x, 1000 * sigma / (1 + sigma))

    kept = collect(network, "down_blocks.1", x0, 0.5, call=call)
    expected = by_hand(network, "down_blocks.1", lambda x: call(network, x, torch.full((3,), 0.5)), x0, 0.5, range(3))
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_a_flow_is_called_with_alpha_x_and_t():
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Conv2d(1, 2, 1)

        def forward(self, x, t):
            seen.append((x.clone(), t.clone()))
            return self.block(x)

    x0 = images(2)
    collect(Probe(), "block", x0, 0.25, schedule="flow", seeds=3)
    x, t = seen[0]
    torch.testing.assert_close(t, torch.full((2,), 0.2))
    torch.testing.assert_close(x, 0.8 * (x0 + 0.25 * fd.randn(x0.shape, seeds=3)))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_of_any_size_give_the_same(size):
    network, x0 = zoo(), images(7)
    whole = collect(network, "enc.2", x0, 1.0, **EDM, batch_size=7)
    torch.testing.assert_close(collect(network, "enc.2", x0, 1.0, **EDM, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    some = collect(network, "enc.2", x0[2:4], 1.0, **EDM, batch_size=1, seeds=[2, 3])
    torch.testing.assert_close(some, whole[2:4], rtol=1e-4, atol=1e-5)


def test_what_lies_behind_the_block_runs_once():
    """The first batch runs to the end, to see that the block runs once; the others stop at the block."""
    network, ran = zoo(), []
    handle = network.head.register_forward_hook(lambda *a: ran.append(1))
    collect(network, "enc.1", images(8), 0.5, **EDM, batch_size=2)
    handle.remove()
    assert len(ran) == 1


def test_the_network_is_left_as_it_was():
    network = zoo().train()
    network.enc.eval()
    modes = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    seen = []
    handle = network.mid.register_forward_hook(lambda m, a, out: seen.append((m.training, torch.is_grad_enabled())))
    kept = collect(network, "dec.2", images(2), 0.5, **EDM)
    handle.remove()
    assert seen == [(False, False)] and not kept.requires_grad
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks for m in network.modules())


class Broken(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.block, self.what = nn.Conv2d(1, 2, 3, padding=1), what

    def forward(self, x, t):
        h = self.block(x)
        if self.what == "raise":
            raise RuntimeError("out of order")
        return h


@pytest.mark.parametrize("what, error, message", [
    ("raise", RuntimeError, "out of order"),
    ("nan", ValueError, "activation of image 1 is not finite"),
])
def test_hooks_go_whatever_happens(what, error, message):
    network = randomised(Broken(what))
    if what == "nan":
        def poison(module, args, out):
            out[1] = torch.nan

        network.block.register_forward_hook(poison)
    network.train()
    before = len(network.block._forward_hooks)
    with pytest.raises(error, match=message):
        collect(network, "block", images(4), 0.5, **EDM)
    assert len(network.block._forward_hooks) == before and network.block.training


def test_a_network_in_16_bits():
    network, x0 = zoo(), images(3)
    kept = collect(network.to(torch.bfloat16), "enc.2", x0, 0.5, **EDM)
    assert kept.dtype == torch.float32
    full = collect(zoo(), "enc.2", x0, 0.5, **EDM)
    assert float((kept - full).norm() / full.norm()) < 0.1


def test_an_activation_that_is_changed_in_place_later():
    network = randomised(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)))
    kept = collect(network, "0", images(2), 0.5, call=lambda network, x, sigma: network(x))
    assert float(kept.min()) < 0


def test_blocks_that_are_not_there():
    network = zoo()
    with pytest.raises(ValueError, match=r"block 'enc2' is not in UNet: did you mean 'enc\.2'"):
        collect(network, "enc2", images(2), 0.5, **EDM)
    with pytest.raises(ValueError, match="did you mean 'down_blocks.2'"):
        find_block(unet_2d(), "down_block.2")
    with pytest.raises(ValueError, match="it has no blocks"):
        find_block(nn.ReLU(), "enc.2")
    with pytest.raises(ValueError, match="'' is not in UNet"):
        find_block(network, "")
    with pytest.raises(TypeError, match="block is 2"):
        find_block(network, 2)
    with pytest.raises(TypeError, match="network is function"):
        find_block(lambda x, t: x, "enc.2")


def test_blocks_that_give_no_activation():
    network = twice()
    with pytest.raises(ValueError, match="'block' ran 2 times"):
        collect(network, "block", images(2), 0.5, call=lambda network, x, sigma: network(x))
    with pytest.raises(ValueError, match="'head' ran 0 times"):
        collect(network, "head", images(2), 0.5, call=lambda network, x, sigma: network.stem(x))
    with pytest.raises(ValueError, match="1 activations for 2 images"):
        collect(network, "stem", images(2), 0.5, call=lambda network, x, sigma: network.stem(x[:1]))

    class Names(nn.Module):
        def forward(self, x):
            return {"h": x}

    with pytest.raises(TypeError, match="block '0' returned dict"):
        collect(nn.Sequential(Names()), "0", images(2), 0.5, call=lambda network, x, sigma: network(x))


@pytest.mark.parametrize("change, error, message", [
    ({"images": images(3).index_fill(0, torch.tensor([1]), float("nan"))}, ValueError, "image 1 holds NaN"),
    ({"images": torch.zeros(0, 1, 16, 16)}, ValueError, "at least one image"),
    ({"images": torch.zeros(2, 1, 16, 16, dtype=torch.uint8)}, TypeError, "images is torch.uint8"),
    ({"images": [1.0]}, TypeError, "images is list"),
    ({"sigma": 0.0}, ValueError, "sigma is 0.0: a number above 0"),
    ({"sigma": float("nan")}, ValueError, "sigma is nan"),
    ({"sigma": "0.5"}, TypeError, "sigma is '0.5'"),
    ({"seeds": [1, 2]}, ValueError, "seeds has 2 entries"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"schedule": None, "prediction": None, "sigma_data": None}, TypeError, "how the network is called is missing"),
    ({"schedule": "edn"}, ValueError, "did you mean 'edm'"),
    ({"call": lambda *a: None}, TypeError, "either by call"),
])
def test_wrong_input_is_refused_before_the_network_runs(change, error, message):
    network, ran = zoo(), []
    network.register_forward_pre_hook(lambda *a: ran.append(1))
    given = {"images": images(3), "sigma": 0.5, **EDM, **change}
    with pytest.raises(error, match=message):
        collect(network, "enc.2", given.pop("images"), given.pop("sigma"), **given)
    assert not ran
