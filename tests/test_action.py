"""What acts on a run: the contract between the loop and its actions, with small actions written here."""

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.action import Acting, Actions
from fastdiff.samplers.assemble import denoised_from

SHAPE = (5, 2, 4, 4)


def gaussian(x, sigma):
    """The exact denoiser of N(0.5, 0.3^2) in x = x0 + sigma n."""
    s2 = sigma.view(-1, *(1,) * (x.ndim - 1)) ** 2
    return (0.09 * x.float() + s2 * 0.5) / (0.09 + s2)


def edm(name="euler", steps=6, **options):
    return fd.plan(name, schedule="edm", prediction="denoised", steps=steps, **options)


class Push(Acting):
    """d += weight_b (u), by the bank or by an input."""

    def __init__(self, setting, vector, weight, window, how):
        self.plan, self.how, self.log = setting.plan, how, []
        self.all, self.vector = torch.as_tensor(weight).expand(setting.shape[0]), vector
        inside = setting.plan.window(*window).astype(float)
        if how == "bank":
            self.plan = setting.plan.with_bank(inside[:, None])
            self.vectors, self.index = vector[None], torch.zeros(setting.size, 1, dtype=torch.int64)
        else:
            self.plan = setting.plan.with_input(how, inside)

    def select(self, index):
        self.weight = self.all[index]

    def weights(self, run, out):
        out[:, 0] = self.weight

    def outputs(self, run, evaluate):
        if self.how == "bank":
            return evaluate()
        return *evaluate(), self.weight.view(-1, 1, 1, 1) * self.vector

    def close(self):
        self.log.append("closed")


class Pushed:
    def __init__(self, vector, weight, window=(0, 1000), how="bank"):
        self.arguments = vector, weight, window, how

    def begin(self, setting):
        self.acting = Push(setting, *self.arguments)
        return self.acting


def vector(seed=0):
    return torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m_sde", "dpmpp_sde"])
@pytest.mark.parametrize("how", ["bank", "push"])
def test_a_push_of_d_is_a_push_of_what_the_model_returns(name, how):
    u, w = vector(), torch.tensor([0.5, -1.0, 0.0, 2.0, 0.25])
    plan = edm(name)
    pushed = fd.sample(gaussian, plan, SHAPE, 0, steering=[Pushed(u, w, (0.5, 50), how)])

    def model(x, sigma):
        inside = (sigma >= 0.5) & (sigma <= 50)
        return gaussian(x, sigma) + (inside * w).view(-1, 1, 1, 1) * u

    torch.testing.assert_close(pushed, fd.sample(model, plan, SHAPE, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["bank", "push"])
@pytest.mark.parametrize("size", [None, 2, 3, 8])
def test_weights_follow_their_samples_into_batches(how, size):
    u, w = vector(), [0.5, -1.0, 0.0, 2.0, 0.25]
    whole = fd.sample(gaussian, edm(), SHAPE, 0, steering=[Pushed(u, torch.tensor(w), how=how)], batch_size=size)
    for b, weight in enumerate(w):
        alone = fd.sample(gaussian, edm(), (1, *SHAPE[1:]), b, steering=[Pushed(u, torch.tensor(weight), how=how)])
        assert torch.equal(whole[b], alone[0])


@pytest.mark.parametrize("how", ["bank", "push"])
def test_no_weight_changes_no_bit(how):
    plain = fd.sample(gaussian, edm("dpmpp_2m_sde"), SHAPE, 0)
    outside = Pushed(torch.full(SHAPE[1:], float("nan")), 1.0, (1e4, 1e5), how)
    assert torch.equal(plain, fd.sample(gaussian, edm("dpmpp_2m_sde"), SHAPE, 0, steering=[outside]))
    if how == "bank":  # an input of weight 1 that holds zeros is added, which may turn -0.0 into 0.0
        nothing = Pushed(vector(), 0.0, how=how)
        assert torch.equal(plain, fd.sample(gaussian, edm("dpmpp_2m_sde"), SHAPE, 0, steering=[nothing]))


def test_several_actions_share_the_bank_in_their_order():
    u, v = vector(1), vector(2)
    joint = fd.sample(gaussian, edm(), SHAPE, 0, steering=[Pushed(u, 0.5), Pushed(v, 0.25, how="push"), Pushed(v, -0.5)])
    plan = edm().with_bank(np.ones((6 + 1, 2)) * edm().calls_model[:, None])
    run = fd.Stepper(plan.with_input("push", 1.0), SHAPE, fd.noise.as_seeds(0, 5), bank=torch.stack([u, v]),
                     bank_index=torch.tensor([[0, 1]] * 5), bank_weight=torch.tensor([[0.5, -0.5]] * 5))
    while not run.done:
        run.step(gaussian(run.model_input, run.time), (0.25 * v).expand(SHAPE))
    assert torch.equal(joint, run.result())


def test_a_loop_of_ones_own():
    steering = [Pushed(vector(), 0.5), Pushed(vector(1), 0.5, how="push")]
    with Actions(steering, edm("heun"), SHAPE, gaussian) as actions:
        actions.select(torch.arange(5))
        run = fd.Stepper(actions.plan, SHAPE, range(5), **actions.bank)
        while not run.done:
            run.step(*actions.outputs(run))
    assert torch.equal(run.result(), fd.sample(gaussian, edm("heun"), SHAPE, 0, steering=steering))
    with pytest.raises(RuntimeError, match="closed"):
        actions.outputs(run)


def test_without_select_the_first_samples_are_meant():
    """All of them, or as many as a call takes; padded with the last one, as by ``fd.sample``."""
    w = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.25])
    for size, expected in ((None, w), (2, w[:2]), (6, w[[0, 1, 2, 3, 4, 4]])):
        for how in ("bank", "push"):
            pushed = Pushed(vector(), w, how=how)
            with Actions([pushed], edm(), SHAPE, gaussian, size=size):
                assert torch.equal(pushed.acting.weight, expected)
    with Actions([Pushed(vector(), 1.0)], edm(), (0, *SHAPE[1:]), gaussian) as actions:
        assert actions.bank["bank_index"].shape == (0, 1)


@pytest.mark.parametrize("where", ["model", "action"])
def test_actions_are_closed_whatever_happens(where):
    pushed = [Pushed(vector(), 0.5), Pushed(vector(), 0.5)]

    def model(x, sigma):
        raise KeyboardInterrupt

    class Fails:
        def begin(self, setting):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.sample(model if where == "model" else gaussian, edm(), SHAPE, 0, steering=pushed + [Fails()] * (where == "action"))
    assert [p.acting.log for p in pushed] == [["closed"]] * 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_action_that_fails_to_close_does_not_keep_the_others_from_it(error):
    class Fails(Pushed):
        def begin(self, setting):
            def close():
                raise error("while closing")

            acting = super().begin(setting)
            acting.close = close
            return acting

    pushed = [Pushed(vector(), 0.5), Pushed(vector(), 0.5)]
    with pytest.raises(error, match="while closing"):
        fd.sample(gaussian, edm(), SHAPE, 0, steering=[pushed[0], Fails(vector(), 0.5), pushed[1]])
    assert [p.acting.log for p in pushed] == [["closed"]] * 2


def test_what_is_not_an_action_is_refused():
    with pytest.raises(TypeError, match="float"):
        fd.sample(gaussian, edm(), SHAPE, 0, steering=[1.0])
    with pytest.raises(TypeError, match="float"):
        fd.sample(gaussian, edm(), SHAPE, 0, steering=1.0)


# ---- what a plan says to actions


@pytest.mark.parametrize("schedule, prediction, options", [
    ("edm", "edm", {}), ("scaled_linear", "epsilon", {}), ("linear", "v", {}), ("flow", "flow", {}),
    ("linear", "epsilon", {"vp_input": True, "grid": "karras", "prior": "unit"}),
])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_input_scales_undo_what_the_model_is_given(schedule, prediction, options, name):
    """The same denoiser, said in two ways, is asked at the same points x0 + sigma n."""
    point = torch.linspace(-1, 1, 64, dtype=torch.float64)[None]

    def asked(prediction):
        plan = fd.plan(name, schedule=schedule, prediction=prediction, steps=5, sigma_data=0.7, **options)
        run, points = fd.Stepper(plan, (1, 64), [3]), []
        while not run.done:
            sigma, c = run.sigma, plan.input_scales[run.row]
            points.append(run.model_input.double() / c)
            alpha = {"edm": 1.0, "flow": 1 / (1 + sigma)}.get(schedule, 1 / np.hypot(sigma, 1))
            c_x, c_o = denoised_from(prediction, sigma, alpha, 0.7)
            if schedule == "edm":
                assert c == pytest.approx(1 / np.hypot(sigma, 0.7) if prediction == "edm" else 1.0)
            denoised = 0.9 * point + 0.1 * points[-1] / (1 + sigma**2)
            run.step(((denoised - c_x * alpha * points[-1]) / c_o).float())
        return points

    for mine, theirs in zip(asked(prediction), asked("sample"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["edm", "linear", "flow"])
def test_d_weight_says_what_a_push_of_d_does_to_the_base(name, schedule):
    plan = fd.plan(name, schedule=schedule, prediction="sample", steps=4)
    pushed = plan.with_input("push", 1.0)
    a, b = fd.Stepper(plan, (1, 16), [0]), fd.Stepper(pushed, (1, 16), [0])
    u = torch.linspace(-1, 1, 16)[None]
    row, out = a.row, torch.zeros(1, 16)
    a.step(out)
    b.step(out, u)
    moved = (b.x.double() - a.x.double()) / plan.base_scales[row]
    torch.testing.assert_close(moved, u.double() * plan.d_weight[row], rtol=1e-4, atol=1e-4 * abs(plan.sigmas[row]))


def test_with_input_refuses():
    plan = edm()
    for name in ("out", "x", "d", "ring0", "bank1", "two words"):
        with pytest.raises(ValueError, match=name.split()[0]):
            plan.with_input(name, 1.0)
    with pytest.raises(ValueError, match="shape"):
        plan.with_input("push", np.ones(3))
    twice = plan.with_input("push", 1.0).with_input("pull", lambda s: -float(s > 1))
    assert twice.inputs[-2:] == ("push", "pull")
    assert fd.Plan.from_json(twice.to_json()) == twice
