"""Each method against its rule written down plainly, in every coordinate system and prediction; and what it costs."""

import math

import pytest
import torch
from guidance import transcribed
from guidance.mixture import Mixture

import fastdiff as fd
from fastdiff import guidance

MIXTURE = Mixture()
SHAPE = (4, *MIXTURE.shape)
TARGET = torch.tensor([0, 1, 2, 1])
SIGMAS = [9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0]

# method -> (preset's arguments, the rule's, recurrences to try)
METHODS = {
    "dps": ({"strength": 6.0}, {"strength": 6.0}, (1,)),
    "lgd": ({"strength": 0.6, "n": 3}, {"strength": 0.6, "n": 3}, (1,)),
    "freedom": ({"strength": 0.08}, {"strength": 0.08}, (1, 3)),
    "mpgd": ({"strength": 0.1}, {"strength": 0.1}, (1,)),
    "ugd": ({"strength": 0.1, "backward_steps": 3}, {"strength": 0.1, "backward_steps": 3}, (1, 2)),
    "tfg": (settings := {"rho": 0.1, "mu": 0.05, "sigma_bar": 0.3, "n_iter": 3, "n_mc": 2}, settings, (1, 4)),
}
# how the plan is made so that x_T has the VP prior, sqrt(1 + sigma^2) in VE coordinates
PLANS = {
    "epsilon": {"schedule": "linear", "prior": "unit"},
    "v": {"schedule": "linear", "prior": "unit"},
    "denoised": {"schedule": "edm", "prior": "unit"},
    "edm": {"schedule": "edm", "prior": "unit"},
    "flow": {"schedule": "flow", "prior": "unit"},
}
CASES = [(name, n) for name, (_, _, recurrences) in METHODS.items() for n in recurrences]


class FlowTime:
    """The mixture's flow model takes sigma; a flow's plan gives t."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        return self.model(x, t.double() / (1 - t.double()))


def made(prediction, eta=0.0, **options):
    time = {} if prediction == "flow" else {"time": "sigma"}
    return fd.plan("ddim", prediction=prediction, sigmas=SIGMAS, eta=eta, **time, **PLANS[prediction], **options)


def model(prediction):
    inner = MIXTURE.model(prediction)
    return FlowTime(inner) if prediction == "flow" else inner


def net(x, sigma):
    """epsilon at x_t, float64."""
    z = x * math.hypot(1, sigma)
    return (z - MIXTURE.denoised(z, sigma)) / sigma


def normal(stream, draw):
    return fd.randn(SHAPE, seeds=5, stream=stream, draw=draw).double()


def classifier(name):
    """DPS divides by |log p|, which an exact classifier brings to 0."""
    return MIXTURE.doubtful if name == "dps" else MIXTURE.log_prob


def transcript(name, eta=0.0, n_recur=1, **settings):
    def log_p(x0):
        return classifier(name)(x0, TARGET)

    rule, settings = getattr(transcribed, name), {**METHODS[name][1], **settings}
    return transcribed.run(rule, net, log_p, SIGMAS, eta, normal, n_recur=n_recur, **settings)


def action(name, n_recur=1, **changed):
    arguments = {**METHODS[name][0], **changed, **({"n_recur": n_recur} if n_recur > 1 else {})}
    return getattr(guidance, name)(classifier(name), TARGET, **arguments)


@pytest.mark.parametrize("prediction", PLANS)
@pytest.mark.parametrize(("name", "n_recur"), CASES)
def test_the_method_is_its_rule(name, n_recur, prediction):
    """In VP, VE and flow coordinates, whatever the model predicts, with and without the sampler's own noise."""
    for eta in (0.0, 1.0):
        expected = transcript(name, eta, n_recur)
        got = fd.sample(model(prediction), made(prediction, eta), SHAPE, 5, steering=[action(name, n_recur)])
        unguided = fd.sample(model(prediction), made(prediction, eta), SHAPE, 5)
        assert (expected - unguided).abs().max() > 0.05  # the guidance is seen
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)


def test_bounds_of_the_estimate_are_those_of_the_rule():
    """clip_denoised bounds the estimate, not what TFG adds to the next state: clip_x0 of its authors' code."""
    clip = (-0.8, 0.7)
    expected = transcript("tfg", clip=clip)
    for prediction in PLANS:
        got = fd.sample(model(prediction), made(prediction, clip_denoised=clip), SHAPE, 5, steering=[action("tfg")])
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)
    assert bool((expected.abs() > 0.8).any())  # the guidance leaves the bounds


# evaluations of a step at the least: network, its gradient, classifier with its gradient
COSTS = {"dps": (1, 1, 1), "lgd": (1, 1, 3), "freedom": (1, 1, 1), "mpgd": (1, 0, 1), "ugd": (1, 1, 3), "tfg": (1, 1, 3 * 2)}


class Counted:
    """Counts calls, and gradients that come back, in samples of the batch."""

    def __init__(self, function, batch):
        self.function, self.batch, self.forward, self.backward = function, batch, 0, 0

    def __call__(self, x, *rest):
        self.forward += len(x) // self.batch
        out = self.function(x, *rest)
        if out.requires_grad:
            out.register_hook(self._back)
        return out

    def _back(self, gradient):
        self.backward += len(gradient) // self.batch


@pytest.mark.parametrize(("name", "n_recur"), CASES)
def test_a_method_costs_what_it_must(name, n_recur):
    steps = len(SIGMAS) - 1
    network, judged = Counted(model("epsilon"), SHAPE[0]), Counted(classifier(name), SHAPE[0])
    guide = action(name, n_recur)
    guide.log_prob = judged
    fd.sample(network, made("epsilon"), SHAPE, 5, steering=[guide])
    forward, backward, classified = (n * steps * n_recur for n in COSTS[name])
    assert (network.forward, network.backward) == (forward, backward)
    assert (judged.forward, judged.backward) == (classified, classified)
    assert guide.counts == {"network_forward": forward, "network_backward": backward, "classifier_forward": classified,
                            "classifier_backward": classified}


def test_outside_of_the_window_nothing_is_differentiated():
    network = Counted(model("epsilon"), SHAPE[0])
    guide = action("tfg", 2, window=(0.5, 2.0))  # three of six levels
    fd.sample(network, made("epsilon"), SHAPE, 5, steering=[guide])
    assert (network.forward, network.backward) == (3 * 2 + 3, 3 * 2)
    assert guide.counts["network_forward"] == 9 and guide.counts["classifier_forward"] == 3 * 2 * 6


@pytest.mark.parametrize("window", [None, (0.4, 4.5)])
@pytest.mark.parametrize("prediction", PLANS)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "euler_ancestral"])
def test_the_exact_classifier_makes_the_conditional_sampler(sampler, prediction, window):
    """D + sigma^2 grad log p(y | x) is E[x0 | x, y]: along the whole path, in samplers of any kind."""
    time = {} if prediction == "flow" else {"time": "sigma"}
    plan = fd.plan(sampler, prediction=prediction, sigmas=SIGMAS, **time, **PLANS[prediction])
    guide = guidance.classifier(MIXTURE.log_prob_noisy, TARGET, scale=1.0, window=window)
    got = fd.sample(model(prediction), plan, SHAPE, 5, steering=[guide])
    low, high = window or (0, math.inf)

    def conditional(x, time):
        at = time.double() / (1 - time.double()) if prediction == "flow" else time
        if not low <= float(at[0]) <= high:
            return model(prediction)(x, time)
        return MIXTURE.conditional_model(prediction)(x, at, TARGET)

    torch.testing.assert_close(got, fd.sample(conditional, plan, SHAPE, 5), rtol=1e-4, atol=1e-4)
    calls = plan.evaluations
    guided = int(plan.window(low, high).sum())
    assert guide.counts == {"network_forward": calls, "network_backward": 0, "classifier_forward": guided,
                            "classifier_backward": guided}


@pytest.mark.parametrize("y", range(3))
def test_classifier_guidance_samples_the_conditional_distribution(y):
    n = 3000
    plan = fd.plan("heun", schedule="edm", prediction="denoised", steps=30)
    guide = guidance.classifier(MIXTURE.log_prob_noisy, y)
    x = fd.sample(MIXTURE.model("denoised"), plan, (n, *MIXTURE.shape), 0, steering=[guide]).double().flatten(1)
    variance = float(MIXTURE.variances[y])
    assert ((x.mean(0) - MIXTURE.means[y]).abs() < 4.5 * math.sqrt(variance / n)).all()
    covariance = torch.cov(x.T)
    wanted = variance * torch.eye(MIXTURE.dims, dtype=torch.float64)
    assert ((covariance - wanted).abs() < 4.5 * variance * math.sqrt(2 / n)).all()


def test_classifier_guidance_in_vp_coordinates():
    """eps -= gamma sqrt(1 - abar) grad_{x_t} log p(y | x_t), step by step."""
    gamma, x = 1.7, normal("init", 0)
    for sigma, after in zip(SIGMAS, SIGMAS[1:]):
        bar, prev = 1 / (1 + sigma**2), 1 / (1 + after**2)
        gradient = transcribed.slope(lambda z, s=sigma: MIXTURE.log_prob_noisy(z * math.hypot(1, s), s, TARGET), x)
        x, _ = transcribed.ddim(x, net(x, sigma) - gamma * math.sqrt(1 - bar) * gradient, bar, prev, 0.0)
    for prediction in PLANS:
        guide = guidance.classifier(MIXTURE.log_prob_noisy, TARGET, scale=gamma)
        got = fd.sample(model(prediction), made(prediction), SHAPE, 5, steering=[guide])
        torch.testing.assert_close(got.double(), x, rtol=2e-4, atol=2e-4)
