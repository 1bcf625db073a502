"""Concepts in fd.sample: one call with the edits, or more that share the encoder; their weights, windows and scales together."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.action import Acting, Actions
from fastdiff.steering.inject import Injection, edited
from steering.networks import MAKERS, closure, directions, probe, zoo


@dataclass
class Made:
    """What Injection needs of a concept."""

    direction: torch.Tensor
    block: str


SHAPE = (5, 1, 12, 12)
PLANS = {
    "heun": {"schedule": "edm", "prediction": "denoised", "steps": 5},
    "ddim": {"schedule": "linear", "prediction": "epsilon", "steps": 6},
    "dpmpp_2m_sde": {"schedule": "edm", "prediction": "denoised", "steps": 6},
}


def plan_of(name):
    return fd.plan(name, **PLANS[name])


class Model(nn.Module):
    """The zoo's network, with a time that it can take."""

    def __init__(self):
        super().__init__()
        self.net = zoo()

    def forward(self, x, t):
        return self.net(x / (1 + x.abs().mean((1, 2, 3), keepdim=True)), t.to(x.dtype).log1p())


@pytest.fixture(scope="module")
def model():
    return Model()


def concepts(count=2, block="net.enc.2", seed=5):
    return [Made(v, block) for v in directions((32, 3, 3), count, seed)]


def manual(model, plan, terms, seeds=0, shape=SHAPE, block="net.enc.2"):
    """The same with whole evaluations, by hand. terms(sigma): [(scale, [(weight, direction), ...]), ...] of that row."""
    def evaluate(edits, run):
        if not edits:
            return model(run.model_input, run.time)
        with edited(model, block, [v for _, v in edits], [w for w, _ in edits]):
            return model(run.model_input, run.time)

    run = fd.Stepper(plan, shape, range(seeds, seeds + shape[0]))
    with torch.no_grad():
        while not run.done:
            here = terms(run.sigma)
            always = [e for scale, edits in here if scale == 1 for e in edits]
            base = total = evaluate(always, run)
            others = [(scale, evaluate(always + edits, run)) for scale, edits in here if scale != 1]
            if "uncond" in plan.inputs:
                run.step(others[0][1] if others else base, base)
            else:
                for scale, out in others:
                    total = total + scale * (out - base)
                run.step(total)
    return run.result()


def bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", PLANS)
def test_scale_1_is_one_call_with_the_edit(model, name):
    a, b = concepts()
    plan = plan_of(name)
    low, high = np.quantile(plan.sigmas[plan.calls_model], [0.2, 0.7])

    def terms(sigma):
        return [(1, [(w, c.direction) for w, c, inside in ((0.3, a, low <= sigma <= high), (-0.2, b, True)) if inside])]

    got = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.3, window=(low, high)), Injection(b, -0.2)])
    assert bits(got, manual(model, plan, terms))
    assert not torch.equal(got, fd.sample(model, plan, SHAPE, 0))


@pytest.mark.parametrize("name", PLANS)
def test_amplification_is_part_of_the_row(model, name):
    """The bits of a guided plan that is given two whole evaluations."""
    (a,) = concepts(1)
    plan = plan_of(name)
    low, high = np.quantile(plan.sigmas[plan.calls_model], [0.2, 0.7])
    guided = plan.with_guidance(lambda sigma: 3.0 if low <= sigma <= high else 1.0)
    got = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.3, 3.0, (low, high))])
    assert bits(got, manual(model, guided, lambda sigma: [(3.0, [(0.3, a.direction)])] if low <= sigma <= high else []))
    again = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.3, 3.0, (low, high))])
    assert bits(got, again)
    by_hand = manual(model, plan, lambda sigma: [(3.0, [(0.3, a.direction)])] if low <= sigma <= high else [])
    torch.testing.assert_close(got, by_hand, rtol=1e-3, atol=1e-4)


def test_several_scales(model):
    """Those of scale 1 edit every evaluation, each other scale is one of its own, and where only one acts the row combines."""
    a, b, c, d = concepts(4)
    plan = plan_of("heun")
    sigmas = sorted(set(plan.sigmas[plan.calls_model]), reverse=True)
    windows = {"a": (0.0, 80.0), "b": (sigmas[3], sigmas[0]), "c": (sigmas[4], sigmas[2]), "d": (sigmas[2], sigmas[1])}
    steering = [Injection(a, 0.1, window=windows["a"]), Injection(b, 0.2, 2.0, windows["b"]),
                Injection(c, 0.3, 3.0, windows["c"]), Injection(d, -0.2, 2.0, windows["d"])]

    def inside(name, sigma):
        return windows[name][0] <= sigma <= windows[name][1]

    def terms(sigma):
        found = [(1, [(0.1, a.direction)])]
        two = [(w, v.direction) for name, w, v in (("b", 0.2, b), ("d", -0.2, d)) if inside(name, sigma)]
        found += [(2.0, two)] if two else []
        return found + ([(3.0, [(0.3, c.direction)])] if inside("c", sigma) else [])

    got = fd.sample(model, plan, SHAPE, 0, steering=steering)
    torch.testing.assert_close(got, manual(model, plan, terms), rtol=1e-3, atol=1e-4)
    with Actions(steering, plan, SHAPE, model) as actions:
        assert actions.plan.inputs[-1] == "uncond" and actions.plan.inputs.count("uncond") == 1
    # in another order the sums differ in their last bits at most
    other = fd.sample(model, plan, SHAPE, 0, steering=steering[::-1])
    torch.testing.assert_close(got, other, rtol=1e-3, atol=1e-4)


def test_blocks_of_different_depth(model):
    (a,) = concepts(1)
    b = Made(directions((16, 6, 6))[0], "net.enc.1")
    plan = plan_of("heun")
    got = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.3, 2.0), Injection(b, 0.2, 2.0)])

    run = fd.Stepper(plan.with_guidance(2.0), SHAPE, range(5))
    with torch.no_grad():
        while not run.done:
            base = model(run.model_input, run.time)
            with edited(model, a.block, a.direction, 0.3), edited(model, b.block, b.direction, 0.2):
                run.step(model(run.model_input, run.time), base)
    assert bits(got, run.result())


@pytest.mark.parametrize("skip", [True, False])
def test_what_is_computed_in_an_amplified_row(model, skip):
    counts = {}
    for name in ("net.stem", "net.enc.1", "net.mid", "net.head"):
        module = model.get_submodule(name)

        def forward(*args, module=module, name=name):
            counts[name] = counts.get(name, 0) + 1
            return type(module).forward(module, *args)

        module.forward = forward
    plan = plan_of("heun")
    low, high = np.quantile(plan.sigmas[plan.calls_model], [0.2, 0.7])
    inside = int(plan.window(low, high).sum())
    try:
        with torch.no_grad():
            fd.sample(model, plan, SHAPE, 0, steering=[Injection(c, 0.3, 3.0, (low, high), skip=skip) for c in concepts(2)])
    finally:
        for name in ("net.stem", "net.enc.1", "net.mid", "net.head"):
            del model.get_submodule(name).forward
    once, twice = plan.evaluations, plan.evaluations + inside
    assert 0 < inside < plan.evaluations
    assert counts == {"net.stem": once, "net.enc.1": once, "net.mid": twice, "net.head": twice}


@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("name", PLANS)
def test_zero_weight_is_the_unsteered_sample(model, name, scale):
    a, b = concepts()
    plan = plan_of(name)
    plain = fd.sample(model, plan, SHAPE, 0)
    for weight in (0.0, torch.zeros(5)) if scale else (1.0, torch.ones(5)):
        assert bits(plain, fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, weight, scale), Injection(b, weight, scale)]))


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("size", [None, 2, 5, 7])
def test_weights_by_sample(model, scale, size):
    """Samples without a weight are those of the unsteered run, and the others do not depend on who is beside them."""
    a, b = concepts()
    plan = plan_of("dpmpp_2m_sde")
    one, two = torch.tensor([0.0, 0.3, 0.0, -0.5, 0.2]), [0.0, 0.0, 0.0, 0.1, 0.0]
    steering = [Injection(a, one, scale), Injection(b, two, scale)]
    got = fd.sample(model, plan, SHAPE, 0, steering=steering, batch_size=size)
    plain = fd.sample(model, plan, SHAPE, 0, batch_size=size)
    assert [bits(g, p) for g, p in zip(got, plain)] == [True, False, True, False, False]
    if size == 2:
        for i in range(4):
            alone = fd.sample(model, plan, (1, *SHAPE[1:]), i, batch_size=2,
                              steering=[Injection(a, one[i : i + 1], scale), Injection(b, two[i : i + 1], scale)])
            assert bits(alone[0], got[i])
    if size is None:
        expected = manual(model, plan, lambda sigma: [(scale, [(one, a.direction), (torch.tensor(two), b.direction)])])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [0.3, torch.tensor([0.3, 0.0, 0.3, 0.3, 0.3])])
def test_16_bit_models(dtype, weight):
    model = Model().to(dtype)
    (a,) = concepts(1)
    plan = plan_of("heun")
    got = fd.sample(model, plan, SHAPE, 0, dtype=dtype, steering=[Injection(a, weight, 2.0, (0.1, 10))])
    plain = fd.sample(model, plan, SHAPE, 0, dtype=dtype)
    assert not torch.equal(got[0], plain[0])
    assert bits(got[1], plain[1]) == (not isinstance(weight, float))


def test_inference_mode(model):
    (a,) = concepts(1)
    plan = plan_of("heun")
    steering = [Injection(a, 0.3, 2.0, (0.1, 10))]
    expected = fd.sample(model, plan, SHAPE, 0, steering=steering)
    with torch.inference_mode():
        assert bits(fd.sample(model, plan, SHAPE, 0, steering=steering), expected)
        in_twos = fd.sample(model, plan, SHAPE, 0, steering=steering, batch_size=2)
    assert bits(in_twos, fd.sample(model, plan, SHAPE, 0, steering=steering, batch_size=2))


def test_guidance_by_a_second_output(model):
    """A model that returns two outputs: each is amplified, before the row combines them."""
    (a,) = concepts(1)

    def two(x, t):
        return model(x, t), model(x * 0.5, t)

    plan = plan_of("heun").with_guidance(4.0)
    got = fd.sample(two, plan, SHAPE, 0, steering=[Injection(a, 0.3, 3.0, network=model)])
    run = fd.Stepper(plan, SHAPE, range(5))
    with torch.no_grad():
        while not run.done:
            base = two(run.model_input, run.time)
            with edited(model, a.block, a.direction, 0.3):
                steered = two(run.model_input, run.time)
            run.step(*(b + 3.0 * (s - b) for b, s in zip(base, steered)))
    assert bits(got, run.result())


def test_classifier_free_guidance(model):
    """Both networks' outputs are amplified, if both have the block."""
    (a,) = concepts(1)
    plan = plan_of("heun")
    injection = Injection(a, 0.3, 3.0, network=model)
    free = fd.guidance.classifier_free(lambda x, t, y: model(x * 0.5, t), 0, 4.0)
    got = fd.sample(model, plan, SHAPE, 0, steering=[free, injection])
    two = fd.sample(lambda x, t: (model(x * 0.5, t), model(x, t)), plan.with_guidance(4.0), SHAPE, 0, steering=[injection])
    assert bits(got, two)


def test_guidance_by_gradients(model):
    """They differentiate through both evaluations, the part that is shared included."""
    (a,) = concepts(1)
    plan = plan_of("ddim")
    dps = fd.guidance.dps(lambda x0, y: -(x0 - 0.3).square().flatten(1).sum(1), 0, 3.0)

    def steered(x, t):
        base = model(x, t)
        with edited(model, a.block, a.direction, 0.2):
            return base + 2 * (model(x, t) - base)

    got = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.2, 2.0), dps])
    expected = fd.sample(steered, plan, SHAPE, 0, steering=[dps])
    without = fd.sample(model, plan, SHAPE, 0, steering=[Injection(a, 0.2, 2.0)])
    assert (got - expected).norm() < 0.01 * (got - without).norm()


class Push:
    """An action that adds an input, to stand between concepts."""

    def __init__(self, name, amount):
        self.name, self.amount = name, amount

    def begin(self, setting):
        acting = Acting()
        acting.plan = setting.plan.with_input(self.name, d=lambda sigma: 1.0)
        acting.outputs = lambda run, evaluate: (*evaluate(), torch.full_like(run.x, self.amount))
        return acting


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_among_other_actions(model, order):
    """Wherever the others stand in the list, every input of the row gets what is its own."""
    a, b = concepts()
    plan = plan_of("heun")
    actions = [Injection(a, 0.3, 3.0, (0.5, 80)), Injection(b, 0.2, 1.0), Push("left", 0.05), Push("right", -0.02)]
    got = fd.sample(model, plan, SHAPE, 0, steering=[actions[i] for i in order])
    expected = fd.sample(model, plan, SHAPE, 0, steering=actions)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, fd.sample(model, plan, SHAPE, 0, steering=actions[:2]), rtol=1e-3, atol=1e-3)


def test_a_loop_of_ones_own(model):
    (a,) = concepts(1)
    plan = plan_of("heun")
    steering = [Injection(a, 0.3, 3.0)]
    with torch.no_grad(), Actions(steering, plan, SHAPE, model) as actions:
        run = fd.Stepper(actions.plan, SHAPE, range(5), **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
            (acting,) = actions._acting
            assert acting.shared == {("net.enc.2",): ("net.noise", "net.stem", "net.enc.0", "net.enc.1", "net.enc.2")}
    assert bits(run.result(), fd.sample(model, plan, SHAPE, 0, steering=steering))


# ---- what fd.sample refuses, and what it leaves behind


def test_refusals_of_a_run(model):
    (a,) = concepts(1)
    plan = plan_of("heun")

    def run(*steering, model=model):
        return fd.sample(model, plan, SHAPE, 0, steering=list(steering))

    calls = []
    handle = model.register_forward_pre_hook(lambda *unused: calls.append(1))
    with pytest.raises(TypeError, match="so the network of block 'net.enc.2' is not known"):
        run(Injection(a, 0.1), model=lambda x, t: model(x, t))
    with pytest.raises(ValueError, match="did you mean 'net.enc.2'"):
        run(Injection(Made(a.direction, "net.enc.22"), 0.1))
    with pytest.raises(ValueError, match="block 'conv1' is in 'net.enc.0.blocks.0' and in 'net.enc.1.blocks.0'"):
        run(Injection(Made(a.direction, "conv1"), 0.1))
    with pytest.raises(ValueError, match=r"no call of the model falls into window \(100, 200\).* at sigma 80"):
        run(Injection(a, 0.1, window=(100, 200)))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), the batch has 5"):
        run(Injection(a, torch.ones(4)))
    with pytest.raises(ValueError, match="weight holds nan"):
        run(Injection(a, float("nan")))
    with pytest.raises(ValueError, match="skip=True and with skip=False"):
        run(Injection(a, 0.1), Injection(a, 0.1, skip=False))
    with pytest.raises(ValueError, match="for two networks"):
        run(Injection(a, 0.1), Injection(Made(a.direction, "enc.2"), 0.1, network=model.net))
    with pytest.raises(ValueError, match=r"directions of shape \(32, 3, 3\) and \(32, 4, 4\)"):
        run(Injection(a, 0.1), Injection(Made(directions((32, 4, 4))[0], a.block), 0.1))
    handle.remove()
    assert calls == []
    with pytest.raises(ValueError, match="scale is nan"):
        Injection(a, 1.0, float("nan"))
    with pytest.raises(ValueError, match=r"window is \(2, 1\)"):
        Injection(a, 1.0, window=(2, 1))
    with pytest.raises(TypeError, match="concept is str"):
        Injection("cat", 1.0)
    with pytest.raises(TypeError, match="skip is 1"):
        Injection(a, 1.0, skip=1)
    other = Model()
    with pytest.raises(RuntimeError, match="block 'net.enc.2' was not called"):
        run(Injection(a, 0.1, network=other), model=lambda x, t: model(x, t))
    with pytest.raises(ValueError, match=r"returned \(32, 3, 3\) a sample, the direction has \(32, 5, 5\)"):
        run(Injection(Made(directions((32, 5, 5))[0], a.block), 0.1))


def test_a_concept_for_another_network_is_refused(model):
    from fastdiff.steering.concept import Concept, network_checksum

    concept = Concept(concepts(1)[0].direction, "enc.2", 1.0, network_checksum(model.net), 3, "rfm", 0.9)
    plan = plan_of("heun")
    given, found = (fd.sample(model, plan, SHAPE, 0, steering=[concept.at(0.3, network=n)]) for n in (model.net, None))
    assert bits(given, found) and not torch.equal(given, fd.sample(model, plan, SHAPE, 0))
    other = Model()
    with torch.no_grad():
        other.net.stem.bias[0] += 1
    for weight in (0.3, 0.0):
        with pytest.raises(ValueError, match="was learnt in"):
            fd.sample(other, plan, SHAPE, 0, steering=[concept.at(weight)])


def test_a_model_that_returns_the_same_memory(model):
    (a,) = concepts(1)
    kept = torch.empty(SHAPE)

    def same(x, t):
        return kept.copy_(model(x, t))

    with pytest.raises(RuntimeError, match="the same memory for two calls"):
        fd.sample(same, plan_of("heun"), SHAPE, 0, steering=[Injection(a, 0.3, 2.0, network=model)])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 4])
@pytest.mark.parametrize("where", ["net.enc.0", "net.enc.2", "net.mid"])
def test_an_interrupted_run_leaves_the_network_as_it_was(error, call, where):
    model = Model().train()
    (a,) = concepts(1)
    steps = []

    def interrupt(*unused):
        steps.append(1)
        if len(steps) > call:
            raise error("stop")

    model.get_submodule(where).register_forward_hook(interrupt)

    def state():
        return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(m.__dict__), m.training) for m in model.modules()]

    before = state()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    for skip in (True, False):
        with pytest.raises(error):
            fd.sample(model, plan_of("heun"), SHAPE, 0, steering=[Injection(a, 0.3, 2.0, skip=skip)])
        assert state() == before
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_a_random_network_of_diffusers_end_to_end():
    pytest.importorskip("diffusers")
    network = MAKERS["UNet2DConditionModel"]()
    model, shape = closure(network), (3, 1, 16, 16)
    v = probe(model, network, "down_blocks.1", torch.randn(shape), torch.ones(3))
    plan = fd.plan("ddim", schedule="scaled_linear", prediction="epsilon", steps=4)
    concept = Made(v, "down_blocks.1")
    plain = fd.sample(model, plan, shape, 0)
    for skip, scale in itertools.product((True, False), (1.0, 3.0)):
        injection = Injection(concept, torch.tensor([0.5, 0.0, 0.5]), scale, (1, 100), skip=skip, network=network)
        got = fd.sample(model, plan, shape, 0, steering=[injection])
        assert [bits(g, p) for g, p in zip(got, plain)] == [False, True, False]


def test_an_empty_batch(model):
    (a,) = concepts(1)
    assert fd.sample(model, plan_of("heun"), (0, 1, 12, 12), [], steering=[Injection(a, 0.3, 2.0)]).shape == (0, 1, 12, 12)
