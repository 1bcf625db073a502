"""Concepts beside other actions and in other loops, what is refused, and what a run leaves behind."""

import itertools

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Acting, Actions
from fastdiff.steering.inject import Injection, edited
from steering.concepts import SHAPE, Made, Model, bits, concepts, plan_of
from steering.networks import MAKERS, closure, directions, probe


@pytest.fixture(scope="module")
def model():
    return Model()


# ---- beside guidance and other actions


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


def test_a_second_output_that_is_missing(model):
    (a,) = concepts(1)
    for scale in (1.0, 3.0):
        with pytest.raises(ValueError, match="the model returned 1 output: 2 are taken"):
            fd.sample(model, plan_of("heun").with_guidance(4.0), SHAPE, 0, steering=[Injection(a, 0.3, scale)])


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
    for scale in (float("nan"), 1e39, 10**400):
        with pytest.raises(ValueError, match="scale is .*: a finite number of float32"):
            Injection(a, 1.0, scale)
    for scale in (torch.ones(5), np.ones(1), [1, 2], "2", None):
        with pytest.raises(TypeError, match="one for all samples"):
            Injection(a, 1.0, scale)
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


@pytest.mark.parametrize("compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m])
def test_a_compiled_model_is_refused_before_it_runs(compiled):
    """Hooks act in it or not, depending on what ran before."""
    model, called = compiled(Model()), []
    model.register_forward_pre_hook(lambda *unused: called.append(1))
    (a,) = concepts(1)
    for scale in (1.0, 2.0):
        with pytest.raises(ValueError, match="block 'net.enc.2' lies in a compiled or scripted module"):
            fd.sample(model, plan_of("heun"), SHAPE, 0, steering=[Injection(a, 0.3, scale)])
    assert called == []


def test_under_another_default_device(model):
    a, b = concepts()
    steering = [Injection(a, [0, 0.1, 0.2, 0.3, 0.4], 2.0), Injection(b, 0.2, 3.0, (0.1, 5))]
    expected = fd.sample(model, plan_of("heun"), SHAPE, 0, steering=steering)
    with torch.device("meta"):
        assert torch.equal(fd.sample(model, plan_of("heun"), SHAPE, 0, device="cpu", steering=steering), expected)


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
    for weight, size in itertools.product((0.3, []), (None, 4)):
        steering = [Injection(a, weight, 2.0)]
        got = fd.sample(model, plan_of("heun"), (0, 1, 12, 12), [], batch_size=size, steering=steering)
        assert got.shape == (0, 1, 12, 12)
