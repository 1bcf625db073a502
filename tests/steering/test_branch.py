"""Two evaluations that share what lies before a block: the bits of two whole ones, whatever the network does."""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fastdiff.steering.branch import Branch
from fastdiff.steering.inject import edited
from steering.networks import BLOCKS, CROSS_ATTENTION, MAKERS, MODES, both, closure, probe, same, whole

CASES = [(name, block) for name, blocks in BLOCKS.items() for block in blocks]
NOT_TAKEN = [("twice", "block"), ("twice", "stem"), ("UNet2DConditionModel", CROSS_ATTENTION)]
"""Blocks whose output no module takes as it is, so that skip=False is refused (test_inject)."""


def inputs(dtype=torch.float32, batch=3):
    x = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.linspace(0.1, 0.9, batch).to(dtype)


def made(name):
    if name.startswith("UNet"):
        pytest.importorskip("diffusers")
    return MAKERS[name]()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name,block", CASES)
def test_a_shared_branch_has_the_bits_of_a_whole_evaluation(name, block, mode):
    network = made(name)
    model, (x, t) = closure(network), inputs()
    v = probe(model, network, block, x, t)
    branch = Branch(network, [block])
    with MODES[mode](), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing lies before the block
        for skip in (True, False):
            if not skip and (name, block) in NOT_TAKEN:
                continue
            edit = partial(edited, network, block, v, torch.tensor([0.5, 0.0, -0.2]), skip=skip)
            for _ in range(2):  # the first looks at all modules, the second at those that were found
                first, second = both(branch, model, edit, x, t)
                plain, steered = whole(model, edit, x, t)
                assert torch.equal(first, plain) and torch.equal(second, steered)
                assert not torch.equal(second[0], first[0]) and torch.equal(second[1], first[1])


def test_a_branch_knows_what_an_earlier_one_of_the_network_found():
    network, block = made("zoo"), "enc.2"
    model, (x, t) = closure(network), inputs()
    v = probe(model, network, block, x, t)
    edit = partial(edited, network, block, v, 0.5)
    watched, shared = [], []
    with torch.no_grad():
        for _ in range(2):
            branch = Branch(network, [block])
            watched.append(len(branch._watched()))
            expected = whole(model, edit, x, t)
            assert same(both(branch, model, edit, x, t), expected)
            shared.append(branch.shared)
        assert watched[1] < watched[0] / 3 and shared[0] == shared[1] and shared[0]

        inner = network.enc[0].forward  # the network is called in another way: what was found is found anew
        network.enc[0].forward = lambda h, emb: network.enc[0].blocks[0](h, emb)
        network.stem.forward, stem = (lambda h: h.expand(-1, 8, -1, -1) * 0.1), network.stem.forward
        for _ in range(3):
            branch = Branch(network, [block])
            expected = whole(model, edit, x, t)
            assert same(both(branch, model, edit, x, t), expected)
        network.enc[0].forward, network.stem.forward = inner, stem
        assert same(both(Branch(network, [block]), model, edit, x, t), whole(model, edit, x, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_16_bit_networks(name, dtype):
    network, block = made(name).to(dtype), BLOCKS[name][0]
    model, (x, t) = closure(network), inputs(dtype)
    v = probe(model, network, block, x, t)
    branch = Branch(network, [block])
    with torch.no_grad():
        assert same(both(branch, model, lambda: edited(network, block, v, 0.5), x, t),
                    whole(model, lambda: edited(network, block, v, 0.5), x, t))
    assert branch.shared


@pytest.mark.parametrize("name,block,shared", [
    ("zoo", "enc.2", ("noise", "stem", "enc.0", "enc.1", "enc.2")),
    ("zoo", "mid", ("noise", "stem", "enc.0", "enc.1", "enc.2", "mid")),
    ("zoo", "enc.1.blocks.0", ("noise", "stem", "enc.0", "enc.1.down", "enc.1.blocks.0")),
    ("UNet2DModel", "down_blocks.1", ("time_proj", "time_embedding", "conv_in", "down_blocks.0", "down_blocks.1")),
    ("UNet2DConditionModel", "down_blocks.1", ("time_proj", "time_embedding", "conv_in", "down_blocks.0", "down_blocks.1")),
    ("twice", "block", ("stem", "block")),
])
def test_what_is_shared(name, block, shared):
    network = made(name)
    model, (x, t) = closure(network), inputs()
    counts = {}
    for m_name in shared:  # forward hooks still run: what is counted is the work
        module = network.get_submodule(m_name)
        work = module.forward

        def forward(*args, work=work, m_name=m_name, **kwargs):
            counts[m_name] = counts.get(m_name, 0) + 1
            return work(*args, **kwargs)

        module.forward = forward
    branch = Branch(network, block)
    with torch.no_grad():
        with branch.first():
            model(x, t)
        once = dict(counts)
        with branch.second():
            model(x, t)
    assert branch.shared == shared and branch.computed == {}
    if name == "twice":  # its second call lies behind the block
        assert once.pop("block") == 2 and counts.pop("block") == 3
    assert counts == once and set(once.values()) == {1}


# ---- models that call the network in their own way


def test_a_model_that_calls_the_network_twice():
    """With and without a condition: the second call has the same arguments both times, so its encoder is shared too."""
    network = made("UNet2DConditionModel")
    x, t = inputs()
    with_, without = closure(network), closure(network, torch.zeros(1, 3, 12))
    v = probe(with_, network, "down_blocks.1", x, t)

    def model(x, t):
        return with_(x, t), without(x, t)

    branch, counts = Branch(network, "down_blocks.1"), []
    network.down_blocks[0].resnets[0].register_forward_hook(lambda *a: counts.append(1))
    with torch.no_grad():
        for _ in range(2):
            counts.clear()
            got = both(branch, model, lambda: edited(network, "down_blocks.1", v, 0.5), x, t)
            assert len(counts) == 2  # of four calls
            expected = whole(model, lambda: edited(network, "down_blocks.1", v, 0.5), x, t)
            assert same(got[0], expected[0]) and same(got[1], expected[1])


@pytest.mark.parametrize("blocks", [("enc.2", "enc.2.blocks.0"), ("mid", "enc.1")])
def test_several_blocks(blocks):
    """Shared is what lies before the first of them."""
    network = made("zoo")
    x, t = inputs()
    v = [probe(network, network, block, x, t) for block in blocks]
    branch = Branch(network, blocks)

    @contextmanager
    def edit():
        with edited(network, blocks[0], v[0], 0.5), edited(network, blocks[1], v[1], 0.5):
            yield

    with torch.no_grad():
        assert same(both(branch, network, edit, x, t), whole(network, edit, x, t))
    assert branch.shared[-1] == blocks[1]


def test_a_call_that_depends_on_an_edited_one_is_computed():
    network = made("zoo")
    x, t = inputs()
    v = probe(closure(network), network, "enc.2", x, t)

    def model(x, t):
        return network(network(x, t) + x, t)

    branch = Branch(network, "enc.2")
    with torch.no_grad():
        got = both(branch, model, lambda: edited(network, "enc.2", v, 0.5), x, t)
        expected = whole(model, lambda: edited(network, "enc.2", v, 0.5), x, t)
    assert same(got, expected)
    assert branch.shared == ("noise", "stem", "enc.0", "enc.1", "enc.2")


def test_a_model_that_calls_the_parts():
    network = made("zoo")
    x, t = inputs()
    v = probe(closure(network), network, "enc.2", x, t)

    def model(x, t):
        return network.decode(*network.encode(x, t))

    branch = Branch(network, "enc.2")
    with torch.no_grad():
        assert same(both(branch, model, lambda: edited(network, "enc.2", v, 0.5), x, t),
                    whole(model, lambda: edited(network, "enc.2", v, 0.5), x, t))
    assert branch.shared == ("noise", "stem", "enc.0", "enc.1", "enc.2")


def test_gradients_flow_through_both_branches():
    network = made("zoo")
    x, t = inputs()
    v = probe(closure(network), network, "enc.2", x, t)
    found = []
    for run in (lambda *a: both(Branch(network, "enc.2"), *a), whole):
        z = x.clone().requires_grad_()
        first, second = run(network, lambda: edited(network, "enc.2", v, 0.5), z, t)
        found.append(torch.autograd.grad((first + 3 * (second - first)).square().sum(), z)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# ---- the network is left as it was


def state(network):
    return {name: (dict(m.__dict__.get("_forward_hooks", {})), dict(m._forward_pre_hooks), m.__dict__.get("forward"), m.training,
                   sorted(m.__dict__)) for name, m in network.named_modules()}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["stem", "enc.2", "mid", "head"])
@pytest.mark.parametrize("when", ["first", "second"])
@pytest.mark.parametrize("training", [True, False])
def test_an_error_leaves_the_network_clean(error, where, when, training):
    network = made("zoo").train(training)
    x, t = inputs()
    v = probe(network, network, "enc.2", x, t)
    network.enc[0].forward = network.enc[0].forward  # as libraries do that wrap it
    module = network.get_submodule(where)
    armed = []
    module.register_forward_hook(lambda *a: (_ for _ in ()).throw(error("stop")) if armed else None)
    before = state(network)
    branch = Branch(network, "enc.2")
    with torch.no_grad():
        with branch.first():
            first = network(x, t)
        assert state(network) == before
        armed.append(1)
        with pytest.raises(error):
            if when == "first":
                with branch.first():
                    network(x, t)
            else:
                with branch.second(), edited(network, "enc.2", v, 0.5):
                    network(x, t)
        assert state(network) == before
        armed.clear()
        again, second = both(branch, network, lambda: edited(network, "enc.2", v, 0.5), x, t)
        assert state(network) == before
        assert torch.equal(again, first) and not torch.equal(second, first)


def test_hooks_of_others_act_in_both_evaluations():
    network = made("zoo")
    x, t = inputs()
    v = probe(network, network, "enc.2", x, t)
    network.enc[0].register_forward_hook(lambda m, args, out: out * 1.5)
    network.enc[1].register_forward_hook(lambda m, args, out: out.mul_(0.5))
    network.mid.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    branch = Branch(network, "enc.2")
    with torch.no_grad():
        got = both(branch, network, lambda: edited(network, "enc.2", v, 0.5), x, t)
        assert same(got, whole(network, lambda: edited(network, "enc.2", v, 0.5), x, t))
    assert branch.computed == {"enc.1": "its output was written into"}


def test_a_second_evaluation_without_a_first_is_whole():
    network = made("zoo")
    x, t = inputs()
    branch = Branch(network, "enc.2")
    with torch.no_grad():
        expected = network(x, t)
        with branch.first():
            network(x, t)
        branch.forget()
        with branch.second():
            assert torch.equal(network(x, t), expected)
    assert branch.shared == ()


def test_blocks_that_are_not_there():
    network = made("zoo")
    with pytest.raises(ValueError, match="did you mean 'enc.2'"):
        Branch(network, ["enc.22"])
    with pytest.raises(TypeError, match="torch.nn.Module"):
        Branch(lambda x: x, ["enc.2"])


def test_compiled_blocks_are_shared_whole():
    network = made("zoo")
    x, t = inputs()
    v = probe(network, network, "enc.2", x, t)
    network.enc[0] = torch.compile(network.enc[0], backend="eager")
    branch = Branch(network, "enc.2")
    with torch.no_grad():
        got = both(branch, network, lambda: edited(network, "enc.2", v, 0.5), x, t)
        assert same(got, whole(network, lambda: edited(network, "enc.2", v, 0.5), x, t))
    assert branch.shared == ("noise", "stem", "enc.0", "enc.1", "enc.2")
