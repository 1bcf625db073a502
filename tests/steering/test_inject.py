"""The edit at a block: h + sum w |h|_F v, wherever the block's output goes, and nothing left behind."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fastdiff.steering.inject import Edit, edited
from steering.networks import MAKERS, closure, directions, probe, zoo


def formula(h, terms):
    """h + sum w |h|_F v, in float64. terms: (w (B,), v) each."""
    h = h.double()
    norm = h.flatten(1).norm(dim=1)
    return h + sum((torch.as_tensor(w, dtype=torch.float64) * norm).view(-1, *(1,) * v.ndim) * v.double() for w, v in terms)


class Block(nn.Module):
    """Returns what it is given, in the form that `make` says."""

    def __init__(self, make=lambda h: h):
        super().__init__()
        self.make = make

    def forward(self, h):
        return self.make(h)


class Net(nn.Module):
    """A stem, a block, and what takes its output: `use` says how."""

    def __init__(self, make=lambda h: h, use=lambda n, out: out):
        super().__init__()
        self.stem, self.block, self.after, self.later = nn.Identity(), Block(make), nn.Identity(), nn.Identity()
        self.use = use

    def forward(self, x, t=None):
        return self.use(self, self.block(self.stem(x)))


# ---- the edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7, 7), (6,), (3, 40)])
def test_the_formula(shape, dtype):
    h = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = directions(shape, 2)
    net, before = Net(), h.clone()
    with edited(net, "block", [a, b], [0.7, torch.tensor([0.0, 0.5, -1.0, 0.0])]):
        out = net(h)
    expected = formula(h, [(0.7, a), (torch.tensor([0.0, 0.5, -1.0, 0.0]), b)])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert out.dtype == dtype and torch.equal(h, before)


def test_a_weight_of_zero_changes_no_bit():
    h = torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(1))
    h[0, 0, 0, :2] = torch.tensor([-0.0, float("inf")])
    v = directions((5, 7, 7))[0]
    net = Net()
    with edited(net, "block", v, torch.tensor([0.0, 0.5, 0.0, -0.0])):
        out = net(h)
    same = (out.view(torch.int32) == h.view(torch.int32)).flatten(1).all(1)
    assert same.tolist() == [True, False, True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout):
    h = torch.randn(3, 4, 6, 6).contiguous(memory_format=layout)
    v = directions((4, 6, 6))[0]
    expected = formula(h, [(0.3, v)])
    for given in (h, h[::2], torch.randn(1, 4, 6, 6).expand(3, -1, -1, -1), torch.randn(3, 4, 6, 8)[..., 1:7]):
        d = directions(given.shape[1:])[0]
        net = Net()
        with edited(net, "block", d, 0.3):
            torch.testing.assert_close(net(given).double(), formula(given, [(0.3, d)]), rtol=1e-5, atol=1e-5)
    net = Net()
    with edited(net, "block", v, 0.3):
        out = net(h)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=layout)


def test_copies_of_a_batch_take_the_weights_in_turn():
    h, v = torch.randn(6, 8), directions((8,))[0]
    weight = torch.tensor([0.0, 1.0, 2.0])
    net = Net()
    with edited(net, "block", v, weight):
        out = net(h)
    torch.testing.assert_close(out.double(), formula(h, [(weight.repeat(2), v)]), rtol=1e-5, atol=1e-6)
    assert torch.equal(out[[0, 3]], h[[0, 3]])


def test_the_gradients_are_those_of_the_formula():
    h, (a, b) = torch.randn(3, 4, 5), directions((4, 5), 2)
    weight = torch.tensor([[0.5, -0.3], [0.0, 0.0], [2.0, 1.0]])
    target = torch.randn(3, 4, 5)
    net, found = Net(), []
    for out in ("op", "formula"):
        z, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        if out == "op":
            with Edit(net, "block", torch.stack([a, b])).at(w):
                y = net(z)
        else:
            y = formula(z, [(w[:, 0], a), (w[:, 1], b)])
        found.append(torch.autograd.grad(((y - target) ** 3).sum(), (z, w)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def pair(h):
    return h, (h * 2, h)


def use_pair(n, out):
    h, skips = out
    return torch.stack([n.after(h), n.later(skips[-1]), skips[0] / 2])


def use_tensor(n, h):
    return torch.stack([n.after(h), n.later(h), h])


@pytest.mark.parametrize("make,use,skip,changed", [
    (lambda h: h, use_tensor, True, [True, True, True]),
    (lambda h: h, use_tensor, False, [True, False, False]),
    (pair, use_pair, True, [True, True, False]),
    (pair, use_pair, False, [True, False, False]),
    (lambda h: (h, h * 2), lambda n, out: torch.stack([n.after(h := out[0]), n.later(h), h]), False, [True, False, False]),
    (lambda h: h, lambda n, h: torch.stack([n.after(input=h), n.later(h), h]), False, [True, False, False]),
])
def test_the_skip_copy(make, use, skip, changed):
    net, h, v = Net(make, use), torch.randn(2, 8), directions((8,))[0]
    for _ in range(2):  # who takes it is looked for in the first evaluation only
        with edited(net, "block", v, 0.5, skip=skip):
            out = net(h)
        assert [not torch.equal(o, h) for o in out] == changed
        for o, is_changed in zip(out, changed):
            if is_changed:
                torch.testing.assert_close(o.double(), formula(h, [(0.5, v)]), rtol=1e-5, atol=1e-6)


def test_the_types_of_outputs_stay():
    net = Net(lambda h: (h, [h, {"h": h}]), lambda n, out: out)
    with edited(net, "block", directions((8,))[0], 0.5):
        out = net(torch.randn(2, 8))
    assert type(out) is tuple and type(out[1]) is list and out[1][0] is out[0] and out[1][1]["h"] is out[0]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_skip_copy_of_the_zoo(level, skip):
    network, x, t = zoo(), torch.randn(2, 1, 16, 16), torch.full((2,), 0.5)
    v = probe(closure(network), network, f"enc.{level}", x, t)
    with torch.no_grad():
        emb, h, skips = network.noise(t), network.stem(x), []
        for i in range(3):
            h = network.enc[i](h, emb)
            skips.append(h)
            if i == level:
                h = Edit(network, f"enc.{level}", v[None])(h, torch.full((2, 1), 0.5))
                skips[-1] = h if skip else skips[-1]
        expected = network.decode(h, skips, emb)
        for _ in range(2):
            with edited(network, f"enc.{level}", v, 0.5, skip=skip):
                assert torch.equal(network(x, t), expected)


@pytest.mark.parametrize("name,block", [("UNet2DModel", "down_blocks.2"), ("UNet2DModel", "down_blocks.0"),
                                        ("UNet2DConditionModel", "down_blocks.1"),
                                        ("UNet2DConditionModel", "down_blocks.1.resnets.0")])
def test_the_skip_copy_of_diffusers(name, block):
    """The residuals that the up blocks are given hold what the block returned where skip is False, else what was edited."""
    pytest.importorskip("diffusers")
    network = MAKERS[name]()
    model, x, t = closure(network), torch.randn(2, 1, 16, 16), torch.full((2,), 0.5)
    v = probe(model, network, block, x, t)
    skips, raw = [], []
    for up in network.up_blocks:
        up.register_forward_pre_hook(lambda m, a, k: skips.extend(
            t for value in (*a, *k.values()) if isinstance(value, tuple) for t in value if t.shape[1:] == v.shape
        ), with_kwargs=True)
    network.get_submodule(block).register_forward_hook(lambda m, a, out: raw.append(out[0] if isinstance(out, tuple) else out))
    outs = []
    with torch.no_grad():
        for skip in (None, True, False):
            skips.clear()
            raw.clear()
            with nullcontext() if skip is None else edited(network, block, v, 0.5, skip=skip):
                outs.append(model(x, t))
            after = formula(raw[0], [(0.5, v)]).float()
            assert any(torch.equal(s, raw[0]) for s in skips) == (skip is not True)
            assert any(torch.allclose(s, after, rtol=1e-4, atol=1e-5) for s in skips) == (skip is True)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


# ---- what is refused


def test_refusals_of_an_edit():
    net, v = zoo(), directions((32, 4, 4))
    with pytest.raises(ValueError, match="did you mean 'enc.2'"):
        Edit(net, "enc.3", v)
    with pytest.raises(TypeError, match=r"directions is torch.int64"):
        Edit(net, "enc.2", v.long())
    with pytest.raises(TypeError, match="torch.nn.Module"):
        Edit(lambda x: x, "enc.2", v)
    for weight in (0.5, torch.tensor(0.5), torch.ones(2), torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"weight is .*: a floating tensor \(B, 2\) or \(1, 2\)"):
            with Edit(net, "enc.2", directions((32, 4, 4), 2)).at(weight):
                raise AssertionError("it has begun")
    with pytest.raises(ValueError, match="2 directions and 1 weights"):
        edited(net, "enc.2", [v[0], v[0]], [1.0])
    x, t = torch.randn(2, 1, 16, 16), torch.zeros(2)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"returned \(32, 4, 4\) a sample, the direction has \(32, 7, 7\)"):
            with edited(net, "enc.2", directions((32, 7, 7))[0], 1.0):
                net(x, t)
        with pytest.raises(ValueError, match="a batch of 2, the weights are for 3"):
            with edited(net, "enc.2", v[0], torch.ones(3)):
                net(x, t)
        with pytest.raises(RuntimeError, match="block 'enc.2' was not called"):
            with edited(net, "enc.2", v[0], 1.0):
                zoo()(x, t)
        with edited(net, "enc.2", v[0], 1.0):
            net(x, t)
            with pytest.raises(RuntimeError, match="block 'enc.2' is edited already"):
                with edited(net, "enc.2", v[0], 1.0):
                    net(x, t)
            net(x, t)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("make,message", [
    (lambda h: {"h": h}, "returned dict"), (lambda h: None, "returned NoneType"), (lambda h: (h > 0, h), "returned torch.bool"),
])
def test_blocks_without_an_activation(make, message):
    net = Net(make)
    with pytest.raises(TypeError, match=message):
        with edited(net, "block", directions((8,))[0], 1.0):
            net(torch.randn(2, 8))
    assert not net.block._forward_hooks


@pytest.mark.parametrize("use", [lambda n, h: n.after(h + 1), lambda n, h: h])
def test_nobody_takes_what_the_block_returns(use):
    net = Net(use=use)
    with pytest.raises(RuntimeError, match="no module takes what block 'block' returns"):
        with edited(net, "block", directions((8,))[0], 1.0, skip=False):
            net(torch.randn(2, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_compiled_networks_are_refused():
    """torch.compile does not see hooks that come later."""
    net = zoo()
    whole = torch.compile(net, backend="eager")
    with pytest.raises(ValueError, match="lies in a compiled or scripted module"):
        Edit(whole, "_orig_mod.enc.2", directions((32, 4, 4)))
    net.enc[2].compile(backend="eager")
    with pytest.raises(ValueError, match="lies in a compiled or scripted module"):
        Edit(net, "enc.2", directions((32, 4, 4)))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("skip", [True, False])
def test_hooks_are_removed_whatever_happens(error, skip):
    def use(n, h):
        raise error("stop")

    net = Net(use=use)
    net.block.register_forward_hook(lambda m, a, out: None)
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
    for _ in range(2):
        with pytest.raises(error):
            with edited(net, "block", directions((8,))[0], 1.0, skip=skip):
                net(torch.randn(2, 8))
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()] == before
