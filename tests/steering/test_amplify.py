"""Concepts in fd.sample: one call with the edits, or more that share the encoder; their weights, windows and scales together."""

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Actions
from fastdiff.steering.inject import Injection, edited
from steering.concepts import PLANS, SHAPE, Made, Model, bits, concepts, manual, plan_of
from steering.networks import directions


@pytest.fixture(scope="module")
def model():
    return Model()


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
@pytest.mark.parametrize("block, shape", [("net.enc.1.blocks.0", (16, 6, 6)), ("net.enc.0", (8, 12, 12)),
                                          ("net.enc.0.blocks.0.conv1", (8, 12, 12))])
def test_an_edit_within_what_is_shared(model, block, shape, skip):
    """A concept of scale 1 at a block that lies before the amplified one, or inside of a module that does."""
    (a,) = concepts(1)
    b = Made(directions(shape)[0], block)
    plan = plan_of("heun")
    got = fd.sample(model, plan, SHAPE, 0, steering=[Injection(b, 0.2, skip=skip), Injection(a, 0.3, 2.0)])

    run = fd.Stepper(plan.with_guidance(2.0), SHAPE, range(5))
    with torch.no_grad(), edited(model, block, b.direction, 0.2, skip=skip):
        while not run.done:
            base = model(run.model_input, run.time)
            with edited(model, a.block, a.direction, 0.3):
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
